"""Notices, on every call, that a tensor whose packed copy we use has been written to or replaced.

Dynamo guards neither identity nor version of parameters: a stale copy would go unseen. A source is unchanged if it
is the same object, at the same address, with the same version counter. Inference tensors have no counter.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .kernels.build import load_cpp

# Below this many tensors Python is as fast, and needs no compiler.
WORTH_COMPILING = 48


def _native() -> Any:
    """The loop in C, at 10 ns a tensor instead of 100; None where it cannot be built."""
    library = load_cpp("freshness.cpp")
    if library is None:
        return None
    function = library.lq_first_changed
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64, *[ctypes.c_void_p] * 3)
    return function


class Snapshot:
    """The state of some tensors, by which to tell whether they are still as they were."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        # Held strongly: a freed tensor's address and identity may come back as another's.
        self.sources = tuple(sources)
        plain: list[Tensor] = []
        self._inner: list[tuple[int, tuple[Tensor, ...]]] = []
        for i, source in enumerate(self.sources):
            if is_traceable_wrapper_subclass(source):
                self._inner.append((i, _inside(source)))
            else:
                plain.append(source)
        flat = [*plain, *(t for _, inner in self._inner for t in inner)]
        counted = tuple(t for t in flat if not t.is_inference())
        self._uncounted = tuple(t for t in flat if t.is_inference())
        self._addresses = [t.data_ptr() for t in self._uncounted]
        self._moved = self._watch(counted)

    def _watch(self, tensors: tuple[Tensor, ...]) -> Callable[[], bool]:
        pointers, versions = [t.data_ptr() for t in tensors], [t._version for t in tensors]
        native = _native() if len(tensors) >= WORTH_COMPILING else None
        if native is None:
            version, address = operator.attrgetter("_version"), Tensor.data_ptr
            return lambda: list(map(version, tensors)) != versions or list(map(address, tensors)) != pointers
        handles = _Handles(tensors)
        n = len(tensors)
        where, what = (ctypes.c_void_p * n)(*pointers), (ctypes.c_int64 * n)(*versions)
        return lambda: native(n, handles.array, where, what) >= 0

    def changed(self, current: tuple[Tensor, ...]) -> bool:
        """Whether `current`, which stand where the sources stood, differ from them."""
        # Tuples compare by identity first: no tensor is compared unless one was replaced, and then any answer is true.
        if any(map(operator.is_not, current, self.sources)) or self._moved():
            return True
        if self._uncounted and [t.data_ptr() for t in self._uncounted] != self._addresses:
            return True
        return any(any(map(operator.is_not, _inside(self.sources[i]), inner)) for i, inner in self._inner)


class _Handles:
    """at::Tensor handles of some tensors, as the C loop takes them. They follow `.data =`; freed with this object."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        self._capsules = capsules
        self.array = (ctypes.c_void_p * len(capsules))(*[pointer(c, None) for c in capsules])

    def __del__(self) -> None:
        # Taking a handle's tensor back frees the handle.
        for capsule in self._capsules:
            torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)


def _inside(t: Any) -> tuple[Tensor, ...]:
    """The plain tensors inside a subclass."""
    found: list[Tensor] = []
    for name in t.__tensor_flatten__()[0]:
        inner = getattr(t, name)
        found.extend(_inside(inner) if is_traceable_wrapper_subclass(inner) else (inner,))
    return tuple(found)
