"""Reports made by hand: what they say, that they fit, and that no name can break them."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lqcompile.errors import Reason
from lqcompile.report import PassRecord, Report
from lqcompile.table import WIDTH
from lqcompile.types import Decision, Format, NearMiss, Piece, Where

INT4 = Format("affine", 4, 128, "int", "float16")
ONE = (Piece(1, None, "dense", 1e-6),)
THREE = (Piece(1, 22, "lut", 1e-6), Piece(23, 911, "quick", 2e-6), Piece(912, None, "dense", 3e-6))
PROBLEM = {"m": "s0", "n": 384, "k": 384, "x_dtype": torch.float32, "bias": True}
HOSTILE = ["quote\"'", "two\nlines\r\n", "a\tb\0c", "</script>", "x" * 10_000, "é中\u202e\ud800", "a#2", ""]


def done(path, pieces=ONE, **kw):
    where = Where(path, "/home/me/model.py", 41, "self.up(x)", "linear")
    return Decision(where, "rewritten", PROBLEM, INT4, "affine", "bit_exact", "lut", pieces, **kw)


def kept(path, reason, near=(), file="model.py"):
    where = Where(path, file, 88, "x @ w", "matmul")
    return Decision(where, "kept", PROBLEM, reason=reason, near_misses=near)


def sample():
    near = (NearMiss("affine", Reason.SCALE_FROM_INPUT, "mul_3"),)
    decisions = [done(f"layers.{i}.up", THREE, bytes_before=1_000_000, bytes_after=150_000) for i in range(3)]
    decisions += [kept(f"layers.{i}.attn", Reason.INPUT_WEIGHT) for i in range(2)]
    decisions += [kept("head", Reason.SCALE_FROM_INPUT, near)]
    passes = (PassRecord("recognise", 0.25, 3), PassRecord("lower", 0.125, 3))
    return Report({"name": "cpu", "real": True}, tuple(decisions), passes, ("a pass was rolled back",))


def test_the_verdict_comes_first_and_layers_are_grouped():
    lines = [line for line in str(sample()).splitlines() if line]
    words = [" ".join(line.split()) for line in lines]
    assert words[1:3] == [
        "3 of 6 matmuls rewritten weights 3.0 MB -> 450.0 kB",
        "what to do: 1 quantized but kept: start with lq why head",
    ]
    table = " ".join(words[3:6])
    assert table.startswith("layer format weights predicted kernel")
    assert "layers.*.up (3) int4 g128 zero 3.0 MB -> 450.0 kB" in table
    assert "lut for M <= 22, quick for 23 <= M <= 911, dense for M >= 912" in " ".join(words)


def test_every_kept_matmul_has_its_sentence_source_and_advice():
    text = " ".join(str(sample()).split())
    for reason in (Reason.INPUT_WEIGHT, Reason.SCALE_FROM_INPUT):
        assert reason.sentence in text and reason.advice in text
    assert "3 kept" in text and "layers.*.attn (2) model.py:88" in text
    assert "nearest: affine stopped at mul_3" in text
    assert "warning: a pass was rolled back" in text


@pytest.mark.parametrize(
    ("decisions", "words"),
    [
        ((), "no matmul was compiled"),
        ((kept("a", Reason.NOT_QUANTIZED), kept("b", Reason.INPUT_WEIGHT)), "nothing is quantized"),
        ((kept("a", Reason.SCALE_FROM_INPUT), kept("b", Reason.INPUT_WEIGHT)), "0 of 2 matmuls rewritten"),
    ],
)
def test_the_verdict_says_plainly_why_nothing_was_done(decisions, words):
    assert words in Report({}, decisions).verdict()


def test_json_has_the_fields_of_schema_1():
    out = json.loads(sample().json())
    assert out["schema"] == 1 and out["torch"] == torch.__version__
    assert out["totals"] == {
        "matmuls": 6,
        "rewritten": 3,
        "kept": 3,
        "bytes_before": 3_000_000,
        "bytes_after": 450_000,
        "predicted_speedup": None,
    }
    head, up = out["decisions"][0], out["decisions"][-1]
    assert head["id"] == "head" and head["reason"] == "scale_from_input"
    assert head["advice"] == Reason.SCALE_FROM_INPUT.advice
    assert head["near_misses"] == [{"rule": "affine", "reason": "scale_from_input", "at": "mul_3"}]
    assert Format(**up["format"]) == INT4
    assert up["problem"]["x_dtype"] == "torch.float32" and up["proof"] == "bit_exact"
    assert [p["when"] for p in up["pieces"]] == ["M <= 22", "23 <= M <= 911", "M >= 912"]
    assert out["passes"][0] == {"name": "recognise", "ms": 250.0, "changed": 3}


def test_order_does_not_matter_and_ids_are_unique():
    names = [*HOSTILE, "a", "a", "a", "layers.2.up", "layers.10.up"]
    decisions = [kept(n, Reason.INPUT_WEIGHT, file=f) for n in names for f in ("a.py", "b.py")]
    first = Report({}, tuple(decisions))
    random.Random(0).shuffle(decisions)
    second = Report({}, tuple(decisions))
    assert first.json() == second.json() and first.text() == second.text()
    ids = [d["id"] for d in json.loads(first.json())["decisions"]]
    assert len(set(ids)) == len(decisions) and {"a", "a#2", "(top level)"} <= set(ids)


def test_merged_adds_up():
    both = Report.merged([sample(), sample()])
    assert (both.rewritten, both.kept, both.bytes_after) == (6, 6, 900_000)
    assert both.passes == (PassRecord("recognise", 0.5, 6), PassRecord("lower", 0.25, 6))
    assert both.warnings == sample().warnings and both.device == sample().device
    assert Report.merged([]).decisions == ()


@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=300)), st.floats())
def test_no_name_breaks_a_line_or_the_json(name, seconds):
    near = (NearMiss(name, Reason.GROUPS, name),)
    pieces = (Piece(1, 5, name, seconds), Piece(6, None, name, seconds))
    decisions = (done(name, pieces), kept(name, Reason.GROUPS, near, file=name), kept(name, Reason.DTYPE))
    report = Report({"name": name}, decisions, (PassRecord(name, 0.1, 1),), (name,))
    assert all(len(line) <= WIDTH and line.isprintable() for line in report.text().split("\n"))
    out = json.loads(report.json(), parse_constant=pytest.fail)
    assert out["decisions"][0]["file"] in (name, "/home/me/model.py")
    assert out["warnings"] == [name]
