"""Sizes of models, derived from their shapes, against known parameter counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule.cases import SHAPE
from splitft.errors import ScheduleError
from splitft.schedule.sizes import sizes_of


def test_derived_sizes_are_those_of_a_known_model():
    sizes = sizes_of(SHAPE)
    # SmolLM2-135M has 134,515,008 parameters; norms are 61 x 576 of them
    total = sizes.embedding_parameters + 30 * sizes.block_parameters + 61 * 576
    assert total == 134_515_008
    assert sizes.adapter_parameters_per_rank == 2 * (576 + 576) + 2 * (576 + 192)
    assert sizes.head_parameters == 576  # tied: the matrix is the embedding
    assert sizes.output_parameters == 576 + 49152 * 576


@pytest.mark.parametrize("name", ["blocks", "block_parameters", "head_parameters"])
def test_impossible_sizes_are_refused(name):
    with pytest.raises(ScheduleError, match=f"{name} is -1"):
        replace(sizes_of(SHAPE), **{name: -1})


def test_a_family_without_gate_has_two_feed_forward_matrices():
    gated, plain = sizes_of(SHAPE), sizes_of(replace(SHAPE, family="gpt2"))
    assert gated.block_parameters - plain.block_parameters == 576 * 1536
