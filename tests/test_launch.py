"""CUDA kernels loaded and launched on a real GPU: clusters, captures, threads, devices, and what the driver refuses."""

import threading
import time

import pytest
import torch

from lqcompile import cache
from lqcompile.errors import ArgumentError
from lqcompile.kernels import build

from .conftest import NO_CUDA

pytestmark = NO_CUDA

TEXTS = {
    "fill.cu": """
extern "C" __global__ void fill(float *out, int n, long long step, float value) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = SCALE * (value + step * i);
}
""",
    "cluster.cu": """
extern "C" __global__ void cluster(unsigned *out) {
    unsigned size, rank;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size));
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) out[blockIdx.x] = 16 * size + rank;
}
extern "C" __global__ void twice_plus(float *data, float more) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (long long start = clock64(); clock64() - start < 20000;);
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    data[i] = 2 * data[i] + more;
}
""",
    "shared.cu": """
extern "C" __global__ void turn(int *data, int n) {
    extern __shared__ int kept[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) kept[i] = data[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) data[i] = kept[n - 1 - i];
}
""",
    "spill.cu": """
extern "C" __global__ void __launch_bounds__(1024) spill(float *data) {
    float kept[200];
#pragma unroll
    for (int i = 0; i < 200; i++) kept[i] = data[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 200; i++) data[i * 1024 + threadIdx.x] = kept[i] * kept[(7 * i + 3) % 200];
}
""",
}
ONE = (1, 1, 1)


@pytest.fixture(autouse=True)
def texts(monkeypatch, tmp_path):
    """Sources of the tests, in the place of the kernels' own; nothing loaded or compiled before."""
    store = cache.Cache(tmp_path / "store")
    monkeypatch.setattr(build, "_source", TEXTS.__getitem__)
    monkeypatch.setattr(cache, "default", lambda: store)
    for cached in (build.cubin, build.load_cuda, build._load):
        cached.cache_clear()


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no clusters and no programmatic launches")


def stream_of(index=0):
    return torch.cuda.current_stream(index).cuda_stream


def load_fill(scale=1, index=0):
    return build.load_cuda("fill.cu", "fill", "Piqf", (("SCALE", scale),), index)


