"""CUDA source to loaded functions. No shell and no process of ours: NVRTC and the driver."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from .. import cache
from ..errors import ArgumentError, Reason, Refused

Defines = tuple[tuple[str, int], ...]

# What CI compiles every kernel for.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")
OPTIONS = ("--std=c++17", "--device-as-default-execution-space")
# The largest cluster that every device with clusters has.
MAX_CLUSTER = 8
# Shared memory (bytes) that a block may have without asking for more.
FREE_SHARED = 48 * 1024
# Every function that was loaded, for whoever wants to look at what the compiler made of it.
LOADED: list[Function] = []
# Two threads that want one kernel must not load it twice.
_LOADING = threading.Lock()


def arch_of(major: int, minor: int) -> str:
    """The architecture to compile for on a device of this compute capability. Only sm_90a has Hopper's wgmma."""
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def _nvrtc_files() -> Iterator[str]:
    """Where NVRTC may be, best first: the wheels beside torch, of torch's CUDA version first; then the system's."""
    version = torch.version.cuda
    torchs = int(version.split(".")[0]) if version else None
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = {path: int(path.suffix[1:]) for f in folders for path in f.glob("*/lib/libnvrtc.so.[1-9][0-9]")}
    yield from map(str, sorted(found, key=lambda path: (found[path] != torchs, -found[path], path)))
    majors = (13, 12) if torchs is None else (torchs,)
    yield from (f"libnvrtc.so.{major}" for major in majors)
    yield "libnvrtc.so"


@functools.cache
def _nvrtc() -> tuple[Any, str, str] | None:
    """NVRTC as ctypes has it, its file and its version; None where there is none."""
    if torch.version.hip:
        return None
    for name in _nvrtc_files():
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return library, name, f"{major.value}.{minor.value}"
    return None


def has_nvrtc() -> bool:
    """Whether CUDA kernels can be compiled here."""
    return _nvrtc() is not None


def nvrtc() -> tuple[Any, str, str]:
    """NVRTC as ctypes has it, its file and its version, like "13.0". Raises Refused(NO_NVRTC)."""
    found = _nvrtc()
    if found is None:
        raise Refused(Reason.NO_NVRTC, ", ".join(_nvrtc_files()))
    return found


def _source(name: str) -> str:
    """The text of a CUDA file of this folder with those it includes put in: only then is it all of a cache's key."""
    if not re.fullmatch(r"\w+\.cuh?", name):
        raise ArgumentError("source", name, "a .cu file of the kernels folder")
    text = resources.files(__package__).joinpath(name).read_text()
    text = re.sub(r'^#include "(\w+\.cuh)"$', lambda found: _source(found[1]), text, flags=re.MULTILINE)
    if re.search(r"^\s*#\s*include\b", text, re.MULTILINE):
        raise ArgumentError("source", name, '#include of "name.cuh" beside it and of nothing else')
    return text


