"""The shape of the house: imports go one way, rooms stay small, and the README tells the truth."""

import ast
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("lqcompile", "kernels", "passes", "tests")
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))
SOURCES = [p for p in FILES if "tests" not in p.parts]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# A module may import what stands before it, never what stands after.
ORDER = "errors types config formats device cache cost kernels passes report backend cli"
LEVEL = {name: i for i, name in enumerate(ORDER.split(" "))}
BESIDE = {"quantize": "formats", "profile": "cache", "freshness": "backend", "prepare": "backend", "packed": "backend"}
BESIDE |= {name: "backend" for name in ("convert", "archive", "parallel")}
BESIDE |= {name: "cli" for name in ("demo", "doctor", "calibrate")}
BESIDE |= {name: "report" for name in ("table", "viewer", "why")}
BESIDE |= {name: "cli" for name in ("terminal", "target", "inspection")}
BESIDE |= {name: "kernels" for name in ("timing", "autotune")}
BESIDE |= {
    name: "cli" for name in ("request", "models", "picture", "bench", "trial", "results", "regret", "neighbours")
}
BESIDE |= {name: "cli" for name in ("decoder", "ways", "step", "model_bench", "model_check", "model_options")}
BESIDE |= {name: "cli" for name in ("model_results", "generate_bench", "moe_bench")}
LEVEL |= {name: LEVEL[beside] for name, beside in BESIDE.items()}


def inside(path):
    """The dotted parts of a source file below the package lqcompile."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "lqcompile" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path):
    """Absolute dotted names that a source file imports; for `from a import b` both a and a.b."""
    here = ("lqcompile", *inside(path))
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def label(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in SOURCES if inside(p)], ids=label)
def test_imports_go_one_way(path):
    here = inside(path)[0]
    assert here in LEVEL, f"{here} has no place in ORDER"
    for name in imports(path):
        package, there, *below = [*name.split("."), "", ""][:3]
        if package != "lqcompile" or there not in LEVEL:
            continue
        layout = here == "quantize" and there == "kernels" and below in (["layout"], [""])
        assert LEVEL[there] <= LEVEL[here] or layout, f"{label(path)} imports {name}"
        if (here, there, *below) == ("passes", "kernels", "ops"):
            assert inside(path) == ("passes", "lower"), f"{label(path)} touches kernels.ops"
    if here == "kernels":
        assert not any(name.startswith("torch.fx") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=label)
def test_files_are_short_and_honest(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "manager", "common"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except at line {node.lineno}"
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not silent, f"swallowed exception at line {node.lineno}"
        if path in SOURCES and isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            assert dotted != "torch.load", f"line {node.lineno} unpickles"
            if dotted in {"os.environ", "os.getenv", "os.environb"}:
                assert path.name == "config.py", f"line {node.lineno} reads the environment"
    if path in SOURCES:
        assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "dill", "cloudpickle", "marshal"}
        assert not {"os.environ", "os.getenv"} & set(imports(path)) or path.name == "config.py"


def test_the_top_level_is_fixed():
    tracked = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    assert set(ROOMS) <= tracked <= {*ROOMS, "build", "dist", "lqcompile.egg-info", "__pycache__"}


def test_the_readme_sets_up_with_two_lines():
    lines = [line for line in README.splitlines() if line.startswith("pip install")]
    assert lines == [
        "pip install -c .ci/constraints.txt -e '.[demo]' && lq demo",
        "pip install -c .ci/constraints.txt -e '.[demo,test]' && pytest",
    ]
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[0][:40])
def test_the_readme_code_runs_by_itself(block, tmp_path):
    # A file, because Dynamo and error messages need source lines.
    script = tmp_path / "block.py"
    script.write_text(textwrap.dedent(block))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_link_of_the_readme_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
