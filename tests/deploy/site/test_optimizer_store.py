"""Moments on a site's own disk are those of the cut and the steps that the server counts, or none."""

from __future__ import annotations

import torch

from splitft.deploy.site.optimizer_store import OptimizerStore


def moments(value: float) -> dict[str, torch.Tensor]:
    return {"0.q_proj.A.exp_avg": torch.full((2,), value)}


def value_of(found) -> float | None:
    return float(found["0.q_proj.A.exp_avg"][0]) if found else None


def test_a_site_goes_on_with_what_the_server_knows_of(tmp_path):
    store = OptimizerStore(tmp_path)
    store.save(1, 2, 10, moments(1.0))
    store.save(2, 3, 10, moments(2.0))  # it has moved in round 2
    assert value_of(store.load(1, 2, 10)) == 1.0  # the server went back to round 1
    assert value_of(store.load(2, 2, 10)) == 1.0  # it never heard of the move
    assert value_of(store.load(2, 3, 10)) == 2.0  # it heard of the move, and of no training
    assert value_of(store.load(5, 3, 10)) == 2.0  # rounds went by without this site
    store.save(2, 3, 20, moments(3.0))  # it has trained
    assert value_of(store.load(2, 3, 20)) == 3.0
    assert value_of(store.load(2, 3, 10)) is None


def test_the_last_two_rounds_stay_and_what_is_damaged_is_none(tmp_path):
    store = OptimizerStore(tmp_path)
    for number in (1, 2, 3):
        store.save(number, 2, 10 * number, moments(number))
    assert value_of(store.load(3, 2, 10)) is None
    assert value_of(store.load(3, 2, 20)) == 2.0
    (tmp_path / "kept-0003.safetensors").write_bytes(b"half a file")
    assert value_of(store.load(3, 2, 30)) is None
    assert value_of(store.load(3, 2, 20)) == 2.0
