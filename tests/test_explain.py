"""`lq explain`, `lq why`, `lq diff` as a newcomer uses them: what the first screen says, exit codes, no traceback."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

import lqcompile
from lqcompile import backend, cache, cli, config, terminal, why
from lqcompile.device import Device
from lqcompile.errors import ArgumentError, Reason
from lqcompile.kernels.build import has_nvrtc
from lqcompile.target import TargetError, explained
from lqcompile.types import Candidate, NearMiss, Piece, Step

from .models import close, mlp
from .newcomers import FAILING, INT4, MODELS
from .test_report import HOSTILE, done, kept

LQ = os.path.join(os.path.dirname(sys.executable), "lq")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    store = cache.Cache(tmp_path / "cache")
    monkeypatch.setattr(cache, "default", lambda: store)
    return store


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


def lq(capsys, *line):
    code = cli.main([str(word) for word in line])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert all(len(row) <= 100 for row in out.splitlines())
    return code, out, err


@pytest.mark.parametrize("name", MODELS)
def test_the_first_screen_says_whether_it_works_and_what_to_do(name, script, capsys):
    text, verdict, step = MODELS[name]
    code, out, _ = lq(capsys, "explain", script(text))
    first = out.splitlines()[:5]
    assert code == cli.Exit.FINE and verdict in first[2]
    assert f"what to do: {step}" in " ".join(" ".join(first).split())
    if "lq why" in step:
        code, out, _ = lq(capsys, "why", *shlex.split(step)[-1:])
        assert code == cli.Exit.FINE and "stopped at" in out and "what to change" in out


def test_a_newcomer_in_a_process_of_their_own(script, tmp_path):
    path, env = (
        script(MODELS["breaks"][0]),
        {**os.environ, "LQ_CACHE_DIR": str(tmp_path / "own"), "HOME": str(tmp_path)},
    )

    def run(*words):
        return subprocess.run([LQ, *words], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300)

    first = run("explain", path)
    assert first.returncode == 0 and "1 of 2 matmuls rewritten" in first.stdout and "graph breaks: 1" in first.stdout
    assert "the weight is ready" not in first.stdout
    second = run("why", "forward#2")
    assert second.returncode == 0 and Reason.GRAPH_BREAK.advice in " ".join(second.stdout.split())
    assert "Traceback" not in first.stderr + second.stderr


@pytest.mark.parametrize("name", FAILING)
def test_a_program_that_fails_is_told_in_a_sentence(name, script, capsys):
    text, words = FAILING[name]
    code, _, err = lq(capsys, "explain", script(text))
    assert code == cli.Exit.USAGE and words in err


@pytest.mark.parametrize(
    ("target", "words"),
    [("no_such_file.py", "that exists"), ("nonsense", "MODULE:FN"), ("no_such:fn", "can be imported"), ("a b:c", "FN")],
)
def test_an_unusable_target_names_what_is_accepted(target, words, capsys):
    code, _, err = lq(capsys, "explain", target)
    assert code == cli.Exit.USAGE and words in err


def test_a_function_of_a_module(script, tmp_path, monkeypatch, capsys):
    text = f"import torch\n{INT4}\ndef made():\n    return Int4(), (torch.randn(3, 128),)\n"
    script(f"{text}\ndef wrong():\n    return 5\n", "newcomers_module.py")
    monkeypatch.chdir(tmp_path)
    assert explained("newcomers_module:made").rewritten == 1
    with pytest.raises(ArgumentError, match="function of newcomers_module"):
        explained("newcomers_module:other")
    with pytest.raises(TargetError, match=r"return \(model, inputs\)"):
        explained("newcomers_module:wrong")


def test_a_plan_that_only_saves_memory_says_so():
    m = sympy.Symbol("m", positive=True)

    def report(ours):
        more = {"candidates": (Candidate("dense", "lut", ours * m),), "dense": Candidate("dense weight", "", 1e-6 * m)}
        return lqcompile.Report({}, (done("a", (Piece(4, None, "dense", 4 * ours),), **more),))

    assert "saves memory, not time, at M=4" in report(2e-6).next_step() and "predicted 0.5x" in report(2e-6).verdict()
    assert report(0.5e-6).next_step() == "nothing: every quantized weight is packed"


@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=300)))
def test_no_name_breaks_a_line_of_why_or_diff(name):
    step = Step(name, name, (), "matmul", "stopped", name, name)
    near = (NearMiss(name, Reason.GROUPS, name),)
    first = dataclasses.replace(kept(name, Reason.GROUPS, near, file=name), before=(step,), advice=name)
    document = lqcompile.Report({}, (first, done(name, before=(step,)))).document()
    lines = [line for d in document["decisions"] for _, line in why.why(document, d["id"])]
    lines += [line for _, line in why.diff(document, {**document, "decisions": []})]
    assert len(lines) > 8 and all(len(line) <= 100 and (line.isprintable()) for line in lines)


def test_what_was_planned_before_a_failure_is_shown(script, capsys):
    text = MODELS["plain"][0] + "\nraise KeyError('later')\n"
    code, out, err = lq(capsys, "explain", script(text))
    assert code == cli.Exit.USAGE and "nothing is quantized" in out and "KeyError" in err


def test_exit_codes(script, tmp_path, monkeypatch, capsys):
    half, ours = script(MODELS["half"][0], "half.py"), script(MODELS["ours"][0], "ours.py")
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    page = tmp_path / "out.html"
    code, out, _ = lq(capsys, "explain", half, "--min-rewritten", "50", "--json", old, "--html", page)
    assert code == cli.Exit.FINE and "out.html" in out and "1 of 2 matmuls rewritten" in page.read_text()
    code, _, err = lq(capsys, "explain", half, "--min-rewritten", "51")
    assert code == cli.Exit.FEW_REWRITTEN and "50 % rewritten" in err
    assert lq(capsys, "explain", ours, "--min-rewritten", "100", "--json", new)[0] == cli.Exit.FINE
    code, out, _ = lq(capsys, "diff", old, new)
    assert code == cli.Exit.DIFFERENT and "- kept: not_quantized" in out and "+ rewritten: int4 g64" in out
    code, out, _ = lq(capsys, "diff", old, old)
    assert code == cli.Exit.FINE and "every decision is the same" in out
    monkeypatch.setattr("lqcompile.inspection.explained", lambda *_: refuted())
    assert lq(capsys, "explain", half)[0] == cli.Exit.PROOF_FAILED


def refuted():
    return lqcompile.Report({"name": "cpu"}, (done("a"), kept("b", Reason.PROOF_FAILED)))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("why nothing", "nothing was explained yet"),
        ("why a no.json", "no.json"),
        ("diff no.json no.json", "no.json"),
        ("explain x.py --arch sm_10", "sm_90"),
    ],
)
def test_what_is_missing_is_said(line, words, capsys):
    code, _, err = lq(capsys, *line.split())
    assert code == cli.Exit.USAGE and words in err


def test_other_files_are_no_reports(tmp_path, capsys):
    for text in ("", "[]", '{"schema": 2, "decisions": []}', '{"schema": 1, "decisions": [{}]}', "\udcff"):
        path = tmp_path / "x.json"
        path.write_bytes(text.encode(errors="surrogateescape"))
        code, _, err = lq(capsys, "diff", path, path)
        assert code == cli.Exit.USAGE and "lq explain --json" in err


def test_why_finds_a_layer_by_a_part_of_its_name_and_offers_near_ones():
    report = lqcompile.Report({}, (done("layers.0.up"), done("layers.0.down"), kept("head", Reason.GROUPS)))
    document = report.document()
    assert why.find(document, "ead")["id"] == "head"
    with pytest.raises(ArgumentError, match=r"layers\.0\.up"):
        why.find(document, "layers.1.up")
    with pytest.raises(ArgumentError, match=r"layers\.0\.down \| layers\.0\.up"):
        why.find(document, "layers")


def test_a_gpu_that_is_not_here_is_planned_for(script, capsys):
    half = INT4.replace("self.codes.float()", "self.codes.half()")
    path = script(f"import torch\n{half}\nmodel, x = Int4(512, 512).half(), torch.randn(1, 512).half()\n")
    code, out, _ = lq(capsys, "explain", path, "--no-gpu", "--arch", "sm_90")
    assert code == cli.Exit.FINE and "(planned for, not here)" in out and "1 of 1 matmuls rewritten" in out
    report = explained(path, Device.null("sm_90"))
    assert report.device["real"] is False and report.device["kind"] == "cuda"
    (decision,) = report.decisions
    assert {c.kernel for c in decision.candidates} >= {"dense"} and decision.bytes_after < decision.bytes_before / 3
    assert Device.null("sm_90").bandwidth > 1e12
    # Nothing of the plan is left to a later compile.
    assert explained(path).device["kind"] == "cpu"


def test_explain_option_and_environment_print_the_same_on_a_cache_hit(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = mlp(), torch.randn(5, 128)

    def said(**options):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend="lq", options=options)(x)
        return [line for line in capsys.readouterr().err.splitlines() if "passes" not in line]

    assert not [line for line in said() if "matmuls" in line]
    miss, hit = said(explain=True), said(explain=True)
    assert miss == hit and any("2 of 2 matmuls rewritten" in line for line in miss)
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] >= 1
    monkeypatch.setenv("LQ_EXPLAIN", "1")
    assert said() == miss
    assert config.make(None, {"explain": True}).fingerprint == config.make(None, {}).fingerprint
    with pytest.raises(ArgumentError, match="explain"):
        config.make(None, {"explain": "yes"})


def test_a_report_that_fails_does_not_fail_the_compile(monkeypatch, capsys):
    monkeypatch.setattr(backend, "described", lambda _: 1 / 0)
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        assert close(torch.compile(model, backend="lq", options={"explain": True})(x), model(x))
    err = capsys.readouterr().err
    assert "2 of 2 matmuls rewritten" in err and "ZeroDivisionError" in err


def test_the_same_words_with_rich_and_without(monkeypatch, capsys):
    lines = [("bold green", "  2 of 2 [bold]matmuls[/bold] :smile:"), ("", ""), ("red", "x" * 100)]
    terminal.show(lines)
    plain = capsys.readouterr().out
    assert plain == "".join(f"{line}\n" for _, line in lines)
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=60, force_terminal=False)
    monkeypatch.setattr(terminal, "_console", lambda: console)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    terminal.show(lines)
    assert capsys.readouterr().out == plain


def test_progress_is_said_only_of_what_takes_long(monkeypatch, capsys):
    with terminal.progress("planning"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    told = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: told.append(words))
    with terminal.progress("planning"):
        while not told:
            torch.zeros(1)
    assert "planning" in told[0][0]


@pytest.mark.parametrize("command", ["explain", "why", "diff", "doctor", "kernels", "cache", "bench", "demo"])
def test_every_command_helps_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and f"example: lq {command}" in " ".join(out.split())


def test_json_names_structures_and_curves_by_place():
    report = lqcompile.explain(mlp(), torch.randn(5, 128))
    out = json.loads(report.json())
    for d in out["decisions"]:
        steps = out["structures"][d["structure"]]["before"]
        assert [s for s in steps if s["role"] == "matmul"] and d["predicted"]["speedup"] > 0
        curve = out["curves"][d["curve"]]
        assert {line["name"] for line in curve["lines"]} >= {"dense", "dense weight"}
        assert all(len(line["seconds"]) == len(curve["m"]) for line in curve["lines"])


def readme():
    return (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_readme_shows_what_lq_explain_prints(script, capsys):
    pattern = r"```python\n((?:(?!```).)*?\ninputs = .*?)```.*?```text\n(.*?)```"
    text, shown = re.search(pattern, readme(), re.DOTALL).groups()
    code, out, _ = lq(capsys, "explain", script(text), "--arch", "sm_90")
    assert code == cli.Exit.FINE
    # Without the head, which names versions, and the times of the passes.
    said = [line for line in out.splitlines()[2:] if not line.startswith("  passes")]
    assert "\n".join(said).rstrip() == shown.rstrip(), "paste it again: a kernel or its cost has changed"


@pytest.mark.skipif(not has_nvrtc(), reason="without NVRTC kernels for GPUs accept nothing")
def test_the_readme_has_the_table_of_lq_kernels(capsys):
    table = re.search(r"<!-- lq kernels --markdown -->\n\n(.*?)\n\n", readme(), re.DOTALL)[1]
    # Not for a terminal: its rows may be longer than 100.
    assert cli.main(["kernels", "--markdown"]) == cli.Exit.FINE
    assert capsys.readouterr().out.strip() == table, "generate it again: lq kernels --markdown"
