"""GPTQModel: its PyTorch layer, 2 to 8 bits, with and without act-order."""

from __future__ import annotations

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from torch import nn

from .harness import Make, rows


def _with(bits: int, act_order: bool = False, group: int = 64, dtype: torch.dtype = torch.float16) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        g = torch.Generator().manual_seed(0)
        layer = TorchLinear(bits=bits, group_size=group, sym=True, desc_act=act_order, in_features=256,
                            out_features=128, bias=False, register_buffers=True, enable_wf_unsqueeze=True)  # fmt: skip
        for name in ("qweight", "qzeros"):
            t = getattr(layer, name)
            t.copy_(torch.randint(-(2**31), 2**31, t.shape, generator=g).to(t.dtype))
        layer.scales = (torch.rand(layer.scales.shape, generator=g) * 0.01 + 1e-3).to(dtype)
        if act_order:
            layer.g_idx.copy_(layer.g_idx[torch.randperm(256, generator=g)])
        layer.optimize = lambda *a, **k: None
        layer.post_init()
        return layer.eval(), rows(dtype=dtype)

    return make


CASES: dict[str, Make] = {
    **{f"{bits} bits": _with(bits) for bits in (2, 3, 4, 5, 6, 7, 8)},
    **{f"{bits} bits act-order": _with(bits, True) for bits in (4, 3)},
    "4 bits bf16": _with(4, dtype=torch.bfloat16),
}
