"""What the choices of the cost model cost, from the rows of a bench."""

from __future__ import annotations

import itertools
import json
from xml.dom import minidom

import pytest
import torch

from lqcompile import bench, cli, models, picture, regret, timing
from lqcompile.device import Device
from lqcompile.errors import ArgumentError
from lqcompile.results import Row

A, B = ("a", "lut"), ("b", "quick")


def point(m, predicted, measured):
    return regret.Point(64, 64, m, "affine:4:32:int:float32", "float32", predicted, measured)


def test_a_choice_is_by_prediction_and_its_regret_by_measurement():
    found = point(1, {A: 1.0, B: 2.0}, {A: 3.0, B: 2.0})
    assert (found.chosen, found.best) == (A, B)
    assert (found.regret(A), found.regret(B)) == (1.5, 1.0)


def test_the_report_names_the_worst_and_what_one_way_alone_would_cost():
    found = [
        point(1, {A: 1.0, B: 2.0}, {A: 3.0, B: 2.0}),
        point(2, {A: 1.0, B: 2.0}, {A: 1.0, B: 4.0}),
        point(3, {B: 1.0, A: 2.0}, {B: 1.0, A: 2.0}),
    ]
    text = regret.report(found)
    assert "3 problems" in text and "1.50x  64x64 m=1" in text and "b (quick) is faster" in text
    assert "chosen                  mean 1.167  95 % 1.50  worst 1.50" in text
    assert "always a (lut)          mean 1.500" in text and "always b (quick)        mean 2.000" in text
    # Off by 2/3, 0, 0, 1/2, 0, 0.
    assert "off by 0 % (median)" in text
    assert "no problem" in regret.report([])


def row(m, kernel, layout, median, kind="ours"):
    return Row(64, 64, m, "affine:4:32:int:float32", "float32", False, kind, kernel, layout, 1, 1, "ok", median=median)


def test_points_are_the_problems_with_a_choice():
    rows = [
        row(1, "dense", "quick", 2e-5), row(1, "dense", "lut", 3e-5), row(1, "torch.mm", "", 1e-6, "dense"),
        row(2, "dense", "quick", 2e-5), row(3, "dense", "quick", None), row(3, "dense", "lut", 1e-5),
    ]  # fmt: skip
    (found,) = regret.points(rows, torch.device("cpu"))
    assert found.m == 1 and set(found.measured) == {("dense", "quick"), ("dense", "lut")}
    assert all(seconds > 0 for seconds in found.predicted.values())


@pytest.mark.parametrize("given", [["--regret"], ["--no-regret"]])
def test_the_bench_tells_it_where_asked(given, capsys):
    small = ["--shapes", "64x64", "--m", "1,5", "--formats", "affine:4:32:int", "--device", "cpu", "--repeats", "1"]
    assert cli.main(["bench", *small, "--no-neighbours", *given]) == cli.Exit.FINE
    assert ("regret: 2 problems" in capsys.readouterr().out) == (given == ["--regret"])


GPU = torch.device("cuda", 0)


def test_the_shapes_of_whole_models():
    found = models.shapes(models.SIZES)
    # q, k, all three, gate, gate and up, down of Llama-3 8B; the merged q, k and v of Gemma-2 9B and of OPT-175B.
    wanted = {(4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)}
    assert wanted | {(8192, 3584), (3584, 4096), (36864, 12288), (49152, 12288)} <= set(found)
    assert len(found) == len(set(found)) and all(k % 128 == 0 for _, k in found + models.shapes(models.SMALL))


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_cut_sample_is_a_fair_one(kind):
    device = torch.device(kind)
    found = list(itertools.islice(models.drawn(device), 592))
    assert found == list(itertools.islice(models.drawn(device), 592))
    weights = list(dict.fromkeys((p.n, p.k, p.format, p.x_dtype) for p in found))
    shapes = [(n, k) for n, k, *_ in weights]
    # Each shape comes once before any comes again.
    rounds = len(set(shapes))
    assert len(set(shapes[:rounds])) == rounds and len(set(weights)) == len(weights)
    new = [p for p in found if not models.fitted(p)]
    assert len(new) >= 300
    for facts in (lambda p: p.format.bits, lambda p: p.format.group, lambda p: int(p.m)):
        assert len({facts(p) for p in found[:100]}) >= 2
    assert {p.format.bits for p in found} == {2, 3, 4, 8} and {p.format.group for p in found} == {64, 128}


