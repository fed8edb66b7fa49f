"""The console script `lq`: demo, doctor, kernels, bench."""

from __future__ import annotations

import argparse
import enum
import os
import sys
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


def _demo(given: argparse.Namespace) -> int:
    from .demo import demo

    return demo(given.quantizer, given.json)


def _doctor(given: argparse.Namespace) -> int:
    from .doctor import doctor

    return doctor()


def _kernels(given: argparse.Namespace) -> int:
    from .doctor import kernel_table

    print(kernel_table())
    return Exit.FINE


def _bench(given: argparse.Namespace) -> int:
    from . import bench
    from .errors import ArgumentError

    chosen = {name: value for name, value in vars(given).items() if name in BENCH and value is not None}
    chosen.setdefault("device", bench.default_device())
    try:
        return bench.bench(bench.Options(**chosen), ("lq", *given.argv))
    except ArgumentError as error:
        print(f"lq bench: {error}", file=sys.stderr)
        return Exit.USAGE


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


def _bench_parser(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="check every kernel against float64 and time it beside the vendor's matmul"
    )
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
    bench.add_argument("--json", type=_writable, metavar="FILE", help="also write everything to FILE")
    bench.set_defaults(run=_bench)


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
    demo = commands.add_parser("demo", help="quantize a trained model, compile it, compare; no GPU needed")
    demo.add_argument("--quantizer", choices=("all", "int4", "bcq3", "nf4"), default="all")
    demo.add_argument("--json", type=_writable, metavar="FILE", help="also write figures and reports to FILE")
    demo.set_defaults(run=_demo)
    doctor = commands.add_parser("doctor", help="check this machine, down to one compiled model")
    doctor.set_defaults(run=_doctor)
    kernels = commands.add_parser("kernels", help="list the kernels and what each accepts")
    kernels.set_defaults(run=_kernels)
    cache = commands.add_parser("cache", help="what lqcompile has compiled and kept")
    cache.add_argument("action", choices=("show", "verify", "clear"))
    cache.set_defaults(run=_cache)
    _bench_parser(commands)
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
        return Exit.UNUSABLE
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        print(
            "\nThis is a bug in lqcompile. Please report it where you got lqcompile from,\n"
            "with the lines above and what `lq doctor` prints.",
            file=sys.stderr,
        )
        return Exit.BUG
