"""C++ source to loaded library, by Inductor's compiler and our cache, for instructions that this CPU has.

Inductor's own CppCodeCache compiles for the CPU that it runs on, with flags that its versions choose differently, and
does not say for which in its key.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import platform
import re
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .. import cache
from ..errors import ArgumentError, Reason, Refused

Defines = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Isa:
    """Instructions to compile for. `needs` are the names by which the kernel of Linux lists them (/proc/cpuinfo)."""

    name: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    defines: Defines


_AVX2 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_VNNI = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi")
_WIDE = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi")
_NARROW = (("LQ_LANES", 8), ("LQ_AMX", 0))
# Best first, each with the same results.
ISAS = (
    Isa(
        "amx",
        (*_VNNI, "amx_tile", "amx_int8"),
        (*_WIDE, "-mamx-tile", "-mamx-int8"),
        (("LQ_LANES", 16), ("LQ_AMX", 1)),
    ),
    Isa("avx512", _VNNI, _WIDE, (("LQ_LANES", 16), ("LQ_AMX", 0))),
    Isa("avx_vnni", (*_AVX2, "avx_vnni"), ("-march=x86-64-v3", "-mavxvnni"), (*_NARROW, ("LQ_VNNI", 1))),
    Isa("avx2", _AVX2, ("-march=x86-64-v3",), (*_NARROW, ("LQ_VNNI", 0))),
)
# Of what every machine has, for code that is no kernel.
ANY = Isa("any", (), (), ())
# Not one of those: bfloat16 products round, whole numbers do not.
AMX_BF16 = Isa(
    "amx_bf16",
    (*_VNNI, "avx512_bf16", "amx_tile", "amx_bf16"),
    (*_WIDE, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    (("LQ_LANES", 16), ("LQ_AMX", 1)),
)
# Sums and products are never put together but where fma says so: every Isa gives the same bits.
FLAGS = ("-O3", "-DNDEBUG", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-w")
_LOADING = threading.Lock()
_NAMES = itertools.count()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this machine's CPU can do, as Linux names it; empty where Linux does not say."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def isas() -> tuple[Isa, ...]:
    """Every Isa that this CPU has, best first; none on other architectures."""
    return tuple(isa for isa in ISAS if has(isa))


def has(isa: Isa) -> bool:
    """Whether this CPU, and what runs on it, let this process use the instructions."""
    return cpu_flags().issuperset(isa.needs) and ("amx_tile" not in isa.needs or _may_use_amx())


@functools.cache
def _may_use_amx() -> bool:
    """Asks the operating system for the tiles: it saves them only for processes that have asked."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def _source(name: str) -> str:
    """The text of a C++ file of this folder with those it includes put in: only then is it all of a cache's key."""
    if not re.fullmatch(r"\w+\.(cpp|h)", name):
        raise ArgumentError("name", name, "a .cpp file of the kernels folder")
    text = resources.files(__package__).joinpath(name).read_text()
    return re.sub(r'^#include "(\w+\.h)"$', lambda found: _source(found[1]), text, flags=re.MULTILINE)


def _key(name: str, isa: Isa, defines: Defines) -> tuple[str, tuple[str, ...]]:
    """What is compiled, and the compiler's flags. Raises ArgumentError for anything but ints in `defines`."""
    for key, value in defines:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", key) or type(value) is not int:
            raise ArgumentError("defines", (key, value), "(NAME, int) pairs")
    named = "".join(f"#define {key} {value}\n" for key, value in (*isa.defines, *defines))
    return f"// {isa.name}: {' '.join(isa.needs)}\n{named}{_source(name)}", (*FLAGS, *isa.flags)


@functools.cache
def load(name: str, isa: Isa, defines: Defines = ()) -> Any:
    """The library built from `name` in this folder for `isa`, by ctypes.

    Raises ArgumentError for an Isa that this CPU has not and for anything but ints in `defines`, Refused(NO_COMPILER)
    where it cannot be compiled or loaded. Kept in the artifact store, whose key holds the source, the flags and the
    Isa: a library of other instructions is never taken for it.
    """
    if not has(isa):
        raise ArgumentError("isa", isa.name, " | ".join(found.name for found in isas()) or "none on this CPU")
    text, flags = _key(name, isa, defines)
    key = repr((text, flags))
    with _LOADING:
        image = cache.default().get("library", key)
        if image is None:
            image = _compile(text, flags)
            cache.default().put("library", key, image, source=name, isa=isa.name, options=" ".join(_shown(defines)))
        return _open(name, image)


@functools.cache
def has_compiler() -> bool:
    """Whether there is a C++ compiler; that it can compile the kernels shows when it does."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:  # noqa: BLE001  what it raises is not the same in every version
        return False


def _shown(defines: Defines) -> list[str]:
    return [f"-D{key}={value}" for key, value in defines]


def _compile(text: str, flags: Sequence[str]) -> bytes:
    """The shared library that Inductor's C++ compiler makes of `text`. Raises Refused(NO_COMPILER)."""
    try:
        from torch._inductor.cpp_builder import BuildOptionsBase, CppBuilder, get_cpp_compiler

        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.cpp")
            source.write_text(text)
            options = BuildOptionsBase(compiler=get_cpp_compiler(), cflags=[flag.removeprefix("-") for flag in flags])
            builder = CppBuilder("kernel", str(source), options, output_dir=folder)
            builder.build()
            return Path(builder.get_target_file_path()).read_bytes()
    except Exception as error:  # the ways in which a compiler can be missing or broken have no common type
        raise Refused(Reason.NO_COMPILER, f"{type(error).__name__}: {error}"[:2000]) from error


def _open(name: str, image: bytes) -> Any:
    """Loads a library from memory: no folder need allow that its files are executed. Raises Refused(NO_COMPILER)."""
    try:
        handle = os.memfd_create(name)
        try:
            with os.fdopen(os.dup(handle), "wb") as file:
                file.write(image)
            # A name of its own each time: what is already loaded under a name is not looked at again.
            return ctypes.CDLL(f"/proc/self/fd/{'/' * next(_NAMES)}{handle}")
        finally:
            os.close(handle)
    except OSError as error:
        raise Refused(Reason.NO_COMPILER, str(error)) from error
