"""Whole Llama models of two layers, random weights, quantized by each library: 14 quantized linears, float lm_head."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lqcompile.errors import Reason

from .harness import Make

QUANTIZED = 14
# All of them, or none: where one is missing, this module cannot be imported.
for library in ("accelerate", "auto_round_extension", "awq", "bitsandbytes", "compressed_tensors", "diffusers", "gguf",
                "gptqmodel", "hqq", "optimum.quanto", "sdnq", "torchao"):  # fmt: skip
    importlib.import_module(library)


def model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
                         use_cache=False)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def _tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 7), generator=torch.Generator().manual_seed(0))


def _loaded(config: Callable[[], Any], dtype: torch.dtype = torch.float32) -> Make:
    """Saved, and loaded again through transformers with a quantization_config."""

    def make() -> tuple[nn.Module, torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            model(dtype).save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=dtype,
                                                          device_map="cpu")  # fmt: skip
        return loaded.eval().requires_grad_(False), _tokens()

    return make


def _swapped(change: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float32) -> Make:
    """Each linear layer of the decoder replaced by a library's own."""

    def make() -> tuple[nn.Module, torch.Tensor]:
        whole = model(dtype)
        for layer in whole.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(part, name, change(child))
        return whole, _tokens()

    return make


def _torchao(name: str, **more: Any) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization as ao
        from transformers import TorchAoConfig

        return TorchAoConfig(quant_type=getattr(ao, name)(**more))

    return config


def _intx(bits: int) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization as ao
        from torchao.quantization.granularity import PerGroup
        from transformers import TorchAoConfig

        return TorchAoConfig(quant_type=ao.IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), PerGroup(64)))

    return config


def _hf(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module("transformers"), name)(**more)


def _hqq(bits: int) -> Callable[[nn.Linear], nn.Module]:
    def change(layer: nn.Linear) -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        made = HQQLinear(layer, config, compute_dtype=layer.weight.dtype, device="cpu")
        HQQLinear.set_backend(HQQBackend.PYTORCH)
        return made

    return change


def _filled(made: nn.Module) -> nn.Module:
    """A GPTQ- or AWQ-like layer with random codes."""
    g = torch.Generator().manual_seed(0)
    for name in ("qweight", "qzeros"):
        t = getattr(made, name)
        t.copy_(torch.randint(-(2**31), 2**31, t.shape, generator=g).to(t.dtype))
    made.scales = (torch.rand(made.scales.shape, generator=g) * 0.004 + 1e-3).to(torch.float16)
    return made


def _gptq(layer: nn.Linear) -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    made = _filled(TorchLinear(bits=4, group_size=64, sym=True, desc_act=False, in_features=layer.in_features,
                               out_features=layer.out_features, bias=False, register_buffers=True))  # fmt: skip
    made.optimize = lambda *a, **k: None
    made.post_init()
    return made.eval()


def _awq(layer: nn.Linear) -> nn.Module:
    from awq.modules.linear.gemm import WQLinear_GEMM

    return _filled(WQLinear_GEMM(4, 64, layer.in_features, layer.out_features, False, "cpu"))


def _autoround(layer: nn.Linear) -> nn.Module:
    from auto_round_extension.torch.qlinear_torch import QuantLinear

    made = _filled(QuantLinear(4, 64, layer.in_features, layer.out_features, False))
    made.post_init()
    return made


def _gguf(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def change(layer: nn.Linear) -> nn.Module:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
        from gguf import GGMLQuantizationType

        from .gguf import packed

        made = GGUFLinear(layer.in_features, layer.out_features, False, layer.weight.dtype)
        bytes_ = packed(kind, layer.out_features, layer.in_features)
        made.weight = GGUFParameter(bytes_, quant_type=GGMLQuantizationType[kind])
        return made

    return change


def _compressed(layer: nn.Linear) -> nn.Module:
    from compressed_tensors.quantization import QuantizationArgs

    from .compressed_tensors import Compressed

    args = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
    return Compressed("pack-quantized", args, layer.weight.dtype, layer.weight.data)


def _sdnq() -> tuple[nn.Module, torch.Tensor]:
    from sdnq.quantizer import sdnq_post_load_quant

    whole = sdnq_post_load_quant(model(), weights_dtype="uint4", minimum_allowed_numel=1, torch_dtype=torch.float32,
                                 modules_to_not_convert=["lm_head"])  # fmt: skip
    return whole, _tokens()


CASES: dict[str, Make] = {
    "torchao intx4": _loaded(_intx(4)),
    "torchao int8": _loaded(_torchao("Int8WeightOnlyConfig")),
    "torchao float8 bf16": _loaded(_torchao("Float8WeightOnlyConfig"), torch.bfloat16),
    "hqq 4 bits": _swapped(_hqq(4)),
    "hqq 3 bits bf16": _swapped(_hqq(3), torch.bfloat16),
    "quanto int4": _loaded(_hf("QuantoConfig", weights="int4")),
    "quanto int8": _loaded(_hf("QuantoConfig", weights="int8")),
    "quanto float8": _loaded(_hf("QuantoConfig", weights="float8")),
    "bitsandbytes nf4": _loaded(_hf("BitsAndBytesConfig", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "gptqmodel 4 bits": _swapped(_gptq, torch.float16),
    "autoawq": _swapped(_awq, torch.float16),
    "auto-round 4 bits": _swapped(_autoround, torch.float16),
    "gguf Q4_K": _swapped(_gguf("Q4_K")),
    "gguf Q6_K bf16": _swapped(_gguf("Q6_K"), torch.bfloat16),
    "compressed-tensors 4 bits": _swapped(_compressed),
    "sdnq uint4": _sdnq,
}  # fmt: skip
KEPT = {"bitsandbytes nf4": Reason.SLOWER}