def test_points_survive_json_and_what_is_none_is_refused():
    found = [
        regret.Point(
            64, 64, 1, "affine:4:32:int:float32", "float32", {A: 1e-6, B: 2e-6}, {A: 3e-6, B: 2e-6}, 4e-6, True
        ),
        regret.Point(64, 64, 2, "affine:4:32:int:float32", "float32", {B: 2e-6}, {B: 2e-6}),
    ]
    document = json.loads(json.dumps(regret.document(found)))
    assert regret.read(document) == found
    told = document["summary"]
    assert told["chosen"] == {"points": 2, "mean": 1.25, "95 %": 1.5, "worst": 1.5}
    assert told["chosen, not fitted"] == {"points": 1, "mean": 1.0, "95 %": 1.0, "worst": 1.0}
    assert told["policies"]["always in lut"]["mean"] == 1.5 and told["policies"]["a dense weight"]["mean"] == 2.0
    with pytest.raises(ArgumentError, match="points"):
        regret.read({"points": [{"n": 64}]})


@pytest.fixture
def tiny(monkeypatch):
    """Whole models that take no time."""
    monkeypatch.setattr(models, "SMALL", {"tiny": (128, 128, 64, 256, True)})
    monkeypatch.setattr(models, "SMALL_MS", (1, 3))
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 12)


def test_whole_models_are_resumed_where_they_were_cut(tiny, tmp_path, capsys):
    path = tmp_path / "out.json"
    given = ["bench", "--device", "cpu", "--repeats", "1", "--json", str(path)]
    assert cli.main([*given, "--draw", "4"]) == cli.Exit.FINE
    first = json.loads(path.read_text())
    assert len(first["points"]) == 4 and first["rows"] == [] and "regret: 4 problems" in capsys.readouterr().out
    assert cli.main([*given, "--draw", "6", "--resume"]) == cli.Exit.FINE
    both, out = json.loads(path.read_text()), capsys.readouterr().out
    assert both["points"][:4] == first["points"] and len(both["points"]) == 6
    assert "regret: 6 problems" in out and "2 problems timed" in out
    assert both["profile"]["bandwidth"] > 0
    path.write_text(json.dumps({**both, "device": {"type": "cpu", "name": "another"}}))
    assert cli.main([*given, "--draw", "6", "--resume"]) == cli.Exit.USAGE
    assert "--resume" in capsys.readouterr().err


def test_what_is_hopeless_in_its_layout_is_not_timed(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.HOPELESS, "cpu", 1.0)
    path = tmp_path / "out.json"
    cli.main(["bench", "--device", "cpu", "--repeats", "1", "--json", str(path), "--draw", "6"])
    for point in regret.read(json.loads(path.read_text())):
        assert len({layout for _, layout in point.measured}) == len(point.measured)


def test_a_picture_shows_predictions_measurements_crossings_and_names(tiny, tmp_path):
    path = tmp_path / "out.svg"
    small = ["--shapes", "64x128", "--m", "1,5,64", "--formats", "affine:4:32:int,binary:2:32:float"]
    run = ["bench", "--device", "cpu", *small, "--repeats", "1", "--no-neighbours", "--picture", str(path)]
    assert cli.main(run) == cli.Exit.FINE
    image = minidom.parseString(path.read_text())
    texts = [node.firstChild.data for node in image.getElementsByTagName("text") if node.firstChild]
    assert "light" in texts and texts.count("dense weight") == 2 and any("dense (quick)" in text for text in texts)
    lines, dots = image.getElementsByTagName("polyline"), image.getElementsByTagName("circle")
    assert len(dots) == 3 * len(lines) and len(lines) >= 5


def test_crossings_are_where_the_choice_changes():
    seconds = {A: 1e-6, B: 2e-6}
    point = regret.Point(4096, 4096, 64, "affine:4:128:int:float16", "float16", seconds, seconds)
    ways = {("dense", "quick"): 1e-3, ("quick", "quick"): 1e-3, ("lut", "lut"): 1e-3}
    real = regret.Point(4096, 4096, 4096, "affine:4:128:int:float16", "float16", ways, ways)
    assert point.within("lut") == A and point.within("other") is None
    curve = picture._curve([real], GPU, Device.null("sm_90"))
    assert curve["crossings"] and curve["m"][-1] == 4096 and len(curve["lines"]) == 4


@pytest.mark.parametrize("given", [["--resume"], ["--resume", "--draw", "2"], ["--draw", "2", "--shapes", "8x8"]])
def test_options_that_do_not_go_together_are_refused(given, capsys):
    assert cli.main(["bench", "--device", "cpu", *given]) == cli.Exit.USAGE
    assert given[0] in capsys.readouterr().err


@pytest.mark.parametrize("name", ["out.png", "out", "nowhere/out.svg"])
def test_a_picture_that_cannot_be_drawn_is_refused(name, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--picture", str(tmp_path / name)])
    assert ".svg" in capsys.readouterr().err
