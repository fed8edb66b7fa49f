"""What the weights of a converted model take, and what is held on the way: `python -m tests.measure memory`."""

from __future__ import annotations

import dataclasses
import gc

import torch

import lqcompile
from lqcompile import PackedLinear, QuantLinear, backend, decoder
from lqcompile.kernels.layout import LAYOUTS
from tests.memory import peak


def measure(device: torch.device, layers: int) -> None:
    """What weights of Llama-3-8B's shape, int4 g128, take once they are converted, and at most on the way there.

    On a CPU the shape is a small one of the same proportions, and it is not seen when originals are freed: the most is
    then told too high, by up to all of them.
    """
    shape = dataclasses.replace(decoder.SHAPES["llama3-8b"], layers=layers)
    if device.type == "cpu":
        shape = dataclasses.replace(
            shape, hidden=1024, heads=8, kv_heads=2, head=128, intermediate=3584, vocabulary=1024
        )
    model = decoder.random(shape, device, torch.bfloat16, bits=4, group=128, method="rtn")
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    # A dense layer as it is multiplied by, and all of the quantized ones as they were.
    dense = max(2 * m.out_features * m.in_features for m in linears)
    originals, count = sum(t.nbytes for m in linears for t in m.buffers()), len(linears)
    linears.clear()
    most = peak(lambda: lqcompile.convert(model, options={"strict": True}), device.type)
    layers_ = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers_) == count, (len(layers_), count)
    formula = sum(LAYOUTS[m.layout].packed_bytes(m.format, m.out_features, m.in_features, device.type) for m in layers_)

    def told(when: str) -> None:
        """Memory behind the packed weights, of the model and of what "lq" compiled, each storage once."""
        tensors = [part for m in layers_ for part in m.parts]
        tensors += [t for compiled in backend._LIVE for t in compiled._packed]
        held = sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
        print(f"{when}: {held / 1e6:.3f} MB of weights, {100 * (held / formula - 1):+.2f} % of {formula / 1e6:.3f} MB")

    name = f"{layers} layers of Llama-3-8B's shape" if device.type == "cuda" else f"{layers} layers of {shape.hidden}"
    print(f"{name}, int4 g128 on {device}: {count} quantized layers of {originals / 1e6:.3f} MB")
    told("converted")
    print(
        f"most while converting, beside what was there before: {most / 1e6:.3f} MB; "
        f"one dense layer: {dense / 1e6:.3f} MB"
    )
    model.empty_cache(1, 64, torch.bfloat16)
    step = torch.compile(model, backend="lq", fullgraph=True, dynamic=False)
    with torch.no_grad(), backend.recording() as reports:
        step(torch.zeros((1, 1), dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    gc.collect()
    together = sum("together" in d.problem for r in reports for d in r.decisions)
    told(f"compiled, {together} of {count} layers run together with others")
