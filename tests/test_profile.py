"""Measured facts of this machine: kept, read back, and refused where they cannot be."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pytest
import torch

from lqcompile import cache, calibrate, cli, profile
from lqcompile.device import Device
from lqcompile.errors import ArgumentError

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LQ_CACHE_DIR", str(tmp_path / "cache"))
    cache.default.cache_clear()
    profile._stored.cache_clear()
    yield tmp_path
    cache.default.cache_clear()
    profile._stored.cache_clear()


def data(**changes):
    found = {"schema": profile.SCHEMA, **dataclasses.asdict(Device.of(CPU)), **changes}
    return json.dumps({name: value for name, value in found.items() if value != "missing"}).encode()


def test_what_is_kept_is_what_plans_are_made_with(folder):
    derived = Device.of(CPU)
    assert profile.of(CPU) == derived
    found = dataclasses.replace(derived, bandwidth=1.25e10, rate=3e11, launch=2e-6)
    profile.keep(found)
    assert profile.of(CPU) == found
    # Another process finds it too.
    cache.default.cache_clear()
    profile._stored.cache_clear()
    assert profile.of("cpu") == found


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"bandwidth": -1e9}, "bandwidth"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"half": -1.0}, "half"),
        ({"launch": "missing"}, "launch"),
        ({"launch": "1e-6"}, "launch"),
        ({"launch": True}, "launch"),
        ({"name": "NVIDIA H100"}, "name"),
        ({"kind": "cuda"}, "kind"),
        ({"processors": 1000}, "processors"),
        ({"schema": 0}, "schema"),
        ({"more": 1}, "schema"),
    ],
)
def test_an_absurd_profile_is_refused_and_the_derived_one_used(folder, changes, named):
    derived = Device.of(CPU)
    with pytest.raises(ArgumentError, match=named):
        profile.read(data(**changes), derived)
    cache.default().put("profile", profile.key(derived), data(**changes))
    with pytest.warns(UserWarning, match=named):
        assert profile.of(CPU) == derived
    with warnings.catch_warnings():
        # Said once.
        warnings.simplefilter("error")
        assert profile.of(CPU) == derived


@pytest.mark.parametrize("damaged", [b"", b"[]", b"null", b"{", b"\xff\xfe"])
def test_what_is_no_profile_is_refused(damaged):
    with pytest.raises(ArgumentError, match="profile"):
        profile.read(damaged, Device.of(CPU))


def test_absurd_measurements_are_not_kept(folder):
    with pytest.raises(ArgumentError, match="bandwidth"):
        profile.keep(dataclasses.replace(Device.of(CPU), bandwidth=0.0))
    assert profile.of(CPU) == Device.of(CPU)


def test_calibrate_measures_keeps_and_shows(folder, monkeypatch, capsys):
    monkeypatch.setitem(calibrate.READS, "cpu", (64 << 10, 1 << 20, 4 << 20))
    monkeypatch.setitem(calibrate.SQUARE, "cpu", 256)
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    assert cli.main(["calibrate", "--device", "cpu"]) == cli.Exit.FINE
    out = capsys.readouterr().out
    found = profile.of(CPU)
    assert found != Device.of(CPU) and all(name in out for name in profile.MEASURED)
    assert f"{found.bandwidth * 1e-9:,.1f} GB/s" in out
