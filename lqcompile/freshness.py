"""Notices, on every call, that a tensor whose packed copy we use has been written to or replaced.

Dynamo guards neither identity nor version of parameters: a stale copy would go unseen. A source is unchanged if it
is the same object, at the same address, with the same version counter. Inference tensors have no counter.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import Refused
from .kernels import native as library

# Below this many tensors Python is as fast, and needs no compiler.
WORTH_COMPILING = 48


@functools.cache
def _native() -> tuple[Any, list[ctypes.c_void_p]] | None:
    """The loop in C, at 10 ns a tensor instead of 100, and what it is to call; None where it cannot be built."""
    try:
        function = library.load("freshness.cpp", library.ANY).lq_first_changed
        torchs = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        # at::TensorBase::_version() const has no name in the C interface.
        found = (torchs._ZNK2at10TensorBase8_versionEv, torchs.aoti_torch_get_data_ptr)
    except (Refused, OSError, AttributeError):
        return None
    function.restype, function.argtypes = ctypes.c_int64, (ctypes.c_int64, *[ctypes.c_void_p] * 5)
    return function, [ctypes.cast(f, ctypes.c_void_p) for f in found]


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
        first_changed, given = native
        handles = _Handles(tensors)
        n = len(tensors)
        where, what = (ctypes.c_void_p * n)(*pointers), (ctypes.c_int64 * n)(*versions)
        return lambda: first_changed(n, handles.array, where, what, *given) >= 0

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
