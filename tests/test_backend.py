"""The torch.compile door: freshness, one graph for all m, caches, options, gradients, copies, and failures of ours."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import lqcompile
from lqcompile import backend
from lqcompile.errors import ArgumentError
from lqcompile.passes import pipeline

from .models import Dequant, close, compiled, mlp
from .test_freshness import load_other, scale_in_place


def test_one_graph_serves_every_m():
    model = mlp()
    with torch.no_grad():
        f = torch.compile(model, backend="lq", dynamic=True, options={"strict": True})
        for m in (2, 3, 16, 17, 255, 4096):
            x = torch.randn(m, 128)
            assert close(f(x), model(x))
    assert counters["stats"]["unique_graphs"] == 1


def test_rows_may_come_in_any_rank_and_stride():
    model = mlp()
    with torch.no_grad():
        f = compiled(model)
        base = torch.randn(6, 4, 256)
        for x in (
            base[..., ::2],
            base[..., 1:129],
            base.transpose(0, 1)[..., :128],
            base[:1, :1, :128].expand(3, 5, 128),
        ):
            assert close(f(x), model(x))
        for shape in ((0, 128), (2, 0, 128), (128,)):
            x = torch.randn(shape)
            assert f(x).shape == model(x).shape
            assert close(f(x), model(x))


def test_gradients_of_inputs_and_other_parameters():
    model = nn.Sequential(nn.Linear(16, 128), Dequant(64, 128), nn.ReLU(), nn.Linear(64, 3))
    x = torch.randn(5, 16, requires_grad=True)
    f = compiled(model)
    f(x).square().sum().backward()
    got = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    x.grad = None
    model.zero_grad()
    model(x).square().sum().backward()
    wanted = [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(got, wanted, strict=True))


def test_training_through_rewritten_layers_learns_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), Dequant(64, 128), nn.Linear(64, 1))
    twin = copy.deepcopy(model)
    x, y = torch.randn(32, 16), torch.randn(32, 1)
    losses = []
    for net, call in ((model, compiled(model)), (twin, twin)):
        step = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            step.zero_grad()
            loss = F.mse_loss(call(x), y)
            loss.backward()
            step.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_weight_in_training_is_kept():
    model = nn.Sequential(Dequant(64, 128))
    model[0].scale.requires_grad_(True)
    report = lqcompile.explain(model, torch.randn(5, 128))
    assert [d.reason for d in report.decisions] == [lqcompile.Reason.NEEDS_GRAD]
    compiled(model)(torch.randn(5, 128)).sum().backward()
    assert model[0].scale.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype):
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        wanted, got = model(x), compiled(model)(x)
    assert got.dtype == wanted.dtype
    assert torch.allclose(got.float(), wanted.float(), rtol=0.05, atol=0.05 * float(wanted.abs().max()))
    torch._dynamo.reset()
    with torch.no_grad():
        wanted, got = model(x.to(dtype)), compiled(model)(x.to(dtype))
    assert got.dtype == wanted.dtype
    assert torch.allclose(got.float(), wanted.float(), rtol=0.05, atol=0.05 * float(wanted.float().abs().max()))


def test_a_float_model_is_exactly_inductors():
    model, x = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval(), torch.randn(5, 32)
    with torch.no_grad():
        ours = compiled(model)(x)
        torch._dynamo.reset()
        assert torch.equal(ours, torch.compile(model)(x))
    report = lqcompile.explain(model, x)
    assert {d.reason for d in report.decisions} == {lqcompile.Reason.NOT_QUANTIZED}
    assert "nothing is quantized" in report.text()


def test_copies_and_pickles_of_the_model():
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        f = compiled(model)
        wanted = f(x)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
        for other in (twin, again, copy.deepcopy(f)):
            assert close(compiled(other)(x) if other is not f else other(x), wanted)
        scale_in_place(twin)
        assert close(f(x), wanted)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        assert buffer.tell() > 0


def test_unknown_options_name_the_known_ones():
    x = torch.randn(5, 128)
    for options, words in (
        ({"strikt": True}, ("strikt", "strict", "check_weights")),
        ({"check_weights": "maybe"}, ("maybe", "never")),
    ):
        with pytest.raises(Exception) as caught:
            torch.compile(mlp(), backend="lq", options=options)(x)
        assert all(word in str(caught.value) for word in words)
        torch._dynamo.reset()
    with pytest.raises(Exception, match="fastest"):
        torch.compile(mlp(), backend="lq", mode="fastest")(x)
    with pytest.raises(ArgumentError, match="model"):
        lqcompile.refresh("everything")


@pytest.mark.parametrize("options", [{"mode": "max-autotune-no-cudagraphs"}, {"epilogue_fusion": False}])
def test_inductors_own_options_pass_through(options):
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        assert close(torch.compile(model, backend="lq", options=options)(x), model(x))


def test_a_failure_of_ours_leaves_the_graph_as_it_was(monkeypatch):
    def broken(*_):
        raise KeyError("seeded")

    monkeypatch.setattr(pipeline, "lower", broken)
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="KeyError"):
            assert close(torch.compile(model, backend="lq")(x), model(x))
        report = lqcompile.explain(model, x)
        assert {d.reason for d in report.decisions} == {lqcompile.Reason.PASS_FAILED}
        assert report.warnings
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"StrictError|seeded"):
            compiled(model)(x)


def test_a_failure_to_compile_the_lowered_graph_falls_back(monkeypatch):
    from torch._inductor import compile_fx

    real = compile_fx.compile_fx

    def fails_on_ours(module, *args, **kwargs):
        if "lq_packed" in module.code:
            raise RuntimeError("seeded")
        return real(module, *args, **kwargs)

    monkeypatch.setattr(compile_fx, "compile_fx", fails_on_ours)
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="seeded"):
            assert close(torch.compile(model, backend="lq")(x), model(x))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="seeded"):
            compiled(model)(x)


def _cache_counts(model: nn.Module, x: torch.Tensor, **options) -> tuple[int, int, int]:
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        torch.compile(model, backend="lq", options=options)(x)
    c, aot = counters["inductor"], counters["aot_autograd"]
    return aot["autograd_cache_hit"], c["fxgraph_cache_hit"], aot["autograd_cache_miss"]


def test_inductor_caches_hit_when_nothing_changed_and_miss_when_something_did(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, x = mlp(), torch.randn(5, 128)
    assert _cache_counts(model, x)[2] == 1
    assert _cache_counts(model, x)[0] == 1, "unchanged: hit"
    other = nn.Sequential(Dequant(64, 128, seed=5), nn.ReLU(), Dequant(32, 64, seed=6)).eval()
    assert _cache_counts(other, x)[0] == 1, "other values, same graph: hit"
    with torch.no_grad():
        assert close(compiled(other)(x), other(x))
    assert _cache_counts(model, x, epilogue_fusion=False)[2] == 1, "an option of Inductor: miss"
    assert _cache_counts(model, x, strict=True)[2] >= 0
    monkeypatch.setattr(backend, "version", lambda: "0.0.0+other")
    assert _cache_counts(model, x)[2] == 1, "another version: miss"


def test_tied_and_sliced_weights():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Dequant(48, 32, 16)

        def forward(self, ids, x):
            codes = torch.stack([self.layer.q & 15, self.layer.q >> 4], -1).view(48, -1, 16)
            w = ((codes.float() - self.layer.zero.float()) * self.layer.scale).view(48, 32)
            q, k, v = w.split(16)
            return (
                F.embedding(ids, w) @ w.t(),
                F.linear(x, q),
                F.linear(x, k),
                x @ v.t(),
                F.linear(x, w[8:40]),
            )

    model, ids, x = Tied().eval(), torch.tensor([1, 5]), torch.randn(3, 32)
    with torch.no_grad():
        report = lqcompile.explain(model, ids, x, options={"strict": True})
        assert report.rewritten == 5
        for got, wanted in zip(compiled(model)(ids, x), model(ids, x), strict=True):
            assert close(got, wanted)


def test_equal_structures_are_analysed_once():
    model = nn.Sequential(*(Dequant(64, 64, seed=i) for i in range(6))).eval()
    seen = []

    def capture(module, inputs):
        seen.append(pipeline.run(module, inputs, backend.make(None, {"strict": True})))
        return module.forward

    with torch.no_grad():
        torch.compile(model, backend=capture)(torch.randn(3, 64))
    assert [d.outcome for d in seen[0].decisions] == ["rewritten"] * 6
    assert seen[0].analysed == 1


def test_every_matmul_has_one_decision():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.head = Dequant(32, 32, 16), Dequant(32, 32, 16, seed=1), nn.Linear(32, 8)

        def forward(self, x):
            return self.head((self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ x)

    report = lqcompile.explain(Attention().eval(), torch.randn(2, 5, 32))
    reasons = sorted(d.reason.name if d.reason else "rewritten" for d in report.decisions)
    assert reasons == ["INPUT_WEIGHT", "INPUT_WEIGHT", "NOT_QUANTIZED", "rewritten", "rewritten"]
    assert all(d.where.file.endswith("test_backend.py") or d.where.file for d in report.decisions)


def test_the_users_tensors_are_untouched():
    model, x = mlp(), torch.randn(5, 128)
    before = {name: (t.clone(), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        compiled(model)(x)
    for name, t in model.state_dict(keep_vars=True).items():
        value, version = before[name]
        assert torch.equal(t, value)
        assert t._version == version
        assert not [k for k in vars(t) if "lq" in k]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_device_mode_and_dtype(device, mode, dtype):
    model = mlp().to(device)
    with torch.no_grad():
        f = torch.compile(model, backend="lq", mode=mode)
        for m in (5, 5, 1, 9):
            x = torch.randn(m, 128, device=device, dtype=dtype)
            for change in (None, scale_in_place, load_other):
                if change is not None:
                    change(model)
                got, wanted = f(x).clone().float(), model(x).float()
                assert bool((got - wanted).abs().max() <= 0.02 * wanted.abs().max())


class Addmm(Dequant):
    """A bias of any shape that broadcasts against the result, with a factor."""

    def __init__(self, bias: torch.Tensor, beta: float) -> None:
        super().__init__(8, 32, 16)
        self.added, self.beta = nn.Parameter(bias, requires_grad=False), beta

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.added, x, self.weight().t(), beta=self.beta)


@pytest.mark.parametrize("beta", [0, 1, 0.5])
@pytest.mark.parametrize("shape", [(1,), (8,), (1, 8), (3, 1), (3, 8)])
def test_biases_that_broadcast(shape, beta):
    # Eager does not read a bias whose factor is 0.
    model, x = Addmm(torch.randn(shape) if beta else torch.full(shape, float("nan")), beta), torch.randn(3, 32)
    with torch.no_grad():
        assert lqcompile.explain(model, x, options={"strict": True}).rewritten == 1
        assert close(compiled(model)(x), model(x))


def test_a_scale_in_another_dtype_after_the_matmul():
    class ScaleAfter(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype
            self.register_buffer("codes", torch.randint(-8, 8, (16, 32), dtype=torch.int8))
            self.register_buffer("scale", torch.rand(16).to(dtype))

        def forward(self, x):
            return F.linear(x, self.codes.to(x.dtype)).to(self.dtype) * self.scale

    for x_dtype, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        torch._dynamo.reset()
        model, x = ScaleAfter(dtype), torch.randn(3, 32, dtype=x_dtype)
        exact = x.double() @ (model.codes.double() * model.scale.double()[:, None]).T
        with torch.no_grad():
            y = compiled(model)(x)
        assert y.dtype == dtype
        unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
        assert bool(((y.double() - exact).abs() <= 2 * unit * exact.abs() + 2.0**-18 * exact.abs().max()).all())
