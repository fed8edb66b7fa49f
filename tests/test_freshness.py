"""A weight that changes after compiling: whatever the way, the next call uses the new one."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lqcompile
from lqcompile import freshness
from lqcompile.kernels.native import has_compiler

from .models import Dequant, close, compiled, mlp


def scale_in_place(m: nn.Sequential) -> None:
    with torch.no_grad():
        m[0].scale.mul_(1.7)


def codes_in_place(m: nn.Sequential) -> None:
    m[2].q.bitwise_xor_(3)


def load_other(m: nn.Sequential) -> None:
    m.load_state_dict(nn.Sequential(Dequant(64, 128, seed=7), nn.ReLU(), Dequant(32, 64, seed=8)).state_dict())


def load_assign(m: nn.Sequential) -> None:
    other = nn.Sequential(Dequant(64, 128, seed=9), nn.ReLU(), Dequant(32, 64, seed=10))
    m.load_state_dict(other.state_dict(), assign=True)


def new_data(m: nn.Sequential) -> None:
    m[0].scale.data = m[0].scale.data * 3


def new_parameter(m: nn.Sequential) -> None:
    m[0].scale = nn.Parameter(m[0].scale * 0.3, requires_grad=False)


def same_memory(m: nn.Sequential) -> None:
    m[0].scale = nn.Parameter(m[0].scale.data.mul_(0.3), requires_grad=False)


def new_buffer(m: nn.Sequential) -> None:
    m[2].zero = (m[2].zero + 1) % 16


def new_submodule(m: nn.Sequential) -> None:
    m[0] = Dequant(64, 128, seed=11).eval()


def write_to_view(m: nn.Sequential) -> None:
    m[0].q[3].fill_(0x37)


def wider(m: nn.Sequential) -> None:
    with torch.no_grad():
        m[0].scale.copy_(torch.rand_like(m[0].scale) / 3)
    m[0].zero.fill_(77)


CHANGES = (
    scale_in_place, codes_in_place, load_other, load_assign, new_data, new_parameter, same_memory, new_buffer,
    new_submodule, write_to_view, wider,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_new_weights_are_used_on_the_next_call(change, native, monkeypatch):
    monkeypatch.setattr("lqcompile.freshness.WORTH_COMPILING", 1 if native else 1 << 30)
    assert freshness._native() is not None or not has_compiler()
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        f = compiled(model)
        assert close(f(x), model(x))
        before = f(x)
        change(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            after = f(x)
        assert close(after, model(x))
        assert not close(after, before)
        assert close(f(x), model(x))


def test_repacking_keeps_the_compiled_graph():
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        f = compiled(model)
        f(x)
        count = counters["stats"]["unique_graphs"]
        load_other(model)
        f(x)
    assert counters["stats"]["unique_graphs"] == count == 1


def test_changes_that_leave_no_trace_need_refresh():
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        f = compiled(model)
        f(x)
        model[0].scale.data.mul_(2)
        lqcompile.refresh(model)
        assert close(f(x), model(x))
        never = compiled(model, check_weights="never")
        never(x)
        model[0].scale.mul_(2)
        lqcompile.refresh()
        assert close(never(x), model(x))


def test_inference_mode():
    with torch.inference_mode():
        model, x = mlp(), torch.randn(5, 128)
        f = compiled(model)
        assert close(f(x), model(x))
        model[0].scale = nn.Parameter(model[0].scale * 0.5, requires_grad=False)
        assert close(f(x), model(x))


def test_replaced_weights_are_let_go():
    model, x = mlp(), torch.randn(5, 128)
    with torch.no_grad():
        f = compiled(model)
        f(x)
        old = weakref.ref(model[0].scale)
        new_parameter(model)
        f(x)
    gc.collect()
    assert old() is None
