"""Fifty near misses: `lq why` names the operation at which recognition stopped, and the change that helps."""

import re

import pytest
import torch

import lqcompile
from lqcompile import why

from .near_misses import CASES, Model

# What `why` gets wrong, by name and why. At most five: the goal is 45 of 50.
WRONG: dict[str, str] = {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_why_names_the_operation_and_the_fix(case):
    torch.manual_seed(0)
    model = Model(case).eval()
    with torch.set_grad_enabled(case.grad):
        report = lqcompile.explain(model, case.x())
    document = report.document()
    kept = [d for d in document["decisions"] if d["outcome"] == "kept"]
    assert len(kept) == 1, report.text()
    said = "\n".join(line for _, line in why.why(document, kept[0]["id"]))
    stopped = re.search(r"^  stopped at  (\w+)", said, re.MULTILINE)
    advice = " ".join(said.partition("what to change:")[2].split())
    right = stopped is not None and stopped[1].startswith(case.op) and case.fix in advice
    assert right != (case.name in WRONG), said
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize(
    ("name", "rule"), [("relu", "affine"), ("rotated_in", "affine"), ("lora", "affine"), ("scale_of_amax", "none")]
)
def test_why_names_the_nearest_rule(name, rule):
    model = Model(next(case for case in CASES if case.name == name)).eval()
    with torch.no_grad():
        document = lqcompile.explain(model, model.case.x()).document()
    said = [line for _, line in why.why(document, document["decisions"][0]["id"])]
    assert [line.split()[2].rstrip(":") for line in said if line.startswith("  nearest rule")] == [rule]


def test_there_are_fifty_cases_and_at_most_five_are_wrong():
    names = [case.name for case in CASES]
    assert len(set(names)) == 50
    assert set(WRONG) <= set(names) and len(WRONG) <= 5
