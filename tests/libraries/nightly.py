"""python -m tests.libraries.nightly [FOLDER]: installs all libraries beside this Python, runs their cases, `reloaded`.

Each group of libraries that live together gets a virtual environment of its own in FOLDER, by default a fresh one, on
top of the environment that this runs in; its torch stays. Exit code 1 if anything is not as its module says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from types import ModuleType

import torch

from .harness import Row

# The modules of this folder, and what pip needs for those of a group; "--no-deps" in front where a library asks for
# another torch.
GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("torchao", "pt2e", "transformers_"), ()),
    (
        ("hqq", "quanto", "bitsandbytes", "compressed_tensors", "gguf", "sdnq", "autoawq", "gptqmodel", "autoround",
         "nncf", "quark", "brevitas", "llama"),
        ("accelerate optimum-quanto compressed-tensors bitsandbytes gguf diffusers sdnq einops termcolor ninja",
         "--no-deps hqq gptqmodel autoawq auto-round defuser device-smi tokenicer logbar",
         "py-cpuinfo datasets pypcre nncf zstandard threadpoolctl onnx onnxslim tabulate dependencies==2.0.1",
         "--no-deps amd-quark brevitas unfoldNd"),
    ),
)  # fmt: skip
LIBRARIES = tuple(name for names, _ in GROUPS for name in names)


def verdict(library: ModuleType, case: str, row: Row) -> str:
    """What is not as the library's module says, or "". Of a whole model the head alone is not quantized."""
    reason = getattr(library, "KEPT", {}).get(case)
    plain = {"NOT_QUANTIZED"} if hasattr(library, "QUANTIZED") else set()
    quantized = [d for d in row.decisions if d.reason is None or d.reason.name not in plain]
    wanted = getattr(library, "QUANTIZED", max(len(quantized), 1))
    # Whether ours is the faster one depends on the machine.
    either = (reason, None) if reason is None or reason.name == "SLOWER" else (reason,)
    right = [d for d in quantized if d.reason in either]
    told = len(right) == len(quantized) == wanted
    return row.wrong or ("" if told else str(row))


def main(folder: Path) -> int:
    """Installs and runs the groups one after the other."""
    failed = 0
    folder.mkdir(parents=True, exist_ok=True)
    pins = folder / "pins.txt"
    import transformers

    pins.write_text(f"torch=={torch.__version__.partition('+')[0]}\ntransformers=={transformers.__version__}\n")
    for number, (names, needs) in enumerate(GROUPS):
        room = folder / f"group{number}"
        if not room.exists():
            venv.create(room, with_pip=True)
            packages = Path(sysconfig.get_path("purelib", vars={"base": str(room), "platbase": str(room)}))
            here = sysconfig.get_path("purelib")
            (packages / "beneath.pth").write_text(f"import site; site.addsitedir({here!r})\n")
            for need in needs:
                python = [str(room / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(pins)]
                subprocess.run([*python, *need.split()], check=True)
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        python = [str(room / "bin" / "python"), "-W", "ignore", "-m"]
        runs = [["tests.libraries", *names]] + [["tests.libraries.reloaded"]] * ("llama" in names)
        failed += sum(subprocess.run([*python, *run], env=environment).returncode != 0 for run in runs)
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).absolute()))
    with tempfile.TemporaryDirectory() as room:
        sys.exit(main(Path(room)))
