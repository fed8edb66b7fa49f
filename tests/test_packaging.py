"""The wheel and the editable install: both import everywhere, and neither shadows a top-level `kernels`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Names the backend and imports nothing of ours: the entry point must. Quantized by hand, for the same reason.
MODEL = """
import sys
import torch

class Int4(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("codes", torch.randint(0, 16, (64, 2, 32), dtype=torch.uint8))
        self.register_buffer("zero", torch.randint(0, 16, (64, 2, 1), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(64, 2, 1) / 16)

    def forward(self, x):
        codes = self.codes.to(torch.int16) - self.zero.to(torch.int16)
        return x @ (codes.to(x.dtype) * self.scale).view(64, 64).t()

model, x = Int4().eval(), torch.randn(3, 64)
assert "lqcompile" not in sys.modules
with torch.no_grad():
    expected, got = model(x), torch.compile(model, backend="lq")(x)
torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
import lqcompile, lqcompile.kernels, lqcompile.passes
from lqcompile.backend import explain
assert explain(model, x).rewritten == 1, explain(model, x).text()
try:
    import kernels
except ModuleNotFoundError:
    print("no top-level kernels")
else:
    raise SystemExit(f"import kernels found {kernels.__file__}")
print(lqcompile.__file__, lqcompile.kernels.__file__, sep="\\n")
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=400, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the tree, built offline from a copy: a left-over build/ cannot leak into it."""
    room = tmp_path_factory.mktemp("wheel")
    source = room / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("lqcompile", "kernels", "passes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    # One of each kind of package data, so that the promise is tested before the first kernel needs it.
    for name in ("a.cu", "a.cuh", "a.cpp"):
        (source / "kernels" / name).write_text("// data")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", str(room), str(source), cwd=room)
    (path,) = room.glob("*.whl")
    return path


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"lqcompile"}
    for room, below in (("lqcompile", ""), ("kernels", "kernels/"), ("passes", "passes/")):
        for path in (ROOT / room).rglob("*"):
            if (
                path.suffix in {".py", ".cu", ".cuh", ".cpp", ".c", ".json", ".html", ".css", ".js"}
                or path.name == "py.typed"
            ):
                assert f"lqcompile/{below}{path.relative_to(ROOT / room).as_posix()}" in names
    assert {"lqcompile/kernels/a.cu", "lqcompile/kernels/a.cuh", "lqcompile/kernels/a.cpp"} <= names


def test_the_wheel_compiles_a_model_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--target", str(site), str(wheel), cwd=tmp_path)
    (empty / "run.py").write_text(MODEL)
    found = run(sys.executable, "run.py", cwd=empty, PYTHONPATH=str(site)).splitlines()
    # An editable install in the same environment must not have answered.
    assert [Path(line).parent for line in found[-2:]] == [site / "lqcompile", site / "lqcompile" / "kernels"]


def test_the_editable_install_works_from_another_folder(tmp_path):
    (tmp_path / "run.py").write_text(MODEL)
    found = run(sys.executable, "run.py", cwd=tmp_path, PYTHONPATH="").splitlines()
    assert [Path(line).parent for line in found[-2:]] == [ROOT / "lqcompile", ROOT / "kernels"]
