"""Matmuls of one x in one op, and what follows a matmul done by it: the same numbers, and only where it is the same."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import lqcompile
from lqcompile.kernels import pages, registry
from lqcompile.kernels.epilogues import unfused

from .models import Dequant, close, compiled
from .test_recognise import outcome_of


@pytest.fixture
def fusing(monkeypatch):
    """Makes the CPU's kernels claim what those of a GPU do: an epilogue of their own."""
    registry.discover()

    def fused(kernel):
        def run(x, parts, bias, call, out, other=None):
            if call.epilogue:
                return unfused(kernel.run, x, parts, bias, call, out, other)
            return kernel.run(x, parts, bias, call, out)

        return run

    for name in ("quick_cpu", "dense"):
        kernel = registry.KERNELS[name]
        made = dataclasses.replace(kernel, run=fused(kernel), epilogues=("silu_mul", "add"))
        monkeypatch.setitem(registry.KERNELS, name, made)


class Heads(nn.Module):
    """Query, key and value as they are written everywhere; `spell` gives the x of each."""

    def __init__(self, sizes=(64, 32, 32), biased=(True, True, True), spell=lambda x, i: x):
        super().__init__()
        self.layers = nn.ModuleList(Dequant(n, 64, seed=i) for i, n in enumerate(sizes))
        for layer, keeps in zip(self.layers, biased, strict=True):
            if not keeps:
                layer.bias = None
        self.spell = spell

    def forward(self, x):
        out = []
        for i, layer in enumerate(self.layers):
            given_ = self.spell(x, i)
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            out.append(F.linear(given_, layer.weight().to(x.dtype), bias))
        return tuple(out)


def gemms(outcome):
    """The custom ops of a lowered graph, by their epilogues."""
    nodes = outcome.lowered.module.graph.nodes if outcome.lowered else []
    return [n.args[7] for n in nodes if getattr(n.target, "namespace", "") == "lq"]


def alike(found, wanted):
    return len(found) == len(wanted) and all(
        close(a, b) and a.stride() == b.stride() for a, b in zip(found, wanted, strict=True)
    )


@given(
    sizes=st.lists(st.sampled_from([8, 32, 40, 64]), min_size=2, max_size=4),
    biased=st.lists(st.booleans(), min_size=4, max_size=4),
    shape=st.sampled_from([(64,), (1, 64), (5, 64), (2, 3, 64), (2, 1, 64)]),
)
def test_matmuls_of_one_x_are_one(sizes, biased, shape):
    model, x = Heads(sizes, biased[: len(sizes)]).eval(), torch.randn(shape)
    outcome, got = outcome_of(model, x)
    assert gemms(outcome) == [""] and alike(got, model(x))
    assert [d.problem["together"] for d in outcome.decisions] == [len(sizes)] * len(sizes)
    assert {d.problem["n"] for d in outcome.decisions} == set(sizes)
    total = sum(part.nbytes for part in outcome.plans[0].packed[0].parts)
    assert abs(sum(d.bytes_after for d in outcome.decisions) - total) <= len(sizes)


@pytest.mark.parametrize(
    "spell",
    [lambda x, i: x.to(torch.float32), lambda x, i: x.float().contiguous(), lambda x, i: x.reshape(-1, 64)],
)
def test_the_same_x_computed_again_is_one_x(spell):
    model, x = Heads(spell=spell).eval(), torch.randn(3, 64)
    outcome, got = outcome_of(model, x)
    assert gemms(outcome) == [""] and alike(got, model(x))


def written_between(x, i):
    return x.mul_(2.0) if i == 1 else x


def other_x(x, i):
    return x + i


@pytest.mark.parametrize("spell", [written_between, other_x, lambda x, i: x.view(3, 64)[:, :64].clone().mul_(i + 1)])
def test_what_is_not_the_same_x_stays_apart(spell):
    model, x = Heads(spell=spell).eval(), torch.randn(3, 64)
    outcome, got = outcome_of(model, x.clone())
    assert alike(got, model(x.clone())) and len(gemms(outcome)) >= 2


