"""convert: quantized layers become packed ones in place; a PackedLinear runs, moves, saves and compiles."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import weakref
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import lqcompile
from lqcompile import ArgumentError, PackedLinear, Reason, convert
from lqcompile.formats import dequantize
from lqcompile.kernels import registry
from lqcompile.kernels.layout import LAYOUTS
from lqcompile.kernels.registry import Call

from .models import Dequant, close, mlp
from .test_ops import FORMS, random_weight, within_bound

STRICT = {"strict": True}


def reasons(model: nn.Module) -> dict[str, Reason | None]:
    return {d.where.path: d.reason for d in lqcompile.conversion(model).decisions}


def packed(n: int, k: int, seed: int = 0) -> PackedLinear:
    return convert(Dequant(n, k, seed=seed), torch.randn(2, k), options=STRICT)


def other_order(layer: PackedLinear, order: str = "cuda") -> PackedLinear:
    """The same layer as it would be on another type of device, but that its tensors stay here."""
    layer._hold(layer.layout, order, LAYOUTS[layer.layout].pack(layer.qweight(), order))
    return layer


@pytest.mark.parametrize("how", [{"method": "rtn"}, {"method": "nf4"}, {"method": "bcq", "bits": 3}], ids=str)
@pytest.mark.parametrize("given_inputs", [True, False])
def test_the_packed_weight_is_the_quantized_one(how, given_inputs):
    model = lqcompile.quantize(nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 32)), group=32, **how).eval()
    x, truth = torch.randn(3, 5, 128), [dequantize(m.qweight()) for m in (model[0], model[2])]
    wanted, biases = model(x), [model[0].bias, model[2].bias]
    assert convert(model, *((x,) if given_inputs else ()), options=STRICT) is model
    for layer, weight, bias in zip((model[0], model[2]), truth, biases, strict=True):
        assert isinstance(layer, PackedLinear) and layer.bias is bias
        assert torch.equal(dequantize(layer.qweight()), weight)
    assert close(model(x), wanted)
    report = lqcompile.conversion(model)
    assert [d.outcome for d in report.decisions] == ["rewritten"] * 2
    assert report.bytes_after == sum(part.nbytes for layer in (model[0], model[2]) for part in layer.parts)


def test_a_model_that_is_a_layer_is_returned_packed():
    layer, x = Dequant(64, 128), torch.randn(2, 128)
    packed = convert(layer, x, options=STRICT)
    assert isinstance(packed, PackedLinear) and close(packed(x), layer(x))
    assert reasons(convert(packed)) == {"": Reason.PACKED}


def test_originals_are_freed_before_the_next_layer_is_packed(monkeypatch):
    model = nn.Sequential(*(Dequant(64, 64, seed=i) for i in range(4))).eval()
    sources = [[weakref.ref(t) for t in (m.q, m.scale, m.zero)] for m in model]
    alive: list[int] = []
    pack = PackedLinear.from_weight

    def counting(*args, **kwargs):
        gc.collect()
        alive.append(sum(any(r() is not None for r in refs) for refs in sources))
        return pack(*args, **kwargs)

    monkeypatch.setattr(PackedLinear, "from_weight", counting)
    convert(model, torch.randn(2, 64), options=STRICT)
    gc.collect()
    assert alive == [4, 3, 2, 1]
    assert not any(r() is not None for refs in sources for r in refs)


def test_weights_take_what_they_take_packed():
    model = convert(lqcompile.quantize(nn.Sequential(nn.Linear(512, 512, bias=False)), group=128), options=STRICT)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    # Four bits a weight, and for each group a float32 scale and an int16 zero.
    assert held <= 1.05 * 512 * (512 / 2 + 512 / 128 * (4 + 2))


def test_shared_layers_and_tied_weights_are_packed_once():
    model = nn.Sequential(Dequant(64, 64), nn.ReLU(), Dequant(64, 64), Dequant(64, 64)).eval()
    model[2] = model[0]
    for name in ("q", "scale", "zero"):
        setattr(model[3], name, getattr(model[0], name))
    x = torch.randn(2, 64)
    wanted = model(x)
    convert(model, x, options=STRICT)
    assert model[2] is model[0] and model[3] is not model[0]
    assert all(a is b for a, b in zip(model[0].parts, model[3].parts, strict=True))
    assert not torch.equal(model[0].bias, model[3].bias) or model[0].bias is not model[3].bias
    assert close(model(x), wanted)


class Doubled(Dequant):
    """The same tensors, another weight."""

    def weight(self) -> torch.Tensor:
        return super().weight() * 2


def test_tensors_shared_by_different_weights():
    model = nn.Sequential(Dequant(64, 64), Doubled(64, 64)).eval()
    for name in ("q", "scale", "zero"):
        setattr(model[1], name, getattr(model[0], name))
    x = torch.randn(2, 64)
    wanted = model(x)
    convert(model, x, options=STRICT)
    assert lqcompile.conversion(model).rewritten == 2 and close(model(x) / 100, wanted / 100)


def test_a_layer_that_is_wired_wrongly_is_not_taken(monkeypatch):
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: forward(self, x.flip(-1)))
    model, x = nn.Sequential(Dequant(64, 64)).eval(), torch.randn(2, 64)
    with pytest.raises(lqcompile.StrictError, match="differs from the original"):
        convert(model, x, options=STRICT)
    assert reasons(convert(model, x)) == {"0": Reason.PASS_FAILED} and isinstance(model[0], Dequant)


def test_equal_layers_are_traced_once():
    model = nn.Sequential(*(Dequant(32, 32, seed=i) for i in range(6)), Dequant(64, 32)).eval()
    convert(model, torch.randn(2, 32), options=STRICT)
    assert lqcompile.conversion(model).rewritten == 7
    assert counters["stats"]["unique_graphs"] == 2


class Twice(Dequant):
    """Not one matmul."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + F.linear(x, self.weight())


