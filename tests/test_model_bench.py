"""`lq bench --model`: right ways timed, wrong ones named, options refused in words, tables and pictures."""

import contextlib
import dataclasses
import json
import math
import re
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lqcompile import cli, decoder, generate_bench, model_bench, model_results, step, timing, ways
from lqcompile.errors import ArgumentError
from lqcompile.model_results import Row

TINY = ("--model", "tiny", "--layers", "1", "--context", "48", "--repeats", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Light is of small reads, and Inductor's own cache is used: these tests do not judge what is measured."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 12)
    for module in (ways, generate_bench):
        monkeypatch.setattr(module, "fresh_cache", contextlib.nullcontext)


@pytest.fixture
def uncompiled(monkeypatch):
    """Ways run eagerly: what is tested has nothing to do with compiling."""
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs `lq bench`; returns its exit code, its document and what it printed."""

    def run(*options):
        path = tmp_path / "out.json"
        code = cli.main(["bench", "--json", str(path), *options])
        return code, json.loads(path.read_text()) if path.exists() else None, capsys.readouterr().out

    return run


def test_lq_beside_int4pack_from_the_command_line(run, tmp_path):
    trace, svg = tmp_path / "trace.json", tmp_path / "out.svg"
    extra = ("--compare", "int4pack", "--steps", "100", "--trace", str(trace), "--svg", str(svg))
    code, found, out = run(*TINY, *extra)
    rows = {row.way: row for row in model_results.rows_of(found)}
    assert code == cli.Exit.FINE and list(rows) == ["lq", "int4pack"]
    for row in rows.values():
        assert row.verdict == "ok" and row.note == "" and (row.phase, row.batch, row.tokens) == ("decode", 1, 1)
        assert 0 < row.least <= row.seconds <= row.most and row.samples == 2 and row.compile_seconds > 0
        assert 0 < row.error <= row.allowed < 0.05 and row.checked == 4 and row.share > 0
    assert (rows["lq"].rewritten, rows["lq"].quantized) == (7, 7)
    assert 0 < rows["lq"].pass_seconds < rows["lq"].compile_seconds and rows["int4pack"].pass_seconds is None
    # The head and the norms are bfloat16; codes of 4 bits have a scale and a zero for 128 of them.
    assert rows["lq"].weight_bytes < 2 * 512 * 256 + 0.6 * 589824 + 2000
    endurance = found["endurance"]
    assert (endurance["steps"], endurance["compiled"], endurance["recorded"]) == (100, 0, 0)
    assert found["trace"]["seconds"] > 0 and json.loads(trace.read_text())["traceEvents"]
    assert {"generated code", "dense matmuls", "attention"} <= set(found["trace"]["groups"]) and "not that" in out
    assert (found["layers"], found["of_layers"], found["model"]) == (1, 2, "tiny") and "1 of 2, shortened" in out
    assert len(ElementTree.parse(svg).getroot().findall(".//{*}polyline")) == 2
    assert "lq is" in out and "int4pack" in model_results.table(found).splitlines()[0]


def test_converted_layers_and_other_weights_in_the_same_run(run):
    code, found, out = run(*TINY, "--compare", "converted,bcq3")
    rows = {row.way: row for row in model_results.rows_of(found)}
    assert code == cli.Exit.FINE and all(row.verdict == "ok" and row.note == "" for row in rows.values()), rows
    # Planes of three bits and float scales in place of four bits, scales and zeros.
    assert rows["bcq3"].weight_bytes < rows["lq"].weight_bytes <= rows["converted"].weight_bytes
    # Beside the packed weights, what each layer's state says of them.
    assert rows["converted"].weight_bytes < rows["lq"].weight_bytes + 7 * 256
    assert all((row.rewritten, row.quantized) == (7, 7) for row in rows.values()) and "x bcq3" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_replays_graphs_and_says_what_memory_it_takes(run, tmp_path):
    trace = tmp_path / "trace.json"
    code, found, _ = run(*TINY, "--device", "cuda", "--prefill", "16", "--steps", "300", "--trace", str(trace))
    rows = model_results.rows_of(found)
    assert code == cli.Exit.FINE and len(rows) == 8 and all(row.verdict == "ok" for row in rows), rows
    for row in rows:
        assert "CUDA graphs" not in row.note and row.memory_bytes > row.weight_bytes and row.seconds > 0
    endurance, groups = found["endurance"], found["trace"]["groups"]
    assert (endurance["compiled"], endurance["recorded"], endurance["bytes"]) == (0, 0, 0)
    assert "gaps" in groups and "generated code" not in groups and sum(g["launches"] for g in groups.values()) > 10


def test_every_way_at_every_point(run, uncompiled):
    code, found, out = run(*TINY, "--batch", "1,3", "--prefill", "16")
    rows = model_results.rows_of(found)
    assert code == cli.Exit.FINE and len(rows) == 12 and found["interleaved"]
    assert [row.way for row in rows[:4]] == ["lq", "inductor", "dense", "int4pack"]
    points = dict.fromkeys((row.phase, row.batch, row.tokens) for row in rows)
    assert list(points) == [("decode", 1, 1), ("decode", 3, 1), ("prefill", 1, 16)]
    assert all(row.verdict == "ok" and row.throughput > 0 for row in rows)
    assert {row.checked for row in rows} == {4, 12}
    # Uncompiled, the quantized model is the one that it is compared with.
    assert all(row.same == row.checked for row in rows if row.way in ("lq", "inductor"))
    assert "prompt of 16: lq is" in out


def test_ways_that_do_not_fit_together_run_one_after_the_other(run, uncompiled, monkeypatch):
    monkeypatch.setattr(model_bench._Session, "fits", lambda self, cached: False)
    code, found, out = run(*TINY, "--compare", "dense")
    assert code == cli.Exit.FINE and not found["interleaved"] and "one way after the other" in out
    assert [row.verdict for row in model_results.rows_of(found)] == ["ok", "ok"]


def late():
    """Wrong after the calls that are checked before timing and the two that say how many make a sample."""
    count = iter(range(1_000_000))
    return lambda tokens, logits: (tokens, logits + 3 * (next(count) >= 6))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda tokens, logits: (tokens, logits * 1.1), "the logits are off"),
        (lambda tokens, logits: (tokens, torch.full_like(logits, math.nan)), "the logits are off by inf"),
        (lambda tokens, logits: (logits.argmin(-1, keepdim=True), logits), "another token"),
        (late(), "wrong after many calls"),
    ],
)
def test_a_wrong_way_is_named_and_not_timed(run, uncompiled, monkeypatch, fault, says):
    call = ways.Runner.__call__

    def faulty(self, tokens, position):
        found = call(self, tokens, position)
        return fault(*found) if self.name == "inductor" else found

    monkeypatch.setattr(ways.Runner, "__call__", faulty)
    code, found, out = run(*TINY, "--compare", "inductor,dense")
    rows = {row.way: row for row in model_results.rows_of(found)}
    assert code == cli.Exit.PROOF_FAILED and says in rows["inductor"].note and "WRONG: inductor" in out
    assert rows["inductor"].verdict == "WRONG" and rows["inductor"].seconds is None
    assert rows["lq"].seconds and rows["dense"].seconds


def test_one_wrong_layer_of_the_model_is_enough(run, uncompiled, monkeypatch):
    dense = ways.WAYS["dense"].layer
    count = iter(range(100))

    def faulty(layer):
        made = dense(layer)
        # The third of seven: the values, with two rows exchanged.
        if next(count) == 2:
            made.weight.data[[0, 1]] = made.weight.data[[1, 0]]
        return made

    monkeypatch.setattr(ways, "WAYS", {**ways.WAYS, "dense": ways.Way("inductor", faulty)})
    code, found, _ = run(*TINY, "--compare", "dense")
    assert code == cli.Exit.PROOF_FAILED
    assert [row.verdict for row in model_results.rows_of(found)] == ["ok", "WRONG"]


def test_a_way_that_cannot_run_says_so_and_costs_no_other(run, uncompiled):
    code, found, out = run(*TINY, "--bits", "3", "--compare", "int4pack,dense")
    rows = {row.way: row for row in model_results.rows_of(found)}
    assert code == cli.Exit.FINE and rows["int4pack"].verdict == "FAILED" and "4 bits" in rows["int4pack"].note
    assert rows["lq"].verdict == rows["dense"].verdict == "ok" and "FAILED" in out


def test_a_failure_of_lq_is_not_overlooked(run, monkeypatch):
    def broken(model, **how):
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setattr(model_bench, "warm_up", lambda device: None)
    monkeypatch.setattr(torch, "compile", broken)
    code, found, _ = run(*TINY, "--compare", "dense")
    assert code == cli.Exit.PROOF_FAILED
    assert {row.note for row in model_results.rows_of(found)} == {"RuntimeError: no such luck"}


def test_the_time_limit_leaves_the_rest_out(run, uncompiled):
    code, found, out = run(*TINY, "--time-limit", "1e-9")
    assert code == cli.Exit.FINE and "time limit" in out
    assert {(row.verdict, row.note) for row in model_results.rows_of(found)} == {("skipped", "time limit")}


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--model", "mixtral-8x22b", "llama3-8b | llama3-70b"),
        ("--bits", "four", "at least 1"),
        ("--group", "0", "at least 1"),
        ("--method", "gptq", "rtn | nf4 | bcq"),
        ("--batch", "1,0", "1,8,32"),
        ("--prefill", "1", "at least 2"),
        ("--compare", "dense,lq", "inductor | dense | int4pack"),
        ("--layers", "-1", "at least 1"),
        ("--context", "3", "at least 8"),
        ("--steps", "0", "at least 1"),
        ("--trace", "/no/such/file", "cannot be written"),
        ("--svg", "/no/such/file", "cannot be written"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(option, value, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "--model=tiny", f"{option}={value}"])
    err = capsys.readouterr().err
    assert stopped.value.code == cli.Exit.USAGE
    assert option in err and value.split(",")[-1] in err and says in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "tiny", "--layers", "3"), "--layers is 3; accepted: at most 2 for tiny"),
        (("--model", "tiny", "--bits", "9"), "bits is 9"),
        (("--model", "tiny", "--layers", "1", "--extrapolate"), "--layers is 1"),
        (("--model", "tiny", "--group", "96"), "group is 96"),
        (("--model", "tiny", "--m", "8"), "it is for matmuls"),
        (("--batch", "8"), "it is for model | moe | transformers"),
        (("--steps", "8"), "it is for model"),
        (("--transformers", "tiny", "--trace", "x.json"), "it is for model"),
        (("--transformers", "tiny", "--model", "tiny"), "one of --model and --transformers"),
        (("--transformers", "nonsense"), "llama3-8b"),
        (("--transformers", "tiny", "--context", "16"), "--context is 16; accepted: more than 16"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--device", "cpu", *options]) == cli.Exit.USAGE
    assert says in capsys.readouterr().err


def test_nothing_is_extrapolated_unless_asked_for_and_then_it_is_marked(run, uncompiled, monkeypatch):
    shape = dataclasses.replace(decoder.SHAPES["tiny"], layers=6)
    monkeypatch.setattr(decoder, "SHAPES", {"tiny": shape})
    some = ("--model", "tiny", "--layers", "3", "--context", "16", "--repeats", "1", "--device", "cpu")
    some += ("--compare", "dense")
    code, found, out = run(*some)
    assert code == cli.Exit.FINE and "extrapolated" not in found and "EXTRAPOLATED" not in out
    code, found, out = run(*some, "--extrapolate")
    assert code == cli.Exit.FINE and out.count("EXTRAPOLATED from 1 and 3 layers to 6") == 2
    timed = {row.way: row.seconds for row in model_results.rows_of(found)}
    one = {row["way"]: row["seconds"] for row in found["rows_of_one_layer"]}
    assert found["layers"] == 3 and {e["way"] for e in found["extrapolated"]} == {"lq", "dense"}
    for e in found["extrapolated"]:
        low, high = one[e["way"]], timed[e["way"]]
        assert e["seconds"] == pytest.approx(low + 5 * (high - low) / 2)


def test_endurance_sees_what_steps_leave_behind():
    class Leaking:
        name = "lq"

        def decode(self, tokens, start, steps):
            counters["stats"]["unique_graphs"] += 1

    found = step.endure(Leaking(), torch.zeros(2, 1), 250, 100)
    assert (found.batch, found.steps, found.compiled, found.recorded) == (2, 250, 3, 0)
    style, text = found.line()
    assert "yellow" in style and "3 recompiles" in text


def test_recorded_graphs_are_counted_through_the_trees(monkeypatch):
    from torch._inductor import cudagraph_trees

    def node(*children):
        return types.SimpleNamespace(children={0: list(children)})

    roots = {0: [node(node(), node(node()))], 1: [node()]}
    for manager, count in ((types.SimpleNamespace(roots=roots), 5), (None, 0)):
        monkeypatch.setattr(cudagraph_trees, "get_manager", lambda *_, manager=manager, **__: manager)
        assert ways.recordings(torch.device("cuda", 0)) == count
    assert ways.recordings(torch.device("cpu")) == 0


def test_a_trace_is_split_without_rest_or_overlap():
    def event(name, start, length):
        return {"name": name, "ts": start, "dur": length}

    # The second begins before the first ends, as a programmatic dependent launch does; then a gap of 2.
    events = [
        event("quick_gemm", 10.0, 8.0),
        event("triton_red_fused_softmax", 16.0, 4.0),
        event("Memcpy DtoD", 22.0, 1.0),
    ]
    found = step._split(events, None)
    groups = {name: group["seconds"] * 1e6 for name, group in found["groups"].items()}
    expected = {"packed matmuls": 8.0, "attention": 2.0, "copies": 1.0, "gaps": 2.0}
    assert groups == pytest.approx(expected) and found["seconds"] * 1e6 == pytest.approx(13.0)
    assert found["groups"]["attention"]["launches"] == 1 and found["longest"][0]["name"] == "quick_gemm"
    (_, head), (_, light), *_ = step.told(found, 5e-6)
    assert "13.0 us" in head and "5.0 us" in light and "8.0 us" in light


def row(**changed):
    values = {"way": "lq", "phase": "decode", "batch": 1, "tokens": 1, "verdict": "ok", "seconds": 0.002}
    return Row(**{**values, "least": 0.0019, "most": 0.0021, "samples": 5, "light": 0.001, **changed})


def document(*rows):
    rows = [dataclasses.asdict(row) for row in rows]
    return {"kind": "model", "schema": model_results.SCHEMA, "model": "<b>&tiny", "rows": rows}


def test_results_survive_json_and_other_schemas_are_refused():
    rows = [row(), row(way="dense", seconds=None, verdict="WRONG")]
    assert model_results.rows_of(json.loads(json.dumps(document(*rows)))) == rows
    for broken in ({"schema": 1, "rows": []}, {**document(), "rows": [{"way": "lq"}]}, document(row(phase="sleep"))):
        with pytest.raises(ArgumentError):
            model_results.rows_of(broken)


def test_the_table_and_the_picture_show_every_way():
    found = document(
        row(),
        row(way="dense", seconds=0.005),
        row(batch=8, seconds=0.003),
        row(way="dense", batch=8, verdict="FAILED", seconds=None),
        row(way="<i>", batch=8, seconds=0.003),
        row(phase="prefill", tokens=2048, seconds=0.1),
    )
    assert model_results.table(found).splitlines() == [
        "| tokens/s | lq | dense | <i> |",
        "|---|---|---|---|",
        "| decode, batch 1 | 500 | 200 (2.50x) | - |",
        "| decode, batch 8 | 2,667 | - | 2,667 (1.00x) |",
        "| prompt of 2048 | 20,480 | - | - |",
    ]
    assert row().share == 0.5 and [text for _, text in model_results.summary(model_results.rows_of(found))] == [
        "decode, batch 1: lq is 2.50x dense",
        "decode, batch 8: lq is 1.00x <i>",
    ]
    drawn = ElementTree.fromstring(model_results.picture(found))
    assert "<b>&tiny" in drawn.find("{*}title").text
    lines = {group.get("class"): group for group in drawn.iter("{http://www.w3.org/2000/svg}g")}
    assert set(lines) == {"way lq", "way dense", "way <i>"}
    # Twice as many circles as tokens in a line that goes up; ends that coincide have names below each other.
    (one, two) = ([float(c.get("cy")) for c in lines[f"way {w}"].findall("{*}circle")] for w in ("lq", "<i>"))
    labels = sorted(float(text.get("y")) for text in (lines["way lq"][-1], lines["way <i>"][-1]))
    assert one[0] > one[1] == two[0] and labels[1] - labels[0] == pytest.approx(16)
    assert ElementTree.fromstring(model_results.picture(document())) is not None


def test_configurations_of_transformers_come_by_name_or_from_a_file(tmp_path):
    for name in generate_bench.KINDS:
        config, shape = generate_bench.config_of(name, None), decoder.SHAPES[name]
        sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size)
        assert sizes == (shape.layers, shape.hidden, shape.intermediate, shape.vocabulary)
    config.save_pretrained(tmp_path)
    for given in (tmp_path, tmp_path / "config.json"):
        assert generate_bench.config_of(str(given), 1).num_hidden_layers == 1


def test_a_way_of_transformers_that_cannot_run_says_so(run, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(generate_bench, "_judged", broken)
    tiny = ("--transformers", "tiny", "--layers", "1", "--context", "17", "--device", "cpu")
    monkeypatch.setattr(generate_bench, "WAYS", ("lq",))
    assert "nothing to compare" in run(*tiny)[1]["rows"][0]["note"]
    monkeypatch.setattr(generate_bench, "WAYS", ("eager",))
    code, found, _ = run(*tiny)
    assert (code, found["rows"][0]["note"]) == (cli.Exit.FINE, "RuntimeError: no such luck")


def test_generate_of_transformers(run, monkeypatch):
    monkeypatch.setattr(generate_bench, "WAYS", ("eager", "lq"))
    tiny = ("--transformers", "tiny", "--layers", "1", "--context", "20", "--repeats", "1", "--device", "cpu")
    code, found, out = run(*tiny)
    rows = {row.way: row for row in model_results.rows_of(found)}
    assert code == cli.Exit.FINE and rows["lq"].verdict == rows["eager"].verdict == "ok", rows
    assert (rows["lq"].rewritten, rows["lq"].quantized, rows["lq"].note) == (7, 7, "")
    assert rows["lq"].tokens == 4 and rows["lq"].throughput > 0 and 0 < rows["lq"].error <= rows["lq"].allowed
    assert "generate, batch 1: lq is" in out


def test_the_readme_s_tables_of_models_are_those_of_the_committed_results():
    root = Path(__file__).parents[1]
    shown = re.findall(r"<!-- lq bench --model: (\S+) -->\n+(\|.*?)\n\n", (root / "README.md").read_text(), re.DOTALL)
    assert len(shown) == 2
    for name, text in shown:
        assert text == model_results.table(json.loads((root / ".readme" / name).read_text())), name
