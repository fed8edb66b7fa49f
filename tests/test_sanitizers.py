"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on buffers of exactly their sizes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lqcompile.kernels import cpu, native
from lqcompile.kernels.layout import LAYOUTS

from .test_cpu import CASES, Case, N, each_isa, pytestmark, source_of, weight
from .test_cpu_bf16 import ALL, ISA, LONG, can_run

__all__ = ["pytestmark"]

SANITIZE = ("-O1", "-g", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-w", "-fsanitize=address,undefined")


@each_isa
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5], CASES[8], CASES[10], *CASES[15:18]], ids=str)
def test_sanitizers_find_nothing(isa, case, tmp_path):
    sanitize(isa, case, tmp_path)


def sanitize(isa: native.Isa, case: Case, tmp_path: Path) -> None:
    """A program of buffers of exactly their sizes, by AddressSanitizer and UndefinedBehaviorSanitizer."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    launcher = cpu.Launcher(source_of(isa, case), case.call(N), case.x_dtype, isa)
    text, flags = native._key(source_of(isa, case), isa, launcher.defines)
    source, program = tmp_path / "main.cpp", tmp_path / "main"
    source.write_text(text + (Path(__file__).parent / "sanitize.cpp").read_text())
    machine = [flag for flag in flags if flag.startswith("-m")]
    built = subprocess.run([compiler, *SANITIZE, *machine, source, "-o", program], capture_output=True, text=True)
    if built.returncode and "asan" in built.stderr:
        pytest.skip("no sanitizers")
    assert built.returncode == 0, built.stderr[-2000:]
    for n, m in ((N, 1), (17, 3), (N, 40), (1, 2)):
        call = case.call(n)
        shapes = LAYOUTS[case.layout].shapes(case.format, n, case.k, "cpu")
        sizes = [dtype.itemsize * torch.Size(shape).numel() for shape, dtype in shapes]
        numbers = cpu.Launcher(source_of(isa, case), call, case.x_dtype, isa)
        table = LAYOUTS[case.layout].pack(weight(case, n))[-1] if case.form == "table" else None
        tables = [0, 0, 0, 0] if table is None else [table.numel(), numbers.levels, *cpu._strides(table)]
        given = [m, *numbers.sizes, *numbers.low, case.x_dtype.itemsize, *sizes, *([0] * (3 - len(sizes))), *tables]
        done = subprocess.run([program, *map(str, given)], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


@can_run
@pytest.mark.parametrize("case", [ALL[0], ALL[4], ALL[7], ALL[13], ALL[16], *LONG], ids=str)
def test_sanitizers_find_nothing_in_many_rows(case, tmp_path):
    sanitize(ISA, case, tmp_path)
