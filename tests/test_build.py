"""CUDA source to a loaded function: compiled for every architecture here, launched through a libcuda of our own.

tests/test_launch.py has what needs a GPU.
"""

import ctypes
import importlib
import pkgutil
import struct
import subprocess
import threading
import types
from pathlib import Path

import pytest
import torch

from lqcompile import cache, doctor, kernels
from lqcompile.errors import ArgumentError, Reason, Refused
from lqcompile.kernels import build
from lqcompile.kernels.tensor_map import tensor_map

FILL = """
extern "C" __global__ void fill(float *out, int n, long long step, float value) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = SCALE * (value + step * i);
}
"""
SQUARE = """extern "C" __global__ void square(float *data) { data[threadIdx.x] *= data[threadIdx.x]; }"""
TEXTS = {"fill.cu": FILL, "square.cu": SQUARE}


def forget():
    for cached in (build.cubin, build.load_cuda, build._load):
        cached.cache_clear()


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """Sources of the tests, in the place of the kernels' own; an artifact store of this test's own."""
    given = dict(TEXTS)
    store = cache.Cache(tmp_path / "store")
    monkeypatch.setattr(build, "_source", given.__getitem__)
    monkeypatch.setattr(cache, "default", lambda: store)
    forget()
    yield given
    forget()


@pytest.fixture
def compiled(monkeypatch):
    """The sources that the compiler has really seen."""
    seen, real = [], build._compile

    def compile(source, text, options):
        seen.append(source)
        return real(source, text, options)

    monkeypatch.setattr(build, "_compile", compile)
    return seen


def variants(name):
    """(source, entry, defines) of every kernel that a module of the kernels folder declares under `name`."""
    for module in pkgutil.iter_modules(kernels.__path__):
        yield from getattr(importlib.import_module(f"{kernels.__name__}.{module.name}"), name, ())


def name_of(variant):
    source, entry, defines = variant
    return "-".join((source, entry, *(f"{name}{value}" for name, value in defines)))


@pytest.mark.parametrize("arch", build.ARCHS)
@pytest.mark.parametrize("variant", list(variants("CUDA_VARIANTS")), ids=name_of)
def test_every_kernel_compiles_for_every_architecture(variant, arch):
    source, entry, defines = variant
    assert f".text.{entry}\0".encode() in build.cubin(source, arch, defines)


@pytest.mark.parametrize("variant", list(variants("HOPPER_VARIANTS")), ids=name_of)
def test_every_kernel_for_hopper_compiles(variant):
    source, entry, defines = variant
    assert f".text.{entry}\0".encode() in build.cubin(source, "sm_90a", defines)


@pytest.mark.parametrize("arch", build.ARCHS)
def test_nvrtc_compiles_for_every_architecture(texts, arch):
    image = build.cubin("fill.cu", arch, (("SCALE", 3),))
    assert image.startswith(b"\x7fELF") and b".text.fill\0" in image


def test_a_device_gets_the_code_made_for_it():
    got = [build.arch_of(*capability) for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))]
    assert tuple(got) == build.ARCHS


def test_a_source_is_compiled_once_for_each_set_of_defines(texts, compiled):
    three = build.cubin("fill.cu", "sm_80", (("SCALE", 3),))
    four = build.cubin("fill.cu", "sm_80", (("SCALE", 4),))
    assert three != four and len(compiled) == 2
    forget()
    assert build.cubin("fill.cu", "sm_80", (("SCALE", 3),)) == three and len(compiled) == 2
    assert {entry.facts["source"] for entry in cache.default().entries()} == {"fill.cu"}
    build.cubin("fill.cu", "sm_86", (("SCALE", 3),))
    texts["fill.cu"] += "\n"
    forget()
    build.cubin("fill.cu", "sm_80", (("SCALE", 3),))
    assert len(compiled) == 4


def test_another_nvrtc_compiles_again(texts, compiled, monkeypatch):
    build.cubin("square.cu", "sm_80")
    library, path, _ = build.nvrtc()
    forget()
    monkeypatch.setattr(build, "_nvrtc", lambda: (library, path, "0.0"))
    build.cubin("square.cu", "sm_80")
    assert len(compiled) == 2


def test_a_damaged_entry_is_built_again(texts, compiled):
    first = build.cubin("square.cu", "sm_80")
    (path,) = cache.default().root.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    forget()
    assert build.cubin("square.cu", "sm_80") == first and len(compiled) == 2
    assert sorted(p.suffix for p in cache.default().root.iterdir()) == [".damaged", ".lq"]


