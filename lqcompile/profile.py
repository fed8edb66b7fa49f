"""Measured facts of this machine, as `lq calibrate` keeps them, for the cost model instead of those of a datasheet."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import warnings
from typing import Any

import torch

from . import cache
from .device import Device
from .errors import ArgumentError

SCHEMA = 2
# What is measured, in the units of Device, and between which numbers it is believed.
MEASURED = {"bandwidth": (1e8, 1e14), "rate": (1e8, 1e17), "half": (1e8, 1e17), "launch": (1e-9, 1e-2)}
FIELDS = [field.name for field in dataclasses.fields(Device)]


def of(device: torch.device | str) -> Device:
    """The facts of a real device: as measured on it, else derived from its properties."""
    return _stored(Device.of(device), cache.default())


def keep(found: Device) -> None:
    """Keeps measured facts for every later process. Raises ArgumentError for facts that cannot be."""
    data = json.dumps({"schema": SCHEMA, **dataclasses.asdict(found)}).encode()
    read(data, found)
    cache.default().put("profile", key(found), data, device=found.name)
    _stored.cache_clear()


def read(data: bytes, derived: Device) -> Device:
    """The facts of a profile. Raises ArgumentError unless it is whole, of this device, and of numbers that can be."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ArgumentError("profile", data[:40], "JSON") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or {"schema", *FIELDS} != set(found):
        raise ArgumentError("profile", found, f"schema {SCHEMA} with {', '.join(FIELDS)}")
    for name in (name for name in FIELDS if name not in MEASURED):
        if found[name] != getattr(derived, name):
            raise ArgumentError(f"profile.{name}", found[name], f"{getattr(derived, name)!r}, this device")
    for name, (least, most) in MEASURED.items():
        _number(f"profile.{name}", found[name], least, most)
    return Device(**{name: found[name] for name in FIELDS})


def _number(name: str, value: Any, least: float, most: float) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or math.isnan(value) or not least <= value <= most:
        raise ArgumentError(name, value, f"a number from {least:g} to {most:g}")


def key(device: Device) -> str:
    """Names a device in keys of the cache."""
    return f"{device.kind} {device.name} {device.arch} {device.processors}"


@functools.lru_cache(maxsize=64)
def _stored(derived: Device, store: cache.Cache) -> Device:
    data = store.get("profile", key(derived))
    if data is None:
        return derived
    try:
        return read(data, derived)
    except ArgumentError as error:
        warnings.warn(f"lqcompile does not use what `lq calibrate` measured: {error}", stacklevel=2)
        return derived
