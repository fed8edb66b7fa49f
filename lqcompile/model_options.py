"""What `lq bench --model` can be asked for, and the readers of its options."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from . import decoder
from .errors import ArgumentError
from .quantize import METHODS
from .request import listed, positive
from .ways import WAYS

# Steps, or runs of a prompt, that are checked: Inductor's first call warms up, its second records, the rest replay.
CHECKED = 4


@dataclass(frozen=True)
class Options:
    """What `lq bench --model` was asked for.

    prefill     tokens of a prompt; None: no prompt is timed
    layers      fewer than the model has
    extrapolate from `layers` and from one to all that the model has; never without being asked for
    context     tokens that the cache of a decoding model holds
    steps       of endurance, by lq at the first batch; 0: none
    time_limit  seconds after which no further way is begun
    """

    model: str
    device: torch.device
    bits: int = 4
    group: int = 128
    method: str = "rtn"
    batches: tuple[int, ...] = (1,)
    prefill: int | None = None
    compare: tuple[str, ...] = ("inductor", "dense", "int4pack")
    layers: int | None = None
    extrapolate: bool = False
    context: int = 512
    steps: int = 0
    repeats: int = 5
    trace: Path | None = None
    svg: Path | None = None
    json: Path | None = None
    time_limit: float | None = None

    @property
    def shape(self) -> decoder.Shape:
        """The model's, with as many layers as were asked for. Raises ArgumentError for more than it has, or too few."""
        whole = decoder.SHAPES[self.model]
        if self.extrapolate and not 1 < (self.layers or 0) < whole.layers:
            raise ArgumentError(
                "--layers", self.layers, f"2 to {whole.layers - 1} for {self.model}, with --extrapolate"
            )
        if self.layers is not None and self.layers > whole.layers:
            raise ArgumentError("--layers", self.layers, f"at most {whole.layers} for {self.model}")
        return whole if self.layers is None else dataclasses.replace(whole, layers=self.layers)


def model(text: str) -> str:
    """The name of a shape. Raises ArgumentError, as all readers of options do."""
    if text not in decoder.SHAPES:
        raise ArgumentError("--model", text, " | ".join(decoder.SHAPES))
    return text


def compare(text: str) -> tuple[str, ...]:
    """Names of ways that stand beside lq."""
    others = [name for name in WAYS if name != "lq"]
    return listed("--compare", text, " | ".join(others), lambda name: others[others.index(name)])


def batches(text: str) -> tuple[int, ...]:
    """ "1,8,32": sequences that are decoded together."""
    return listed("--batch", text, "ints of at least 1, such as 1,8,32", positive)


def count(option: str, text: str, least: int = 1) -> int:
    """A whole number of at least `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ArgumentError(option, text, f"an int of at least {least}")
    return int(text)


def bits(text: str) -> int:
    """Bits of a quantized weight."""
    return count("--bits", text)


def group(text: str) -> int:
    """Inputs that share a scale."""
    return count("--group", text)


def prefill(text: str) -> int:
    """Tokens of a prompt: more than one."""
    return count("--prefill", text, 2)


def layers(text: str) -> int:
    """How many layers of the model."""
    return count("--layers", text)


def context(text: str) -> int:
    """Tokens in the cache: more than are checked."""
    return count("--context", text, 2 * CHECKED)


def steps(text: str) -> int:
    """Steps of endurance."""
    return count("--steps", text)


def method(text: str) -> str:
    """How weights are quantized."""
    if text not in METHODS:
        raise ArgumentError("--method", text, " | ".join(METHODS))
    return text
