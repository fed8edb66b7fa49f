"""The console script `lq`: its commands, their arguments and exit codes."""

from __future__ import annotations

import argparse
import enum
import importlib
import itertools
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


class Exit(enum.IntEnum):
    """What `lq` returns to the shell."""

    FINE = 0
    BUG = 1
    USAGE = 2
    FEW_REWRITTEN = 3
    PROOF_FAILED = 4
    UNUSABLE = 5
    DIFFERENT = 6


def _explain(given: argparse.Namespace) -> int:
    from .inspection import explain

    return explain(given.target, given.html, given.json, given.arch, given.no_gpu, given.min_rewritten)


def _why(given: argparse.Namespace) -> int:
    from .inspection import tell

    return tell(given.layer, given.source)


def _diff(given: argparse.Namespace) -> int:
    from .inspection import differ

    return differ(given.old, given.new)


def _demo(given: argparse.Namespace) -> int:
    from .demo import demo

    return demo(given.quantizer, given.json)


def _doctor(given: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


def _kernels(given: argparse.Namespace) -> int:
    from .doctor import format_table, kernel_table

    print(format_table() if given.markdown else kernel_table())
    return Exit.FINE


def _bench(given: argparse.Namespace) -> int:
    from . import bench, request
    from .errors import ArgumentError

    asked = [name for name in ("model", "moe", "transformers") if getattr(given, name) is not None]
    mode = asked[0] if asked else "matmuls"
    if len(asked) > 1:
        both = " and ".join(f"--{name}" for name in asked)
        raise ArgumentError(f"--{asked[1]}", getattr(given, asked[1]), f"one of {both}")
    known = {name for _, name, *_ in BENCH[mode]}
    for option, name, *_ in itertools.chain.from_iterable(BENCH.values()):
        if name not in known and getattr(given, name) is not None:
            modes = " | ".join(mode for mode, options in BENCH.items() if name in (other for _, other, *_ in options))
            raise ArgumentError(option, getattr(given, name), f"nothing in a bench of {mode}; it is for {modes}")
    chosen = {name: value for name, value in vars(given).items() if name in known and value is not None}
    chosen.setdefault("device", request.default_device())
    command = ("lq", *given.argv)
    if mode == "matmuls":
        return bench.bench(request.Options(**chosen), command)
    from . import generate_bench, model_bench, moe_bench

    if mode == "moe":
        return moe_bench.bench_moe(model_bench.Options(model=given.moe, **chosen), command)
    if mode == "model":
        return model_bench.bench_model(model_bench.Options(model=given.model, **chosen), command)
    whole = {"context": generate_bench.CONTEXT, **chosen}
    return generate_bench.bench_generate(model_bench.Options(model=given.transformers, **whole), command)


def _calibrate(given: argparse.Namespace) -> int:
    from . import calibrate, request

    return calibrate.calibrate(given.device or request.default_device())


def _read(name: str, room: str = "request") -> Callable[[str], Any]:
    """The reader of an option of `lq bench`; torch is imported only where one is given."""

    def read(text: str) -> Any:
        from .errors import ArgumentError

        try:
            return getattr(importlib.import_module(f".{room}", __package__), name)(text)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _writable(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} cannot be written")
    return path


# Option, name, what reads it (None: yes or no), metavar, help.
Option = tuple[str, str, Callable[[str], Any] | None, str, str]
SHARED_OPTIONS: tuple[Option, ...] = (
    ("--device", "device", _read("device"), "DEVICE", "cpu | cuda | cuda:N (a GPU where there is one)"),
    ("--repeats", "repeats", _read("repeats"), "N", "samples of each candidate (15; of whole models 5)"),
    ("--time-limit", "time_limit", _read("time_limit"), "SECONDS", "begin nothing further after this time"),
    ("--json", "json", _writable, "FILE", "also write everything to FILE"),
)
KERNEL_OPTIONS: tuple[Option, ...] = (
    ("--shapes", "shapes", _read("shapes"), "NxK,...", "sizes of the weight, or standard | llama3-8b"),
    ("--m", "ms", _read("ms"), "M,...", "rows of x (1,2,4,8)"),
    ("--formats", "formats", _read("formats"), "SPEC,...", "form:bits:group:zero[:scale_dtype]"),
    ("--kernels", "kernels", _read("kernels"), "NAME,...", "only these of `lq kernels`"),
    ("--dtype", "dtypes", _read("dtypes"), "NAME,...", "float16 | bfloat16, and float32 on a CPU"),
    ("--bias", "bias", None, "", "add a bias (no)"),
    ("--neighbours", "neighbours", None, "", "time other libraries too (yes)"),
    ("--regret", "regret", None, "", "what the cost model's choices cost (no)"),
    ("--picture", "picture", _read("picture"), "FILE.svg", "draw time against M, predicted and measured"),
    ("--draw", "draw", _read("draw"), "N", "N problems drawn from whole models, and what choices cost"),
    ("--resume", "resume", None, "", "go on with the FILE of --draw N --json FILE (no)"),
)
LAYER_OPTIONS: tuple[Option, ...] = (
    ("--bits", "bits", _read("bits", "model_options"), "N", "of a weight (4)"),
    ("--group", "group", _read("group", "model_options"), "N", "inputs that share a scale (128)"),
    ("--method", "method", _read("method", "model_options"), "NAME", "rtn | nf4 | bcq (rtn)"),
    ("--batch", "batches", _read("batches", "model_options"), "B,...", "sequences that are decoded together (1)"),
)
MODEL_OPTIONS: tuple[Option, ...] = (
    *LAYER_OPTIONS,
    ("--layers", "layers", _read("layers", "model_options"), "N", "a shorter model"),
    ("--context", "context", _read("context", "model_options"), "N", "tokens in the cache (512; of transformers 80)"),
)
STEP_OPTIONS: tuple[Option, ...] = (
    ("--prefill", "prefill", _read("prefill", "model_options"), "N", "also read a prompt of N tokens"),
    ("--compare", "compare", _read("compare", "model_options"), "WAY,...", "inductor,dense,int4pack; converted, bcq3"),
    ("--extrapolate", "extrapolate", None, "", "from --layers and from one to all layers, marked as such (no)"),
    ("--steps", "steps", _read("steps", "model_options"), "N", "also N steps by lq, for what they leave behind"),
    ("--trace", "trace", _writable, "FILE", "also a Chrome trace of one step by lq, and what its time goes to"),
    ("--svg", "svg", _writable, "FILE", "also a picture of tokens a second against batch"),
)
# What each of the four benches can be asked for.
BENCH = {
    "matmuls": (*SHARED_OPTIONS, *KERNEL_OPTIONS),
    "model": (*SHARED_OPTIONS, *MODEL_OPTIONS, *STEP_OPTIONS),
    "moe": (*SHARED_OPTIONS, *LAYER_OPTIONS),
    "transformers": (*SHARED_OPTIONS, *MODEL_OPTIONS),
}


def _cache(given: argparse.Namespace) -> int:
    from .doctor import cache_report

    print(cache_report(given.action))
    return Exit.FINE


def _command(commands: Any, name: str, about: str, example: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    """A command with an example under its help."""
    made = commands.add_parser(name, help=about, description=about, epilog=f"example:  {example}")
    made.set_defaults(run=run)
    return made


def _inspection_parsers(commands: Any) -> None:
    about = "plan a model and show what is rewritten, what is not, and why"
    explain = _command(commands, "explain", about, "lq explain model.py --html out.html", _explain)
    explain.add_argument(
        "target",
        metavar="FILE.py | MODULE:FN",
        help='a script that compiles with backend="lq", or has `model` and `inputs`; or a function: (model, inputs)',
    )
    explain.add_argument("--html", type=_writable, metavar="FILE", help="also write one page to open, attach and share")
    explain.add_argument("--json", type=_writable, metavar="FILE", help="also write everything to FILE")
    explain.add_argument("--arch", metavar="sm_NN", help="plan for this GPU, which need not be here: sm_90")
    explain.add_argument("--no-gpu", action="store_true", help="hide this machine's GPUs from the program")
    explain.add_argument(
        "--min-rewritten", type=_percent, metavar="PCT", help="exit with 3 if fewer matmuls with a weight are rewritten"
    )
    about = "one matmul from near: its code, its weight's expression, where recognition stopped, what to change"
    why = _command(commands, "why", about, "lq why model.layers.3.mlp.up", _why)
    why.add_argument("layer", metavar="LAYER", help="a name that lq explain prints, or a part of only one")
    why.add_argument("source", metavar="FROM", nargs="?", help="a report.json, FILE.py or MODULE:FN (last explained)")
    diff = _command(commands, "diff", "what was decided otherwise; exits with 6", "lq diff old.json new.json", _diff)
    diff.add_argument("old", type=Path, metavar="OLD.json")
    diff.add_argument("new", type=Path, metavar="NEW.json")


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no percentage; accepted: 0 to 100")
    return value


def _bench_parser(commands: Any) -> None:
    about = "check every kernel, or whole models, and time them beside the vendor's matmul and other ways"
    bench = _command(commands, "bench", about, "lq bench --shapes 4096x4096 --m 1,8 --json out.json", _bench)
    model = "a whole model of random weights, such as llama3-8b, in place of single matmuls"
    bench.add_argument("--model", type=_read("model", "model_options"), metavar="NAME", help=model)
    layer = "a layer of experts alone, of a model that has some, such as mixtral-8x7b"
    bench.add_argument("--moe", type=_read("model", "model_options"), metavar="NAME", help=layer)
    theirs = "a model of transformers, by one of these names or by its config.json, through its generate"
    bench.add_argument("--transformers", metavar="NAME | FILE", help=theirs)
    for title, options in (
        ("for all", SHARED_OPTIONS),
        ("for single matmuls", KERNEL_OPTIONS),
        ("with --model, --moe or --transformers", LAYER_OPTIONS),
        ("with --model or --transformers", MODEL_OPTIONS[len(LAYER_OPTIONS) :]),
        ("with --model", STEP_OPTIONS),
    ):
        these = bench.add_argument_group(title)
        for option, name, read, metavar, about in options:
            if read is None:
                these.add_argument(option, dest=name, action=argparse.BooleanOptionalAction, help=about)
            else:
                these.add_argument(option, dest=name, type=read, metavar=metavar, help=about)


def parser() -> argparse.ArgumentParser:
    """The arguments of `lq`."""
    top = argparse.ArgumentParser(prog="lq", description="quantized matmuls under torch.compile")
    top.add_argument("--version", action="version", version=f"lqcompile {version('lqcompile')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _inspection_parsers(commands)
    about = "quantize a trained model, compile it, compare; no GPU needed"
    demo = _command(commands, "demo", about, "lq demo --quantizer int4", _demo)
    demo.add_argument("--quantizer", choices=("all", "int4", "bcq3", "nf4"), default="all")
    demo.add_argument("--json", type=_writable, metavar="FILE", help="also write figures and reports to FILE")
    _command(commands, "doctor", "check this machine, down to one compiled model", "lq doctor", _doctor)
    kernels = _command(commands, "kernels", "list the kernels and what each accepts", "lq kernels", _kernels)
    kernels.add_argument("--markdown", action="store_true", help="formats x kernels, as the README has it")
    cache = _command(commands, "cache", "what lqcompile has compiled and kept", "lq cache show", _cache)
    cache.add_argument("action", choices=("show", "verify", "clear"))
    _bench_parser(commands)
    about = "measure what the cost model needs to know of this machine, and keep it"
    calibrate = _command(commands, "calibrate", about, "lq calibrate", _calibrate)
    calibrate.add_argument("--device", type=_read("device"), metavar="DEVICE", help="cpu | cuda | cuda:N")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argparse itself exits with 2 on wrong usage."""
    given = parser().parse_args(argv)
    given.argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return int(given.run(given))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"lq {given.command}: {error}", file=sys.stderr)
        return Exit.USAGE if given.command in ("explain", "why", "diff") else Exit.UNUSABLE
    except Exception as error:  # noqa: BLE001
        if _is_argument(error):
            print(f"lq {given.command}: {error}", file=sys.stderr)
            return Exit.USAGE
        print(f"lq {given.command}: {type(error).__name__}: {error}", file=sys.stderr)
        print(
            f"\nThis is a bug in lqcompile. Please report it where you got lqcompile from,\n"
            f"with {_bundle(given.argv)} and what `lq doctor` prints.",
            file=sys.stderr,
        )
        return Exit.BUG


def _is_argument(error: Exception) -> bool:
    from .errors import ArgumentError

    return isinstance(error, ArgumentError)


def _bundle(argv: Sequence[str]) -> str:
    """A file with the traceback and versions, to attach to a report; its name."""
    versions = " ".join(f"{name} {version(name)}" for name in ("lqcompile", "torch"))
    with tempfile.NamedTemporaryFile("w", prefix="lq-bug-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"{versions}, Python {sys.version}\nlq {shlex.join(argv)}\n\n{traceback.format_exc()}")
    return file.name
