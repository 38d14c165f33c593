"""A calibration times real blocks once, and is then read from the cache."""

from __future__ import annotations

import pytest

from splitft.assemble.fleet import exact_sizes
from splitft.model import open_model
from splitft.runtime import calibration
from splitft.runtime.ranks import Ranks
from splitft.specs import LoraSpec, ModelSpec, TrainingSpec


@pytest.fixture
def measure(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITFT_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "SECONDS", 0.1)
    model = open_model(ModelSpec(name=str(tiny_llama), dtype="float32"))
    ranks = Ranks(LoraSpec(rank=4, rank_at_cut=None), model.shape.blocks, "svd", 0)
    return lambda: calibration.measured(model, exact_sizes(model, ranks), ranks, TrainingSpec())


def test_what_was_measured_is_positive_and_kept(measure):
    first = measure()
    device = first.device
    assert device.block_forward_s_per_token > 0
    assert device.block_backward_s_per_token > 0
    assert device.head_s_per_token > 0
    assert measure() == first


def test_a_damaged_cache_is_measured_again(measure, tmp_path):
    measure()
    (file,) = tmp_path.glob("calibrations/*.json")
    file.write_text("{", encoding="utf-8")
    assert measure().device.block_forward_s_per_token > 0