def test_weights_of_another_format_or_used_twice_stay_apart():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = Dequant(32, 64, seed=1), Dequant(32, 64, group=16, seed=2), Dequant(32, 64, seed=3)

        def forward(self, x):
            return self.a(x), self.b(x), self.c(x), self.c(x + 1)

    model, x = Mixed().eval(), torch.randn(3, 64)
    outcome, got = outcome_of(model, x)
    assert gemms(outcome) == [""] * 4 and alike(got, model(x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_any_change_of_one_of_them_is_used(dynamic):
    model = Heads(biased=(True, False, True)).eval()
    fast = torch.compile(model, backend="lq", dynamic=dynamic, options={"strict": True})
    with torch.no_grad():
        for m in (3, 4, 9):
            x = torch.randn(m, 64)
            assert alike(fast(x), model(x))
        model.layers[1].q.bitwise_xor_(5)
        assert alike(fast(x), model(x))
        model.layers[2].bias.mul_(3)
        assert alike(fast(x), model(x))
        model.layers[0].bias = nn.Parameter(torch.randn(64))
        assert alike(fast(x), model(x))
        # Nothing but ones needs no zeros and one group: another format.
        model.layers[0].zero.zero_()
        model.layers[0].q.fill_(0x11)
        assert alike(fast(x), model(x))


def test_gradients_pass_through():
    model, x = Heads(biased=(False,) * 3).eval(), torch.randn(3, 64, requires_grad=True)
    fast = compiled(model)
    wanted, found = (torch.autograd.grad([y.sin().sum() for y in f(x)], x)[0] for f in (model, fast))
    assert close(found, wanted)


class Gated(nn.Module):
    def __init__(self, n=64, k=64, order=0):
        super().__init__()
        self.gate, self.up, self.down = Dequant(n, k, seed=1), Dequant(n, k, seed=2), Dequant(k, n, seed=3)
        self.order = order

    def forward(self, x):
        gate, up = F.silu(self.gate(x)), self.up(x)
        return gate * up if self.order == 0 else up * gate


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("n", [8, 64, 72])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64)])
def test_silu_mul_is_done_by_the_op(n, order, shape, fusing):
    model, x = Gated(n, order=order).eval(), torch.randn(shape)
    outcome, got = outcome_of(model, x)
    assert gemms(outcome) == ["silu_mul"] and alike([got], [model(x)])
    assert [d.problem["epilogue"] for d in outcome.decisions] == ["silu_mul"] * 2
    names = [str(n.target) for n in outcome.lowered.module.graph.nodes]
    assert not any("silu" in name or "mul" in name for name in names)


def twice(model, x):
    gate = F.silu(model.gate(x))
    return gate * model.up(x) + gate


def shown(model, x):
    up = model.up(x)
    return F.silu(model.gate(x)) * up, up


def squared(model, x):
    gate = F.silu(model.gate(x))
    return gate * gate + model.up(x)


def gelu(model, x):
    return F.gelu(model.gate(x)) * model.up(x)


def broadcast(model, x):
    return F.silu(model.gate(x)) * model.up(x[:1])


def scaled(model, x):
    return torch.add(model.gate(x), x, alpha=2)


def row_added(model, x):
    return model.gate(x) + x[0]


def itself(model, x):
    y = model.gate(x)
    return y + y


def in_place(model, x):
    y = model.gate(x)
    x.mul_(2)
    return y + x.clone()


NOT_FUSED = (twice, shown, squared, gelu, broadcast, scaled, row_added, itself, in_place)


@pytest.mark.parametrize("program", NOT_FUSED, ids=lambda f: f.__name__)
def test_what_only_looks_like_an_epilogue_is_none(program, fusing):
    model, x = Gated().eval(), torch.randn(3, 64)
    outcome, got = outcome_of(lambda x: program(model, x), x.clone())
    wanted = program(model, x.clone())
    assert set(gemms(outcome)) <= ({"", "add"} if program is squared else {""})
    assert alike(got if isinstance(got, tuple) else [got], wanted if isinstance(wanted, tuple) else [wanted])