def test_a_compile_error_shows_the_log_and_is_not_kept(texts):
    texts["wrong.cu"] = 'extern "C" __global__ void f(float *p) { p[0] = no_such_name; }'
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"wrong\.cu does not compile[^\n]*sm_80(.|\n)*no_such_name"):
            build.cubin("wrong.cu", "sm_80")
    assert not list(cache.default().entries())


@pytest.mark.parametrize(
    "arguments",
    [
        ("fill.cu", "sm_80", (("SCALE", "3"),)),
        ("fill.cu", "sm_80", (("SCALE", 3.5),)),
        ("fill.cu", "sm_80", (("SCALE", True),)),
        ("fill.cu", "sm_80", (("SCALE=1 -I/tmp", 3),)),
        ("fill.cu", "sm_80 -I/tmp", (("SCALE", 3),)),
        ("fill.cu", "compute_80", (("SCALE", 3),)),
    ],
)
def test_only_ints_and_names_reach_the_compiler(texts, compiled, arguments):
    with pytest.raises(ArgumentError):
        build.cubin(*arguments)
    assert not compiled


def test_only_self_contained_files_of_the_folder_are_sources(monkeypatch, tmp_path):
    for name in ("../pyproject.toml", "build.py", "/etc/passwd", ".cu", "a/b.cu"):
        with pytest.raises(ArgumentError):
            build._source(name)
    (tmp_path / "x.cu").write_text("// fine\n  # include <cuda_fp16.h>\n")
    monkeypatch.setattr(build.resources, "files", lambda package: tmp_path)
    with pytest.raises(ArgumentError, match="include"):
        build._source("x.cu")


def test_every_cuda_file_of_the_folder_is_self_contained():
    for path in Path(kernels.__path__[0]).glob("*.cu"):
        assert build._source(path.name)


def test_without_nvrtc_the_reason_says_what_to_install(texts, monkeypatch):
    monkeypatch.setattr(build, "_nvrtc_files", lambda: iter(["libno-such-nvrtc.so"]))
    monkeypatch.setattr(build, "_nvrtc", build._nvrtc.__wrapped__)
    with pytest.raises(Refused, match="libno-such") as refused:
        build.cubin("square.cu", "sm_80")
    assert refused.value.reason is Reason.NO_NVRTC and "nvidia-cuda-nvrtc" in Reason.NO_NVRTC.advice
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (doctor._nvrtc().status, doctor._nvrtc().advice) == ("warn", Reason.NO_NVRTC.advice)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor._nvrtc().status == "ok"


