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


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"factors", "fedsa"}))
def test_rules_that_share_all_they_train_are_accepted(rule):
    check_deployable(configured(aggregate={"rule": rule}))


def test_ranks_of_their_own_are_accepted():
    check_deployable(configured(lora={"client_ranks": "halving"}, aggregate={"rule": "zero-pad"}))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"aggregate": {"rule": "fedsa"}}, "aggregate.rule: fedsa .* give one of .*stack"),
        ({"split": {"server_adapters": "shared"}}, "split.server_adapters: shared .* give per-client"),
        ({"clients": {"cuts": "whole"}}, "clients.cuts: whole"),
        ({"wire": "auto"}, "wire: auto .* name the codecs"),
        ({"wire": {"hidden": "temporal"}}, "wire.hidden: temporal .* give another codec"),
        ({"privacy": {"private_blocks": 1}}, "privacy.private_blocks"),
    ],
)
def test_what_needs_one_place_or_a_memory_is_refused_by_its_key(sections, words):
    with pytest.raises(DeployError, match=words):
        check_deployable(configured(**sections))


def test_every_reason_is_told_at_once():
    config = configured(aggregate={"rule": "fedsa"}, wire={"hidden": "temporal"})
    with pytest.raises(DeployError, match=r"aggregate\.rule.*wire\.hidden"):
        check_deployable(config)
