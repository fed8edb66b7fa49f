"""A converted model as one safetensors file: its packed layers, and every other tensor. Nothing is ever unpickled.

The file is an ordinary one of safetensors. Its metadata says, as JSON in `facts`, what the packed layers are and, of
every tensor, dtype, shape and sha256; `digest` is the sha256 of that text. All is checked before a model is changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import ArgumentError
from .kernels.layout import LAYOUTS, PLAIN, Layout, check_parts
from .packed import DEVICES, PackedLinear
from .passes.pack import Packed
from .types import Format

FORMAT, VERSION = "lqcompile.packed", "1"
DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
        torch.bool,
    )
}  # fmt: skip
# Bytes that are hashed, or compared, at a time.
PIECE = 1 << 24


def save_packed(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a converted model to `path`, whole or not at all: packed layers, parameters and buffers, ties kept.

    Buffers that a state_dict leaves out are written too, so that the model's class and this file are all that
    `load_packed` needs. Raises ArgumentError for a model without a PackedLinear, and, by name, for a tensor that is not
    plain (a quantized one that was not converted) or holds no values.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    layers = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedLinear)}
    if not layers:
        raise ArgumentError("model", type(model).__name__, "a model with a PackedLinear; see lqcompile.convert")
    first: dict[Any, str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name, t in _named(model):
        plain = type(t) in (Tensor, nn.Parameter) and not is_traceable_wrapper_subclass(t) and t.layout == torch.strided
        if not plain or t.is_meta or str(t.dtype).removeprefix("torch.") not in DTYPES:
            shown = f"{type(t).__name__} {t.dtype} on {t.device}"
            raise ArgumentError(name, shown, f"a plain tensor that holds values, {' | '.join(DTYPES)}")
        key = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride()) if t.numel() else id(t)
        if key in first:
            ties[name] = first[key]
            continue
        first[key] = name
        held = t.detach().cpu().contiguous()
        # Views of one storage are no tie: each is written by itself.
        storage = held.untyped_storage().data_ptr()
        tensors[name] = held.clone() if storage in storages else held
        storages.add(storage)
    for name, module in model.named_modules():
        own = type(module).get_extra_state is not nn.Module.get_extra_state
        if own and not isinstance(module, PackedLinear):
            raise ArgumentError(name, type(module).__name__, "a module without extra state")
    shared = _shared(layers)
    facts = {
        "layers": {name: _facts_of(layer) for name, layer in layers.items() if name not in shared},
        "shared": shared,
        "ties": ties,
        "passing": sorted({name for name, _ in _named(model)} - set(model.state_dict(keep_vars=True))),
        "tensors": {name: _description(t) for name, t in tensors.items()},
    }
    text = json.dumps(facts, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    metadata = {"format": FORMAT, "version": VERSION, "facts": text, "digest": digest}
    _write(Path(path), tensors, metadata)


def load_packed(
    model: nn.Module, path: str | os.PathLike[str], device: torch.device | str | None = "cpu", verify: bool = True
) -> nn.Module:
    """Puts what `save_packed` wrote into `model`, in place, and returns it.

    `model` is one of the same class, such as a skeleton on the meta device (`with torch.device("meta")`) or float
    layers: those that are packed in the file are replaced, all other tensors take the file's values and dtypes. On a
    CPU tensors stay in the file, mapped into memory, and are read when they are used; for a device of another type
    than the file was written for, each layer is packed anew. With `device=None` all stays as it is in the file, to be
    cut between ranks (see lqcompile.parallel) or moved by `.to(device)` before it is used. `verify=False` does not
    read the file to compare its sha256.
    Raises ArgumentError, before `model` is changed, for a file that is damaged, foreign or of another version, and for
    a model that does not fit it.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
    target = torch.device("cpu" if device is None else device)
    if target.type not in DEVICES:
        raise ArgumentError("device", str(device), " | ".join(DEVICES))
    path = Path(path)
    tensors, facts = _read(path, verify)
    with _told(path):
        made = {name: _layer(name, fact, tensors, facts["ties"]) for name, fact in facts["layers"].items()}
        layers = {**made, **{name: made[first] for name, first in facts["shared"].items()}}
    # The skeleton's own name is one level below the holder's, so that it may itself be replaced.
    holder = nn.Sequential(model)
    plain = _fit(path, model, layers, tensors, facts)
    _check_device(target)
    for name in layers:
        parent, _, attribute = f"0.{name}".rstrip(".").rpartition(".")
        owner = holder.get_submodule(parent) if parent else holder
        layers[name].train(getattr(owner, attribute).training)
        layers[name].path = layers[name].path or name
        setattr(owner, attribute, layers[name] if device is None else layers[name].to(target))
    loaded = holder[0]
    placed: dict[str, Tensor] = {}
    for name, source in plain.items():
        owner_name, _, attribute = name.rpartition(".")
        owner = loaded.get_submodule(owner_name)
        held: dict[str, Any] = owner._parameters if attribute in owner._parameters else owner._buffers
        old = held[attribute]
        if source not in placed:
            t = tensors[source].to(target)
            parameter = isinstance(old, nn.Parameter)
            placed[source] = nn.Parameter(t, requires_grad=old.requires_grad) if parameter else t
        held[attribute] = placed[source]
    return loaded


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name that it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _facts_of(layer: PackedLinear) -> dict[str, Any]:
    """What a layer is, as values of JSON."""
    dtypes = {name: getattr(layer, name) for name in ("x_dtype", "compute", "result")}
    return {
        **layer.facts(),
        "tiles": tiles_of(LAYOUTS[layer.layout], layer.order),
        "perm": "perm" in layer._buffers,
        "bias": layer._parameters["bias"] is not None,
        "workload": sorted(layer.workload.items()),
        **{name: None if d is None else str(d).removeprefix("torch.") for name, d in dtypes.items()},
    }


