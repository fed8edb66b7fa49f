"""options={"autotune": True}: what is timed decides, is kept, and is told as measured."""

from __future__ import annotations

import json

import pytest
import sympy
import torch

import lqcompile
from lqcompile import autotune, cache, config, cost, timing
from lqcompile.device import Device
from lqcompile.errors import ArgumentError
from lqcompile.kernels import registry
from lqcompile.types import Candidate, Format, Problem

from .models import close, compiled, mlp

M = sympy.Symbol("m", positive=True, integer=True)
CPU = torch.device("cpu")
FORMAT = Format("affine", 4, 32, "int", "float32")
DENSE = Candidate("dense weight", "", 1e-5 + 1e-7 * M)
FEW = Candidate("dense", "lut", 2e-5 + 1e-7 * M)
MANY = Candidate("dense", "quick", 3e-5 + 1e-8 * M)
WORKLOAD = {1: 10.0, 16: 2.0, 256: 1.0}


class FakeTimer:
    """Says of each kind of candidate the next of its `seconds`, and counts what it is asked."""

    rotation = 1

    def __init__(self, **seconds):
        self.seconds, self.asked = seconds, []

    def sampler(self, runs):
        # torch.mm has x and the weight, a kernel x, parts, bias and the call.
        args = runs[0].args
        layout = args[3].layout if len(args) > 2 else "vendor"
        self.asked.append((layout, args[0].shape[0]))
        seconds = self.seconds[layout]
        return lambda: seconds(args[0].shape[0]) if callable(seconds) else seconds


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Makes a FakeTimer with some seconds the timer; what is timed is kept in a folder of this test."""
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path / "cache"))
    cache.default.cache_clear()

    def use(**seconds):
        timer = FakeTimer(**{"vendor": 1e-5, "lut": 2e-5, "quick": 3e-5, **seconds})
        monkeypatch.setattr(timing, "timer", lambda device: timer)
        return timer

    yield use
    cache.default.cache_clear()


def size(n=64, k=128, dtype=torch.float32):
    return Problem(M, (1, 1 << 31), n, k, FORMAT, dtype, CPU)


def tuned(problem=None, m_range=(1, None), workload=WORKLOAD):
    return autotune.timed(problem or size(), m_range, [DENSE, FEW, MANY], workload, Device.of(CPU))


def test_measured_seconds_take_the_place_of_predicted_ones(use):
    timer = use(lut=4e-5, quick=lambda m: 1e-5 + 1e-8 * m)
    dense, few, many = tuned()
    assert sorted(timer.asked) == sorted((name, m) for name in ("vendor", "lut", "quick") for m in WORKLOAD)
    assert few.measured == ((1, 4e-5), (16, 4e-5), (256, 4e-5)) and dense.measured[0] == (1, 1e-5)
    assert cost.sample(few.seconds, [1, 16, 256]) == pytest.approx([4e-5] * 3)
    assert cost.sample(many.seconds, [1, 256]) == pytest.approx([1e-5 + 1e-8, 1e-5 + 256e-8])
    # Between and beyond, the prediction is held to what was measured nearby.
    for m in (2, 8, 64, 4096):
        ratio = cost.sample(few.seconds, [m])[0] / cost.sample(FEW.seconds, [m])[0]
        ratios = [4e-5 / cost.sample(FEW.seconds, [at])[0] for at in WORKLOAD]
        assert min(ratios) <= ratio <= max(ratios)


def test_what_was_timed_is_read_the_next_time(use):
    first, found = use(), tuned()
    assert first.asked
    again = use(lut=9.0)
    cache.default.cache_clear()
    assert tuned() == found and not again.asked


@pytest.mark.parametrize(
    "change",
    [
        {"problem": size(n=32)},
        {"problem": size(k=256)},
        {"problem": size(dtype=torch.bfloat16)},
        {"workload": {1: 1.0, 3: 1.0}},
        {"m_range": (16, 16)},
    ],
    ids=str,
)
def test_another_problem_is_timed_anew(use, change):
    use()
    tuned()
    timer = use()
    tuned(**change)
    assert timer.asked


def test_another_version_or_device_is_timed_anew(use, monkeypatch):
    use()
    tuned()
    for name, value in (("version", lambda package: "9.9"), ("SCHEMA", 99)):
        timer = use()
        monkeypatch.setattr(autotune, name, value)
        tuned()
        assert timer.asked
    timer, device = use(), Device.of(CPU)
    other = Device("cpu", "another", *(getattr(device, f) for f in ("bandwidth", "rate", "half", "launch")), "cpu", 1)
    autotune.timed(size(), (1, None), [DENSE, FEW, MANY], WORKLOAD, other)
    assert timer.asked


@pytest.mark.parametrize("how", ["torn", "list", "empty", "negative", "nan", "text", "first", "stranger"])
def test_a_damaged_entry_is_timed_anew(use, how):
    use()
    wanted = tuned()
    (file,) = cache.default().root.iterdir()
    key = autotune._key(size(), [DENSE, FEW, MANY], [1, 16, 256], Device.of(CPU))
    whole = json.loads(cache.default().get("autotune", key))
    rows = whole["times"]
    if how == "torn":
        file.write_bytes(file.read_bytes()[:-9])
    elif how == "list":
        cache.default().put("autotune", key, b"[]")
    else:
        values = {"negative": -1.0, "nan": float("nan"), "text": "1e-5"}
        if how in values:
            rows["1"]["dense/lut"] = values[how]
        if how == "first":
            del rows["1"]
        if how == "stranger":
            rows["1"]["other/lut"] = 1e-5
        cache.default().put("autotune", key, b"" if how == "empty" else json.dumps(whole).encode())
    timer = use()
    assert tuned() == wanted and timer.asked


def test_no_further_number_of_rows_is_begun_after_the_limit(use, monkeypatch):
    monkeypatch.setattr(autotune, "LIMIT", 0.0)
    timer = use()
    dense, few, _ = tuned(workload={256: 1.0, 1: 5.0})
    # The most frequent one always is.
    assert {m for _, m in timer.asked} == {1} and few.measured == ((1, 2e-5),) and dense.measured == ((1, 1e-5),)


def test_what_is_hopeless_is_not_timed(use):
    timer, slow = use(), Candidate("dense", "lut", 1.0 + 1.0 * M)
    _, few, many = autotune.timed(size(), (1, None), [DENSE, slow, MANY], WORKLOAD, Device.of(CPU))
    assert few == slow and many.measured and {layout for layout, _ in timer.asked} == {"vendor", "quick"}


def test_what_cannot_be_timed_is_predicted(use):
    def broken(m):
        raise RuntimeError("no timer today")

    use(lut=broken)
    with pytest.warns(UserWarning, match="no timer today"):
        assert tuned() == [DENSE, FEW, MANY]


def test_random_numbers_of_the_user_stay_as_they_were(use):
    use()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    tuned()
    assert torch.equal(torch.rand(4), wanted)


@torch.no_grad()
def test_a_plan_follows_the_timer_and_tells_of_it(use, monkeypatch):
    model, x = mlp(), torch.randn(3, 128)
    use(lut=1e-6, quick=2e-6)
    # Predictions say otherwise.
    assert {d.layout for d in lqcompile.explain(model, x).decisions} == {"quick"}
    for name, kernel in registry.discover().items():
        seconds = lambda problem, layout, device: sympy.Float(2e-6 if layout == "lut" else 1e-6)  # noqa: E731
        monkeypatch.setitem(registry.KERNELS, name, type(kernel)(**{**vars(kernel), "seconds": seconds}))
    report = lqcompile.explain(model, x, options={"autotune": True})
    assert {d.layout for d in report.decisions} == {"lut"}
    assert "measured 10x at M=3" in report.verdict() and "10x measured" in report.text()
    (first, *_) = report.document()["decisions"]
    assert first["predicted"] is None and first["measured"] == {"m": 3, "speedup": 10.0, "by": "autotune"}
    lines = report.document()["curves"][0]["lines"]
    assert {"name": "dense weight", "measured": [[3, 1e-5]]}.items() <= {**lines[-1]}.items()
    # Another GPU is planned for by predictions.
    assert "measured" not in lqcompile.explain(model, x, options={"autotune": True, "arch": "sm_90"}).verdict()


@torch.no_grad()
def test_a_real_shape_on_this_cpu(use, monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1 << 12)
    model, x = mlp(), torch.randn(2, 128)
    report = lqcompile.explain(model, x, options={"autotune": True, "strict": True})
    for d in report.decisions:
        (m, seconds), *_ = d.dense.measured
        assert m == 2 and 0 < seconds < 1
        assert {c.measured[0][0] for c in d.candidates if c.measured} == {2}
        (piece,) = d.pieces
        assert piece.seconds == pytest.approx(min(s for c in d.candidates for _, s in c.measured))
    assert close(compiled(model, autotune=True)(x), model(x))
    monkeypatch.setattr(timing, "timer", lambda device: pytest.fail("timed again"))
    assert lqcompile.explain(model, x, options={"autotune": True}).decisions == report.decisions


def test_autotune_is_a_bool():
    with pytest.raises(ArgumentError, match="autotune"):
        config.make(None, {"autotune": 1})
