"""Deferred tensors: blocks of them are what eager would have made, and recognising needs little memory."""

from random import Random

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import nn

from lqcompile.formats import dequantize
from lqcompile.passes import deferred, recognise
from lqcompile.passes.constants import Constants
from lqcompile.passes.deferred import Block, Deferred, codes_of, defer, held, spans
from lqcompile.passes.evaluate import undisturbed
from lqcompile.passes.pipeline import static_values
from lqcompile.passes.recognise import Kept, Match, Recogniser

from .fuzz import judge
from .libraries.harness import measure
from .memory import peak
from .models import Dequant
from .plain import PLAIN
from .test_plain import Layer

aten = torch.ops.aten


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything is deferred, and cut into many blocks."""
    monkeypatch.setattr(deferred, "LEAST", 2)
    monkeypatch.setattr(deferred, "BLOCK", {"cpu": 64})


@pytest.mark.parametrize("name", PLAIN)
def test_every_spelling_by_blocks(name, small_blocks):
    form, make = PLAIN[name]
    tensors, weight = make()
    row = measure(name, lambda: (Layer(tensors, weight), torch.eye(weight(*tensors.values()).shape[1])))
    assert not row.wrong, row
    assert [(d.outcome, d.format and d.format.form) for d in row.decisions] == [("rewritten", form)], row


@pytest.mark.parametrize("kind", ["dressings", "mutations"])
@hypothesis.settings(
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    max_examples=4,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(seed=st.integers(0, 2**60))
def test_verdicts_by_blocks(kind, seed, small_blocks):
    assert not [f"{v.failure}: {v.detail}\n{v.case}" for v in judge(range(seed, seed + 3), kind) if v.failure]


def steps(random, t):
    """One operation that a slice may be made of, and its arguments, for a tensor of that shape."""
    d = random.randrange(t.ndim)
    other = list(t.shape)
    for i in range(t.ndim):
        other[i] = random.choice((1, other[i]))
    value = torch.rand(other, generator=torch.Generator().manual_seed(random.randrange(999))) + 0.5
    order = random.sample(range(t.ndim), t.ndim)
    low = random.randrange(t.shape[d])
    found = [
        (aten.mul.Tensor, (value,)),
        (aten.sub.Tensor, (value,)),
        (aten.permute.default, (order,)),
        (aten.unsqueeze.default, (random.randint(0, t.ndim),)),
        (aten.slice.Tensor, (d, low, t.shape[d], random.choice((1, 2)))),
        (aten.select.int, (d, low)),
        (aten.reshape.default, ([-1, t.shape[-1]],)),
        (aten.reshape.default, ([t.numel()],)),
        (aten.reshape.default, ([*t.shape[:d], 1, *t.shape[d:]],)),
        (aten._to_copy.default, ()),
        (aten.flip.default, ([d],)),
        (aten.sum.dim_IntList, ([d], random.random() < 0.5)),
        (aten.index.Tensor, ([None] * d + [torch.tensor([0, low, low, 0])],)),
        (aten.expand.default, ([3, *t.shape],)),
        (aten.squeeze.default, ()),
    ]
    if t.shape[d] % 2 == 0:
        found.append((aten.reshape.default, ([*t.shape[:d], 2, t.shape[d] // 2, *t.shape[d + 1 :]],)))
    if t.shape[d] == 1:
        found.append((aten.expand.default, ([*t.shape[:d], 4, *t.shape[d + 1 :]],)))
    return random.choice(found)


@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture], deadline=None
)
@hypothesis.given(seed=st.integers(0, 2**60))
def test_every_part_is_what_eager_makes(seed, small_blocks):
    random = Random(seed)
    eager = torch.rand(random.choice([(6, 8), (4, 3, 8), (16, 1), (2, 5, 4)]), dtype=torch.float64)
    with undisturbed():
        late = defer(eager)
        for _ in range(random.randint(2, 7)):
            if eager.ndim == 0 or eager.ndim > 5:
                break
            func, args = steps(random, eager)
            eager, late = func(eager, *args), func(late, *args)
            if random.random() < 0.3:
                pair = (torch.stack, torch.cat)[random.randrange(2)]
                dim = random.randrange(max(eager.ndim, 1))
                if eager.ndim:
                    eager, late = pair([eager, eager * 2], dim), pair([late, late * 2], dim)
        assert (late.dtype, late.shape) == (eager.dtype, eager.shape)
        for axis in range(eager.ndim):
            for low, high in spans(eager, axis):
                torch.testing.assert_close(Block().part(late, low, high, axis), eager.narrow(axis, low, high - low))
        torch.testing.assert_close(held(late), eager)


def test_memory_that_is_not_laid_out_is_not_read(small_blocks):
    given = torch.arange(24.0).view(4, 6)
    with undisturbed():
        late = defer(given[1:])
        view = aten.as_strided.default(late, [2, 3], [3, 1], 0)
        assert torch.equal(held(view), given.as_strided([2, 3], [3, 1], 0))
        with pytest.raises(NotImplementedError):
            aten.as_strided.default(late * 2, [2, 3], [3, 1], 0)


@hypothesis.given(low=st.integers(-40000, 40000), span=st.integers(0, 70000), dtype=st.sampled_from(["i4", "i8"]))
def test_codes_are_held_in_the_narrowest_type(low, span, dtype):
    t = torch.randint(low, low + span + 1, (7, 9), dtype={"i4": torch.int32, "i8": torch.int64}[dtype])
    codes, least, most = codes_of(t, (7, 9))
    assert (least, most) == (int(t.min()), int(t.max()))
    if least >= -(2**15) and most < 2**15:
        assert torch.equal(codes.to(t.dtype), t)
        assert codes.dtype.itemsize == 1 or least < -128 or most > 255 or least < 0 <= 127 < most


def recogniser(model, x, threads=1):
    """A recogniser that is ready to run on a model's graph."""
    kept = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=lambda module, inputs: kept.append((module, inputs)) or module.forward)(x)
    module, inputs = kept[-1]
    return Recogniser(module, Constants(module.graph, static_values(module, inputs)), strict=True, threads=threads)


