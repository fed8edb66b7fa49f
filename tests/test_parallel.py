"""Packed layers cut between ranks: by whole tiles, exactly; the same outputs from two processes as from one."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

import lqcompile
from lqcompile import ArgumentError, PackedLinear
from lqcompile.formats import dequantize
from lqcompile.parallel import ColwisePacked, RowwisePacked, cut_inputs, cut_outputs

from .decode_parallel import free_port
from .test_convert import other_order
from .test_ops import FORMS, random_weight

RANKS = 2
SIZES = ((64, 256, 32), (128, 512, 128), (64, 768, 384), (64, 512, 512), (64, 1024, 4), (64, 768, 96))


@pytest.mark.parametrize(("form", "zero"), FORMS)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31 - 1), bits=st.integers(1, 8), order=st.sampled_from(["cpu", "cuda", "plain"]),
    size=st.sampled_from(SIZES),
)  # fmt: skip
def test_the_parts_of_all_ranks_are_the_weight(form, zero, seed, bits, order, size):
    (n, k, group), random = size, Random(seed)
    w = random_weight(random, n, k, group, form, zero, bits, "cpu")
    whole, bias = dequantize(w), torch.randn(n)
    layer = other_order(PackedLinear.from_weight(w, bias), order)
    columns, rows = ([copy.deepcopy(layer) for _ in range(RANKS)] for _ in range(2))
    for rank in range(RANKS):
        cut_outputs(columns[rank], rank, RANKS)
        cut_inputs(rows[rank], rank, RANKS)
    assert torch.equal(torch.cat([dequantize(part.qweight()) for part in columns]), whole)
    assert torch.equal(torch.cat([dequantize(part.qweight()) for part in rows], 1), whole)
    assert torch.equal(torch.cat([part.bias for part in columns]), bias)
    assert torch.equal(rows[0].bias, bias) and rows[1].bias is None
    for part in (*columns, *rows):
        # Nothing of another rank's is kept alive by a view; memory is taken by lines of 64 bytes.
        assert all(t.untyped_storage().nbytes() < t.nbytes + 64 for t in part.parts)
        before = dequantize(part.qweight())
        assert torch.equal(dequantize(part.cpu().qweight()), before) and part.order == "cpu"


def packed(n: int, k: int, group: int, path: str = "mlp.up") -> PackedLinear:
    layer = PackedLinear.from_weight(random_weight(Random(0), n, k, group, "affine", "int", 4, "cpu"))
    layer.path = path
    return layer


@pytest.mark.parametrize(
    ("cut", "layer", "said"),
    [
        (cut_outputs, lambda: packed(40, 128, 32), ("mlp.up.out_features is 40", "multiple of 32", "2 ranks")),
        (cut_outputs, lambda: other_order(packed(32, 128, 32)), ("out_features is 32", "multiple of 64")),
        (cut_inputs, lambda: packed(64, 384, 128), ("mlp.up.in_features is 384", "multiple of 256")),
        (cut_inputs, lambda: packed(64, 768, 256), ("mlp.up.format.group is 256", "384")),
        (cut_inputs, lambda: in_act_order(packed(64, 256, 32)), ("mlp.up is 'in act-order'", "ColwisePacked")),
    ],
)
def test_an_impossible_cut_is_refused_by_name(cut, layer, said):
    layer = layer()
    before = (layer.out_features, layer.in_features, [id(part) for part in layer.parts])
    with pytest.raises(ArgumentError) as caught:
        cut(layer, 0, RANKS)
    assert all(word in str(caught.value) for word in said), caught.value
    assert before == (layer.out_features, layer.in_features, [id(part) for part in layer.parts])


def in_act_order(layer: PackedLinear) -> PackedLinear:
    w = dataclasses.replace(layer.qweight(), perm=torch.arange(layer.in_features).flip(0))
    moved = PackedLinear.from_weight(w)
    moved.path = layer.path
    return moved


def test_unusable_arguments_are_named():
    with pytest.raises(ArgumentError, match="a mesh and a plan"):
        lqcompile.convert(nn.Linear(4, 4), options={"plan": {}})
    with pytest.raises(ArgumentError, match=r"nothing\.\*"):
        lqcompile.convert(nn.Linear(4, 4), options={"plan": {"nothing.*": ColwisePacked()}, "mesh": object()})
    with pytest.raises(ArgumentError, match="output_layouts"):
        ColwisePacked(output_layouts=Shard(0))
    with pytest.raises(ArgumentError, match="input_layouts"):
        RowwisePacked(input_layouts=Shard(0))


class Block(nn.Module):
    """What is cut where: up by its outputs, down by its inputs, the rest one or the other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(256, 512), nn.Linear(256, 512, bias=False), nn.Linear(512, 256)
        self.gathered, self.summed = nn.Linear(256, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.summed(self.gathered(y))


PLAN = {
    "up": ColwisePacked(), "gate": ColwisePacked(), "down": RowwisePacked(),
    "gathered": ColwisePacked(output_layouts=Replicate()),
    "summed": RowwisePacked(input_layouts=Replicate(), one_shot=True),
}  # fmt: skip


def block() -> tuple[Block, torch.Tensor]:
    torch.manual_seed(0)
    model = lqcompile.quantize(Block().eval().requires_grad_(False), group=32)
    return model, torch.randn(3, 5, 256)


def rank_of_two(path: str) -> None:
    """What each of two processes does."""
    dist.init_process_group("gloo")
    try:
        mesh, (model, x) = init_device_mesh("cpu", (RANKS,)), block()
        wanted = model(x)
        with torch.device("meta"):
            cut = Block().eval().requires_grad_(False)
        lqcompile.load_packed(cut, path, device=None)
        parallelize_module(cut, mesh, PLAN)
        cut.cpu()
        with torch.no_grad():
            held = sum(part.nbytes for m in cut.modules() if isinstance(m, PackedLinear) for part in m.parts)
            whole = lqcompile.load_packed(Block().eval().requires_grad_(False), path)
            packed = sum(part.nbytes for m in whole.modules() if isinstance(m, PackedLinear) for part in m.parts)
            assert 2 * held == packed, (held, packed)
            for run in (cut, torch.compile(cut, backend="lq", fullgraph=True)):
                torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-4)
            again, _ = block()
            lqcompile.convert(again, x, options={"strict": True, "mesh": mesh, "plan": PLAN})
            assert sum(part.nbytes for m in again.modules() if isinstance(m, PackedLinear) for part in m.parts) == held
            torch.testing.assert_close(again(x), wanted, rtol=1e-4, atol=1e-4)
            up = cut.up(DTensor.from_local(x, mesh, [Replicate()]))
            torch.testing.assert_close(up, whole.up(x).chunk(RANKS, -1)[mesh.get_local_rank()], rtol=1e-4, atol=1e-4)
            try:
                parallelize_module(nn.Linear(64, 64), mesh, ColwisePacked())
            except ArgumentError as error:
                assert "PackedLinear" in str(error)
            else:
                raise AssertionError("a float layer was taken")
        if mesh.get_local_rank() == 0:
            print("both ranks agree")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    model, x = block()
    lqcompile.save_packed(lqcompile.convert(model, x, options={"strict": True}), tmp_path / "model")
    root = Path(__file__).resolve().parent.parent
    code = f"from tests.test_parallel import rank_of_two; rank_of_two({str(tmp_path / 'model')!r})"
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": root}
    environment = {**os.environ, **address, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env={**environment, "RANK": str(rank)}, **piped)
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "".join(err[-3000:] for _, err in said)
    assert "both ranks agree" in said[0][0]
