"""Seeded faults in our own passes and kernels. Each must be caught: by the proof, by verify, or by a test's oracle."""

import dataclasses
import functools
from random import Random

import pytest
import torch

from lqcompile.backend import Compiled
from lqcompile.config import Config
from lqcompile.freshness import Snapshot
from lqcompile.kernels import dense, layout, ops, registry
from lqcompile.passes import constants, grouping, idioms, lower, pack, pipeline, plan, prove, recognise
from lqcompile.passes.canonicalize import SPELLINGS

from .corpus import draw
from .fuzz import judge, run_batch

COUNT = 6
IDIOM = {idioms.name_of(i): i for i in idioms.discover()}


def wrapped(patch, owner, name, change):
    """Replaces owner.name by a function that calls `change(original, *args)`."""
    original = getattr(owner, name)
    patch.setattr(owner, name, functools.wraps(original)(functools.partial(change, original)))


def after(patch, owner, name, change):
    """Replaces owner.name by a function that changes its result."""
    wrapped(patch, owner, name, lambda original, *a, **k: change(original(*a, **k)))


def trusting(patch):
    """A prover and a verifier that accept anything, so that only an oracle is left."""
    patch.setattr(prove, "prove", lambda *a: "bit_exact")
    patch.setattr(pipeline, "verify", lambda *a: None)


def unverified(patch):
    """No verifier."""
    patch.setattr(pipeline, "verify", lambda *a: None)


def misread(field, change):
    """A reader that changes one field of every weight that it reads; by_value may not come to the rescue."""

    def apply(patch):
        for idiom in IDIOM.values():
            after(patch, idiom, "read", lambda q: _changed(q, field, change))

    return apply


def _changed(q, field, change):
    value = getattr(q, field)
    return q if value is None else dataclasses.replace(q, **{field: change(value)})


def _next_group(t):
    return t.roll(1, 1)


def _last_is_first(codes):
    return torch.cat([codes[:, :-1], codes[:, :1]], 1)


def _parts(place, change):
    """A kernel that sees one of its parts changed: 0 is the first plane, 1 the scale."""

    def altered(original, parts, call, dtype):
        planes = 1
        parts = list(parts)
        at = 0 if place == 0 else planes + place - 1
        parts[at] = change(parts[at])
        return original(parts, call, dtype)

    return lambda patch: wrapped(patch, dense, "dequantize", altered)


def _zeroed(index):
    def change(w):
        w[index] = 0
        return w

    return lambda patch: after(patch, dense, "dequantize", change)


def _no_bias(patch):
    kernel = registry.KERNELS["dense"]
    patch.setitem(
        registry.KERNELS,
        "dense",
        dataclasses.replace(kernel, run=lambda x, p, bias, c, out: kernel.run(x, p, None, c, out)),
    )


def _code_15(patch):
    after(patch, layout.Tiles, "unpack", lambda codes: codes.clamp(max=14))


def _relabelled(name, swap):
    def apply(patch):
        original = SPELLINGS[name]

        def change(*args):
            c = original(*args)
            return dataclasses.replace(c, **swap(c))

        patch.setitem(SPELLINGS, name, change)

    return apply


def _forgets_scale(patch):
    def change(original, *args):
        output, _ = original(*args)
        return output, []

    original = recognise.Recogniser._scalings
    patch.setattr(recognise.Recogniser, "_scalings", lambda *args: change(original, *args))


def _batch_reversed(patch):
    original = plan.Planner.plan
    patch.setattr(
        plan.Planner,
        "plan",
        lambda self, match: (p := original(self, match)) and dataclasses.replace(p, packed=p.packed[::-1]),
    )


def _no_perm(patch):
    after(patch, plan, "pack", lambda packed: setattr(packed, "perm", None) or packed)


def _perm_reversed(patch):
    def change(packed):
        packed.perm = None if packed.perm is None else packed.perm.flip(0)
        return packed

    after(patch, plan, "pack", change)


def _order_not_inverted(patch):
    patch.setattr(pack, "_order", lambda perm, across: perm)


def _blind_to_writes(patch):
    patch.setattr(constants, "written", lambda node: [])
    patch.setattr(lower, "written", lambda node: [])
    patch.setattr(constants.Constants, "check_versions", lambda self, cut: None)
    trusting(patch)


def _one_pack_for_equal_slices(patch):
    class Forgetful(dict):
        def __contains__(self, key):
            return super().__contains__(key[0])

        def __getitem__(self, key):
            return super().__getitem__(key[0])

        def __setitem__(self, key, value):
            super().__setitem__(key[0], value)

    original = recognise.Recogniser.__init__

    def init(self, *args, **named):
        original(self, *args, **named)
        self._seen = Forgetful()

    patch.setattr(recognise.Recogniser, "__init__", init)


