"""Other libraries' low-bit matmuls, timed beside ours: each makes random weights of its own, of the same size."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch

from .types import Problem

TINYGEMM_GROUPS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Held:
    """A neighbour's weight: `weight` is what `run` takes, `tensors` all that it reads.

    dense(rows) is the truth of the rows of these indices in float64, [len(rows), k]; None where the library does not
    say what its weight means, and results are not checked.
    """

    weight: Any
    tensors: tuple[torch.Tensor, ...]
    dense: Callable[[torch.Tensor], torch.Tensor] | None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Neighbour:
    """One library's matmul. `needs` names the modules that must be importable, `copies` how many copies can be had."""

    name = ""
    copies = 1 << 31
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)

    def missing(self) -> str | None:
        """Why this library cannot be used here, or None."""
        for name in self.needs:
            try:
                importlib.import_module(name)
            except Exception as error:  # noqa: BLE001  foreign code at import: a broken build raises anything
                return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def accepts(self, problem: Problem) -> str | None:
        """None, or the sentence that says what it does not accept."""
        raise NotImplementedError

    def prepare(self, problem: Problem) -> Held:
        """A random weight of the problem's size, packed as the library wants it."""
        raise NotImplementedError

    def run(self, weight: Any, x: torch.Tensor) -> torch.Tensor:
        """x [m, k] times the weight's transpose."""
        raise NotImplementedError

    def copy(self, weight: Any) -> Any:
        """The same weight at other addresses."""
        return copy.deepcopy(weight)

    def _refusal(self, problem: Problem, bits: Sequence[int], dtypes: Sequence[torch.dtype]) -> str | None:
        f = problem.format
        if problem.device.type not in self.devices:
            return " | ".join(self.devices)
        if f.form != "affine" or f.bits not in bits:
            return f"affine weights of {' | '.join(map(str, bits))} bits"
        if problem.x_dtype not in dtypes:
            return " | ".join(map(str, dtypes))
        return None