class Block(nn.Module):
    def __init__(self, operator, size=64):
        super().__init__()
        self.mlp, self.operator = Gated(size, size), operator

    def forward(self, x):
        return self.operator(x.sin(), self.mlp.down(self.mlp(x)))


@pytest.mark.parametrize("operator", [torch.add, lambda r, y: r + y, lambda r, y: y + r, lambda r, y: y.add(r)])
def test_a_residual_is_added_by_the_op(operator, fusing):
    model, x = Block(operator).eval(), torch.randn(2, 3, 64)
    outcome, got = outcome_of(model, x)
    assert gemms(outcome) == ["silu_mul", "add"] and alike([got], [model(x)])


def test_two_results_added_to_one_another(fusing):
    model, x = Gated().eval(), torch.randn(3, 64)
    outcome, got = outcome_of(lambda x: model.gate(x) + model.down(x.sin()), x)
    assert sorted(gemms(outcome)) == ["", "add"] and alike([got], [model.gate(x) + model.down(x.sin())])


def test_epilogues_wait_for_kernels_that_have_them():
    model, x = Block(torch.add, 2048).eval(), torch.randn(1, 2048)
    outcome, got = outcome_of(model, x)
    assert gemms(outcome) == ["", ""] and alike([got / got.norm()], [model(x) / got.norm()])
    with torch.no_grad():
        report = lqcompile.explain(model.half(), x.half(), options={"arch": "sm_90"})
    assert [d.problem.get("epilogue") for d in report.decisions] == ["silu_mul", "silu_mul", "add"]


def test_epilogues_through_inductor(fusing):
    model = nn.Sequential(Block(torch.add), Block(torch.add)).eval()
    fast = torch.compile(model, backend="lq", dynamic=True, options={"strict": True})
    with torch.no_grad():
        for m in (2, 5, 1):
            x = torch.randn(m, 64)
            assert close(fast(x) / 1e5, model(x) / 1e5)
        model[1].mlp.up.scale.mul_(1.5)
        assert close(fast(x) / 1e5, model(x) / 1e5)