def _group_off(patch):
    original = grouping.Groups.each
    patch.setattr(grouping.Groups, "each", lambda self, t, n, k: original(self, t, n, k).roll(1, 0))


def _no_bias_node(patch):
    wrapped(
        patch,
        lower,
        "_gemm",
        lambda original, p, packed, emit, inputs, x, bias: original(p, packed, emit, inputs, x, None),
    )


def _half_scales(patch):
    original = layout.Layout.pack
    patch.setattr(
        layout.Layout,
        "pack",
        lambda self, w: [t.half().to(t.dtype) if t.is_floating_point() else t for t in original(self, w)],
    )


def _everything_constant(patch):
    def is_constant(self, node, constant):
        if node.op in ("placeholder", "get_attr"):
            return node in self.values
        return node.op.startswith("call") and any(i in constant for i in node.all_input_nodes)

    patch.setattr(constants.Constants, "_is_constant", is_constant)
    trusting(patch)


def _linear_as_at(patch):
    _relabelled("linear", lambda c: {"b_labels": c.b_labels[::-1]})(patch)


def _transposed_output(patch):
    _relabelled("mm", lambda c: {"y_labels": c.y_labels[::-1]})(patch)


def both(*patches):
    return lambda patch: [apply(patch) for apply in patches] and None


def _swapped_nibbles(patch):
    wrapped(patch, layout, "unpack_plane", lambda original, plane, *rest: original((plane >> 4) | (plane << 4), *rest))


def _any_strides(patch):
    patch.setattr(lower, "_with_strides", lambda emit, y, wanted: y)


N4 = {"idiom": "affine", "spelling": "linear"}
PERM = {"idiom": "affine", "only": "column_order"}
BINARY, TABLE = {"idiom": "binary", "spelling": "mm"}, {"idiom": "table", "spelling": "mm"}
ACROSS = {"kind": "mutations", "only": "axis_0", "spelling": "linear"}
BIAS, SCALED = {"spelling": "linear_bias"}, {"spelling": "addmm_scaled"}
# name: (fault, the cases that show it, which check catches it first)
MUTANTS = {
    "reader: scale of the neighbour group": (misread("scale", _next_group), N4, "proof"),
    "reader: scale of the neighbour row": (misread("scale", lambda t: t.roll(1, 0)), N4, "proof"),
    "reader: zero ignored": (misread("zero", torch.zeros_like), N4, "proof"),
    "reader: code of the next column": (misread("codes", _next_group), N4, "proof"),
    "reader: codes one up": (misread("codes", lambda c: c + 1), N4, "proof"),
    "reader: last bit lost": (misread("codes", lambda c: c & ~1), N4, "proof"),
    "reader: last column of codes lost": (misread("codes", _last_is_first), N4, "proof"),
    "reader: planes reversed": (misread("alpha", lambda a: a.flip(-1)), BINARY, "proof"),
    "reader: binary offset ignored": (misread("offset", torch.zeros_like), BINARY, "proof"),
    "reader: table reversed": (misread("table", lambda t: t.flip(-1)), TABLE, "proof"),
    "reader: perm reversed": (misread("perm", lambda p: p.flip(0)), PERM, "proof"),
    "groups: first group of the next row": (_group_off, N4, "proof"),
    "any reader, trusted: neighbour row": (both(trusting, misread("scale", lambda t: t.roll(1, 0))), N4, "oracle"),
    "any reader, trusted: zero ignored": (both(trusting, misread("zero", torch.zeros_like)), N4, "oracle"),
    "any reader, trusted: last bit lost": (both(trusting, misread("codes", lambda c: c & ~1)), N4, "oracle"),
    "any reader, trusted: perm dropped": (both(trusting, misread("perm", lambda p: None)), PERM, "oracle"),
    "labels: linear as x @ w": (_linear_as_at, {"spelling": "linear"}, "any"),
    "labels: output transposed": (_transposed_output, {"spelling": "weight_first_t"}, "verify"),
    "alpha ignored": (_relabelled("addmm", lambda c: {"alpha": 1.0}), SCALED, "verify"),
    "beta ignored": (_relabelled("addmm", lambda c: {"beta": 1.0}), SCALED, "verify"),
    "bias forgotten by canonicalize": (_relabelled("linear", lambda c: {"bias": None}), BIAS, "verify"),
    "bias forgotten by lower": (_no_bias_node, BIAS, "verify"),
    "bias forgotten by the kernel": (_no_bias, BIAS, "verify"),
    "scale after the matmul forgotten": (_forgets_scale, {"spelling": "scale_after", "idiom": "affine"}, "verify"),
    "batch of weights reversed": (_batch_reversed, {"spelling": "bmm_two"}, "verify"),
    "act-order forgotten": (_no_perm, PERM, "verify"),
    "act-order reversed, unverified": (both(unverified, _perm_reversed), PERM, "oracle"),
    "across: outputs out of order": (_no_perm, ACROSS, "verify"),
    "across: order not inverted": (_order_not_inverted, ACROSS, "verify"),
    "across: order not inverted, unverified": (both(unverified, _order_not_inverted), ACROSS, "oracle"),
    "across, trusted: scale of the neighbour input": (both(trusting, misread("scale", lambda t: t.roll(1, 0))), ACROSS,
                                                      "oracle"),
    "batch of weights reversed, unverified": (both(unverified, _batch_reversed), {"spelling": "bmm_two"}, "oracle"),
    "kernel: last row of the weight zero": (both(unverified, _zeroed(-1)), N4, "oracle"),
    "kernel: last column of the weight zero": (both(unverified, _zeroed((slice(None), -1))), N4, "oracle"),
    "kernel: one element zero": (_zeroed((0, 0)), N4, "oracle"),
    "kernel: code 15 read as 14": (_code_15, {"idiom": "table", "spelling": "linear"}, "any"),
    "kernel: nibbles swapped": (_swapped_nibbles, {"spelling": "linear"}, "verify"),
    "kernel: scale of the neighbour row": (_parts(1, lambda t: t.roll(1, 0)), N4, "verify"),
    "kernel: scales in half precision": (_half_scales, N4, "oracle"),
    "strides of the result": (_any_strides, {"spelling": "conv2d"}, "oracle"),
    "writes from the input unseen": (_blind_to_writes, {"kind": "mutations", "only": "written_from_x"}, "oracle"),
    "inputs taken for constants": (_everything_constant, {"kind": "mutations", "only": "scale_from_x"}, "any"),
}  # fmt: skip


