"""Plain PyTorch: every spelling of a dequantized weight, and what stands around its matmul."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lqcompile
from lqcompile.errors import Reason

from .libraries.harness import Backend, measure
from .models import Dequant, compiled
from .plain_codes import PLAIN


class Layer(nn.Module):
    """A weight by its spelling, in a linear layer."""

    def __init__(self, tensors, weight):
        super().__init__()
        self.names, self.weight = tuple(tensors), weight
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, x):
        return F.linear(x, self.weight(*(getattr(self, name) for name in self.names)))


@pytest.mark.parametrize("name", PLAIN)
def test_every_spelling_is_rewritten_and_right(name):
    form, make = PLAIN[name]
    tensors, weight = make()
    # Through the identity each weight shows by itself.
    row = measure(name, lambda: (Layer(tensors, weight), torch.eye(weight(*tensors.values()).shape[1])))
    assert not row.wrong, row
    assert [(d.outcome, d.format.form) for d in row.decisions] == [("rewritten", form)], row
    assert {d.proof for d in row.decisions} <= {"bit_exact", "float64_rounding"}


class Around(nn.Module):
    """Codes of 4 bits, and a forward that does something around the matmul with them."""

    def __init__(self, body):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.body = body
        self.register_buffer("q", torch.randint(0, 16, (96, 64), generator=g, dtype=torch.uint8))
        self.register_buffer("s", torch.rand(96, generator=g) * 0.1 + 0.01)
        self.register_buffer("z", torch.randint(0, 16, (96,), generator=g).float())
        self.register_buffer("groups", torch.rand(96, 4, generator=g) * 0.1 + 0.01)
        self.register_buffer("b", torch.randn(96, generator=g))
        self.register_buffer("index", torch.randperm(64, generator=g))

    def weight(self):
        return (self.q.float() - self.z[:, None]) * self.s[:, None]

    def forward(self, x):
        return self.body(self, x)


def _per_group(m, x):
    parts = torch.einsum("mgk,ngk->mng", x.view(-1, 4, 16), m.q.float().view(96, 4, 16))
    return (parts * m.groups).sum(-1)


def _experts(m, x):
    w = m.weight().view(3, 32, 64)
    return torch.cat([x @ w[i].t() for i in range(3)], -1)


AROUND = {
    "scale after": (1, lambda m, x: F.linear(x, m.q.float()) * m.s),
    "scale and bias after": (1, lambda m, x: (x @ m.q.float().t()) * m.s + m.b),
    "divided after": (1, lambda m, x: F.linear(x, m.q.float()) / m.s),
    "zero by the sum of x": (1, lambda m, x: (F.linear(x, m.q.float()) - x.sum(-1, keepdim=True) * m.z) * m.s),
    "zero subtracted last": (1, lambda m, x: F.linear(x, m.q.float()) * m.s - x.sum(-1, keepdim=True) * (m.z * m.s)),
    "groups summed after": (1, _per_group),
    "x permuted": (1, lambda m, x: F.linear(x[:, m.index], m.weight())),
    "split": (3, lambda m, x: torch.cat([F.linear(x, w) for w in m.weight().split(32)], -1)),
    "two activations": (2, lambda m, x: F.linear(x, w := m.weight()) + F.linear(x * 2, w)),
    "experts": (3, _experts),
    "tied with an embedding": (1, lambda m, x: F.linear(x, w := m.weight()) + F.embedding(m.index[:1], w).sum()),
}


@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_the_matmul(name):
    matmuls, body = AROUND[name]
    row = measure(name, lambda: (Around(body), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))))
    assert (row.rewritten, len(row.decisions), row.wrong) == (matmuls, matmuls, ""), row


def test_a_matmul_that_is_none_is_left_alone():
    row = measure("sum", lambda: (Around(lambda m, x: (x[:, None] * m.weight()).sum(-1)), torch.randn(5, 64)))
    assert (row.decisions, row.wrong) == ([], "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    def body(m, x):
        with torch.autocast("cpu", dtype=dtype):
            return F.linear(x, m.weight())

    row = measure("autocast", lambda: (Around(body), torch.randn(5, 64)))
    assert (row.rewritten, len(row.decisions), row.wrong) == (1, 1, "")


def test_the_dense_weight_is_not_kept_for_backward():
    model = Dequant(64, 128).requires_grad_(False)
    torch._dynamo.reset()
    f, x = compiled(model), torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = f(x)
    assert not [t.shape for t in saved if t.is_floating_point() and t.numel() >= 64 * 128]
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, model.weight().sum(0).expand(5, -1), rtol=1e-4, atol=1e-4)


TABLE = torch.tensor([-1.0, -0.6, -0.3, -0.1, 0.1, 0.3, 0.6, 1.0])


class OfModule(nn.Module):
    """A table that is a global of the Python module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("q", torch.randint(0, 8, (32, 64)))

    def forward(self, x):
        return F.linear(x, TABLE[self.q])


def test_a_table_of_a_python_module_is_constant_and_fresh():
    model, x = OfModule(), torch.randn(3, 64)
    torch._dynamo.reset()
    with torch.no_grad():
        report = lqcompile.explain(model, x)
        assert [(d.outcome, d.format.form) for d in report.decisions] == [("rewritten", "table")]
        f = compiled(model)
        torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)
        TABLE.mul_(2)
        torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)


class Masked(nn.Module):
    """Codes picked out by a mask and a shape read from a buffer: Dynamo cuts the graph there, unless prepared."""

    def __init__(self):
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 16, (32, 80), dtype=torch.uint8))
        self.register_buffer("mask", torch.arange(80) % 5 > 0)
        self.register_buffer("s", torch.rand(32, 1))

    def forward(self, x):
        return F.linear(x, self.packed[:, self.mask] * self.s)


def test_prepare_keeps_a_graph_whole_and_restores_what_it_set():
    model, x = Masked(), torch.randn(3, 64)
    settings = torch._dynamo.config.get_config_copy()
    torch._dynamo.reset()
    with torch.no_grad():
        backend = Backend()
        torch.compile(model, backend=backend)(x)
        assert [d.reason for o in backend.outcomes for d in o.decisions] == [Reason.GRAPH_BREAK]
        torch._dynamo.reset()
        before = torch.get_rng_state()
        f = lqcompile.prepare(model, x, options={"strict": True})
        with lqcompile.backend.recording() as reports:
            torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)
        assert [(d.outcome, d.format.bits) for r in reports for d in r.decisions] == [("rewritten", 4)]
        model.packed.bitwise_xor_(1)
        torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-4)
    assert torch._dynamo.config.get_config_copy() == settings
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(lqcompile.ArgumentError):
        lqcompile.prepare(3)
