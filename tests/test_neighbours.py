"""Other libraries' matmuls for `lq bench`: what they accept, and that each computes its own weight."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import sympy
import torch

from lqcompile import neighbours, results, trial

from .test_bench import problem


def test_neighbours_say_what_they_do_not_accept():
    tinygemm, int8, freezing, torchao, gemlite = neighbours.NEIGHBOURS
    assert tinygemm.accepts(problem()) is None and int8.accepts(problem("affine:8:128:none:float16")) is None
    assert "32" in tinygemm.accepts(problem("affine:4:16:int:float16"))
    assert "multiple of 16" in tinygemm.accepts(problem(n=24))
    assert "4 bits" in tinygemm.accepts(problem("affine:3:32:int:float16"))
    assert "affine" in tinygemm.accepts(problem("binary:4:32:none:float16"))
    for other in (torchao, gemlite):
        assert other.accepts(problem()) == "cuda"
    assert "weights" in freezing.accepts(problem()) and freezing.accepts(problem(n=1024, k=1024)) is None
    on_gpu = problem(device="cuda", k=1024)
    assert freezing.accepts(on_gpu) == "cpu"
    assert freezing.accepts(dataclasses.replace(problem(n=1024, k=1024), m=sympy.Integer(2))) == "one row"
    assert torchao.accepts(on_gpu) is None and gemlite.accepts(on_gpu) is None
    assert "1024" in torchao.accepts(dataclasses.replace(on_gpu, k=1152))
    assert "bfloat16" in torchao.accepts(dataclasses.replace(on_gpu, x_dtype=torch.float16))
    assert "float16" in gemlite.accepts(dataclasses.replace(on_gpu, x_dtype=torch.float32))
    assert int8.missing() is None
    assert "no_such_module" in type("None", (neighbours.Neighbour,), {"needs": ("no_such_module",)})().missing()


def test_a_neighbour_that_is_there_computes_its_own_weight(device):
    for other in neighbours.NEIGHBOURS:
        for spec, dtype in (("affine:4:32:int:float16", torch.bfloat16), ("affine:8:32:none:float16", torch.bfloat16)):
            asked = problem(spec, 64, 1024, dtype, device.type)
            if other.missing() is None and other.accepts(asked) is None:
                held, x = other.prepare(asked), torch.randn(3, 1024, device=device).to(dtype)
                copies = [held.weight, other.copy(held.weight)]
                candidate = trial.theirs(other, held, copies, x)
                assert candidate.check()[0] in results.TIMED, (other.name, candidate.check())
                assert candidate.bytes < 64 * 1024 * 2
                assert torch.equal(*(run() for run in candidate.runs))


def test_inductor_freezes_a_dense_weight_for_each_copy(monkeypatch):
    freezing, asked, x = neighbours.Freezing(), problem(n=1024, k=1024), torch.randn(3, 1024).bfloat16()
    with torch.no_grad():
        held = freezing.prepare(asked)
        copies = [held.weight, freezing.copy(held.weight)]
        candidate = trial.theirs(freezing, held, copies, x)
        assert candidate.check()[0] == "ok" and candidate.bytes == 2 * 1024 * 1024
        assert torch.equal(*(run() for run in candidate.runs))
        # One that reads the codes in each call is found out.
        monkeypatch.setattr(type(torch._inductor.config), "patch", lambda *_, **how: contextlib.nullcontext())
        with pytest.raises(RuntimeError, match="in each call"):
            freezing.prepare(asked).weight(x)
