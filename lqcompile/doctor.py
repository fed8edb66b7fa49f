"""`lq doctor` and `lq kernels`: what this machine has, and whether a model really compiles on it."""

from __future__ import annotations

import importlib.util
import itertools
import platform
import shutil
import stat
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from . import cache
from .cli import Exit
from .errors import Refused
from .formats import bound, dequantize
from .kernels import build, native, registry
from .kernels.layout import LAYOUTS
from .quantize import QuantLinear, quantize
from .report import size
from .types import FORMS, Format

OLDEST_TORCH = (2, 11)
NO_COMPILER = "Inductor needs a C++ compiler: install g++ (Debian: apt install g++) or set CXX to one"
OWN_FOLDER = "set LQ_CACHE_DIR to a folder of your own"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: `status` is ok, warn or fail; `advice` is for the last two."""

    status: str
    name: str
    detail: str
    advice: str = ""


def compiler() -> str | None:
    """The C++ compiler that Inductor will use, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def _python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} on {platform.platform(terse=True)}")


def _torch() -> Finding:
    old = tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH
    oldest = ".".join(map(str, OLDEST_TORCH))
    return Finding("fail" if old else "ok", "torch", torch.__version__, f"install torch {oldest} or newer")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("ok", "gpu", "none; models run on the CPU")
    p = torch.cuda.get_device_properties(0)
    driver = torch._C._cuda_getDriverVersion()
    return Finding("ok", "gpu", f"{p.name}, sm_{p.major}{p.minor}, driver for CUDA {driver // 1000}")


def _triton() -> Finding:
    if importlib.util.find_spec("triton"):
        return Finding("ok", "triton", version("triton"))
    if torch.cuda.is_available():
        return Finding("fail", "triton", "missing", "pip install triton; Inductor needs it on a GPU")
    return Finding("ok", "triton", "none; only GPUs need it")


def _nvrtc() -> Finding:
    try:
        _, path, found = build.nvrtc()
    except Refused as refused:
        if torch.cuda.is_available():
            return Finding("warn", "nvrtc", "missing; matmuls run dense", refused.reason.advice)
        return Finding("ok", "nvrtc", "none; only GPUs need it")
    return Finding("ok", "nvrtc", f"{found}, {path}")


def _cpu() -> Finding:
    found = native.isas()
    if not found:
        return Finding("ok", "cpu kernels", "none: they need x86-64 with AVX2, on Linux; matmuls run dense")
    try:
        native.load("light.cpp", found[0])
    except Refused as refused:
        return Finding("warn", "cpu kernels", f"not compiled: {refused}"[:300], refused.reason.advice)
    return Finding("ok", "cpu kernels", f"{found[0].name}, of {', '.join(isa.name for isa in found)}")


def _own_cache() -> Finding:
    store = cache.default()
    problem = store.problem()
    if problem is not None:
        return Finding("warn", "cache", f"not used: {problem}", OWN_FOLDER)
    return Finding("ok", "cache", f"{store.root}, private")


def _compiler() -> Finding:
    found = compiler()
    if found is None:
        return Finding("fail", "c++ compiler", "none found", NO_COMPILER)
    return Finding("ok", "c++ compiler", shutil.which(found) or found)


def _cache() -> Finding:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    advice = "set TORCHINDUCTOR_CACHE_DIR to a folder of your own"
    try:
        path = Path(cache_dir())
        probe = path / "lq_doctor"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding("fail", "inductor cache", f"{error.filename}: {error.strerror}", advice)
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return Finding("warn", "inductor cache", f"{path} can be written by other users", advice)
    return Finding("ok", "inductor cache", str(path))


def _ops() -> Finding:
    from . import backend  # noqa: F401

    names = [f"lq::{layout}_gemm" for layout in LAYOUTS]
    missing = [name for name in names if not hasattr(torch.ops.lq, name.removeprefix("lq::"))]
    if missing:
        return Finding("fail", "ops", f"not registered: {', '.join(missing)}", "reinstall lqcompile")
    kernels = ", ".join(sorted(registry.discover()))
    return Finding("ok", "ops", f"{', '.join(names)}; kernels: {kernels}")


@torch.no_grad()
def _end_to_end() -> Finding:
    from .backend import explain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(256, 64)), bits=4, group=64).eval().to(device)
    layer, x = model.get_submodule("0"), torch.randn(5, 256, device=device)
    assert isinstance(layer, QuantLinear) and isinstance(layer.bias, torch.Tensor)
    report = explain(model, x)
    y = torch.compile(model, backend="lq")(x)
    name = "a compiled int4 layer"
    if report.rewritten != 1:
        return Finding("fail", name, report.verdict(), report.text())
    (decision,) = report.decisions
    weight = layer.qweight()
    w64 = dequantize(weight)
    y64 = nn.functional.linear(x.double(), w64, layer.bias.double())
    used = [registry.discover()[p.kernel] for p in decision.pieces if p.low <= len(x) <= (p.high or len(x))]
    call = registry.Call(decision.layout, weight.format, weight.n, weight.k)
    allowed = bound(y64, x.double(), w64, used[0].rounding(call, x.dtype))
    error = (y.double() - y64).abs()
    detail = f"kernel {used[0].name}, error {float((error / allowed).max()):.2f} of the bound against float64"
    if not bool((error <= allowed).all()):
        return Finding("fail", name, detail, "please report this with all lines above")
    return Finding("ok", name, detail)