def tiles_of(layout: Layout, order: str) -> str:
    """Names the order in which a layout stands in memory, whatever this version of ours calls it."""
    return hashlib.sha256(repr((layout.fields, layout.tiles.get(order))).encode()).hexdigest()[:16]


def _shared(layers: Mapping[str, PackedLinear]) -> dict[str, str]:
    """Layers that are one module under several names, by the first of these."""
    first: dict[int, str] = {}
    return {name: kept for name, m in layers.items() if (kept := first.setdefault(id(m), name)) != name}


def _description(t: Tensor) -> list[Any]:
    return [str(t.dtype).removeprefix("torch."), list(t.shape), _digest(t)]


def _digest(t: Tensor) -> str:
    """The sha256 of a tensor's bytes."""
    found = hashlib.sha256()
    for piece in t.reshape(-1).view(torch.uint8).split(PIECE):
        found.update(memoryview(piece.numpy()))
    return found.hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, unfinished = tempfile.mkstemp(".tmp", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, unfinished, metadata)
        # As any file that is made here, not as a private one.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(unfinished, 0o666 & ~mask)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Makes whatever does not read an ArgumentError that names the file."""
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(str(path), f"{error.name} {error.value!r}", error.accepted) from error
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ArgumentError(str(path), what, "a whole file that lqcompile.save_packed wrote") from error


