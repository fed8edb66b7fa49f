"""lq::all_reduce: the sum of a tensor over the ranks of a group; of a small one in one kernel, on GPUs that can.

Decoding adds up a few rows, twice a layer: what counts is how long that takes, not how many bytes a second. torch's
one_shot_all_reduce puts a rank's part where the other GPUs read it, waits for theirs and adds them all up. What it does
not take, and all on other devices, is the backend's own all-reduce. The sum is rounded to x's dtype.
"""

from __future__ import annotations

import warnings
import weakref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import Library

# Bytes that Inductor's own rule for this kernel takes at most, and of which each thread of it takes a multiple.
MOST, LINE = 128 << 10, 16
DTYPES = (torch.float32, torch.bfloat16)
LIBRARY = Library("lq", "FRAGMENT")
LIBRARY.define("all_reduce.v1(Tensor x, str group) -> Tensor")
ALL_REDUCE = torch.ops.lq.all_reduce.v1
_ROOMS: weakref.WeakKeyDictionary[dist.ProcessGroup, Tensor | None] = weakref.WeakKeyDictionary()


def meet(group: dist.ProcessGroup, kind: str) -> None:
    """Gives the ranks of a group memory on their current GPUs that all of them read; once. All of them must call it.

    Where one cannot, and on devices of another `kind`, the group's own all-reduce does everything.
    """
    if kind != "cuda" or group in _ROOMS:
        return
    device, room = torch.device(kind, torch.cuda.current_device()), None
    try:
        from torch.distributed import _symmetric_memory as symmetric

        room = symmetric.empty(MOST, dtype=torch.uint8, device=device)
        symmetric.rendezvous(room, group.group_name)
    except (ImportError, AttributeError, RuntimeError) as error:
        room = None
        warnings.warn(f"{device} shares no memory with its peers: {error}", stacklevel=3)
    able = torch.tensor(room is not None, dtype=torch.int32, device=device)
    dist.all_reduce(able, dist.ReduceOp.MIN, group)
    _ROOMS[group] = room if able.item() else None


def _run(x: Tensor, group: str) -> Tensor:
    x = x.contiguous()
    ranks = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    room = _ROOMS.get(ranks)
    # Every rank must take the same way, so that only what all of them have alike decides.
    if room is None or x.dtype not in DTYPES or x.nbytes > MOST or x.nbytes % LINE or not x.nbytes:
        y = x.clone()
        dist.all_reduce(y, group=ranks)
        return y
    if x.data_ptr() % LINE:
        x = x.clone()
    place = room[: x.nbytes].view(x.dtype).view(x.shape)
    return torch.ops.symm_mem.one_shot_all_reduce_copy(place, x, "sum", group)


def _fake(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape)


LIBRARY.impl("all_reduce.v1", _run, "CompositeExplicitAutograd")
torch.library.register_fake(ALL_REDUCE, _fake, lib=LIBRARY)
