"""What the machine code of the CUDA kernels shows without a GPU: where weights become numbers; that nothing spills."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import nvidia
import pytest
import torch

from lqcompile.kernels import build, lut, quick, quick_batch
from lqcompile.types import Format

INT4 = Format("affine", 4, 128, "int", "float16")
FORMATS = [
    INT4,
    Format("affine", 4, 128, "float", "bfloat16"),
    Format("affine", 3, 64, "int", "float16"),
    Format("affine", 8, 128, "none", "float16"),
]
X_DTYPES = [torch.float16, torch.bfloat16]


@functools.cache
def disassembler() -> str:
    beside = [Path(place) / version / "bin/nvdisasm" for place in nvidia.__path__ for version in ("cu13", "cu12")]
    found = next((str(path) for path in beside if path.exists()), shutil.which("nvdisasm"))
    assert found, "nvdisasm is in the test extra: nvidia-cuda-nvdisasm"
    return found


@functools.cache
def code(source: str, entry: str, defines: build.Defines, directory: Path) -> list[str]:
    """The instructions of a kernel on sm_90a, without predicates, each with its operands."""
    image = directory / f"{abs(hash(defines))}.cubin"
    image.write_bytes(build.cubin(source, "sm_90a", defines))
    done = subprocess.run([disassembler(), "-c", image], capture_output=True, text=True, check=True, timeout=100)
    found = re.findall(r"/\*[0-9a-f]{4,}\*/ +(?:@!?U?P\w+ +)?(\S.*?) *;", done.stdout)
    assert f".text.{entry}" in done.stdout and len(found) > 300
    return found


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cubins")


def ops(instructions: list[str], *names: str) -> list[int]:
    """Where instructions of these names stand."""
    return [i for i, text in enumerate(instructions) if text.split()[0].split(".")[0] in names]


def few(f: Format, x_dtype: torch.dtype, rows: int) -> quick.Shape:
    groups = quick.groups_of(f, 1024) or 0
    return quick.Shape(f, x_dtype, rows, groups, quick.Shape.warps_of(f, rows, groups), 3)


@pytest.mark.parametrize("x_dtype", X_DTYPES)
@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_few_rows_numbers_go_from_registers_to_the_tensor_core(f, x_dtype, directory):
    found = code("quick_sm80.cu", "quick_gemm", few(f, x_dtype, 8).defines, directory)
    products, numbers, stores = ops(found, "HMMA"), ops(found, "HFMA2"), ops(found, "STS")
    assert len(products) == 16 and len(ops(found, "LDSM")) == 4
    # Sixteen products take 64 pairs of weights from a lane, each made by at least one fused multiply-add.
    inside = [i for i in numbers if products[0] - 200 < i < products[-1]]
    assert len(inside) >= 60
    # Nothing made there is stored: from the first of them to the last product there is no store at all.
    assert not [i for i in stores if inside[0] < i < products[-1]]
    weights = [found[i] for i in ops(found, "LDGSTS")]
    assert len([text for text in weights if ".128" in text.split()[0]]) >= f.bits
    assert not ops(found, "LDL", "STL")


@pytest.mark.parametrize("rows", quick.EXPERT_ROWS)
@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_experts_are_multiplied_by_the_same_products_and_spill_nothing(f, rows, directory):
    groups = quick.groups_of(f, 1024) or 0
    warps = quick.Experts.warps_of(f, rows, groups)
    shape = quick.Experts(f, torch.bfloat16, rows, groups, warps, 3, epilogue="silu_mul")
    found = code("quick_sm80.cu", "quick_grouped", shape.defines, directory)
    assert len(ops(found, "HMMA")) == 16 and len(ops(found, "LDSM")) == 4
    assert not ops(found, "LDL", "STL")
    # Where experts' rows end is read after the kernel before has ended.
    first = next(i for i in ops(found, "LDG") if found[i].startswith("LDG.E R"))
    assert ops(found, "ACQBULK")[0] < first


@pytest.mark.parametrize(
    ("columns", "warps", "ways", "stages"), [(16, 16, 2, 12), (64, 8, 2, 9), (128, 8, 2, 5), (256, 8, 1, 2)]
)
@pytest.mark.parametrize("f", FORMATS, ids=str)
def test_batches_take_weights_from_registers_by_warpgroups(f, columns, warps, ways, stages, directory):
    batch = quick_batch.Batch(f, torch.float16, columns, quick.groups_of(f, 1024) or 0, warps, stages, ways, 1)
    found = code("quick_sm90.cu", "quick_batch", batch.defines, directory)
    products = [found[i] for i in ops(found, "HGMMA")]
    # A block of 128 inputs in the loop, with a register as first operand and only x by a descriptor.
    assert len(products) == 8
    assert all(re.search(rf"HGMMA\.64x{columns}x16\.F32 R\d+, R\d+, gdesc", text) for text in products)
    # The copy engine brings both operands. No number of a weight is stored: what is, sums and results, comes after.
    assert ops(found, "UTMALDG") and not ops(found, "LDL", "STL")
    assert not [i for i in ops(found, "STS", "STSM") if i < ops(found, "HGMMA")[-1]]


@pytest.mark.parametrize("rows", [1, 4, 8])
def test_bit_planes_are_multiplied_as_they_are(rows, directory):
    f = Format("binary", 3, 128, "float", "float16")
    shape = lut.Shape(f, torch.float16, rows, 1, lut.Shape.warps_of(f, rows, 1), 3)
    found = code("lut.cu", "lut_gemm", shape.defines, directory)
    names = {1: "BMMA", 4: "IMMA", 8: "HMMA"}
    assert len(ops(found, names[rows])) == {1: 18, 4: 48, 8: 48}[rows]
    assert not ops(found, *(name for m, name in names.items() if m != rows))
    assert not ops(found, "LDL", "STL")
