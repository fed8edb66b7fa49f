"""Equal operations are done once, and only those that are the same wherever they stand."""

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from lqcompile import backend
from lqcompile.passes.once import once

from .models import Dequant, close


def graph_of(function, *args):
    return make_fx(function, tracing_mode="fake")(*args)


def calls(graph: fx.Graph) -> list[str]:
    return [f"{n.target} {n.args}" for n in graph.nodes if n.op == "call_function"]


def test_equal_operations_become_the_first():
    def twice(x):
        return torch.where(x > 0, x.sin(), 0.0) + torch.where(x > 0, x.sin(), 0.0) * 2

    x = torch.randn(8)
    module = graph_of(twice, x)
    before = len(calls(module.graph))
    assert once(module.graph) > 2 and len(set(calls(module.graph))) == len(calls(module.graph)) < before
    module.recompile()
    assert torch.equal(module(x), twice(x)) and once(module.graph) == 0


def test_what_only_looks_equal_stays():
    def function(x):
        zeros = torch.full_like(x, 0.0), torch.full_like(x, -0.0)
        drawn = torch.rand_like(x), torch.rand_like(x)
        before = x.sin()
        x.add_(1)
        return [t * 2 for t in (*zeros, *drawn, before, x.sin(), x + 1, x + True)]

    module = graph_of(function, torch.randn(8))
    before = calls(module.graph)
    once(module.graph)
    assert calls(module.graph) == before


def test_results_stay_apart():
    module = graph_of(lambda x: (x.cos(), x.cos(), x.cos().sin().view(2, 4), x.cos().sin()), torch.randn(8))
    once(module.graph)
    module.recompile()
    outputs = module(torch.randn(8))
    assert len({t.data_ptr() for t in outputs}) == 4
    assert sum(call.startswith("aten.cos") for call in calls(module.graph)) == 3


class Layer(nn.Module):
    """Attention that makes its mask from positions, as every layer of a decoder does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.q, self.o = Dequant(64, 64, seed=seed), Dequant(64, 64, seed=seed + 1)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(x.shape[1]) <= position
        y = F.scaled_dot_product_attention(self.q(x).unsqueeze(1), x[:, None], x[:, None], attn_mask=mask)
        return self.o(y.squeeze(1)) / 100


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(seed) for seed in (1, 3))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, position)
        return x


def test_layers_share_what_they_spell_alike(monkeypatch):
    seen: list[list[str]] = []

    def kept(graph: fx.Graph) -> int:
        gone = once(graph)
        seen.append(calls(graph))
        return gone

    monkeypatch.setattr(backend, "once", kept)
    model, x, position = Two().eval(), torch.randn(1, 16, 64), torch.tensor([[5]])
    # No graph may come out of a cache, where no pass runs.
    options = {"strict": True, "fx_graph_cache": False}
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        fast = torch.compile(model, backend="lq", options=options)
        assert close(fast(x, position), model(x, position))
    assert len(seen) == 1 and sum("aten.le" in call for call in seen[0]) == 1