def fill(function, out, step, value):
    """out[i] = scale * (value + step * i), by one launch on the current stream of `out`."""
    blocks = -(-out.numel() // 128)
    values = (out.data_ptr(), out.numel(), step, value)
    function.launch((blocks, 1, 1), 128, 0, ONE, stream_of(out.device), values)


def filled(out, scale, step, value):
    return scale * (value + step * torch.arange(out.numel(), device=out.device, dtype=torch.float32))


def test_every_parameter_arrives():
    out = torch.full((1001,), float("nan"), device="cuda")
    fill(load_fill(3), out[:1000], -(1 << 33), 0.5)
    assert torch.equal(out[:1000], filled(out[:1000], 3, -float(1 << 33), 0.5)) and out[1000].isnan()


def test_what_the_driver_says_of_a_kernel():
    small = load_fill()
    spill = build.load_cuda("spill.cu", "spill", "P")
    assert 0 < small.registers <= 40 and (small.local_bytes, small.shared_bytes) == (0, 0)
    assert spill.registers <= 64 and spill.local_bytes > 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_clusters_have_the_size_that_was_asked_for(hopper, size):
    out = torch.zeros(16, dtype=torch.int32, device="cuda")
    function = build.load_cuda("cluster.cu", "cluster", "P")
    function.launch((16, 1, 1), 32, 0, (size, 1, 1), stream_of(), (out.data_ptr(),))
    assert out.tolist() == [16 * size + i % size for i in range(16)]


@pytest.mark.parametrize("kept", [1024, 200 * 1024])
def test_dynamic_shared_memory(kept):
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    kept = min(kept, most)
    data = torch.arange(kept // 4, dtype=torch.int32, device="cuda")
    function = build.load_cuda("shared.cu", "turn", "Pi", (), 0, kept)
    function.launch(ONE, 256, kept, ONE, stream_of(), (data.data_ptr(), kept // 4))
    assert torch.equal(data, torch.arange(kept // 4, dtype=torch.int32, device="cuda").flip(0))


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_captured_launch_is_replayed(hopper, cluster):
    function = build.load_cuda("cluster.cu", "cluster", "P")
    out = torch.zeros(4, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        function.launch((4, 1, 1), 32, 0, (cluster, 1, 1), stream_of(), (out.data_ptr(),))
    torch.cuda.synchronize()
    assert out.tolist() == [0] * 4
    for _ in range(2):
        out.zero_()
        graph.replay()
        assert out.tolist() == [16 * cluster + i % cluster for i in range(4)]


def test_a_kernel_is_compiled_and_loaded_while_a_stream_is_captured():
    out = torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        fill(load_fill(5), out, 2, 1.0)
    graph.replay()
    assert torch.equal(out, filled(out, 5, 2, 1.0))


def test_a_kernel_is_loaded_by_one_thread_while_another_captures():
    out, failures, graph = torch.zeros(1000, device="cuda"), [], torch.cuda.CUDAGraph()

    def load():
        try:
            load_fill(7)
        except RuntimeError as error:
            failures.append(error)

    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        thread = threading.Thread(target=load)
        thread.start()
        thread.join(100)
        fill(load_fill(7), out, 1, 0.0)
    graph.replay()
    assert not failures and torch.equal(out, filled(out, 7, 1, 0.0))


def test_any_thread_may_launch():
    out = torch.zeros(8, 1000, device="cuda")
    # Its own stream: the default one's handle says nothing of the device. None of the threads calls CUDA first.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    function, failures = load_fill(), []

    def work(row, handle):
        try:
            for i in range(100):
                values = (out.data_ptr() + 4000 * row, 1000, row, float(i))
                function.launch((8, 1, 1), 128, 0, ONE, handle, values)
        except RuntimeError as error:
            failures.append(error)

    for handle in (stream.cuda_stream, 0):
        out.zero_()
        torch.cuda.synchronize()
        threads = [threading.Thread(target=work, args=(row, handle)) for row in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        torch.cuda.synchronize()
        assert not failures
        for row in range(8):
            assert torch.equal(out[row], filled(out[row], 1, row, 99.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_function_runs_on_its_own_device_whichever_is_current():
    outs = [torch.zeros(100, device=f"cuda:{index}") for index in (0, 1)]
    for index, out in enumerate(outs):
        for current in (0, 1):
            with torch.cuda.device(current):
                fill(load_fill(index + 1, index), out, current, 1.0)
            assert torch.equal(out, filled(out, index + 1, current, 1.0))


def test_launches_that_overlap_still_follow_each_other(hopper):
    function = build.load_cuda("cluster.cu", "twice_plus", "Pf")
    data = torch.zeros(132 * 256, device="cuda")
    for i in range(20):
        function.launch((132, 1, 1), 256, 0, ONE, stream_of(), (data.data_ptr(), float(i % 2)), True)
    expected = 0.0
    for i in range(20):
        expected = 2 * expected + i % 2
    assert torch.equal(data, torch.full_like(data, expected))


def test_what_the_driver_refuses_is_raised_and_does_no_harm():
    function = load_fill()
    out = torch.zeros(128, device="cuda")
    values = (out.data_ptr(), 128, 0, 1.0)
    for grid, block, shared in ((ONE, 2048, 0), ((1, 70_000, 1), 32, 0), (ONE, 32, 1 << 20)):
        with pytest.raises(RuntimeError, match=r"launch of fill: .*CUDA_ERROR_INVALID_VALUE"):
            function.launch(grid, block, shared, ONE, stream_of(), values)
    with pytest.raises(ArgumentError, match="values"):
        function.launch(ONE, 128, 0, ONE, stream_of(), values[:-1])
    with pytest.raises(ArgumentError, match=r"signature.*in bytes"):
        build.load_cuda("fill.cu", "fill", "Pif", (("SCALE", 1),))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NOT_FOUND"):
        build.load_cuda("fill.cu", "absent", "Piqf", (("SCALE", 1),))
    fill(function, out, 0, 1.0)
    assert torch.equal(out, torch.ones_like(out))


def test_a_launch_is_quick_for_the_cpu():
    function, out = load_fill(), torch.zeros(128, device="cuda")
    arguments = (ONE, 128, 0, ONE, stream_of(), (out.data_ptr(), 128, 0, 1.0))
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        # Fewer than the driver's queue holds: no launch waits for the GPU.
        for _ in range(200):
            function.launch(*arguments)
        best = min(best, (time.perf_counter() - start) / 200)
    # About 3 us with the driver's own part; the bound is for what would be a mistake, not for a busy machine.
    assert best < 12e-6
