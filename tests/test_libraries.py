"""Models quantized by libraries that are not ours, as a user installs them: those that CI has; the others by night."""

import importlib
import warnings

import pytest
import torch
from torch import nn

import lqcompile

from .libraries.harness import measure
from .libraries.nightly import LIBRARIES, verdict


def cases():
    """Every case of every library that is installed here."""
    for name in LIBRARIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                library = importlib.import_module(f"tests.libraries.{name}")
            except ImportError:
                continue
        for case in library.CASES:
            yield pytest.param(library, case, id=f"{name}: {case}")


@pytest.mark.parametrize(("library", "case"), cases())
def test_what_a_library_quantized_is_rewritten_or_told(library, case):
    wrong = verdict(library, case, measure(case, library.CASES[case]))
    assert not wrong, wrong


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torchao = pytest.importorskip("torchao.quantization")

CONFIGS = {
    "int4 groups": lambda: torchao.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=torchao.granularity.PerGroup(32)
    ),
    "int8, scale after the matmul": lambda: torchao.Int8WeightOnlyConfig(),
}


def quantized(config, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128, bias=False)).to(dtype).eval()
    torchao.quantize_(model, config())
    return model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_torchao_weights_are_fresh(config):
    torch._dynamo.reset()
    model, x = quantized(config, torch.float32, 0), torch.randn(5, 128)

    def same(f) -> bool:
        wanted = model(x)
        return bool((f(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max())

    with torch.no_grad():
        report = lqcompile.explain(model, x, options={"strict": True})
        assert [d.outcome for d in report.decisions] == ["rewritten"] * 2
        f = torch.compile(model, backend="lq", options={"strict": True})
        assert same(f)
        model[0].weight = quantized(config, torch.float32, 1)[0].weight
        assert same(f), "replaced parameter"
        model[0].weight.qdata.bitwise_xor_(1)
        assert same(f), "written to inside the subclass"