def _affine(
    codes: torch.Tensor, scale: torch.Tensor, middle: torch.Tensor | int, offset: torch.Tensor | int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """(codes - middle) * scale + offset by rows, for codes [n, k] and the rest [n, groups] or one number."""

    def dense(rows: torch.Tensor) -> torch.Tensor:
        low, high = (v[rows].double().unsqueeze(-1) if isinstance(v, torch.Tensor) else v for v in (middle, offset))
        wide = codes[rows].double().view(len(rows), scale.shape[1], -1)
        return ((wide - low) * scale[rows].double().unsqueeze(-1) + high).flatten(1)

    return dense


def tinygemm(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes - 8) * scale + zero as torch's own int4 matmul wants it: the packed codes, and scales with zeros.

    codes uint8 [n, k], of 4 bits; scale and zero [n, k/group]. Raises what torch raises for sizes that it is not for.
    """
    if codes.device.type == "cuda":
        packed = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    else:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
    return packed, torch.stack((scale, zero), -1).transpose(0, 1).contiguous()


class Tinygemm(Neighbour):
    """torch's own int4 matmul, `torch._weight_int4pack_mm`: w = (code - 8) * scale + zero."""

    name = "torch int4"
    devices = ("cpu", "cuda")

    def accepts(self, problem: Problem) -> str | None:
        cuda = problem.device.type == "cuda"
        dtypes = (torch.bfloat16,) if cuda else (torch.bfloat16, torch.float16, torch.float32)
        if refusal := self._refusal(problem, (4,), dtypes):
            return refusal
        if problem.format.group not in TINYGEMM_GROUPS:
            return f"groups of {' | '.join(map(str, TINYGEMM_GROUPS))}"
        if problem.n % 16 or (cuda and problem.k % 128):
            return "n a multiple of 16" + (", k of 128" if cuda else "")
        if cuda and torch.cuda.get_device_capability(problem.device) < (8, 0):
            return "compute capability 8.0 or newer"
        return None

    def prepare(self, problem: Problem) -> Held:
        n, k, group, device = problem.n, problem.k, problem.format.group, problem.device
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
        scale = (torch.rand((n, k // group), device=device) / 16 + 1 / 32).to(problem.x_dtype)
        zero = torch.randn((n, k // group), device=device).div_(16).to(problem.x_dtype)
        packed, both = tinygemm(codes, scale, zero)
        return Held((packed, both, group), (packed, both), _affine(codes, scale, 8, zero))

    def run(self, weight: Any, x: torch.Tensor) -> torch.Tensor:
        packed, both, group = weight
        if x.device.type == "cuda":
            return torch._weight_int4pack_mm(x, packed, group, both)
        return torch._weight_int4pack_mm_for_cpu(x, packed, group, both)


class Int8Pack(Neighbour):
    """torch's own int8 matmul on the CPU, `torch._weight_int8pack_mm`: one scale a row."""

    name = "torch int8"
    devices = ("cpu",)

    def accepts(self, problem: Problem) -> str | None:
        return self._refusal(problem, (8,), (torch.bfloat16, torch.float16, torch.float32))

    def prepare(self, problem: Problem) -> Held:
        codes = torch.randint(-128, 128, (problem.n, problem.k), dtype=torch.int8)
        scale = (torch.rand(problem.n) / 256 + 1 / 256).to(problem.x_dtype)
        return Held((codes, scale), (codes, scale), _affine(codes, scale.unsqueeze(1), 0, 0))

    def run(self, weight: Any, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int8pack_mm(x, *weight)


class _Dequantizing(torch.nn.Module):
    """A linear whose weight is (codes - zero) * scale, as a model from a quantizer without kernels has it."""

    codes: torch.Tensor
    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        n, k, group, dtype = problem.n, problem.k, problem.format.group, problem.x_dtype
        self.register_buffer("codes", torch.randint(0, 16, (n, k // 2, 2), dtype=torch.uint8))
        self.register_buffer("packed", self.codes[..., 0] | self.codes[..., 1] << 4)
        self.register_buffer("scale", ((torch.rand(n, k // group) + 0.5) / 16).to(dtype))
        self.register_buffer("zero", torch.randint(0, 16, (n, k // group)).to(dtype))
        self.shape, self.group = (n, k), group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = torch.stack((self.packed & 15, self.packed >> 4), -1).view(self.shape[0], -1, self.group)
        w = (codes.to(x.dtype) - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)
        return torch.nn.functional.linear(x, w.view(self.shape))


class _Frozen:
    """Compiled with freezing for one number of rows, at its first call for all copies: none can be copied."""

    def __init__(self, layer: _Dequantizing, family: list[_Frozen]) -> None:
        self._layer, self._family = layer, family
        self._way: Callable[[torch.Tensor], torch.Tensor] | None = None
        family.append(self)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._way is None:
            for one in self._family:
                one._way = one._compiled(x)
        assert self._way is not None
        return self._way(x)

    def copy(self) -> _Frozen:
        return _Frozen(copy.deepcopy(self._layer), self._family)

    def _compiled(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        # Dynamo keeps what it compiles by code object, asks one after the other, and gives up where there are many.
        forward = FunctionType(_Dequantizing.forward.__code__.replace(), _Dequantizing.forward.__globals__)
        way = torch.compile(MethodType(forward, self._layer), dynamic=False)
        codes = self._layer.packed.clone()
        # Dynamo asks for it too: given as an option of Inductor alone it folds nothing.
        with torch._inductor.config.patch(freezing=True):
            y = way(x)
        self._layer.packed.zero_()
        folded = torch.equal(y, way(x))
        self._layer.packed.copy_(codes)
        if not folded:
            raise RuntimeError("freezing left codes to be dequantized in each call")
        return way


class Freezing(Neighbour):
    """Inductor with freezing: the weight is dequantized while compiling, and stays dense."""

    name = "inductor freezing"
    devices = ("cpu",)
    # Of this many in turns none is read twice while 20 ms are timed, and to compile one takes a second.
    copies = 8

    def accepts(self, problem: Problem) -> str | None:
        if refusal := self._refusal(problem, (4,), (torch.bfloat16, torch.float16, torch.float32)):
            return refusal
        # More rows are torch's matmul on a dense weight, which is timed anyway; each is a gigabyte that is never freed.
        if problem.m != 1:
            return "one row"
        # What is smaller takes less time than to call compiled code.
        return "at least 1,048,576 weights" if problem.n * problem.k < 1 << 20 or problem.k % 2 else None

    def prepare(self, problem: Problem) -> Held:
        layer = _Dequantizing(problem).eval()
        codes = layer.codes.flatten(1)
        del layer.codes
        # What it reads is the dense weight.
        dense = torch.empty((problem.n, problem.k), dtype=problem.x_dtype, device="meta")
        return Held(_Frozen(layer, []), (dense,), _affine(codes, layer.scale, layer.zero, 0))

    def run(self, weight: Any, x: torch.Tensor) -> torch.Tensor:
        return weight(x)

    def copy(self, weight: Any) -> Any:
        return weight.copy()


class Torchao(Neighbour):
    """torchao's int4 weight-only config in its tiled packing, through its own linear."""

    name = "torchao int4"
    needs = ("torchao.quantization",)

    def accepts(self, problem: Problem) -> str | None:
        if refusal := self._refusal(problem, (4,), (torch.bfloat16,)):
            return refusal
        if problem.format.group not in TINYGEMM_GROUPS:
            return f"groups of {' | '.join(map(str, TINYGEMM_GROUPS))}"
        # It pads k to 1024 on every call; padding is not what is compared.
        return "n a multiple of 8, k of 1024" if problem.n % 8 or problem.k % 1024 else None

    def prepare(self, problem: Problem) -> Held:
        quantization = importlib.import_module("torchao.quantization")
        layer = torch.nn.Linear(problem.k, problem.n, bias=False, device=problem.device, dtype=torch.bfloat16)
        config = quantization.Int4WeightOnlyConfig(
            group_size=problem.format.group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
        quantization.quantize_(layer, config)
        weight: Any = layer.weight
        # Its dequantized weight has no public name, so results are not checked.
        return Held(layer, (weight.qdata, weight.scale_and_zero), None)

    def run(self, weight: Any, x: torch.Tensor) -> torch.Tensor:
        return weight(x)


class Gemlite(Neighbour):
    """gemlite's Triton kernels for weights of 1, 2, 4 or 8 bits: w = (code - zero) * scale."""

    name = "gemlite"
    needs = ("gemlite.core",)

    def accepts(self, problem: Problem) -> str | None:
        if refusal := self._refusal(problem, (1, 2, 4, 8), (torch.float16, torch.bfloat16)):
            return refusal
        if problem.format.group < 16 or problem.n % 32 or problem.k % 32:
            return "groups of at least 16, n and k multiples of 32"
        return None

    def prepare(self, problem: Problem) -> Held:
        core = importlib.import_module("gemlite.core")
        n, k, f, device = problem.n, problem.k, problem.format, problem.device
        kind = {torch.float16: core.DType.FP16, torch.bfloat16: core.DType.BF16}[problem.x_dtype]
        codes = torch.randint(0, 1 << f.bits, (n, k), dtype=torch.uint8, device=device)
        scale = ((torch.rand((n, k // f.group), device=device) + 0.5) / (1 << f.bits)).to(problem.x_dtype)
        zero = torch.randint(0, 1 << f.bits, (n, k // f.group), device=device).to(problem.x_dtype)
        layer = core.GemLiteLinear(
            W_nbits=f.bits, group_size=f.group, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind
        )
        layer.pack(codes, scale.view(-1, 1), zero.view(-1, 1), None)
        return Held(layer, tuple(layer.get_tensor_args()), _affine(codes, scale, zero, 0))

    def run(self, weight: Any, x: torch.Tensor) -> torch.Tensor:
        return weight(x)


NEIGHBOURS: tuple[Neighbour, ...] = (Tinygemm(), Int8Pack(), Freezing(), Torchao(), Gemlite())
