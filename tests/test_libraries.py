"""Models quantized by libraries that are not ours, as a user installs them."""

import warnings

import pytest
import torch
from torch import nn

import lqcompile

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int4 groups": lambda: torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=torchao.granularity.PerGroup(32)
    ),
    "int3 rows": lambda: torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int3, granularity=torchao.granularity.PerAxis(0)
    ),
    "int8, scale after the matmul": lambda: torchao.Int8WeightOnlyConfig(),
}


def quantized(config, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128, bias=False)).to(dtype).eval()
    torchao.quantize_(model, config())
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_torchao_weights_are_rewritten_proved_and_fresh(config, dtype):
    torch._dynamo.reset()
    model, x = quantized(config, dtype, 0), torch.randn(5, 128, dtype=dtype)
    near = 1e-5 if dtype == torch.float32 else 0.03

    def same(f) -> bool:
        wanted = model(x).float()
        return bool((f(x).float() - wanted).abs().max() <= near * wanted.abs().max())

    with torch.no_grad():
        report = lqcompile.explain(model, x, options={"strict": True})
        assert [d.outcome for d in report.decisions] == ["rewritten"] * 2
        assert {d.proof for d in report.decisions} == {"bit_exact"}
        f = torch.compile(model, backend="lq", options={"strict": True})
        assert same(f)
        model[0].weight = quantized(config, dtype, 1)[0].weight
        assert same(f), "replaced parameter"
        model[0].weight.qdata.bitwise_xor_(1)
        assert same(f), "written to inside the subclass"