CHECKS: tuple[Callable[[], Finding], ...] = (
    _python,
    _torch,
    _gpu,
    _triton,
    _nvrtc,
    _compiler,
    _cpu,
    _cache,
    _own_cache,
    _ops,
)


def findings() -> Iterator[Finding]:
    """One finding after the other; the compiled model is tried only where nothing has failed."""
    failed = False
    for check in CHECKS:
        finding = check()
        failed |= finding.status == "fail"
        yield finding
    if not failed:
        print("        compiling a model; half a minute where the cache is empty", flush=True)
        yield _end_to_end()


def doctor() -> int:
    """Prints every finding. Returns Exit.UNUSABLE if one failed."""
    failed = False
    for finding in findings():
        print(f"  {finding.status:<5} {finding.name:<22} {finding.detail}", flush=True)
        if finding.status != "ok":
            print(textwrap.indent(finding.advice, " " * 8), flush=True)
        failed |= finding.status == "fail"
    print("lqcompile cannot be used here." if failed else "lqcompile can be used here.")
    return Exit.UNUSABLE if failed else Exit.FINE


def cache_report(action: str) -> str:
    """`lq cache`: shows every entry, or sets the damaged ones aside (verify), or removes all (clear)."""
    store = cache.default()
    problem = store.problem()
    if problem is not None:
        return f"not used: {problem}; {OWN_FOLDER}"
    if action == "clear":
        return f"{store.root}: {store.clear()} removed"
    if action == "verify":
        damaged = store.verify()
        return "\n".join([f"set aside: {entry.key}" for entry in damaged] + [f"{store.root}: {len(damaged)} damaged"])
    entries = list(store.entries())
    lines = [
        f"{entry.kind if entry.ok else 'damaged':<8} {size(entry.bytes):>9}  "
        + " ".join(f"{value}" for name, value in sorted(entry.facts.items()) if name != "nvrtc")
        for entry in entries
    ]
    return "\n".join([*sorted(lines), f"{store.root}: {len(entries)} entries, {size(sum(e.bytes for e in entries))}"])


def kernel_table() -> str:
    """Every kernel: its layouts, devices and formats.

    "repeats": bit-identical from run to run. "any batch": a row's result does not depend on the other rows.
    """
    kernels = sorted(registry.discover().items())
    rows = [("kernel", "layout", "device", "formats", "repeats", "any batch")]
    for name, kernel in kernels:
        repeats, batch = ("yes" if flag else "no" for flag in (kernel.deterministic, kernel.batch_invariant))
        where = ("/".join(kernel.layouts), "/".join(kernel.devices))
        rows.append((name, *where, _formats(kernel), repeats, batch))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(f"{name}: {kernel.summary}" for name, kernel in kernels)])


SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def format_table() -> str:
    """Formats x kernels as a Markdown table: on which devices, for which dtypes of x, each kernel takes a format."""
    kernels = sorted(registry.discover().items())
    lines = ["| weight | bits | " + " | ".join(name for name, _ in kernels) + " |", "|---|---|" + "---|" * len(kernels)]
    for form in FORMS:
        cells = {bits: tuple(_cell(kernel, form, bits) for _, kernel in kernels) for bits in range(1, 9)}
        for row, same in itertools.groupby(cells, key=cells.__getitem__):
            run = list(same)
            bits = f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}"
            lines.append(f"| {form} | {bits} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _cell(kernel: registry.Kernel, form: str, bits: int) -> str:
    found: dict[str, list[str]] = {}
    for device in kernel.devices:
        names = [SHORT[t] for t in registry.X_DTYPES if _accepts(kernel, form, bits, t, device)]
        if names:
            found.setdefault("all" if len(names) == len(SHORT) else ", ".join(names), []).append(device)
    return "; ".join(f"{', '.join(devices)}: {dtypes}" for dtypes, devices in found.items()) or "-"


def _accepts(kernel: registry.Kernel, form: str, bits: int, dtype: torch.dtype, device: str) -> bool:
    """Whether a kernel takes a form in some layout, with some kind of zero, at groups of 128."""
    zeros = {"affine": ("none", "int", "float"), "table": ("none",), "binary": ("none", "float")}[form]
    calls = (
        registry.Call(layout, Format(form, bits, 128, zero, "float16"), 512, 512)
        for layout, zero in itertools.product(kernel.layouts, zeros)
        if form in LAYOUTS[layout].forms
    )
    return any(kernel.accepts(call, dtype, device) is None for call in calls)


def _formats(kernel: registry.Kernel) -> str:
    """Forms and bits that a kernel accepts in some layout, at groups of 128, for some dtype of x."""
    tries = list(itertools.product(registry.X_DTYPES, kernel.devices))
    parts = []
    for form in FORMS:
        bits = [b for b in range(1, 9) if any(_accepts(kernel, form, b, dtype, device) for dtype, device in tries)]
        if bits:
            run = len(bits) > 2 and bits == list(range(bits[0], bits[-1] + 1))
            parts.append(f"{form} {bits[0]}-{bits[-1]}" if run else f"{form} {'/'.join(map(str, bits))}")
    return ", ".join(parts)