@functools.cache
def clean(**cases):
    """The cases pass without the fault; once for each selection."""
    return not any(v.failure for v in _run(cases))


def _run(cases):
    return judge(range(COUNT), **{"kind": "dressings", **cases})


def _caught_by(verdict):
    """Which check spoke first: `refused` and `Broken` come from ours, `wrong` from the oracle."""
    if "Broken" in verdict.detail:
        return "verify"
    if verdict.failure == "refused" and any(word in verdict.detail for word in ("PROOF_FAILED", "EAGER_DIFFERS")):
        return "proof"
    return "oracle" if verdict.failure == "wrong" else verdict.failure


@pytest.fixture
def patch(monkeypatch):
    """A monkeypatch under which only the readable kernel runs: faults are seeded in that one."""
    for name in list(registry.discover()):
        if name != "dense":
            monkeypatch.delitem(registry.KERNELS, name)
    monkeypatch.setattr(dense, "FAST", {})
    ops.parse_route.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    ops.parse_route.cache_clear()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_mutant_is_caught(name, patch):
    fault, cases, catcher = MUTANTS[name]
    assert clean(**cases)
    fault(patch)
    ops.parse_route.cache_clear()
    caught = {_caught_by(v) for v in _run(cases)} - {""}
    assert caught if catcher == "any" else catcher in caught, f"survived: {caught}"


def test_equal_slices_that_share_one_weight_are_caught(patch):
    def wrong():
        case, other = (draw(Random("0"), "dressings", "affine", "linear") for _ in range(2))
        for name, value in other.tensors.items():
            other.tensors[name] = value.flip(0)
        return {_caught_by(v) for v in run_batch([case, other])}

    assert wrong() == {""}
    _one_pack_for_equal_slices(patch)
    unverified(patch)
    assert "oracle" in wrong()


class Stale(torch.nn.Module):
    """A row-scaled 4-bit layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 8, (16, 32), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(16, 1) + 0.1)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.codes * self.scale)


def _fresh(model, x, change):
    """Whether the compiled layer gives the new result after `change`."""

    def backend(module, inputs):
        outcome = pipeline.run(module, inputs, Config(strict=True))
        return Compiled(module, inputs, Config(), outcome, outcome.lowered.module)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(x)
        change(model)
        return torch.allclose(compiled(x), model(x), atol=1e-4)


@pytest.mark.parametrize("change", [
    lambda m: m.codes.neg_().clamp_(max=7),
    lambda m: m.scale.mul_(3),
    lambda m: m.load_state_dict({k: v.flip(0) for k, v in m.state_dict().items()}),
], ids=["codes", "scale", "state_dict"])  # fmt: skip
def test_a_freshness_check_that_never_fires_is_caught(change, monkeypatch):
    torch.manual_seed(0)
    assert _fresh(Stale(), torch.randn(3, 32), change)
    monkeypatch.setattr(Snapshot, "changed", lambda self, tensors: False)
    assert not _fresh(Stale(), torch.randn(3, 32), change)


def test_there_are_enough_mutants():
    assert len(MUTANTS) >= 16