def _read(path: Path, verify: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, mapped, and the facts of a file. Raises ArgumentError unless it is whole and ours."""
    with _told(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
            found = f"{metadata.get('format')} version {metadata.get('version')}"
            raise ArgumentError("format", found, f"{FORMAT} version {VERSION}, as lqcompile.save_packed writes it")
        if hashlib.sha256(metadata["facts"].encode()).hexdigest() != metadata["digest"]:
            raise ArgumentError("facts", "damaged", "text of the sha256 that the file names")
        facts = json.loads(metadata["facts"])
        if set(file.keys()) != set(facts["tensors"]):
            different = sorted(set(file.keys()) ^ set(facts["tensors"]))
            raise ArgumentError("tensors", different[:3], "those that its facts name")
        unknown = [first for first in facts["ties"].values() if first not in facts["tensors"]]
        if unknown or not isinstance(facts["passing"], list):
            raise ArgumentError("ties", unknown, "names of its tensors")
        tensors = {}
        for name, (dtype, shape, digest) in facts["tensors"].items():
            t = tensors[name] = file.get_tensor(name)
            if t.dtype != DTYPES[dtype] or list(t.shape) != shape:
                raise ArgumentError(name, f"{t.dtype} {list(t.shape)}", f"{dtype} {shape}")
            if verify and _digest(t) != digest:
                raise ArgumentError(name, "damaged", "bytes of the sha256 that the file names")
        return tensors, facts


def _layer(name: str, fact: dict[str, Any], tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> PackedLinear:
    """A layer of the file, in the order of the device that it was written for. Raises ArgumentError."""
    format, n, k, order = Format.parse(fact["format"]), fact["n"], fact["k"], fact["order"]
    layout = LAYOUTS.get(fact["layout"])
    if layout is None or order not in (*DEVICES, PLAIN) or fact["tiles"] != tiles_of(layout, order):
        known = f"{' | '.join(LAYOUTS)} for {' | '.join(DEVICES)}, in the order of this version"
        raise ArgumentError(f"layout of {name}", (fact["layout"], order, fact["tiles"]), known)

    def get(part: str) -> Tensor:
        full = f"{name}.{part}".lstrip(".")
        return tensors[ties.get(full, full)]

    parts = [get(part) for part in layout.names(format, order)]
    check_parts(layout, parts, format, n, k, order)
    perm = get("perm") if fact["perm"] else None
    if perm is not None and (perm.shape != (k,) or not torch.equal(perm.sort().values, torch.arange(k))):
        raise ArgumentError(f"{name}.perm", "not a permutation", f"each of 0..{k - 1} once")
    dtypes = {key: fact[key] and DTYPES[fact[key]] for key in ("x_dtype", "compute", "result")}
    bias = nn.Parameter(get("bias"), requires_grad=False) if fact["bias"] else None
    workload = {int(rows): float(share) for rows, share in fact["workload"]}
    return PackedLinear(Packed(layout.name, format, n, k, parts, perm), bias, **dtypes, workload=workload, order=order)


def _fit(
    path: Path, model: nn.Module, layers: Mapping[str, PackedLinear], tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> dict[str, str]:  # fmt: skip
    """For each tensor of the model outside of `layers` the one of the file. Raises ArgumentError, all of it checked."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        found = modules.get(name)
        sizes = {size: getattr(layer, size) for size in ("in_features", "out_features")}
        given = {size: getattr(found, size, wanted) for size, wanted in sizes.items()}
        if found is None or given != sizes:
            shown = "no such module" if found is None else f"{type(found).__name__} {given}"
            raise ArgumentError(f"model.{name}", shown, f"a layer {sizes}, as {path} holds it")
    inside = tuple(f"{name}." if name else "" for name in layers)
    own = {name: t for name, t in _named(model) if not name.startswith(inside)}
    lasting = {name for name in model.state_dict(keep_vars=True) if not name.startswith(inside)}
    ties = facts["ties"]
    known = {name for name in (*tensors, *ties) if not name.startswith(inside)}
    missing = sorted(name for name in own if name not in known and (name in lasting or own[name].is_meta))
    # A buffer that no state_dict holds may be one that a model makes when it is first called.
    extra = sorted(known - set(own) - set(facts["passing"]))
    sources = {name: ties.get(name, name) for name in own if name in known}
    if missing or extra:
        shown = f"without {missing[:3]}, with {extra[:3]}"
        raise ArgumentError(str(path), shown, "a file of the same model, with all of its tensors and no others")
    for name, source in sources.items():
        if own[name].shape != tensors[source].shape:
            wanted = f"{tuple(tensors[source].shape)}, as in {path}"
            raise ArgumentError(f"model.{name}", tuple(own[name].shape), wanted)
    return sources


def _check_device(device: torch.device) -> None:
    """Raises ArgumentError for a device that is not here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError("device", str(device), "a device of this machine") from error
