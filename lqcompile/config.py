"""One frozen Config, made from torch.compile's `mode` and `options`. The only reader of the environment."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ArgumentError

CHECK_WEIGHTS = ("every_call", "never")
# Rows of x, and how often: mostly steps of decoding, for a few requests at a time, with now and then a prompt.
WORKLOAD = {1: 128.0, 2: 32.0, 4: 32.0, 8: 32.0, 16: 32.0, 512: 1.0, 1024: 1.0, 2048: 1.0, 4096: 1.0}


@dataclass(frozen=True)
class Config:
    """What a user may set.

    strict         raise instead of falling back to Inductor when a pass of ours fails
    check_weights  "every_call" compares every source tensor with the one that was packed; "never" leaves
                   that to lqcompile.refresh(model)
    explain        print what became of each matmul, on stderr, whenever a graph is compiled; LQ_EXPLAIN=1 does too
    workload       by number of rows of x how often they come, in any unit: where that number is not known when a model
                   is compiled, each weight is packed for what takes the least time over all
    copies         1, or 2 to allow a weight of which the number of rows is not known two packed copies, one for few
                   rows and one for many, where that is predicted to take less time
    autotune       time the kernels that could run each shape while compiling, instead of predicting their time
    inductor       options of Inductor itself, passed on
    """

    strict: bool = False
    check_weights: str = "every_call"
    explain: bool = False
    workload: Mapping[int, float] = field(default_factory=lambda: dict(WORKLOAD))
    copies: int = 1
    autotune: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Names everything of ours that may change generated code; part of both Inductor cache keys."""
        tuned = f"copies={self.copies} autotune={self.autotune}"
        return f"strict={self.strict} workload={sorted(self.workload.items())} {tuned}"


OWN = tuple(f.name for f in fields(Config) if f.name != "inductor")


def make(mode: str | None, options: Mapping[str, Any] | None) -> Config:
    """The Config for one call of torch.compile. Raises ArgumentError for an unknown option or value."""
    from torch import _inductor

    given = dict(options or {})
    mode = given.pop("mode", mode)
    own = {name: given.pop(name) for name in OWN if name in given}
    modes = _inductor.list_mode_options()
    if mode is not None and mode != "default" and mode not in modes:
        raise ArgumentError("mode", mode, " | ".join(["default", *modes]))
    known = set(_inductor.list_options())
    for name in given:
        if name.replace("-", "_") not in known:
            raise ArgumentError("options", name, f"{', '.join(('mode', *OWN))}, or an option of Inductor")
    for flag in ("strict", "explain", "autotune"):
        if not isinstance(own.get(flag, False), bool):
            raise ArgumentError(f"options['{flag}']", own[flag], "True | False")
    if own.get("check_weights", CHECK_WEIGHTS[0]) not in CHECK_WEIGHTS:
        raise ArgumentError("options['check_weights']", own["check_weights"], " | ".join(CHECK_WEIGHTS))
    if type(own.get("copies", 1)) is not int or own.get("copies", 1) not in (1, 2):
        raise ArgumentError("options['copies']", own["copies"], "1 | 2")
    if "workload" in own:
        own["workload"] = _workload(own["workload"])
    inductor = {**modes.get(mode or "default", {}), **{k.replace("-", "_"): v for k, v in given.items()}}
    if environment("LQ_STRICT") == "1":
        own.setdefault("strict", True)
    if environment("LQ_EXPLAIN") == "1":
        own.setdefault("explain", True)
    return Config(**own, inductor=inductor)


def _workload(given: Any) -> dict[int, float]:
    """Raises ArgumentError for anything but positive shares of positive numbers of rows."""
    accepted = "{rows of x, from 1 up: a positive number, ...}"
    if not isinstance(given, Mapping) or not given:
        raise ArgumentError("options['workload']", given, accepted)
    for rows, share in given.items():
        numbers = type(rows) is int and isinstance(share, (int, float)) and not isinstance(share, bool)
        if not numbers or rows < 1 or not 0 < share < math.inf:
            raise ArgumentError("options['workload']", {rows: share}, accepted)
    return {rows: float(share) for rows, share in given.items()}


def environment(name: str) -> str | None:
    """An environment variable of ours."""
    return os.environ.get(name)


def cache_folder() -> Path | None:
    """Where compiled kernels are kept; None where no folder can be named. Not made here."""
    own = environment("LQ_CACHE_DIR")
    if own:
        return Path(own).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The XDG standard: a relative path there is to be ignored.
        return (base if base.is_absolute() else Path.home() / ".cache") / "lqcompile"
    except RuntimeError:
        return None


def hide_gpus() -> None:
    """Makes torch see no GPU. Only before the first use of CUDA in this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def go_offline() -> None:
    """Keeps transformers from asking a hub for files: everything that the demo needs is on the disk."""
    os.environ["HF_HUB_OFFLINE"] = "1"
