"""An evaluation that was done once, to be done again on other tensors: nothing is traced, arithmetic alone is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from ..errors import Reason, Refused
from .deferred import Deferred, Late

T = TypeVar("T")


class Tape(Generic[T]):
    """What was made of the deferred tensors `leaves`: all that `roots` are computed from, and nothing else.

    result   what reads the roots, called once they are those of other leaves

    What is computed is what eager computes of those leaves. How the algebra understood it is what was found of the
    first ones: a proof may fail where it holds of a fresh evaluation. One reader at a time.
    """

    def __init__(self, leaves: Sequence[Tensor], roots: Sequence[Tensor], result: Callable[[], T]) -> None:
        self._leaves = [t.late for t in leaves if isinstance(t, Deferred)]
        self._layouts = [_layout(late.value) for late in self._leaves if late.value is not None]
        self._made: dict[Late, None] = {}
        self._result = result
        stack = [t.late for t in roots if isinstance(t, Deferred)]
        readers: dict[Late, int] = dict.fromkeys(stack, 0)
        while stack:
            late = stack.pop()
            if late in self._made or late.op is None:
                continue
            self._made[late] = None
            for operand in late.op.tensors:
                if isinstance(operand, Deferred):
                    readers[operand.late] = readers.get(operand.late, 0) + 1
                    stack.append(operand.late)
        # What the evaluation made beside, to understand, is not made again.
        for late, count in readers.items():
            late.readers = count

    def play(self, leaves: Sequence[Tensor]) -> T:
        """The result for other plain tensors. Raises Refused where they are not laid out as the first were."""
        if [_layout(t) for t in leaves] != self._layouts:
            raise Refused(Reason.UNSUPPORTED_OP, "a tensor laid out differently")
        self.clear()
        for late, t in zip(self._leaves, leaves, strict=True):
            late.value = t
        return self._result()

    def clear(self) -> None:
        """Lets go of every tensor."""
        for late in (*self._leaves, *self._made):
            late.value = None


def _layout(t: Tensor) -> tuple[object, ...]:
    return type(t), t.dtype, t.device, t.shape, t.stride(), t.storage_offset()
