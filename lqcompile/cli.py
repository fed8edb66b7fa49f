"""The console script `lq`: its commands, their arguments and exit codes."""

from __future__ import annotations

import argparse
import enum
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
    from . import bench

    chosen = {name: value for name, value in vars(given).items() if name in BENCH and value is not None}
    chosen.setdefault("device", bench.default_device())
    return bench.bench(bench.Options(**chosen), ("lq", *given.argv))


def _calibrate(given: argparse.Namespace) -> int:
    from . import bench, calibrate

    return calibrate.calibrate(given.device or bench.default_device())


BENCH = (
    "shapes",
    "ms",
    "formats",
    "kernels",
    "dtypes",
    "device",
    "bias",
    "neighbours",
    "json",
    "repeats",
    "regret",
    "time_limit",
)


def _read(name: str) -> Callable[[str], Any]:
    """The reader of an option of `lq bench`; torch is imported only where one is given."""

    def read(text: str) -> Any:
        from . import bench
        from .errors import ArgumentError

        try:
            return getattr(bench, name)(text)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


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
    about = "check every kernel against float64 and time it beside the vendor's matmul"
    bench = _command(commands, "bench", about, "lq bench --shapes 4096x4096 --m 1,8 --json out.json", _bench)
    for option, name, metavar, about in (
        ("--shapes", "shapes", "NxK,...", "sizes of the weight, or standard | llama3-8b"),
        ("--m", "ms", "M,...", "rows of x (1,2,4,8)"),
        ("--formats", "formats", "SPEC,...", "form:bits:group:zero[:scale_dtype]"),
        ("--kernels", "kernels", "NAME,...", "only these of `lq kernels`"),
        ("--dtype", "dtypes", "NAME,...", "float16 | bfloat16, and float32 on a CPU"),
        ("--device", "device", "DEVICE", "cpu | cuda | cuda:N (a GPU where there is one)"),
        ("--repeats", "repeats", "N", "samples of each candidate (15)"),
        ("--time-limit", "time_limit", "SECONDS", "begin no further problem after this time"),
    ):
        bench.add_argument(option, dest=name, type=_read(name), metavar=metavar, help=about)
    bench.add_argument("--bias", action=argparse.BooleanOptionalAction, help="add a bias (no)")
    bench.add_argument("--neighbours", action=argparse.BooleanOptionalAction, help="time other libraries too (yes)")
    bench.add_argument(
        "--regret", action=argparse.BooleanOptionalAction, help="what the cost model's choices cost (no)"
    )
    bench.add_argument("--json", type=_writable, metavar="FILE", help="also write everything to FILE")


def _writable(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name} cannot be written")
    return path


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
