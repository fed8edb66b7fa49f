"""Graphs with experts: torch's grouped matmul, batches and picked weights become one op; and `lq bench --moe`."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lqcompile
from lqcompile import cli, moe_bench, timing
from lqcompile.decoder import SHAPES, Experts, Mixture, made
from lqcompile.errors import Reason
from lqcompile.kernels import grouped
from lqcompile.passes import lower

SMALL = dataclasses.replace(SHAPES["tiny-moe"], hidden=64, intermediate=96)


def mixture(device, **how) -> nn.Module:
    torch.manual_seed(0)
    layer = made(lambda: Mixture(SMALL), device, torch.bfloat16).eval()
    chosen = lambda name, _: "router" not in name  # noqa: E731
    return lqcompile.quantize(layer, **{"bits": 4, "group": 32, "modules": chosen, **how})


def off(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("how", [{}, {"method": "bcq", "bits": 3}, {"method": "nf4"}])
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_mixture_of_experts_is_two_ops(how, dynamic, device):
    layer = mixture(device, **how)
    compiled = torch.compile(layer, backend="lq", fullgraph=True, dynamic=dynamic, options={"strict": True})
    for batch in (5, 9):
        x = torch.randn(batch, SMALL.hidden, device=device).bfloat16()
        with lqcompile.backend.recording() as reports:
            y = compiled(x)
        assert off(y, layer(x)) < 0.02
    layer.gate.stacked.scale.mul_(2) if not how else layer.down.stacked.get_buffer("plane0").bitwise_not_()
    assert off(compiled(x), layer(x)) < 0.02
    rewritten = [d for report in reports for d in report.decisions if d.outcome == "rewritten"]
    assert {d.where.path for d in rewritten} <= {"gate", "up", "down"}
    assert all(d.problem["experts"] == SMALL.experts for d in rewritten)


@torch.no_grad()
def test_gate_and_up_of_experts_are_one_op():
    x = torch.randn(6, SMALL.hidden).bfloat16()
    for options in ({}, {"arch": "sm_90"}):
        report = lqcompile.explain(mixture("cpu"), x, options=options)
        found = {d.where.path: d for d in report.decisions if d.outcome == "rewritten"}
        assert set(found) == {"gate", "up", "down"}
        assert found["gate"].problem["together"] == found["up"].problem["together"] == 2
        assert "together" not in found["down"].problem
        # Of the kernels for a CPU none does what follows.
        assert found["gate"].problem.get("epilogue") == ("silu_mul" if options else None)
        assert not options or {p.kernel for d in found.values() for p in d.pieces} == {"quick"}


@pytest.mark.parametrize("how", [{}, {"method": "bcq", "bits": 3}, {"method": "nf4"}, {"symmetric": True}])
@torch.no_grad()
def test_a_converted_mixture_runs_packed(how):
    layer, x = mixture("cpu", **how), torch.randn(5, SMALL.hidden).bfloat16()
    wanted = layer(x)
    layer = lqcompile.convert(layer, x)
    with lqcompile.backend.recording() as reports:
        y = torch.compile(layer, backend="lq", fullgraph=True, options={"strict": True})(x)
    assert off(y, wanted) < 0.02
    assert [(report.rewritten, report.kept) for report in reports] == [(3, 1)]


class Batched(nn.Module):
    """The weights of experts as a library spells them, in one of several forms."""

    def __init__(self, spelled, experts=4, n=64, k=96):
        super().__init__()
        self.spelled, self.shape, self.stacked = spelled, (experts, n, k), nn.Linear(k, experts * n, bias=False)

    def forward(self, x):
        return self.spelled(x, self.stacked.weight.view(self.shape))


SPELLED = {
    "bmm": lambda x, w: torch.bmm(x, w.transpose(1, 2)),
    "matmul": lambda x, w: x @ w.mT,
    "einsum": lambda x, w: torch.einsum("emk,enk->emn", x, w),
    "einsum_out": lambda x, w: torch.einsum("emk,enk->men", x, w),
    "einsum_row": lambda x, w: torch.einsum("ek,enk->en", x[:, 0], w),
    "grouped_mm": lambda x, w: F.grouped_mm(x, w.mT),
}
# By a router's choice ids [rows, 2] of weights [experts, n, k].
PICKED = {
    "einsum": lambda x, w, ids: torch.einsum("ti,taoi->tao", x, w[ids]),
    "each": lambda x, w, ids: torch.einsum("tai,taoi->tao", x[:, None] * ids[..., None], w[ids]),
    "turned": lambda x, w, ids: torch.einsum("tk,atnk->nat", x, w[ids.t()]),
    "bmm": lambda x, w, ids: torch.bmm(w[ids.flatten()], x.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1),
    "bmm_right": lambda x, w, ids: torch.bmm(x.unsqueeze(1), w[ids[:, 0]].transpose(1, 2)),
    "selected": lambda x, w, ids: x.unsqueeze(1) @ w.index_select(0, ids[:, 1]).mT,
    "sliced": lambda x, w, ids: torch.einsum("tk,tnk->tn", x, w[ids[:, 0], :, :].to(x.dtype)),
    "negative": lambda x, w, ids: torch.einsum("tk,tnk->tn", x, w[ids[:, 0] - 4]),
}
NOT_PICKED = {
    "rows": lambda x, w, ids: torch.bmm(x.view(2, -1, 96), w[ids[:2, 0]].mT),
    "outputs": lambda x, w, ids: torch.einsum("tk,etk->te", x, w[:, ids[:, 0]]),
    "scaled": lambda x, w, ids: torch.einsum("tk,tnk->tn", x, w[ids[:, 0]] * 2),
}


class Picking(Batched):
    """The same by what the input picks."""

    def forward(self, x):
        w, first = self.stacked.weight.view(self.shape), x[:, 0].abs().mul(64).long()
        return self.spelled(x, w, torch.stack([first % 4, (first + 1) % 4], 1))


@pytest.mark.parametrize("spelled", PICKED)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_weights_that_the_input_picks(spelled, dynamic, device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = lqcompile.quantize(Picking(PICKED[spelled]), bits=4, group=32).to(device, dtype)
    compiled = torch.compile(layer, backend="lq", fullgraph=True, dynamic=dynamic, options={"strict": True})
    for rows in (7, 4):
        x = torch.randn(rows, 96, device=device, dtype=dtype)
        with lqcompile.backend.recording() as reports:
            y, wanted = compiled(x), layer(x)
        assert off(y, wanted) < (0.02 if dtype == torch.bfloat16 else 1e-5) and y.stride() == wanted.stride()
    for report in reports:
        assert [d.problem["experts"] for d in report.decisions if d.outcome == "rewritten"] == [4]


@pytest.mark.parametrize("spelled", NOT_PICKED)
@torch.no_grad()
def test_what_picks_more_than_rows_stays(spelled):
    layer = lqcompile.quantize(Picking(NOT_PICKED[spelled]), bits=4, group=32)
    report = lqcompile.explain(layer, torch.randn(6, 96))
    assert [d.reason for d in report.decisions] == [Reason.SCALE_FROM_INPUT]


@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_as_many_rows_for_each_expert(spelled, dynamic, device):
    if spelled == "grouped_mm" and not hasattr(F, "grouped_mm"):
        pytest.skip("an older torch")
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" or spelled == "grouped_mm" else torch.float32
    layer = lqcompile.quantize(Batched(SPELLED[spelled]), bits=4, group=32).to(device, dtype)
    compiled = torch.compile(layer, backend="lq", fullgraph=True, dynamic=dynamic, options={"strict": True})
    for rows in (3, 6):
        x = torch.randn(4, rows, 96, device=device, dtype=dtype)
        with lqcompile.backend.recording() as reports:
            y, wanted = compiled(x), layer(x)
        assert off(y, wanted) < (0.02 if dtype == torch.bfloat16 else 1e-5) and y.stride() == wanted.stride()
    layer.stacked.scale.mul_(2)
    assert off(compiled(x), layer(x)) < 0.02
    for report in reports:
        assert [d.problem["experts"] for d in report.decisions if d.outcome == "rewritten"] == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_grouped_matmuls_of_transformers(dtype):
    from transformers.integrations import moe

    class Theirs(Experts):
        def forward(self, x, ends):
            w = self.stacked.weight.to(x.dtype).unflatten(0, (self.experts, -1)).transpose(1, 2)
            return moe._grouped_mm(x, w, ends)

    layer = made(lambda: Theirs(4, 64, 96), torch.device("cpu"), dtype)
    layer = lqcompile.quantize(layer, bits=4, group=32)
    x, ends = torch.randn(7, 96, dtype=dtype), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    compiled = torch.compile(layer, backend="lq", fullgraph=True, options={"strict": True})
    with lqcompile.backend.recording() as reports:
        y = compiled(x, ends)
    assert off(y, layer(x, ends)) < 0.02
    assert [d.problem.get("experts") for report in reports for d in report.decisions] == [4]


@torch.no_grad()
def test_what_is_not_one_op_for_experts_stays():
    """Outputs that fill no tile, gradients, and weights that nobody quantized."""
    x, ends = torch.randn(6, 64).bfloat16(), torch.tensor([1, 4, 6], dtype=torch.int32)

    def reasons(layer):
        return [d.reason for d in lqcompile.explain(layer, x, ends).decisions]

    def of(n):
        return made(lambda: Experts(3, n, 64), torch.device("cpu"), torch.bfloat16)

    assert reasons(lqcompile.quantize(of(40), bits=4, group=32)) == [Reason.NO_KERNEL]
    assert reasons(of(64)) == [Reason.NOT_QUANTIZED]
    layer = lqcompile.quantize(of(64), bits=4, group=32)
    assert reasons(layer) == [None]
    x.requires_grad_()
    with torch.enable_grad():
        assert reasons(layer) == [Reason.NO_KERNEL]


def test_a_mixture_is_that_of_transformers():
    from transformers import AutoConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = AutoConfig.for_model(
        "mixtral", hidden_size=SMALL.hidden, intermediate_size=SMALL.intermediate, num_local_experts=SMALL.experts,
        num_experts_per_tok=SMALL.top,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = MixtralSparseMoeBlock(config).eval()
    layer = made(lambda: Mixture(SMALL), torch.device("cpu"), torch.float32)
    stacked = {name: getattr(layer, name).stacked.weight.unflatten(0, (SMALL.experts, -1)) for name in ("gate", "up")}
    down = layer.down.stacked.weight.unflatten(0, (SMALL.experts, -1))
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([stacked["gate"], stacked["up"]], 1))
        theirs.experts.down_proj.copy_(down)
        x = torch.randn(1, 9, SMALL.hidden)
        found = theirs(x)
        torch.testing.assert_close(layer(x), found[0] if isinstance(found, tuple) else found, rtol=1e-4, atol=1e-4)


def _wrong_expert(patch):
    patch.setattr(
        grouped, "of_expert", lambda parts, e, experts, of=grouped.of_expert: of(parts, experts - 1 - e, experts)
    )


def _rows_not_sorted(patch):
    emitted = lower._grouped
    patch.setattr(lower, "_grouped", lambda plan, emit, inputs, x, ends: emitted(plan, emit, inputs, x.args[0], ends))


@pytest.mark.parametrize("fault", [_wrong_expert, _rows_not_sorted])
@torch.no_grad()
def test_rows_by_the_weight_of_another_expert_are_caught(fault, monkeypatch):
    fault(monkeypatch)
    layer = lqcompile.quantize(Picking(PICKED["bmm_right"]), bits=4, group=32)
    with pytest.raises(Exception, match="differs from the original"):
        torch.compile(layer, backend="lq", options={"strict": True})(torch.randn(5, 96))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs `lq bench` with ways that run eagerly; returns its exit code and document."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 12)
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)

    def run(*options):
        path = tmp_path / "out.json"
        code = cli.main(["bench", "--device", "cpu", "--repeats", "2", "--json", str(path), *options])
        return code, json.loads(path.read_text())["rows"]

    return run


def test_a_layer_of_experts_is_timed_beside_the_dense_one(bench):
    code, rows = bench("--moe", "tiny-moe", "--batch", "1,3")
    assert code == cli.Exit.FINE
    assert [(row["way"], row["batch"]) for row in rows] == [("lq", 1), ("dense", 1), ("lq", 3), ("dense", 3)]
    for row in rows:
        assert row["verdict"] == "ok" and 0 < row["error"] <= row["allowed"] < 0.1 and row["phase"] == "layer"
        assert 0 < row["least"] <= row["seconds"] and row["light"] > 0
    # One token reads two experts of four, three read more.
    shape = SHAPES["tiny-moe"]
    assert rows[1]["weight_bytes"] == 2 * 3 * 2 * shape.hidden * shape.intermediate < rows[3]["weight_bytes"]


def test_a_wrong_layer_of_experts_is_named_and_not_timed(bench, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda model, backend, **how: lambda x: model(x) * (1.2 - 0.2 * (backend != "lq"))
    )
    code, rows = bench("--moe", "tiny-moe", "--batch", "2")
    assert code == cli.Exit.PROOF_FAILED
    assert [(row["way"], row["verdict"], row["seconds"] is None) for row in rows] == [
        ("lq", "WRONG", True), ("dense", "ok", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--moe", "tiny"), "--moe is 'tiny'; accepted: mixtral-8x7b | tiny-moe"),
        (("--moe", "tiny-moe", "--model", "tiny"), "one of --model and --moe"),
        (("--moe", "tiny-moe", "--context", "64"), "nothing in a bench of moe; it is for model | transformers"),
    ],
)
def test_options_of_another_bench_are_refused(options, says, capsys):
    assert cli.main(["bench", "--device", "cpu", *options]) == cli.Exit.USAGE
    assert says in capsys.readouterr().err


def test_tokens_are_drawn_until_no_rounding_changes_their_routing():
    layer = made(lambda: Mixture(SMALL), torch.device("cpu"), torch.bfloat16)
    torch.manual_seed(0)
    assert bool(moe_bench._undecided(layer, torch.randn(50, SMALL.hidden).bfloat16()).any())
    assert not bool(moe_bench._undecided(layer, moe_bench._tokens(layer, 50, SMALL.hidden, torch.device("cpu"))).any())
