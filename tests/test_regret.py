"""What the choices of the cost model cost, from the rows of a bench."""

from __future__ import annotations

import pytest
import torch

from lqcompile import cli, regret
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
