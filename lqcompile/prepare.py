"""For libraries that get in Dynamo's way: compile a model so that dequantization and matmul come in one graph."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from .errors import ArgumentError

# What cuts a graph between unpacking and matmul, though the values are constant: masks by which codes are picked,
# numbers read from a buffer, parameters made in forward.
TRACING = {
    "capture_dynamic_output_shape_ops": True,
    "capture_scalar_outputs": True,
    "graph_break_on_nn_param_ctor": False,
}


def _never_cached(tensor: Any) -> float:
    """Stands for the key of a cache: not even equal to itself."""
    return math.nan


# What a library calls in forward and Dynamo cannot trace: (module, name, what stands in for it while tracing).
ADAPTED: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    # GPTQModel caches unpacked zero points by the version of what they were unpacked from; unpacked anew, they are
    # part of the graph, and that they are fresh is ours to check.
    ("gptqmodel.nn_modules.qlinear.torch", "tensor_cache_key", _never_cached),
)


def prepare(
    model: Callable[..., Any], *inputs: Any, mode: str | None = None, options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:  # fmt: skip
    """`model` compiled for "lq", after one eager run on `inputs`; use it in place of torch.compile(backend="lq").

    The run lets a library do what it does only once (repack weights, warn, fill caches), which would cut the graph.
    Settings of torch that the library changes meanwhile are restored, and so are random numbers; those that tracing
    needs are set during each call alone. Raises ArgumentError for a model that cannot be called, and whatever the
    model raises.
    """
    if not callable(model):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module or a function")
    run_once(model, inputs, kwargs)
    compiled = torch.compile(model, backend="lq", mode=mode, options=None if options is None else dict(options))

    @functools.wraps(compiled.forward if isinstance(compiled, torch.nn.Module) else compiled)
    def prepared(*args: Any, **named: Any) -> Any:
        with tracing():
            return compiled(*args, **named)

    prepared._orig_mod = model  # type: ignore[attr-defined]
    return prepared


def run_once(model: Callable[..., Any], inputs: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Calls `model` without gradients; what it changes of torch's settings and random numbers is restored."""
    with _settings_restored(), torch.random.fork_rng(), torch.no_grad():
        model(*inputs, **kwargs)


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Under these settings a prepared model is traced; what is set for a library is set for the time being."""
    known = {name: value for name, value in TRACING.items() if hasattr(torch._dynamo.config, name)}
    found = [(sys.modules[path], name, stand_in) for path, name, stand_in in ADAPTED if path in sys.modules]
    before = [getattr(module, name) for module, name, _ in found]
    with torch._dynamo.config.patch(known):
        try:
            for module, name, stand_in in found:
                setattr(module, name, stand_in)
            yield
        finally:
            for (module, name, _), value in zip(found, before, strict=True):
                setattr(module, name, value)


@contextlib.contextmanager
def _settings_restored() -> Iterator[None]:
    modules = (torch._dynamo.config, torch._inductor.config)
    before = [config.get_config_copy() for config in modules]
    precision = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for config, values in zip(modules, before, strict=True):
            for name, value in config.get_config_copy().items():
                if name in values and value != values[name]:
                    setattr(config, name, values[name])