def test_recognising_needs_less_than_one_dense_layer():
    n = k = 4096
    ready = recogniser(Dequant(n, k, 128).half(), torch.randn(1, k).half())
    found = []
    assert peak(lambda: found.extend(ready.run())) < n * k * torch.float16.itemsize
    (match,) = found
    assert isinstance(match, Match)
    (weight,) = match.recovered.weights
    held_by = [t for t in vars(weight).values() if isinstance(t, torch.Tensor)]
    assert held_by and all(type(t) is torch.Tensor and not isinstance(t, Deferred) for t in held_by)


def test_how_often_the_device_is_waited_for_does_not_grow_with_the_weight(monkeypatch):
    monkeypatch.setattr(deferred, "BLOCK", {"cpu": 1 << 30})
    counts = []
    for n in (512, 1024):
        ready = recogniser(Dequant(n, 512, 32), torch.randn(1, 512))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            (match,) = ready.run()
        assert isinstance(match, Match)
        waits = ("aten::item", "aten::_local_scalar_dense", "aten::equal", "aten::nonzero")
        counts.append(sum(e.count for e in profile.key_averages() if e.key in waits))
    assert counts[0] == counts[1] < 60


class Several(nn.Module):
    """Layers of two structures, one that is used twice, one with NaN among its scales and a float one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Dequant(64, 64, 32, seed) for seed in range(5)])
        self.layers.extend([Dequant(64, 64, 16), nn.Linear(64, 64), self.layers[0]])
        self.layers[3].scale.data[5] = torch.nan

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_several_threads_find_what_one_does(monkeypatch):
    monkeypatch.setattr(recognise, "READ_AHEAD", 1)

    ahead, pool = [], recognise.ThreadPoolExecutor
    monkeypatch.setattr(recognise, "ThreadPoolExecutor", lambda threads: ahead.append(threads) or pool(threads))

    def told(threads):
        ready = recogniser(Several().eval(), torch.randn(3, 64), threads)
        found = ready.run()
        assert ready.reader.analysed == 2
        return found

    one, several = told(1), told(2)
    assert ahead == [2]
    assert [type(f) for f in one] == [Match] * 3 + [Kept] + [Match] * 2 + [Kept] + [Match]
    for a, b in zip(one, several, strict=True):
        assert (type(a), a.where.path) == (type(b), b.where.path)
        if isinstance(a, Kept):
            assert (a.reason, a.near_misses) == (b.reason, b.near_misses)
        else:
            assert torch.equal(dequantize(a.recovered.weights[0]), dequantize(b.recovered.weights[0]))
    assert several[0].recovered is several[-1].recovered
