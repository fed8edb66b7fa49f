"""`lq bench`: complete rows, wrong kernels found, options refused in words, tables. What it measures is not judged."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import sympy
import torch

from lqcompile import bench, cli, neighbours, request, results, timing, trial
from lqcompile import device as machine
from lqcompile.errors import ArgumentError, Refused
from lqcompile.formats import bound, code_range, dequantize, random_weight, validate
from lqcompile.kernels import build, registry
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.types import Format, Problem, Rounding

ROOT = Path(__file__).resolve().parent.parent
SPECS = (
    "affine:4:32:none:float16",
    "affine:4:32:int:float16",
    "affine:8:32:float:float32",
    "table:4:32:none:float16",
    "binary:3:32:float:bfloat16",
    "binary:2:32:none:float16",
)
TINY = ("--shapes", "64x64", "--m", "1,3", "--repeats", "2")


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Copies that exceed a real cache would fill the memory of a small machine."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 12)


@pytest.fixture
def run(device, tmp_path, capsys):
    """Runs `lq bench` on the device of the test; returns its exit code, its document and what it printed."""

    def run(*options):
        path = tmp_path / "out.json"
        code = cli.main(["bench", *TINY, "--device", str(device), "--json", str(path), *options])
        document = json.loads(path.read_text()) if path.exists() else None
        return code, document, capsys.readouterr().out

    return run


def problem(spec="affine:4:32:int:float16", n=64, k=128, dtype=torch.bfloat16, device="cpu"):
    return Problem(sympy.Integer(1), (1, 1), n, k, Format.parse(spec), dtype, torch.device(device))


def row(**changed):
    values = {"n": 64, "k": 64, "m": 1, "format": "binary:3:32:float:float16", "x_dtype": "float16", "bias": False}
    values |= {"kind": "ours", "kernel": "lut", "layout": "lut", "bytes": 2048, "copies": 9, "verdict": "ok"}
    values |= {"median": 1e-5, "least": 9e-6, "most": 1.2e-5, "samples": 15, "light": 8e-6, "dense": 3e-5}
    return results.Row(**{**values, **changed})


def document(*rows):
    return {"schema": results.SCHEMA, "rows": [dataclasses.asdict(row) for row in rows]}


def test_every_kernel_is_checked_and_timed_beside_its_baselines(run, device):
    code, found, out = run("--formats", "affine:4:32:int,binary:3:32:float")
    assert code == cli.Exit.FINE and found["skipped"] == []
    rows = results.rows_of(found)
    assert found["device"]["type"] == device.type and found["command"].startswith("lq bench --shapes 64x64")
    for spec, m in ((s, m) for s in ("affine:4:32:int", "binary:3:32:float") for m in (1, 3)):
        these = [r for r in rows if (results.short(r.format), r.m) == (spec, m)]
        assert {r.kind for r in these} >= {"ours", "dense", "light"}
        ours = {(r.kernel, r.layout) for r in these if r.kind == "ours"}
        call = registry.Call("", Format.parse(these[0].format), 64, 64)
        dtype = getattr(torch, these[0].x_dtype)
        assert ours == {
            (kernel.name, layout)
            for kernel in registry.discover().values()
            for layout in kernel.layouts
            if call.format.form in LAYOUTS[layout].forms and device.type in kernel.devices
            if kernel.accepts(dataclasses.replace(call, layout=layout), dtype, device.type) is None
        }
    for r in rows:
        assert r.verdict in results.TIMED, r
        assert r.samples == 2 and 0 < r.least <= r.median <= r.most and r.bytes > 0
        assert r.copies * r.bytes > found["rotation_bytes"]
        if r.kind == "ours":
            assert 0 <= r.error <= 1 and r.share > 0 and r.speedup > 0
    assert sum(line.startswith("64x64") for line in out.splitlines()) == len(rows)
    assert out.splitlines()[-1].startswith("4 problems timed, 0 skipped") and "0 WRONG" in out.splitlines()[-1]
    assert max(map(len, out.splitlines()[4:])) <= 140


def test_with_a_bias_in_half_precision(run):
    code, found, _ = run("--bias", "--dtype", "float16,bfloat16", "--formats", "affine:4:32:none")
    assert code == cli.Exit.FINE
    rows = results.rows_of(found)
    assert {r.x_dtype for r in rows} == {"float16", "bfloat16"} and all(r.bias for r in rows)


def fake(change, **declared):
    """The dense kernel under another name, its result changed by `change(out)`."""
    honest = registry.discover()["dense"]

    def run(x, parts, bias, call, out):
        honest.run(x, parts, bias, call, out)
        change(out)

    return dataclasses.replace(honest, name="fake", run=run, **declared)


def drift():
    """One unit in the last place of float16, every second launch."""
    count = iter(range(1_000_000))
    return lambda out: out[0, 0].mul_(1 + 2.0**-10 * (next(count) % 2))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda out: out[-1, -1].add_(1.0), "times the bound"),
        (lambda out: out[0, 0].fill_(math.nan), "not every element is finite"),
        (drift(), "a second launch differs"),
    ],
)
def test_a_wrong_kernel_is_named_not_timed_and_fails(run, monkeypatch, change, why):
    monkeypatch.setitem(registry.discover(), "fake", fake(change))
    code, found, out = run("--formats", "affine:8:32:int", "--m", "3", "--dtype", "float16", "--kernels", "fake,dense")
    wrong = [r for r in results.rows_of(found) if r.kernel == "fake"]
    assert code == cli.Exit.PROOF_FAILED and len(wrong) == 2
    for r in wrong:
        assert r.verdict == "WRONG" and why in r.note and r.median is None and r.samples == 0
    assert "WRONG" in out and all(r.verdict == "ok" for r in results.rows_of(found) if r.kernel == "dense")


def test_a_kernel_that_goes_wrong_under_repetition_is_found(run, monkeypatch):
    count = iter(range(1_000_000))
    later = fake(lambda out: out.add_(1.0) if next(count) > 5 else None)
    monkeypatch.setitem(registry.discover(), "fake", later)
    code, found, _ = run("--formats", "affine:4:32:none", "--m", "1", "--kernels", "fake")
    assert code == cli.Exit.PROOF_FAILED
    assert "again and again" in " ".join(r.note for r in results.rows_of(found) if r.kernel == "fake")


def test_a_kernel_that_raises_does_not_stop_the_others(run, monkeypatch):
    def broken(out):
        raise RuntimeError("no such luck\nsecond line")

    monkeypatch.setitem(registry.discover(), "fake", fake(broken))
    code, found, _ = run("--formats", "affine:4:32:none", "--m", "1", "--kernels", "fake,dense")
    rows = results.rows_of(found)
    assert code == cli.Exit.PROOF_FAILED
    assert {r.note for r in rows if r.kernel == "fake"} == {"RuntimeError: no such luck"}
    assert all(r.verdict == "ok" for r in rows if r.kernel == "dense")


def test_what_is_skipped_is_said(run):
    code, found, out = run("--formats", "affine:4:48:int")
    assert code == cli.Exit.FINE and found["rows"] == [] and "group 48 does not divide k=64" in out
    code, found, out = run("--formats", "affine:4:32:int", "--m", "1,2,3", "--time-limit", "1e-9")
    assert code == cli.Exit.FINE and found["rows"] == [] and "the last 3 of 3 problems skipped" in out
    assert [s["why"] for s in found["skipped"]] == ["time limit"] * 3 and [s["m"] for s in found["skipped"]] == list(
        "123"
    )


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--shapes", "4096", "NxK"),
        ("--shapes", "0x64", "llama3-8b"),
        ("--m", "0", "at least 1"),
        ("--m", "1;2", "at least 1"),
        ("--formats", "affine:4:32", "form:bits:group:zero"),
        ("--formats", "affine:9:32:int", "an int from 1 to 8"),
        ("--formats", "table:4:32:int", "none, for a table"),
        ("--kernels", "nonsense", "dense"),
        ("--dtype", "float64", "bfloat16"),
        ("--device", "tpu", "cpu"),
        ("--repeats", "0", "at least 1"),
        ("--time-limit", "-1", "above 0"),
        ("--time-limit", "soon", "above 0"),
        ("--json", "/no/such/file", "cannot be written"),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(option, value, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", f"{option}={value}"])
    err = capsys.readouterr().err
    assert stopped.value.code == cli.Exit.USAGE
    assert option in err and value.split(";")[0] in err and says in err


def test_float32_is_for_the_cpu():
    gpu = request.Options(torch.device("cuda", 0), dtypes=(torch.float32,))
    with pytest.raises(ArgumentError, match="float16"):
        gpu.problems()
    assert {p.x_dtype for p in request.Options(torch.device("cpu")).problems()} == {torch.float32}
    assert {p.format.scale_dtype for p in request.Options(torch.device("cuda", 0)).problems()} == {"float16"}


def test_readers_of_options():
    assert request.shapes("64x32,8x8") == ((64, 32), (8, 8))
    assert len(request.shapes("standard")) == 6 and (128256, 4096) in request.shapes("llama3-8b")
    assert request.formats(request.FORMATS) and request.kernels("dense") == ("dense",)
    assert request.dtypes("float16,bfloat16") == (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("rotation", [0, 1, 4095, 4096, 240 << 20])
@pytest.mark.parametrize("size", [1, 4096, 2_097_152, 302 << 20])
def test_copies_exceed_the_rotation_and_no_copy_is_spare(size, rotation):
    count = timing.copies(size, rotation)
    assert count == timing.MOST_COPIES or (count * size > rotation >= (count - 1) * size)


@pytest.mark.parametrize("count", [1, 7, 29, 115])
@pytest.mark.parametrize("seconds", [0.0, 1e-6, 1e-4, 1e-3, 0.1])
def test_a_graph_holds_enough_launches_of_each_copy(count, seconds):
    found = timing.launches(count, seconds)
    assert found % count == 0 and found * max(seconds, 1e-7) >= 2e-3 * (1 - 1e-9)
    assert found >= 40 or seconds >= 1e-3


def test_the_timer_rotates_over_every_copy(device):
    timer = timing.timer(device)
    assert timer.rotation == timing.CACHES * timing.cache_bytes(device)
    buffers = [torch.zeros(16, device=device) for _ in range(5)]
    (samples,) = timing.interleaved([timer.sampler([lambda b=b: b.add_(1) for b in buffers])], 3)
    assert samples.count == 3 and 0 < samples.least <= samples.median <= samples.most
    assert all(float(b[0]) > 0 for b in buffers)


def test_light_compiles():
    try:
        images = {build.cubin("light.cu", "sm_90a", (("UNROLL", unroll),)) for unroll in timing.LIGHT_UNROLLS}
    except Refused as refused:
        pytest.skip(str(refused))
    assert len(images) == len(timing.LIGHT_UNROLLS)


def test_light_reads_copies_that_exceed_the_cache(device):
    timer = timing.timer(device)
    runs, _ = timer.light(1000)
    assert len(runs) * 1000 > timer.rotation * 0.9
    for run in runs[:2]:
        run()


@pytest.mark.parametrize("spec", SPECS)
def test_random_weights_are_well_formed_and_use_every_code(device, spec):
    weight = validate(random_weight(Format.parse(spec), 64, 512, device))
    low, high = code_range(weight.format)
    assert (int(weight.codes.min()), int(weight.codes.max())) == (low, high)
    dense = dequantize(weight)
    assert 0.05 < float(dense.abs().mean()) < 5
    for layout in LAYOUTS.values():
        if weight.format.form in layout.forms:
            assert torch.equal(dequantize(layout.unpack(layout.pack(weight), weight.format, 64, 512)), dense)


def test_rows_of_a_large_weight_are_spread_and_meet_both_ends():
    n = 49152
    rows = trial.chosen_rows(n, 12288)
    assert len(rows) == trial.MOST_ROWS == len(rows.unique())
    assert set(range(128)) | set(range(n - 128, n)) <= set(rows.tolist())
    assert int(rows.sort().values.diff().max()) < 2 * n / trial.MOST_ROWS
    # Every lane and register of a tile is met.
    assert len((rows[128:-128] % 128).unique()) == 128
    assert torch.equal(trial.chosen_rows(100, 64), torch.arange(100))
    for n in (2049, 2304, 4000, 128256, 10**6):
        rows = trial.chosen_rows(n, 1 << 20)
        assert len(rows.unique()) == len(rows) and int(rows.min()) >= 0 and int(rows.max()) == n - 1


@pytest.mark.parametrize("spec", SPECS)
def test_the_truth_is_the_bound_of_formats(device, monkeypatch, spec):
    monkeypatch.setattr(trial, "CHUNK", 128 * 5)
    weight = random_weight(Format.parse(spec), 64, 128, device)
    x, bias = torch.randn(3, 128, device=device), torch.randn(64, device=device)
    rounding = Rounding(2.0**-11, 2.0**-24, 2.0**-11)
    exact = x.double() @ dequantize(weight).T + bias.double()
    allowed = bound(exact, x.double(), dequantize(weight), rounding) + rounding.out * bias.double().abs()
    y = exact + allowed * torch.rand_like(allowed) * 0.5
    y[1, 7] = exact[1, 7] - 0.75 * allowed[1, 7]
    truth = trial.truth_of(weight, x, bias)
    assert truth.ratio(y, rounding) == pytest.approx(0.75, rel=1e-6)
    assert truth.relative(y) == pytest.approx(float((y - exact).norm() / exact.norm()), rel=1e-6)
    y[0, 0] = math.nan
    assert truth.ratio(y, rounding) == truth.relative(y) == math.inf


def test_reads_of_a_cpu_keep_what_they_read():
    timer = timing.timer(torch.device("cpu"))
    runs, _ = timer.light(1 << 12)
    read = runs[0].args[0]
    before = read.clone()
    timer.light(3 << 20)
    runs[0]()
    assert torch.equal(read, before)


def test_neighbours_stand_beside_ours(run, device):
    code, found, out = run("--dtype", "bfloat16", "--formats", "affine:4:32:int", "--m", "1", "--shapes", "64x1024")
    assert code == cli.Exit.FINE
    theirs = [r for r in results.rows_of(found) if r.kind == "neighbour"]
    assert "torch int4" in {r.kernel for r in theirs if r.verdict == "ok"} and "neighbours: torch int4" in out
    _, found, _ = run("--no-neighbours", "--dtype", "bfloat16", "--formats", "affine:4:32:int", "--m", "1")
    assert not [r for r in results.rows_of(found) if r.kind == "neighbour"] and found["neighbours"] == {}


def test_a_broken_neighbour_costs_only_itself(run, monkeypatch):
    def broken(self, problem):
        raise KeyError("scales")

    monkeypatch.setattr(neighbours.Tinygemm, "prepare", broken)
    code, found, _ = run("--dtype", "bfloat16", "--formats", "affine:4:32:int", "--m", "1", "--shapes", "64x1024")
    (failed,) = [r for r in results.rows_of(found) if r.kernel == "torch int4"]
    assert code == cli.Exit.FINE and failed.verdict == "FAILED" and "scales" in failed.note


def test_results_survive_json_and_other_schemas_are_refused():
    rows = [row(), row(kind="light", median=None, light=None), row(error=0.25, note="x")]
    assert results.rows_of(json.loads(json.dumps(document(*rows)))) == rows
    with pytest.raises(ArgumentError, match="schema"):
        results.rows_of({"schema": 0, "rows": []})
    with pytest.raises(ArgumentError, match="rows"):
        results.rows_of({"schema": results.SCHEMA, "rows": [{"n": 1}]})
    with pytest.raises(ArgumentError, match="row"):
        results.rows_of(document(row(verdict="fine")))


def test_the_table_shows_the_fastest_right_kernel_of_each_cell():
    found = bench.table(
        document(
            row(),
            row(kernel="slow", median=2e-5),
            row(m=2, kernel="wide", median=1.5e-5, dense=None),
            row(m=4, verdict="WRONG", median=None),
            row(m=16),
            row(kind="neighbour", median=1e-6),
            row(format="affine:4:32:int:float16", light=None),
        )
    )
    assert found.splitlines() == [
        "| N x K | format | kernel | m=1 | m=2 | m=4 | m=8 |",
        "|---|---|---|---|---|---|---|",
        "| 64 x 64 | binary:3:32:float | lut, wide | 10.0 us, 80 %, 3.00x | 15.0 us, 53 % | - | - |",
        "| 64 x 64 | affine:4:32:int | lut | 10.0 us, 3.00x | - | - | - |",
    ]
    assert len(bench.table(document(row(), row(m=2)), ms=(1,), formats=["table:4:32:none"]).splitlines()) == 2


def test_the_tables_of_the_readme_are_those_of_the_committed_results():
    found = {result["file"]: result for result in bench.committed()}
    marked = r"<!-- lq bench: (\S+) (\S+) m=(\S+) -->\n+(\|.*?)\n\n"
    shown = re.findall(marked, (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(shown) == 3, "`<!-- lq bench: FILE FORMAT,FORMAT... m=M,M... -->` with a table below it"
    for name, formats, ms, text in shown:
        assert text == bench.table(found[name], [int(m) for m in ms.split(",")], formats.split(",")), name


def test_committed_results_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    (tmp_path / "measured").mkdir()
    for name in ("b.json", "a.json", "notes.txt"):
        (tmp_path / "measured" / name).write_text(json.dumps(document(row())))
    monkeypatch.setattr(machine.resources, "files", lambda package: tmp_path)
    assert [result["file"] for result in bench.committed()] == ["a.json", "b.json"]
    (tmp_path / "measured" / "c.json").write_text('{"schema": 0}')
    with pytest.raises(ArgumentError):
        bench.committed()


def test_committed_results_travel_in_the_wheel():
    assert '"lqcompile" = ["measured/*.json", "page/*"]' in (ROOT / "pyproject.toml").read_text()