class Gated(Dequant):
    """More than a matmul, a bias and casts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class Broken(Dequant):
    """Cut in two by Dynamo."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight()
        torch._dynamo.graph_break()
        return F.linear(x, w)


class Reshaping(Dequant):
    """As libraries do: rows flattened, computed in float16, bias apart, and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.reshape(-1, x.shape[-1]).to(torch.float16) @ self.weight().half().t()
        return (y.reshape(*x.shape[:-1], self.n) + self.bias.half()).to(x.dtype)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Dequant(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x=x)


def test_a_layer_that_casts_and_reshapes():
    model, x = nn.Sequential(Reshaping(64, 128)).eval(), torch.randn(2, 3, 128)
    wanted = model(x).detach()
    convert(model, x, options=STRICT)
    layer = model[0]
    assert (layer.compute, layer.result) == (torch.float16, None) and model(x).dtype == torch.float32
    assert torch.allclose(model(x), wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", [Twice, Gated, Broken])
def test_what_is_more_than_a_linear_layer_stays(kind):
    model, x = nn.Sequential(kind(64, 64)).eval(), torch.randn(2, 64)
    wanted = model(x)
    assert reasons(convert(model, x, options=STRICT)) == {"0": Reason.LAYER}
    assert isinstance(model[0], kind) and torch.equal(model(x), wanted)


def test_hooks_parametrizations_and_training_are_told():
    hooked, trained, parametrized = Dequant(64, 64), Dequant(64, 64), nn.Linear(64, 64)
    wrapped = Dequant(64, 64)
    wrapped.forward = lambda x: Dequant.forward(wrapped, x)
    hooked.register_forward_hook(lambda *_: None)
    trained.scale.requires_grad_()
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    model = nn.Sequential(hooked, trained, parametrized, nn.Linear(64, 64), Keyword(), wrapped).eval()
    x = torch.randn(2, 64)
    wanted = {"0": Reason.HOOKED, "1": Reason.NEEDS_GRAD, "2": Reason.HOOKED, "3": Reason.NOT_QUANTIZED}
    assert reasons(convert(model, x, options=STRICT)) == wanted | {"4.layer": Reason.LAYER, "5": Reason.HOOKED}
    with torch.no_grad():
        assert reasons(convert(model, x, options=STRICT))["1"] is None


class Lora(nn.Module):
    """As PEFT wraps a layer: a trained correction beside it, which reads the layer's dtype."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.a, self.b = base_layer, nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.b(self.a(x.to(self.a.weight.dtype)))


def test_a_layer_inside_lora_is_packed_and_the_rest_still_learns():
    model, x = Lora(Dequant(64, 64)), torch.randn(2, 64)
    model.base_layer.requires_grad_(False)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in (model.a.weight, model.b.weight)]
    model.zero_grad()
    convert(model, x, options=STRICT)
    assert isinstance(model.base_layer, PackedLinear)
    model(x).square().sum().backward()
    for got, grad in zip((model.a.weight.grad, model.b.weight.grad), wanted, strict=True):
        assert torch.allclose(got, grad, rtol=1e-3, atol=1e-3)


def test_a_parent_that_reads_the_weight():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    lqcompile.quantize(model, group=32)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        wanted = model(x)
        convert(model, x, options=STRICT)
        assert isinstance(model.linear1, PackedLinear) and close(model(x), wanted)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("model", lambda: convert(len)),
        ("options", lambda: convert(mlp(), options={"mode": "max-autotune"})),
        ("workload", lambda: convert(mlp(), options={"workload": {}})),
        ("model", lambda: lqcompile.conversion(mlp())),
        ("bias", lambda: PackedLinear(packed(64, 64).packed, torch.zeros(3))),
    ],
)
def test_unusable_arguments_are_named(name, call):
    with pytest.raises(ArgumentError, match=name):
        call()


def test_a_report_is_recorded_and_printed(capsys):
    with lqcompile.backend.recording() as reports:
        model = convert(mlp(), torch.randn(2, 128), options={"explain": True})
    assert reports == [lqcompile.conversion(model)] and "2 of 2 matmuls rewritten" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["lq", "inductor"])