@functools.cache
def cubin(source: str, arch: str, defines: Defines = ()) -> bytes:
    """Machine code of `source`, a .cu file of this folder, for `arch`, with NAME=value defined for each of `defines`.

    Kept in memory and in the artifact store. Raises Refused(NO_NVRTC) without NVRTC, ArgumentError for anything but
    ints in `defines`, RuntimeError with the compiler's log for source that does not compile.
    """
    if not re.fullmatch(r"sm_\d+[af]?", arch):
        raise ArgumentError("arch", arch, "sm_XY")
    for name, value in defines:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or type(value) is not int:
            raise ArgumentError("defines", (name, value), "(NAME, int) pairs")
    text = _source(source)
    options = (f"--gpu-architecture={arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in defines))
    key = repr((text, options, nvrtc()[2]))
    image = cache.default().get("cubin", key)
    if image is None:
        image = _compile(source, text, options)
        cache.default().put("cubin", key, image, source=source, options=" ".join(options), nvrtc=nvrtc()[2])
    return image


def _compile(source: str, text: str, options: Sequence[str]) -> bytes:
    library = nvrtc()[0]

    def call(name: str, *arguments: Any) -> int:
        return getattr(library, f"nvrtc{name}")(*arguments)

    def content(name: str) -> bytes:
        size = ctypes.c_size_t()
        _expect(call(f"Get{name}Size", program, ctypes.byref(size)), f"nvrtcGet{name}Size")
        buffer = ctypes.create_string_buffer(size.value)
        _expect(call(f"Get{name}", program, buffer), f"nvrtcGet{name}")
        return buffer.raw

    def _expect(code: int, what: str) -> None:
        if code:
            raise RuntimeError(f"{what} failed on {source}: {ctypes.string_at(call('GetErrorString', code)).decode()}")

    library.nvrtcGetErrorString.restype = ctypes.c_void_p
    program = ctypes.c_void_p()
    created = call("CreateProgram", ctypes.byref(program), text.encode(), source.encode(), 0, None, None)
    _expect(created, "nvrtcCreateProgram")
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if call("CompileProgram", program, len(options), array):
            log = content("ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{source} does not compile with {' '.join(options)}:\n{log}")
        return content("CUBIN")
    finally:
        call("DestroyProgram", ctypes.byref(program))


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: what stands first in its union of 64 bytes, of the attributes that are used."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_uint * 16))
    CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Driver:
    """libcuda by ctypes. A call by name raises RuntimeError with the driver's name for the error."""

    def __init__(self, library: Any) -> None:
        self.library = library
        # The two that each launch calls. Their arguments are ctypes objects, made once: nothing is converted.
        self.launch, self.current = library.cuLaunchKernelEx, library.cuCtxGetCurrent

    def __call__(self, name: str, *arguments: Any) -> None:
        self.check(getattr(self.library, name)(*arguments), name)

    def check(self, code: int, what: str) -> None:
        if code == 0:
            return
        found = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            text = ctypes.c_char_p()
            getattr(self.library, name)(code, ctypes.byref(text))
            found.append((text.value or b"unknown").decode())
        raise RuntimeError(f"{what}: error {code}, {found[0]}: {found[1]}")

    @contextmanager
    def inside(self, context: ctypes.c_void_p) -> Iterator[None]:
        """Makes `context` this thread's own for the while."""
        self("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Allows what a capture of any stream of the process would forbid: loading touches no stream."""
        mode = ctypes.c_int(2)
        self("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


@functools.cache
def libcuda() -> Driver:
    """The driver of this process, loaded once."""
    return Driver(ctypes.CDLL("libcuda.so.1"))


class _Slots(threading.local):
    """Where one thread puts together its launches of one function."""

    def __init__(self, signature: str) -> None:
        self.memory = (ctypes.c_uint64 * (struct.calcsize(_format(signature)) // 8 + 1))()
        at = ctypes.addressof(self.memory)
        self.pointers = (ctypes.c_void_p * len(signature))(*(at + offset for offset, _ in _fields(signature)))
        self.configs: dict[tuple[Any, ...], tuple[LaunchConfig, Any]] = {}
        self.context = ctypes.c_void_p()
        self.where = ctypes.byref(self.context)


def _format(signature: str) -> str:
    """The signature as `struct` knows it."""
    return signature.replace("T", "128s")


def _fields(signature: str) -> list[tuple[int, int]]:
    """Offset and size (bytes) of each parameter, as C lays them out."""
    sizes = [struct.calcsize(_format(kind)) for kind in signature]
    return [(struct.calcsize(_format(signature[: i + 1])) - size, size) for i, size in enumerate(sizes)]


class Function:
    """A kernel loaded on one device.

    registers     32-bit registers of a thread
    local_bytes   local memory of a thread: above 0 where registers spill or an array is indexed
    shared_bytes  static shared memory of a block
    """

    # New shapes make new configs; beyond so many in a thread they are forgotten, all at once.
    MOST_CONFIGS = 1024

    def __init__(self, driver: Driver, context: ctypes.c_void_p, handle: ctypes.c_void_p, name: str, signature: str):
        self.name, self.signature = name, signature
        self._driver, self._context, self._handle, self._where = driver, context, handle, context.value
        self._pack, self._slots = struct.Struct(_format(signature)).pack_into, _Slots(signature)
        self.shared_bytes, self.local_bytes, self.registers = map(self._attribute, (1, 3, 4))

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._driver("cuFuncGetAttribute", ctypes.byref(value), which, self._handle)
        return value.value

    def launch(
        self,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        cluster: tuple[int, int, int],
        stream: int,
        values: Sequence[int | float | bytes],
        pdl: bool = False,
    ) -> None:
        """Queues the kernel on `stream` (a handle of this function's device) and returns. From any thread.

        grid in blocks, block in threads, shared in bytes (dynamic), cluster in blocks, at most 8 and a divisor of
        the grid; `values` are the parameters, in the order of the signature, pointers as addresses. With pdl the
        kernel may start before the one queued before it ends, and must wait for it by griddepcontrol.wait.
        Raises ArgumentError for values that do not fit the signature, RuntimeError for what the driver refuses.
        """
        slots, driver = self._slots, self._driver
        found = slots.configs.get((grid, block, shared, cluster, pdl))
        config, reference = found or self._configure(grid, block, shared, cluster, pdl)
        config.stream = stream
        try:
            self._pack(slots.memory, 0, *values)
        except struct.error as error:
            raise ArgumentError("values", values, f"numbers as in {self.signature!r}: {error}") from error
        driver.current(slots.where)
        if slots.context.value == self._where:
            code = driver.launch(reference, self._handle, slots.pointers, None)
        else:
            # Another device is current; or none is, in a thread that has not called CUDA yet.
            with driver.inside(self._context):
                code = driver.launch(reference, self._handle, slots.pointers, None)
        if code:
            driver.check(code, f"launch of {self.name}")

    def _configure(
        self, grid: tuple[int, int, int], block: int, shared: int, cluster: tuple[int, int, int], pdl: bool
    ) -> tuple[LaunchConfig, Any]:
        sizes = (*grid, block, *cluster)
        # Beyond these the fields of the C structure would wrap; the driver checks the rest.
        if min(sizes) < 1 or shared < 0 or max(*sizes, shared) >= 1 << 31:
            raise ArgumentError("(grid, block, shared, cluster)", (grid, block, shared, cluster), "1 to 2**31 - 1")
        blocks = cluster[0] * cluster[1] * cluster[2]
        if blocks > MAX_CLUSTER or any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise ArgumentError("cluster", cluster, f"at most {MAX_CLUSTER} blocks, and a divisor of the grid {grid}")
        attributes = []
        if blocks > 1:
            attributes.append(LaunchAttribute(LaunchAttribute.CLUSTER_DIMENSION, value=cluster))
        if pdl:
            attributes.append(LaunchAttribute(LaunchAttribute.PROGRAMMATIC_STREAM_SERIALIZATION, value=(1,)))
        # The structure keeps the array alive.
        array = (LaunchAttribute * len(attributes))(*attributes) if attributes else None
        config = LaunchConfig(grid, (block, 1, 1), shared, 0, array, len(attributes))
        configs = self._slots.configs
        if len(configs) >= self.MOST_CONFIGS:
            configs.clear()
        configs[grid, block, shared, cluster, pdl] = made = (config, ctypes.byref(config))
        return made


@functools.cache
def load_cuda(
    source: str, entry: str, signature: str, defines: Defines = (), device_index: int = 0, shared_bytes: int = 0
) -> Function:
    """The kernel `entry` (extern "C") of `source`, compiled for a device and loaded on it, once.

    `signature` has a letter for each parameter: P a pointer, i an int, q a long long, f a float and, before all
    others, T a tensor map. `shared_bytes` is the most dynamic shared memory that a launch will ask for. From any
    thread, also while a stream is captured.
    Raises what `cubin` raises; ArgumentError where the signature is not the kernel's; RuntimeError from the driver.
    """
    if not re.fullmatch("T*[Piqf]*", signature):
        raise ArgumentError("signature", signature, "letters of P i q f, after any T")
    properties = torch.cuda.get_device_properties(device_index)
    image = cubin(source, arch_of(properties.major, properties.minor), defines)
    with _LOADING:
        return _load(image, entry, signature, device_index, shared_bytes)


@functools.cache
def _load(image: bytes, entry: str, signature: str, device_index: int, shared_bytes: int) -> Function:
    driver = libcuda()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    driver("cuInit", 0)
    with driver.relaxed():
        driver("cuDeviceGet", ctypes.byref(device), device_index)
        # torch's own context. Never released, as the module is never unloaded: both live as long as the process.
        driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        with driver.inside(context):
            driver("cuModuleLoadData", ctypes.byref(module), image)
            driver("cuModuleGetFunction", ctypes.byref(handle), module, entry.encode())
            function = Function(driver, context, handle, entry, signature)
            _check_signature(function, handle)
            if function.shared_bytes + shared_bytes > FREE_SHARED:
                driver("cuFuncSetAttribute", handle, 8, shared_bytes)
    LOADED.append(function)
    return function


def _check_signature(function: Function, handle: ctypes.c_void_p) -> None:
    """Compares the signature with the kernel's own: launching with too few parameters would read beyond them."""
    get = getattr(function._driver.library, "cuFuncGetParamInfo", None)
    if get is None:
        # Drivers before CUDA 12.4.
        return
    found: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    while get(handle, ctypes.c_size_t(len(found)), ctypes.byref(offset), ctypes.byref(size)) == 0:
        found.append(size.value)
    if found != [size for _, size in _fields(function.signature)]:
        raise ArgumentError("signature", function.signature, f"parameters of {function.name}, in bytes: {found}")