def test_the_nvrtc_of_torchs_cuda_version_is_tried_first(monkeypatch, tmp_path):
    for folder, major in (("cu13", 13), ("cuda_nvrtc", 12), ("cu14", 14)):
        (tmp_path / folder / "lib").mkdir(parents=True)
        for name in (f"libnvrtc.so.{major}", f"libnvrtc-builtins.so.{major}.0", f"libnvrtc.alt.so.{major}"):
            (tmp_path / folder / "lib" / name).touch()
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec)
    for version, order in (("12.8", "12 14 13 12 so"), ("13.0", "13 14 12 13 so"), (None, "14 13 12 13 12 so")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert [name.rsplit(".", 1)[1] for name in build._nvrtc_files()] == order.split()


def test_the_structures_are_those_of_cuda_h(tmp_path):
    config, attribute = build.LaunchConfig, build.LaunchAttribute
    offsets = [getattr(config, name).offset for name in ("shared", "stream", "attributes", "attribute_count")]
    ours = [ctypes.sizeof(config), *offsets, ctypes.sizeof(attribute), attribute.value.offset, attribute.value.size]
    assert ours == [56, 24, 32, 40, 48, 72, 8, 64]
    headers = sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))
    if not headers:
        pytest.skip("no cuda.h to compare with; the figures of CUDA 13 agree")
    source = """#include <cuda.h>\n#include <stddef.h>\n#include <stdio.h>
    int main() { printf("%zu %zu %zu %zu %zu %zu %zu %zu %d %d", sizeof(CUlaunchConfig),
        offsetof(CUlaunchConfig, sharedMemBytes), offsetof(CUlaunchConfig, hStream), offsetof(CUlaunchConfig, attrs),
        offsetof(CUlaunchConfig, numAttrs), sizeof(CUlaunchAttribute), offsetof(CUlaunchAttribute, value),
        sizeof(CUlaunchAttributeValue), CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION); }"""
    (tmp_path / "sizes.cpp").write_text(source)
    command = [doctor.compiler(), "sizes.cpp", "-I", headers[-1].parent, "-o", "sizes"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    done = subprocess.run([tmp_path / "sizes"], capture_output=True, text=True, timeout=10)
    ids = [attribute.CLUSTER_DIMENSION, attribute.PROGRAMMATIC_STREAM_SERIALIZATION]
    assert [int(figure) for figure in done.stdout.split()] == [*ours, *ids]


class Record(ctypes.Structure):
    """What tests/libcuda.cpp remembers of a thread's last launch."""

    _fields_ = (
        *(("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint)),
        *(("stream", ctypes.c_void_p), ("count", ctypes.c_uint), ("attributes", build.LaunchAttribute * 2)),
        *(("parameters", ctypes.c_char * 256), ("context", ctypes.c_void_p)),
    )


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """tests/libcuda.cpp, built."""
    path = tmp_path_factory.mktemp("libcuda") / "libcuda.so"
    source = Path(__file__).with_name("libcuda.cpp")
    subprocess.run([doctor.compiler(), "-shared", "-fPIC", "-O1", source, "-o", path], check=True, timeout=100)
    library = ctypes.CDLL(str(path))
    library.lq_last.restype = ctypes.POINTER(Record)
    assert library.lq_record_size() == ctypes.sizeof(Record)
    return library


@pytest.fixture
def load(texts, library, monkeypatch):
    """load_cuda on a Hopper that is not there, for kernels with the parameters of `signature`."""
    monkeypatch.setattr(build, "libcuda", lambda: build.Driver(library))
    hopper = types.SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: hopper)

    def load(entry="fill", signature="Piqf", device_index=0, shared_bytes=0, kernels_own="Piqf"):
        fields = build._fields(kernels_own)
        array = ctypes.c_size_t * len(fields)
        library.lq_parameters(len(fields), array(*(at for at, _ in fields)), array(*(size for _, size in fields)))
        return build.load_cuda("fill.cu", entry, signature, (("SCALE", 1),), device_index, shared_bytes)

    yield load
    assert (library.lq_depth(), library.lq_mode()) == (0, 0)


def test_a_launch_says_what_was_asked_for(load, library):
    function = load()
    assert load() is function
    assert (function.registers, function.local_bytes, function.shared_bytes) == (104, 103, 101)
    for grid, cluster, pdl, ids in (
        ((6, 2, 1), (1, 1, 1), False, []),
        ((6, 2, 1), (2, 2, 1), False, [4]),
        ((6, 2, 1), (1, 1, 1), True, [6]),
        ((8, 1, 1), (8, 1, 1), True, [4, 6]),
    ):
        values = (0xDEADBEEF00000000, -7, -(1 << 40), 0.5)
        for stream in (0, 0x700000001):
            function.launch(grid, 128, 1024, cluster, stream, values, pdl)
            got = library.lq_last().contents
            assert (*got.grid,) == grid and (*got.block,) == (128, 1, 1) and got.shared == 1024
            assert (got.stream or 0) == stream and got.context == 0x100000000
            assert struct.unpack_from("Piqf", bytes(memoryview(got)), Record.parameters.offset) == values
            attributes = {a.id: tuple(a.value) for a in got.attributes[: got.count]}
            assert list(attributes) == ids
            assert attributes.get(4, cluster)[:3] == cluster and attributes.get(6, (1,))[0] == 1


@pytest.mark.parametrize("values", [(), (1, 2, 3), (1, 2, 3, 4.0, 5), (1, 2.5, 3, 4.0), (1, 1 << 31, 3, 4.0), "1234"])
def test_values_that_do_not_fit_the_signature_are_refused(load, values):
    with pytest.raises(ArgumentError, match="values"):
        load().launch((1, 1, 1), 32, 0, (1, 1, 1), 0, values)


@pytest.mark.parametrize(
    ("grid", "block", "shared", "cluster"),
    [
        ((0, 1, 1), 32, 0, (1, 1, 1)),
        ((1, 1, 1), 0, 0, (1, 1, 1)),
        ((1, 1, 1), 32, -1, (1, 1, 1)),
        ((1 << 32, 1, 1), 32, 0, (1, 1, 1)),
        ((3, 1, 1), 32, 0, (2, 1, 1)),
        ((16, 1, 1), 32, 0, (16, 1, 1)),
        ((4, 4, 1), 32, 0, (4, 4, 1)),
    ],
)
def test_sizes_that_no_device_has_are_refused(load, grid, block, shared, cluster):
    with pytest.raises(ArgumentError):
        load().launch(grid, block, shared, cluster, 0, (0, 0, 0, 0.0))


@pytest.mark.parametrize("signature", ["", "Piq", "Piqff", "iPqf", "Pqqf", "Pi qf", "Piqd", "@Piqf"])
def test_a_signature_that_is_not_the_kernels_is_refused(load, signature):
    with pytest.raises(ArgumentError, match="signature"):
        load(signature=signature)


def test_a_tensor_map_goes_first_and_by_value(load, library):
    tensor_map.cache_clear()
    made = tensor_map(0x7000, torch.bfloat16, (5, 256), (16, 64), True)
    # Type, rank, address, sizes, stride in bytes, box, steps, interleave, 128-byte swizzle, promotion, fill.
    assert struct.unpack("16Q", made) == (9, 2, 0x7000, 256, 5, 512, 64, 16, 1, 1, 0, 3, 3, 0, 0, 0)
    load(signature="TPi", kernels_own="TPi").launch((1, 1, 1), 32, 0, (1, 1, 1), 0, (made, 0x1234, -5))
    got = library.lq_last().contents
    assert struct.unpack_from("128sPi", bytes(memoryview(got)), Record.parameters.offset) == (made, 0x1234, -5)
    with pytest.raises(ArgumentError, match="signature"):
        load(signature="PT")
    tensor_map.cache_clear()


def test_a_kernel_without_parameters_can_be_launched(load):
    load(signature="", kernels_own="").launch((1, 1, 1), 32, 0, (1, 1, 1), 0, ())


def test_errors_of_the_driver_have_their_names(load, library):
    function = load()
    for code, text in ((1, "launch of fill: error 1, CUDA_ERROR_INVALID_VALUE: invalid"), (77, "error 77, unknown")):
        library.lq_fail_next(code)
        with pytest.raises(RuntimeError, match=text):
            function.launch((1, 1, 1), 32, 0, (1, 1, 1), 0, (0, 0, 0, 0.0))
    with pytest.raises(RuntimeError, match="cuModuleGetFunction: error 500, CUDA_ERROR_NOT_FOUND"):
        load("absent")


def test_large_shared_memory_is_asked_for(load, library):
    before = library.lq_largest_shared()
    load(shared_bytes=40 * 1024)
    assert library.lq_largest_shared() == before
    load(shared_bytes=200 * 1024)
    assert library.lq_largest_shared() == 200 * 1024
    # Static memory counts: the library that plays libcuda says 101 bytes.
    load(shared_bytes=48 * 1024 - 100)
    assert library.lq_largest_shared() == 48 * 1024 - 100


def test_a_function_runs_on_its_own_device_whichever_is_current(load, library):
    for device in (0, 1, 3):
        load(device_index=device).launch((1, 1, 1), 32, 0, (1, 1, 1), 0, (0, 0, 0, 0.0))
        assert library.lq_last().contents.context == 0x100000000 + device


def test_threads_load_once_and_do_not_mix_their_values(load, library):
    before, failures, barrier = library.lq_modules(), [], threading.Barrier(8)

    def work(mark):
        barrier.wait()
        function = load()
        for i in range(300):
            values = (mark, i, mark * i, 0.0)
            function.launch((mark, 1, 1), 32, 0, (1, 1, 1), mark, values)
            got = library.lq_last().contents
            packed = bytes(memoryview(got))
            if struct.unpack_from("Piqf", packed, Record.parameters.offset) != values or got.grid[0] != mark:
                failures.append((mark, i))

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and library.lq_modules() == before + 1


def test_configs_are_bounded(load):
    function = load()
    for m in range(1, 3 * function.MOST_CONFIGS):
        function.launch((m, 1, 1), 32, 0, (1, 1, 1), 0, (0, 0, 0, 0.0))
    assert len(function._slots.configs) <= function.MOST_CONFIGS