class Attention(nn.Module):
    """Query, key and value of one x, and a layer whose result is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = Dequant(64, 128, seed=1), Dequant(32, 128, seed=2), Dequant(32, 128, seed=3)
        self.o = Dequant(128, 64, seed=4)

    def forward(self, x):
        h = x.sin()
        return x + self.o(self.q(h) * torch.cat((self.k(h), self.v(h)), -1)) * 1e-3


class Residual(Attention):
    """The same with nothing between the layer and the sum."""

    def forward(self, x):
        h = x.sin()
        return x + self.o(self.q(h) * torch.cat((self.k(h), self.v(h)), -1))


def converted(kind, device, rows=3):
    """Two equal models, one of them converted, and an x."""
    model, x = kind().eval().to(device), torch.randn(rows, 128, device=device)
    return model, lqcompile.convert(copy.deepcopy(model), x, options={"strict": True}), x


def near(a, b):
    return bool((a - b).norm() <= 1e-2 * b.norm())


@pytest.mark.parametrize("kind", [Attention, Residual])
def test_converted_layers_are_merged_as_others_are(kind, device):
    model, packed, x = converted(kind, device)
    wanted, alone = model(x), packed(x)
    before = sum(part.nbytes for layer in (packed.q, packed.k, packed.v) for part in layer.parts)
    ops = gemms(outcome_of(model, x)[0])
    outcome, got = outcome_of(packed, x)
    assert gemms(outcome) == ops and len(ops) == 2
    assert near(alone, wanted) and near(got, wanted) and near(packed(x), wanted)
    assert [d.problem.get("together") for d in outcome.decisions][:3] == [3] * 3
    assert all(d.reason is lqcompile.Reason.PACKED for d in outcome.decisions)
    # One copy: the layers' parts are views of what the op reads, and nothing else of it is held.
    first = outcome.plans[0].packed[0]
    storages = {t.untyped_storage().data_ptr() for layer in (packed.q, packed.k, packed.v) for t in layer.parts}
    assert storages == {part.untyped_storage().data_ptr() for part in first.parts}
    assert sum(part.untyped_storage().nbytes() for part in first.parts) < before + 64 * len(first.parts)
    again, _ = outcome_of(packed, x)
    assert [p.data_ptr() for p in again.plans[0].packed[0].parts] == [p.data_ptr() for p in first.parts]
    for other in (copy.deepcopy(packed), copy.deepcopy(packed).to("cpu").to(device)):
        assert torch.equal(other(x), packed(x)) and gemms(outcome_of(other, x)[0]) == ops
    empty = copy.deepcopy(packed)
    for part in empty.q.parts:
        part.zero_()
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(x), packed(x))


def test_a_residual_is_added_to_a_converted_layer(fusing):
    model, packed, x = converted(Residual, "cpu")
    outcome, got = outcome_of(packed, x)
    assert gemms(outcome) == ["", "add"] == gemms(outcome_of(model, x)[0]) and near(got, model(x))
    names = [str(n.target) for n in outcome.lowered.module.graph.nodes]
    assert not any("add" in name for name in names)


def test_a_converted_pair_whose_rows_do_not_stand_by_turns(fusing):
    model = Gated().eval()
    x = torch.randn(3, 64)
    packed = lqcompile.convert(copy.deepcopy(model), x, options={"strict": True})
    outcome, got = outcome_of(packed, x)
    assert gemms(outcome) == [""] and alike([got], [model(x)])


def test_any_change_of_a_converted_part_is_used(device):
    _, packed, x = converted(Attention, device)
    fast = compiled(packed)
    with torch.no_grad():

        def right():
            return near(fast(x), packed(x))

        assert right()
        packed.k.scale.mul_(3)
        packed.v.bias.add_(1)
        assert right()
        # What is put in another's place, and that back again, keeps its own values.
        old, new = packed.q.scale, packed.q.scale * 2
        kept = old.clone()
        packed.q.scale = new
        assert right() and torch.equal(old, kept)
        packed.q.scale = old
        assert right() and torch.equal(new, kept * 2) and torch.equal(old, kept)
        packed.k, packed.v = packed.v, packed.k
        assert right()
        packed.load_state_dict({name: t.clone() for name, t in packed.state_dict().items()}, assign=True)
        assert right()


def test_memory_that_others_hold_is_left_where_it_is(device):
    _, packed, x = converted(Attention, device)
    state, wanted = packed.state_dict(), packed(x)
    outcome, got = outcome_of(packed, x)
    assert gemms(outcome) == [] and near(got, wanted)
    assert state["k.scale"].data_ptr() == packed.k.scale.data_ptr()
    state.clear()
    packed.v = copy.deepcopy(packed.k)
    packed.v.planes = packed.k.planes
    outcome, got = outcome_of(packed, x)
    assert gemms(outcome) == [] and near(got, packed(x))


def test_adjoined_parts_are_views_of_one():
    parts = [torch.arange(12 * n, dtype=torch.int16).view(n, 3, 4).clone() for n in (2, 1, 3)]
    values = [part.clone() for part in parts]
    whole = pages.adjoin(parts)
    assert torch.equal(whole, torch.cat(values)) and all(map(torch.equal, parts, values))
    whole.neg_()
    assert all(torch.equal(part, -value) for part, value in zip(parts, values, strict=True))
    assert pages.adjoin(parts).data_ptr() == whole.data_ptr() == pages.adjoin(parts[:2]).data_ptr()
    assert pages.adjoin(parts[1:]).data_ptr() == parts[1].data_ptr()
    assert pages.adjoin(parts[::-1]) is None and pages.adjoin([parts[0], parts[0]]) is None
