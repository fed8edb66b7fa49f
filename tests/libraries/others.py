"""NNCF, AMD Quark, Brevitas."""

from __future__ import annotations

import torch
from torch import nn

from .harness import Make, linear, rows


class Wrapped(nn.Module):
    """NNCF keeps its hooks in a submodule of the model, so that is to be more than a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def _nncf(mode: str, **more: int) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        import nncf

        model = Wrapped()
        data = nncf.Dataset([rows()])
        return nncf.compress_weights(model, mode=getattr(nncf.CompressWeightsMode, mode), dataset=data, **more), rows()

    return make


def _quark(spec: str, **more: object) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        from quark.torch import ModelQuantizer
        from quark.torch.export.nn.modules.qparamslinear import QParamsLinear
        from quark.torch.quantization.config import config as c

        model = nn.Sequential(linear())
        kind = getattr(c, spec)(**more).to_quantization_spec()
        layers = c.QLayerConfig if hasattr(c, "QLayerConfig") else c.QuantizationConfig
        whole = c.QConfig if hasattr(c, "QConfig") else c.Config
        quantizer = ModelQuantizer(whole(global_quant_config=layers(weight=kind)))
        model = quantizer.freeze(quantizer.quantize_model(model, [rows()]))
        assert QParamsLinear
        return model, rows()

    return make


def _brevitas(bits: int) -> Make:
    def make() -> tuple[nn.Module, torch.Tensor]:
        import brevitas.nn as qnn

        torch.manual_seed(0)
        layer = qnn.QuantLinear(256, 128, bias=False, weight_bit_width=bits)
        return layer.eval().requires_grad_(False), rows()

    return make


CASES: dict[str, Make] = {
    "nncf int4 sym": _nncf("INT4_SYM", group_size=64, ratio=1.0, all_layers=True),
    "nncf int4 asym": _nncf("INT4_ASYM", group_size=64, ratio=1.0, all_layers=True),
    "nncf int8 asym": _nncf("INT8_ASYM"),
    "nncf int8 sym": _nncf("INT8_SYM"),
    "quark uint4 groups": _quark("Uint4PerGroupSpec", ch_axis=-1, is_dynamic=False, scale_type="float", group_size=64),
    "quark int8 channel": _quark("Int8PerChannelSpec", symmetric=True, scale_type="float", round_method="half_even",
                                 ch_axis=0, is_dynamic=False),
    "brevitas 4 bits": _brevitas(4),
    "brevitas 8 bits": _brevitas(8),
}  # fmt: skip
