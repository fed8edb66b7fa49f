"""What `lq bench` is asked for: its options, read and checked, and the problems that they make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import sympy
import torch

from .errors import ArgumentError
from .kernels import registry
from .models import FITTED, Shape, drawn
from .quantize import NAME_OF_DTYPE
from .types import SCALE_DTYPES, Format, Problem

T = TypeVar("T")
SHAPES: dict[str, tuple[Shape, ...]] = {
    "standard": FITTED["cuda"],
    # q and o; k and v; gate and up; down; the head.
    "llama3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (128256, 4096)),
}
CPU_SHAPES = ((1024, 1024), (4096, 4096))
FORMATS = (
    "binary:2:128:float,binary:3:128:float,binary:4:128:float,affine:4:128:none,affine:4:128:int,"
    "affine:8:128:none,table:4:64:none"
)
FORMAT_HELP = "form:bits:group:zero[:scale_dtype], such as affine:4:128:int; scales default to x's dtype"


@dataclass(frozen=True)
class Options:
    """What `lq bench` was asked for. None is the device's default; `time_limit` is in seconds.

    draw    how many problems of whole models to draw, in place of `shapes`, `ms`, `formats` and `dtypes`; 0 for none
    resume  what is in the file `json` already is not measured again
    """

    device: torch.device
    shapes: tuple[Shape, ...] | None = None
    ms: tuple[int, ...] = (1, 2, 4, 8)
    formats: tuple[str, ...] = tuple(FORMATS.split(","))
    kernels: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    bias: bool = False
    neighbours: bool = True
    json: Path | None = None
    repeats: int = 15
    regret: bool = False
    picture: Path | None = None
    draw: int = 0
    resume: bool = False
    time_limit: float | None = None

    def problems(self) -> list[Problem]:
        """Every problem, those of one weight together.

        Raises ArgumentError for a dtype that the device is not for, and for options that do not go together.
        """
        gpu = self.device.type == "cuda"
        if self.resume and not (self.draw and self.json):
            raise ArgumentError("--resume", True, "with --draw and --json")
        if self.draw and (self.shapes or self.dtypes):
            raise ArgumentError("--draw", self.draw, "without --shapes and --dtype, which it draws")
        if self.draw:
            return list(itertools.islice(drawn(self.device), self.draw))
        dtypes = self.dtypes or ((torch.float16,) if gpu else (torch.float32,))
        if gpu and torch.float32 in dtypes:
            raise ArgumentError("--dtype", "float32", f"float16 | bfloat16 on {self.device}")
        shapes = self.shapes or (SHAPES["standard"] if gpu else CPU_SHAPES)
        found = []
        for (n, k), dtype, spec, m in itertools.product(shapes, dtypes, self.formats, self.ms):
            full = spec if spec.count(":") == 4 else f"{spec}:{NAME_OF_DTYPE[dtype]}"
            found.append(Problem(sympy.Integer(m), (m, m), n, k, Format.parse(full), dtype, self.device))
        return found


def listed(option: str, text: str, accepted: str, read: Callable[[str], T]) -> tuple[T, ...]:
    found = []
    for piece in text.split(","):
        try:
            found.append(read(piece.strip()))
        except (ValueError, KeyError) as error:
            # A format's own complaint says more than that it was not accepted.
            why = f"; {error}" if isinstance(error, ArgumentError) else ""
            raise ArgumentError(option, piece, accepted + why) from error
    return tuple(dict.fromkeys(found))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def shapes(text: str) -> tuple[Shape, ...]:
    """ "4096x4096,..." or the name of a list. Raises ArgumentError, as all readers of options do."""

    def read(piece: str) -> Shape:
        n, k = piece.split("x")
        return positive(n), positive(k)

    return SHAPES.get(text) or listed("--shapes", text, f"NxK,... | {' | '.join(SHAPES)}", read)


def ms(text: str) -> tuple[int, ...]:
    """ "1,2,4,8": rows of x."""
    return listed("--m", text, "ints of at least 1, such as 1,2,4,8", positive)


def formats(text: str) -> tuple[str, ...]:
    """Specs of a format, each with or without its scale dtype."""

    def read(piece: str) -> str:
        Format.parse(piece if piece.count(":") == 4 else f"{piece}:float16")
        return piece

    return listed("--formats", text, FORMAT_HELP, read)


def kernels(text: str) -> tuple[str, ...]:
    """Names of registered kernels."""
    known = registry.discover()
    return listed("--kernels", text, ", ".join(sorted(known)), lambda name: known[name].name)


def dtypes(text: str) -> tuple[torch.dtype, ...]:
    """Names of x's dtypes."""
    return listed("--dtype", text, " | ".join(SCALE_DTYPES), SCALE_DTYPES.__getitem__)


def device(text: str) -> torch.device:
    """ "cpu", "cuda" or "cuda:1", if it is there."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = {"cpu": torch.device("cpu")} | {f"cuda:{i}": torch.device("cuda", i) for i in range(count)}
    if count:
        there["cuda"] = torch.device("cuda", torch.cuda.current_device())
    if text not in there:
        raise ArgumentError("--device", text, " | ".join(sorted(there)))
    return there[text]


def default_device() -> torch.device:
    """The current GPU, or the CPU where there is none."""
    return device("cuda" if torch.cuda.is_available() else "cpu")


def repeats(text: str) -> int:
    """How many samples of each candidate."""
    return _count("--repeats", text)


def draw(text: str) -> int:
    """How many problems of whole models."""
    return _count("--draw", text)


def _count(option: str, text: str) -> int:
    try:
        return positive(text)
    except ValueError as error:
        raise ArgumentError(option, text, "an int of at least 1") from error


def picture(text: str) -> Path:
    """A file to draw into."""
    path = Path(text)
    if path.suffix != ".svg" or path.is_dir() or not path.parent.is_dir():
        raise ArgumentError("--picture", text, "the name of an .svg file in a folder that is there")
    return path


def time_limit(text: str) -> float:
    """Seconds after which no further problem is begun."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ArgumentError("--time-limit", text, "seconds above 0")
    return seconds