def test_converted_models_compile(backend):
    model, x = convert(mlp(), torch.randn(2, 128), options=STRICT), torch.randn(4, 128)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for rows in (4, 7, 1):
            x = torch.randn(rows, 128)
            assert close(compiled(x), model(x))


def test_a_packed_matmul_is_told_as_such():
    model, x = nn.Sequential(packed(64, 64), Dequant(64, 64)).eval(), torch.randn(4, 64)
    with torch.no_grad():
        report = lqcompile.explain(model, x)
    assert (report.packed, report.rewritten) == (1, 1)
    assert "1 of 2 matmuls packed already, 1 more rewritten" in report.text()
    assert report.next_step().startswith("nothing")


def test_export_and_its_file():
    model, x = convert(mlp(), torch.randn(2, 128), options=STRICT), torch.randn(4, 128)
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (4, 9):
        x = torch.randn(n, 128)
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(("form", "zero"), FORMS)
@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**31 - 1), bits=st.integers(1, 8), act_order=st.booleans(),
    size=st.sampled_from([(5, 24, 8), (40, 256, 64), (33, 128, 128), (16, 130, 130)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), order=st.sampled_from(["cuda", "plain"]),
)  # fmt: skip
def test_any_weight_runs_and_moves_between_orders(form, zero, device, seed, bits, act_order, size, dtype, order):
    (n, k, group), random = size, Random(seed)
    w = random_weight(random, n, k, group, form, zero, bits, "cpu")
    g = torch.Generator().manual_seed(seed)
    w = dataclasses.replace(w, perm=torch.randperm(k, generator=g) if act_order else None)
    bias = torch.randn(n, generator=g).to(dtype)
    layer = PackedLinear.from_weight(w, bias, x_dtype=dtype).to(device)
    x = torch.randn(3, k, generator=g).to(dtype)
    moved = other_order(copy.deepcopy(layer).cpu(), order)
    assert torch.equal(dequantize(moved.qweight()), dequantize(w))
    # There and back it may have come to stand in another layout.
    for each in (layer, moved.to(device)):
        name = each.routes[dtype].partition("@")[0].partition(",")[0]
        rounding = registry.discover()[name].rounding(Call(each.layout, w.format, n, k), dtype)
        assert within_bound(each(x.to(device)).cpu(), x, w, bias, rounding) and each.order == device.type
    fresh = PackedLinear.from_weight(dequantizing_to_nothing(w), torch.zeros(n, dtype=dtype), x_dtype=dtype)
    fresh.load_state_dict(other_order(copy.deepcopy(layer).cpu(), order).state_dict())
    assert torch.equal(dequantize(fresh.qweight()), dequantize(w))


def dequantizing_to_nothing(w):
    """A weight like another one, of zeros."""
    blank = {name: torch.zeros_like(t) for name in ("scale", "alpha", "offset") if (t := getattr(w, name)) is not None}
    return dataclasses.replace(w, **blank, perm=None if w.perm is None else torch.arange(w.k))


def test_kernels_are_chosen_where_the_parts_come_to_be():
    layer = packed(64, 128)
    routes, state = layer.routes, layer.state_dict()
    layer._hold(layer.layout, "cpu", [part.to("meta") for part in layer.parts])
    assert layer.routes == {} != routes
    layer.to_empty(device="cpu").load_state_dict(state)
    assert layer.routes == routes


def test_a_layer_in_act_order_compiles_and_exports():
    layer = packed(64, 128)
    w = dataclasses.replace(layer.qweight(), perm=torch.randperm(128, generator=torch.Generator().manual_seed(0)))
    layer, x = PackedLinear.from_weight(w, layer.bias).eval(), torch.randn(5, 128)
    wanted = x @ dequantize(w, torch.float32).T + layer.bias
    file = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(layer, (x,)), file)
        file.seek(0)
        for run in (layer, torch.compile(layer, backend="lq", fullgraph=True), torch.export.load(file).module()):
            assert close(run(x), wanted)
        assert close(layer.weight, dequantize(w, torch.float32))


def test_dtypes_change_the_bias_alone():
    layer = packed(64, 128)
    before = [part.clone() for part in layer.parts]
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        change(layer)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(layer.parts, before, strict=True))
    assert layer.half().bias.dtype == torch.float16 and layer(torch.randn(2, 128).half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 128)).dtype == torch.bfloat16


def test_states_are_saved_loaded_and_refused():
    layer, x = packed(64, 128), torch.randn(2, 128)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    blank = copy.deepcopy(layer).to("meta")
    assert all(t.is_meta for t in blank.parts) and blank.order == "meta"
    blank = blank.to_empty(device="cpu")
    blank.load_state_dict(state)
    assert torch.equal(blank(x), layer(x))
    blank.load_state_dict(state, assign=True)
    assert torch.equal(blank(x), layer(x))
    with pytest.raises(RuntimeError, match=r"'n': 32"):
        layer.load_state_dict(packed(32, 128).state_dict())
    with pytest.raises(RuntimeError, match="get_extra_state"):
        layer.load_state_dict({**state, "_extra_state": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({name: t for name, t in state.items() if name != "planes"})
