"""What a dequantized weight can be. Each file here is one idiom and is found by itself.

An idiom is a module with
    RANK                   idioms are tried in this order
    read(weight)           -> QWeight, from the evaluated weight; raises Refused with the reason and the place
    example(random, n, k)  -> (tensors, dequantize): tensors to store in a module and a function of them that
                              spells the idiom in PyTorch, drawn from `random`; tests and fuzzers are made of these
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache
def discover() -> tuple[ModuleType, ...]:
    """Every idiom, in the order of RANK."""
    found = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return tuple(sorted(found, key=lambda module: module.RANK))


def name_of(idiom: ModuleType) -> str:
    """The name that decisions and near misses carry."""
    return idiom.__name__.rpartition(".")[2]
