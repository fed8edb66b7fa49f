"""The console script `lq`: demo, doctor, kernels."""

from __future__ import annotations

import argparse
import enum
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


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
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argparse itself exits with 2 on wrong usage."""
    given = parser().parse_args(argv)
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
