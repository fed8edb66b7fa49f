"""An evaluation played again on other tensors: what a fresh one gives, or none at all."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lqcompile.errors import Reason, Refused
from lqcompile.formats import dequantize
from lqcompile.passes import deferred
from lqcompile.passes.deferred import held
from lqcompile.passes.evaluate import evaluate, played, recorded
from lqcompile.passes.idioms import affine
from lqcompile.passes.prove import prove
from lqcompile.passes.recognise import Match

from .models import Dequant
from .plain_codes import PLAIN
from .test_deferred import recogniser, small_blocks  # noqa: F401
from .test_plain import Layer


def other_values(tensors):
    """Tensors laid out as these are: their rows change places, each in its own way."""
    return {name: t.roll(i + 1, 0) if t.ndim else t.clone() for i, (name, t) in enumerate(tensors.items())}


def told(found):
    return [
        [dequantize(w) for w in item.recovered.weights] if isinstance(item, Match) else (item.reason, item.near_misses)
        for item in found
    ]


@pytest.mark.parametrize("name", PLAIN)
def test_a_layer_after_an_equal_one_is_read_as_alone(name, small_blocks):  # noqa: F811
    _, make = PLAIN[name]
    tensors, weight = make()
    first, second = Layer(tensors, weight), Layer(other_values(tensors), weight)
    n, k = weight(*tensors.values()).shape
    x = torch.randn(3, k)
    alone = [told(recogniser(layer, x).run())[0] for layer in (first, second)]
    together = told(recogniser(nn.Sequential(first, nn.Linear(n, k), second), x).run())
    assert len(together) == 3
    for found, wanted in zip(together[::2], alone, strict=True):
        assert type(found) is type(wanted)
        if isinstance(wanted, list):
            torch.testing.assert_close(found, wanted, rtol=2.0**-48, atol=0)
        else:
            assert found == wanted


def test_equal_layers_are_traced_once(small_blocks):  # noqa: F811
    layers = nn.Sequential(*(Dequant(64, 64, 32, seed) for seed in range(5))).eval()
    # Bytes of the codes, zeros and scales where the first layer has others: read anew, or as before, but right.
    layers[2].zero.fill_(8)
    layers[3].scale.data[5] = torch.nan
    ready = recogniser(layers, torch.randn(2, 64))
    found = ready.run()
    assert [isinstance(f, Match) for f in found] == [True, True, True, False, True]
    assert ready.reader.played >= 2 and ready.reader.analysed == 1
    for layer, item in zip(layers, found, strict=True):
        if isinstance(item, Match):
            assert item.recovered.proof == "bit_exact"
            assert torch.equal(dequantize(item.recovered.weights[0]).float(), layer.weight())


def played_again(compute, first, second):
    """What a tape of `compute` on the first tensors gives for the second; None where there is no tape."""
    _, tape = recorded(compute, first)
    return None if tape is None else played(tape, second)[0]


def test_values_that_code_looked_at_are_not_played(small_blocks):  # noqa: F811
    codes, more = (torch.arange(start, start + 64, dtype=torch.uint8).view(8, 8) for start in (0, 100))
    plain = played_again(lambda q: [q.float() * 2], [codes], [more])
    assert torch.equal(held(plain.native), more.float() * 2)
    largest = played_again(lambda q: [q.float() / q.float().max()], [codes], [more])
    assert torch.equal(held(largest.native), more.float() / more.max())
    assert played_again(lambda q: [q.float() * float(q.max())], [codes], [more]) is None
    assert played_again(lambda q: [q.float() * (2 if bool((q > 63).any()) else 3)], [codes], [more]) is None


def test_what_is_not_kept_is_not_played(small_blocks, monkeypatch):  # noqa: F811
    monkeypatch.setattr(deferred, "FEW", 16)
    codes = torch.randint(0, 16, (8, 8), dtype=torch.uint8)
    assert played_again(lambda q: [q.float().sort(0).values], [codes], [codes.clone()]) is None


def test_other_layouts_are_refused(small_blocks):  # noqa: F811
    codes = torch.randint(0, 16, (8, 8), dtype=torch.uint8)
    _, tape = recorded(lambda q: [q.float() * 2], [codes])
    for other in (codes.t(), codes[:4], codes.to(torch.int8), torch.cat([codes, codes])[8:]):
        with pytest.raises(Refused):
            played(tape, [other])
    # Of which none was taken for the first.
    assert torch.equal(held(played(tape, [codes])[0].native), codes.float() * 2)


def test_a_tape_that_is_cleared_holds_no_tensor(small_blocks):  # noqa: F811
    codes = torch.randint(0, 16, (8, 8), dtype=torch.uint8)
    _, tape = recorded(lambda q: [(q >> 1).float() * 2], [codes])
    tape.clear()
    again = codes.clone()
    seen = weakref.ref(again.untyped_storage())
    assert torch.equal(held(played(tape, [again])[0].native), (codes >> 1).float() * 2)
    tape.clear()
    del again
    gc.collect()
    assert seen() is None
    assert len(evaluate(lambda q: [q.float()], [codes])) == 1


def other(t, place, change):
    """A copy of which one place is changed."""
    t = t.clone()
    t[place] = change(t[place])
    return t


PROOFS = {
    "as it is": (lambda q, w: (q, w), "bit_exact"),
    "a code": (lambda q, w: (replace(q, codes=other(q.codes, (-1, -1), lambda c: c ^ 1)), w), Reason.PROOF_FAILED),
    "a zero": (lambda q, w: (replace(q, zero=other(q.zero, (-1, 0), lambda z: z + 1)), w), Reason.PROOF_FAILED),
    "a scale": (
        lambda q, w: (replace(q, scale=other(q.scale, (-1, 0), lambda s: s * (1 + 2.0**-40))), w),
        Reason.PROOF_FAILED,
    ),
    "a scale by its last bit": (
        lambda q, w: (replace(q, scale=other(q.scale, (-1, 0), lambda s: s * (1 + 2.0**-52))), w),
        "float64_rounding",
    ),
    "eager's own by a rounding": (
        lambda q, w: (q, replace(w, native=other(held(w.native), (-1, 0), lambda v: v * (1 + 2.0**-22)))),
        "bit_exact",
    ),
    "eager's own": (
        lambda q, w: (q, replace(w, native=other(held(w.native), (-1, 0), lambda v: v * 1.01 + 1))),
        Reason.EAGER_DIFFERS,
    ),
    "eager's own is infinite": (
        lambda q, w: (q, replace(w, native=other(held(w.native), (-1, 0), lambda v: torch.inf))),
        Reason.NON_FINITE,
    ),
}


@pytest.mark.parametrize("name", PROOFS)
@pytest.mark.parametrize("block", [64, 1 << 17])
def test_a_proof_covers_every_weight(name, block, small_blocks, monkeypatch):  # noqa: F811
    monkeypatch.setattr(deferred, "BLOCK", {"cpu": block})
    layer, (change, wanted) = Dequant(64, 64, 32), PROOFS[name]

    def dequantized(q, scale, zero):
        codes = torch.stack([q & 15, q >> 4], -1).view(64, -1, 32)
        return [((codes.float() - zero.float()) * scale).view(64, 64)]

    (weight,) = evaluate(dequantized, [layer.q, layer.scale, layer.zero])
    qweight, weight = change(affine.read(weight), weight)
    if isinstance(wanted, str):
        assert prove(qweight, weight, False) == wanted
    else:
        with pytest.raises(Refused) as refused:
            prove(qweight, weight, False)
        assert refused.value.reason is wanted
