"""C++ source to a loaded library, through the compiler and the cache that Inductor itself uses."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any


@functools.cache
def load_cpp(name: str) -> Any | None:
    """The library built from `name` in this folder, by ctypes; None where there is no compiler or it fails.

    Never raises: whoever asks has another way, and says so. Compiled once for each source, then cached on disk.
    """
    source = resources.files(__package__).joinpath(name).read_text()
    try:
        from torch._inductor.codecache import CppCodeCache

        return CppCodeCache.load(source, device_type="cpu")
    except Exception:  # noqa: BLE001  the ways in which a compiler can be missing or broken have no common type
        return None
