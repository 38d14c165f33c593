"""Settings that cannot be deployed are refused with the key to change; others are accepted."""

from __future__ import annotations

import pytest

from splitft.config import from_mapping
from splitft.deploy.unsupported import check_deployable
from splitft.errors import DeployError
from splitft.specs.rules import RULES


def configured(**sections):
    clients = {"count": 2, "cuts": [1, 2], **sections.pop("clients", {})}
    return from_mapping({"clients": clients, **sections})


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"factors"}))
def test_every_rule_is_accepted(rule):
    check_deployable(configured(aggregate={"rule": rule}))


@pytest.mark.parametrize("codec", ["temporal", "principal", "int4", "auto"])
def test_private_blocks_and_every_codec_are_accepted(codec):
    check_deployable(configured(privacy={"private_blocks": 1}, wire={"hidden": codec}))


@pytest.mark.parametrize("mode", ["shared", "shared-in-turn", "shared-by-arrival"])
def test_shared_factors_and_whole_models_are_accepted(mode):
    check_deployable(configured(split={"server_adapters": mode}))
    check_deployable(configured(clients={"cuts": "whole"}))


def test_ranks_of_their_own_are_accepted():
    check_deployable(configured(lora={"client_ranks": "halving"}, aggregate={"rule": "zero-pad"}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": "local", "clients": {"cuts": "whole"}}, "aggregate.federated: false .* give true"),
        (
            {"split": {"server_adapters": "shared-in-turn", "turns": "fixed"}},
            "split.turns: fixed .* in their order of arrival; give random",
        ),
        (
            {"wire": {"hidden": "temporal"}, "training": {"micro_batches": 2, "in_flight": 2}},
            "wire.hidden: temporal .* no order; give training.in_flight: 1",
        ),
    ],
)
def test_what_needs_one_place_or_a_memory_is_refused_by_its_key(sections, words):
    with pytest.raises(DeployError, match=words):
        check_deployable(configured(**sections))


def test_every_reason_is_told_at_once():
    flight = {"micro_batches": 2, "in_flight": 2}
    config = configured(training=flight, wire={"hidden": "temporal", "gradient": "int2"})
    with pytest.raises(DeployError, match=r"wire\.hidden.*wire\.gradient"):
        check_deployable(config)
