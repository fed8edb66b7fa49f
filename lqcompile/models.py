"""The matmuls of whole models, and a sample of problems drawn from them in an order that may be cut anywhere."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

import sympy
import torch

from .types import Format, Problem

Shape = tuple[int, int]
MS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
# By kind of device, the shapes that kernels' costs were fitted to, and how many of the first problems drawn.
FITTED: dict[str, tuple[Shape, ...]] = {
    "cuda": ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (49152, 12288)),
    "cpu": ((512, 2048), (2048, 2048), (2048, 1024), (4864, 896), (4096, 4096), (11008, 4096), (4096, 11008)),
}
FITTED_DRAWN = {"cuda": 206, "cpu": 0}
# Width, of all heads, of the keys' heads, of the hidden layer, and whether that has a gate.
SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "Llama-3 8B": (4096, 4096, 1024, 14336, True),
    "Llama-3 70B": (8192, 8192, 1024, 28672, True),
    "Qwen2.5 7B": (3584, 3584, 512, 18944, True),
    "Qwen2.5 32B": (5120, 5120, 1024, 27648, True),
    "Mistral 7B": (4096, 4096, 1024, 14336, True),
    "Gemma-2 9B": (3584, 4096, 2048, 14336, True),
    # One expert.
    "Mixtral 8x7B": (4096, 4096, 1024, 14336, True),
    "OPT-175B": (12288, 12288, 12288, 49152, False),
}
# For a CPU: models that one is used for, up to so many weights and rows that all takes minutes.
SMALL: dict[str, tuple[int, int, int, int, bool]] = {
    "MiniLM-L6": (384, 384, 384, 1536, False),
    "BERT base": (768, 768, 768, 3072, False),
    "Qwen2.5 0.5B": (896, 896, 128, 4864, True),
    "Llama-3.2 1B": (2048, 2048, 512, 8192, True),
}
SMALL_MS, MOST = (1, 2, 4, 8, 16, 64, 256), 9_000_000
SEED = 5


def shapes(sizes: dict[str, tuple[int, int, int, int, bool]]) -> list[Shape]:
    """Each (n, k) once: q, k and v, all three in one, o, gate and up, both in one, and down."""
    found: dict[Shape, None] = {}
    for width, heads, keys, hidden, gated in sizes.values():
        inner = [(hidden, width), (2 * hidden, width)] if gated else [(hidden, width)]
        for shape in (
            (heads, width),
            (keys, width),
            (heads + 2 * keys, width),
            (width, heads),
            *inner,
            (width, hidden),
        ):
            found[shape] = None
    return list(found)


def drawn(device: torch.device) -> Iterator[Problem]:
    """Problems, each once, those of one weight together: in the first round every shape once, in any order, and so on.

    Each round gives a shape one of the formats; three of four weights are affine, which more than one layout holds.
    """
    gpu = device.type == "cuda"
    source = random.Random(SEED)
    seen: set[Problem] = set()
    found, ms = (shapes(SIZES), MS) if gpu else ([(n, k) for n, k in shapes(SMALL) if n * k <= MOST], SMALL_MS)
    formats = [
        (form, bits, group)
        for bits, group, form in itertools.product((2, 3, 4, 8), (64, 128), ("affine", "affine", "affine", "binary"))
    ]
    left = {shape: source.sample(formats, len(formats)) for shape in found}
    for _ in formats:
        for n, k in source.sample(found, len(found)):
            form, bits, group = left[n, k].pop()
            dtype = torch.float16 if gpu else source.choice((torch.bfloat16, torch.float32))
            scale = str(dtype).removeprefix("torch.")
            format = Format(form, bits, group, "int" if form == "affine" else "float", scale)
            for m in ms:
                problem = Problem(sympy.Integer(m), (m, m), n, k, format, dtype, device)
                if problem not in seen:
                    seen.add(problem)
                    yield problem


def fitted(problem: Problem) -> bool:
    """Whether kernels' costs were fitted to a problem: it is not new to the cost model."""
    kind = problem.device.type
    return (problem.n, problem.k) in FITTED[kind] or problem in _first(problem.device, FITTED_DRAWN[kind])


@functools.cache
def _first(device: torch.device, count: int) -> frozenset[Problem]:
    return frozenset(itertools.islice(drawn(device), count))
