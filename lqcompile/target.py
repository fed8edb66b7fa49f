"""What `lq explain` is given, FILE.py or MODULE:FN, run while "lq" only plans: the reports of its graphs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from . import backend
from .device import Device
from .errors import ArgumentError, LqError
from .report import Report
from .table import fit

FORM = "a file FILE.py, or MODULE:FN"
# Names under which a script may leave its inputs beside `model`.
INPUTS = ("inputs", "example_inputs", "x")


class TargetError(LqError):
    """The user's own program failed, or gives nothing to explain; `report` is of what was planned until then."""

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


def explained(target: str, device: Device | None = None) -> Report:
    """Runs `target` and reports every matmul that "lq" would compile in it, planned for `device`.

    FILE.py     is run as a script. What it compiles with backend="lq" is reported; where it compiles nothing so, its
                `model`, called with its `inputs`, `example_inputs` or `x`
    MODULE:FN   FN() is called: it returns (model, inputs), or compiles with backend="lq" itself
    Raises ArgumentError for neither, TargetError for a program that fails or holds no model.
    """
    name, _, function = target.partition(":")
    # What was compiled before must not answer for this program, nor this plan for a later one.
    torch._dynamo.reset()
    try:
        return _planned(target, name, function, device)
    finally:
        torch._dynamo.reset()


def _planned(target: str, name: str, function: str, device: Device | None) -> Report:
    with backend.planning(device) as reports, _stdout_to_stderr(), _torch_silent():
        if target.endswith(".py"):
            _script(target, reports)
        elif function.isidentifier() and all(part.isidentifier() for part in name.split(".")):
            with _searching(Path.cwd()):
                _function(name, function, reports)
        else:
            raise ArgumentError("target", target, FORM)
    return Report.merged(reports)


def _script(target: str, reports: list[Report]) -> None:
    path = Path(target)
    if not path.is_file():
        raise ArgumentError("target", target, f"{FORM}, that exists")
    # Kept as __main__ until the model has run: Dynamo looks names up in that module.
    main = types.ModuleType("__main__")
    main.__file__ = target
    before = sys.argv, sys.modules["__main__"]
    sys.argv, sys.modules["__main__"] = [target], main
    try:
        with _searching(path.resolve().parent), _blaming(path, reports):
            exec(compile(path.read_bytes(), target, "exec"), vars(main))
            if not reports:
                model, inputs = _of_globals(target, vars(main))
                _call(model, inputs)
    finally:
        sys.argv, sys.modules["__main__"] = before


def _of_globals(target: str, found: Mapping[str, Any]) -> tuple[Callable[..., Any], Any]:
    model, name = found.get("model"), next((name for name in INPUTS if name in found), None)
    if not callable(model) or name is None:
        raise TargetError(
            f'{fit(target, 60, keep_end=True)} compiles nothing with lq: call torch.compile(model, backend="lq") in'
            f" it, or let it define `model` and `{INPUTS[0]}`"
        )
    return model, found[name]


def _function(module: str, name: str, reports: list[Report]) -> None:
    try:
        with _blaming(None, reports):
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ArgumentError("target", f"{module}:{name}", f"{FORM}, of a module that can be imported") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise ArgumentError("target", f"{module}:{name}", f"a function of {module}")
    with _blaming(Path(getattr(found, "__file__", None) or module), reports):
        made = function()
        if not reports:
            if not isinstance(made, (tuple, list)) or len(made) != 2 or not callable(made[0]):
                raise TargetError(f"{module}:{name} returned {type(made).__name__}: let it return (model, inputs)")
            _call(*made)


def _call(model: Callable[..., Any], inputs: Any) -> None:
    """Compiles and calls a model: inputs are one tensor, a tuple of arguments, or a dict of named ones."""
    function: Any = torch.compile(getattr(model, "_orig_mod", model), backend="lq")
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            function(**inputs)
        else:
            function(*inputs if isinstance(inputs, (tuple, list)) else (inputs,))


@contextlib.contextmanager
def _blaming(path: Path | None, reports: list[Report]) -> Iterator[None]:
    """Turns whatever the user's program raises into a TargetError that names its line."""
    try:
        yield
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        # Without a path it is the target itself that may not be there.
        if path is None:
            raise
        raise TargetError(_sentence(error, path), Report.merged(reports)) from error
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise TargetError(f"the program ended with exit code {stop.code}", Report.merged(reports)) from stop
    except Exception as error:
        raise TargetError(_sentence(error, path), Report.merged(reports)) from error


def _sentence(error: BaseException, path: Path | None) -> str:
    """The user's own line that failed, and the first line of what it raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError):
        place = f"{error.filename}:{error.lineno}"
    else:
        own = [f for f in frames if path is not None and Path(f.filename).name == path.name] or frames
        place = f"{own[-1].filename}:{own[-1].lineno}" if own else str(path)
    # Dynamo wraps what a backend raises.
    error = getattr(error, "inner_exception", error)
    said = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{fit(place, 60, keep_end=True)}: {type(error).__name__}: {fit(said[0], 300)}"


@contextlib.contextmanager
def _searching(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _torch_silent() -> Iterator[None]:
    """torch logs a traceback of what it raises: the sentence that we make of it is enough."""
    handlers = {handler: handler.level for handler in logging.getLogger("torch").handlers}
    try:
        for handler in handlers:
            handler.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for handler, level in handlers.items():
            handler.setLevel(level)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What the program prints must not mix with the report."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
