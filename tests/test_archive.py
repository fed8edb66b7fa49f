"""save_packed and load_packed: the same outputs in a new process; what is not whole or does not fit is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import lqcompile
from lqcompile import ArgumentError, PackedLinear, load_packed, save_packed
from lqcompile.archive import FORMAT, VERSION, _read

from .test_convert import other_order


class Tied(nn.Module):
    """Tied embeddings, a shared layer, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.again = self.up
        self.register_buffer("angles", torch.linspace(0, 1, 64), persistent=False)
        self.register_buffer("gain", torch.full((64,), 2.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) * self.gain + self.angles
        return self.head(self.down(self.up(x).relu() + self.again(x)))


TOKENS = torch.arange(10).view(2, 5)


def converted(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    model = lqcompile.quantize(Tied().eval(), group=32, modules=lambda name, _: name in ("up", "down"))
    return lqcompile.convert(model.requires_grad_(False), TOKENS, options={"strict": True})


def skeleton() -> Tied:
    with torch.device("meta"):
        return Tied().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted model, and the file of it."""
    model, path = converted(), tmp_path_factory.mktemp("saved") / "model.safetensors"
    save_packed(model, path)
    return model, path


FITTING = {"meta": skeleton, "half": lambda: Tied().eval().half(), "packed": lambda: converted(1)}


@pytest.mark.parametrize("name", FITTING)
def test_the_same_model_comes_back(saved, name):
    model, path = saved
    loaded = FITTING[name]()
    assert load_packed(loaded, path) is loaded
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert loaded.again is loaded.up and loaded.head.weight is loaded.embed.weight
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert set(loaded.state_dict()) == set(model.state_dict()) and loaded.up.path == "up"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_a_loaded_model_is_mapped(saved):
    loaded = load_packed(skeleton(), saved[1])
    assert str(saved[1]) in Path("/proc/self/maps").read_text()
    assert loaded.up.parts[0].untyped_storage().nbytes() == loaded.up.parts[0].nbytes


CHILD = """
import sys, torch, lqcompile
from safetensors.torch import load_file
from tests.test_archive import TOKENS, skeleton
model = lqcompile.load_packed(skeleton(), sys.argv[1])
wanted = load_file(sys.argv[2])["y"]
with torch.no_grad():
    torch.testing.assert_close(model(TOKENS), wanted, rtol=0, atol=0)
    y = torch.compile(model, backend="lq", fullgraph=True)(TOKENS)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
"""


def test_a_new_process_needs_the_class_and_the_file_alone(saved, tmp_path):
    model, path = saved
    save_file({"y": model(TOKENS)}, tmp_path / "wanted")
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", CHILD, str(path), str(tmp_path / "wanted")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def refused(path: Path, *said: str, model: nn.Module | None = None, **how) -> None:
    """Loading raises ArgumentError that says so, and leaves the model as it was."""
    model = model or skeleton()
    before = list(model.named_parameters()) + list(model.named_modules())
    with pytest.raises(ArgumentError) as caught:
        load_packed(model, path, **how)
    assert all(word in str(caught.value) for word in said), caught.value
    after = list(model.named_parameters()) + list(model.named_modules())
    assert [(n, id(o)) for n, o in before] == [(n, id(o)) for n, o in after]


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), early=st.booleans())
def test_a_flipped_bit_is_found(saved, tmp_path_factory, at, bit, early):
    model, path = saved
    data = bytearray(path.read_bytes())
    place = int(at * (min(6000, len(data)) if early else len(data)))
    data[place] ^= 1 << bit
    damaged = tmp_path_factory.mktemp("flip") / "model.safetensors"
    damaged.write_bytes(data)
    try:
        loaded = load_packed(skeleton(), damaged)
    except ArgumentError as error:
        assert str(damaged) in str(error)
    else:
        # Such as a space between two words of its header, made a tab.
        assert torch.equal(loaded(TOKENS), model(TOKENS)) and place < 8 + int.from_bytes(data[:8], "little")


@settings(max_examples=15)
@given(at=st.floats(0, 1, exclude_max=True), more=st.booleans())
def test_a_file_cut_short_or_grown_is_refused(saved, tmp_path_factory, at, more):
    data = saved[1].read_bytes()
    damaged = tmp_path_factory.mktemp("cut") / "model.safetensors"
    damaged.write_bytes(data + bytes(int(99 * at) + 1) if more else data[: int(at * len(data))])
    refused(damaged, str(damaged))
    refused(damaged, str(damaged), verify=False)


def rewritten(path: Path, to: Path, change, digest: bool = True) -> Path:
    """The file with other facts; their sha256 made right, unless `digest` is false."""
    import hashlib

    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    facts, tensors = json.loads(metadata["facts"]), load_file(path)
    change(facts, tensors, metadata)
    if digest:
        metadata["facts"] = json.dumps(facts)
        metadata["digest"] = hashlib.sha256(metadata["facts"].encode()).hexdigest()
    save_file(tensors, to, metadata)
    return to


FORGED = {
    "version": (lambda f, t, m: m.update(version="2"), ("version 2", f"{FORMAT} version {VERSION}")),
    "format": (lambda f, t, m: m.update(format="pt"), ("pt version", FORMAT)),
    "sizes": (lambda f, t, m: f["layers"]["up"].update(n=1 << 20), ("parts.planes",)),
    "negative": (lambda f, t, m: f["layers"]["up"].update(n=-64), ("group",)),
    "type": (lambda f, t, m: f["layers"]["up"].update(n="64"), ("whole file",)),
    "layout": (lambda f, t, m: f["layers"]["up"].update(layout="rows"), ("layout of up",)),
    "order": (lambda f, t, m: f["layers"]["up"].update(order="npu"), ("layout of up", "npu")),
    "other device": (lambda f, t, m: f["layers"]["up"].update(order="cuda"), ("layout of up",)),
    "tiles": (lambda f, t, m: f["layers"]["up"].update(tiles="0" * 16), ("layout of up", "0000")),
    "no layer": (lambda f, t, m: f.pop("layers"), ("KeyError",)),
    "tie": (lambda f, t, m: f["ties"].update({"head.weight": "nothing"}), ("nothing",)),
    "tensor": (lambda f, t, m: t.pop("gain"), ("gain",)),
    "dtype": (lambda f, t, m: t.update(gain=t["gain"].half()), ("gain", "float16")),
    "value": (lambda f, t, m: t["gain"].add_(1), ("gain", "damaged")),
    "facts": (lambda f, t, m: m.update(facts="{}"), ("facts",)),
    "workload": (lambda f, t, m: f["layers"]["up"].update(workload=[["x", 1]]), ("whole file",)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_what_is_not_ours_is_refused(saved, tmp_path, name):
    change, said = FORGED[name]
    refused(rewritten(saved[1], tmp_path / "forged", change, name != "facts"), *said)


def test_a_permutation_is_checked(tmp_path):
    layer = converted().up
    layer.register_buffer("perm", torch.arange(64).flip(0))
    model = nn.Sequential(layer)
    save_packed(model, tmp_path / "whole")

    def spoil(facts, tensors, metadata):
        tensors["0.perm"][3] = 1 << 40
        facts["tensors"]["0.perm"][2] = None

    float_model = nn.Sequential(nn.Linear(64, 128))
    refused(rewritten(tmp_path / "whole", tmp_path / "spoiled", spoil), "0.perm", model=float_model, verify=False)
    assert torch.equal(load_packed(float_model, tmp_path / "whole")(torch.ones(2, 64)), model(torch.ones(2, 64)))


def test_files_of_others_are_refused(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "plain")
    torch.save({"w": torch.ones(3)}, tmp_path / "pickled")
    (tmp_path / "empty").touch()
    refused(tmp_path / "plain", "None version None")
    for name in ("pickled", "empty", "missing", "."):
        refused(tmp_path / name, str(tmp_path / name), "a whole file that lqcompile.save_packed wrote")


def wrong_skeletons():
    wider, without, more, other = skeleton(), skeleton(), skeleton(), skeleton()
    wider.down = nn.Linear(128, 96, bias=False, device="meta")
    del without.down
    more.extra = nn.Linear(3, 3, device="meta")
    other.embed = nn.Embedding(51, 64, device="meta")
    yield "model.down", wider
    yield "no such module", without
    yield "extra.weight", more
    yield "model.embed.weight", other
    less = skeleton()
    del less.gain
    yield "gain", less


@pytest.mark.parametrize("case", range(5))
def test_a_model_that_does_not_fit_is_refused(saved, case):
    said, model = list(wrong_skeletons())[case]
    refused(saved[1], said, model=model)


def test_unusable_arguments_are_named(saved, tmp_path):
    refused(saved[1], "device", device="mps")
    for call, name in (
        (lambda: load_packed(len, saved[1]), "model"),
        (lambda: save_packed(len, tmp_path / "x"), "model"),
        (lambda: save_packed(Tied(), tmp_path / "x"), "PackedLinear"),
    ):
        with pytest.raises(ArgumentError, match=name):
            call()
    half_way = converted()
    half_way.head.weight = nn.Parameter(torch.empty(50, 64, device="meta"))
    with pytest.raises(ArgumentError, match=r"head\.weight"):
        save_packed(half_way, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_device_is_packed_anew(saved, tmp_path):
    model, path = converted(), tmp_path / "cuda"
    for layer in (model.up, model.down):
        other_order(layer)
    save_packed(model, path)
    loaded = load_packed(skeleton(), path)
    assert loaded.up.order == "cpu" and torch.equal(loaded(TOKENS), saved[0](TOKENS))
    kept = load_packed(skeleton(), path, device=None)
    assert kept.up.order == "cuda" and torch.equal(kept.up.parts[0], model.up.parts[0])
    assert torch.equal(kept.cpu()(TOKENS), saved[0](TOKENS))


def test_a_file_moves_to_a_device_and_back(saved, device, tmp_path):
    model, path = saved
    loaded = load_packed(skeleton(), path, device)
    assert isinstance(loaded.up, PackedLinear) and loaded.up.order == device.type
    y = loaded(TOKENS.to(device))
    assert torch.allclose(y.cpu(), model(TOKENS), rtol=1e-4, atol=1e-4)
    save_packed(loaded, tmp_path / "again")
    assert torch.equal(load_packed(skeleton(), tmp_path / "again", device)(TOKENS.to(device)), y)


def test_a_file_is_written_whole_or_not_at_all(saved, tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.write_bytes(b"before")

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("lqcompile.archive.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_packed(saved[0], path)
    assert os.listdir(tmp_path) == ["model"] and path.read_bytes() == b"before"


class Views(nn.Module):
    """Parameters that share memory: one is a part of another, one is another's data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.whole = nn.Parameter(torch.arange(64.0), requires_grad=False)
        self.part = nn.Parameter(self.whole.data[:8], requires_grad=False)
        self.data = nn.Parameter(self.whole.data, requires_grad=False)
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t(), requires_grad=False)


def test_views_of_one_storage(tmp_path):
    model = lqcompile.convert(lqcompile.quantize(Views().requires_grad_(False), group=32))
    save_packed(model, tmp_path / "views")
    loaded = load_packed(Views().requires_grad_(False), tmp_path / "views")
    for name in ("whole", "part", "data", "turned"):
        assert torch.equal(getattr(loaded, name), getattr(model, name))
    assert loaded.data is loaded.whole and loaded.part.data_ptr() != loaded.whole.data_ptr()


def test_nothing_but_a_name_is_kept_of_a_tied_tensor(saved):
    tensors, facts = _read(saved[1], True)
    assert facts["ties"]["head.weight"] == "embed.weight" and facts["shared"] == {"again": "up"}
    assert "head.weight" not in tensors and not any(name.startswith("again.") for name in tensors)
