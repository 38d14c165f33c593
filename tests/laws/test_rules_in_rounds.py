"""Stack, exact, ffa and fedsa in real rounds: dense arithmetic on whole models, whatever the cuts."""

from __future__ import annotations

import pytest
import torch

from laws.federations import federation, largest_relative_difference, play, write_text
from laws.rules_oracle import Global, train
from laws.test_cut_invariance import _with_labels
from splitft.adapters import AdapterState, with_folded
from splitft.geometry import Span

STEPS, ROUNDS = 6, 3
RULES = ("stack", "exact", "ffa", "fedsa")
TRAINING = {"rounds": ROUNDS, "steps": STEPS}
BY_ROUND = [[1, 2, 4], [4, 3, 1], [2, 1, 4]]
"""Four is the whole model."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture(scope="module")
def parties(tiny_llama, text):
    def make(rule, cuts, **lora):
        sections = {"aggregate": {"rule": rule}, "training": TRAINING, "lora": lora}
        return federation(tiny_llama, text, cuts, **sections)

    return make


def _changing(number, cuts):
    return dict(zip(cuts, BY_ROUND[number - 1], strict=True))


def _updates(prepared, state):
    """Every client's whole update by layer: global, or with its own B."""
    blocks = prepared.model.shape.blocks
    found = {}
    for client in prepared.clients:
        adapters = state.adapters
        if prepared.ranks.keeps_own:
            cut = state.cuts[client.name]
            own = prepared.server.client_states.own.get(client.name, AdapterState())
            server = own.within(Span(cut, blocks))
            adapters = adapters.replace_B(client.own().within(Span(0, cut)).union(server))
        for key, factors in with_folded(adapters, state.folded).items():
            found[f"{client.name}/{key}"] = factors.product()
    return found


@pytest.mark.parametrize("rule", RULES)
def test_rounds_are_those_of_whole_models_with_dense_updates_whatever_the_cuts(rule, parties, tiny_llama):
    prepared = parties(rule, BY_ROUND[0])
    names = prepared.model.block_names()
    sizes = prepared.server.blocks.bank.sizes

    def named(state, half):
        return {f"{names[block]}.{target}": getattr(f, half) for (block, target), f in state.items()}

    start = prepared.initial().adapters
    fresh = [
        named(prepared.ranks.start(sizes, torch.float64, number), "A") for number in range(1, ROUNDS + 1)
    ]
    batches = []
    for number in range(ROUNDS):
        steps = range(number * STEPS, (number + 1) * STEPS)
        batches.append([[_with_labels(c.setup.stream.batch(s)) for s in steps] for c in prepared.clients])
    wanted = train(
        rule,
        tiny_llama,
        Global(named(start, "A"), named(start, "B")),
        batches,
        fresh,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        alpha=8,
        lr=5e-3,
    )
    state, _ = play(prepared, _changing)
    found = _updates(prepared, state)
    expected = {
        f"{client.name}/{(block, target)}": wanted.update(f"{names[block]}.{target}", index)
        for index, client in enumerate(prepared.clients)
        for block, target in start
    }
    assert largest_relative_difference(found, expected) < 1e-5
    assert all(float(update.abs().max()) > 1e-3 for update in found.values())


@pytest.mark.parametrize("rule", RULES)
def test_what_is_evaluated_does_not_depend_on_the_cuts(rule, parties):
    curves = []
    for cuts, controller in (([1, 1, 1], lambda number, cuts: cuts), (BY_ROUND[0], _changing)):
        _, events = play(parties(rule, cuts), controller)
        curves.append([e.by_client for e in events if type(e).__name__ == "Evaluated"])
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-7)
    assert curves[0][-1] != curves[0][0]


@pytest.mark.parametrize("rule", ["stack", "exact", "ffa"])
def test_with_unequal_ranks_too_the_round_ends_at_the_mean_of_what_was_trained(rule, parties, monkeypatch):
    """Clients of lower rank near their cuts carry the other rows along: nothing of the mean is lost."""
    from splitft.training import rounds

    seen = []
    united = rounds.aggregate

    def watched(rule, members, *rest):
        seen.append([(weight, {k: f.product() for k, f in state.items()}) for weight, state in members])
        return united(rule, members, *rest)

    monkeypatch.setattr(rounds, "aggregate", watched)
    prepared = parties(rule, BY_ROUND[0], rank_at_cut=2)
    before = prepared.initial()
    learnt = with_folded(before.adapters, before.folded)
    ends = []
    original = rounds.FederatedTrainer._round

    def recorded(*arguments):
        done = original(*arguments)
        ends.append(done[0])
        return done

    monkeypatch.setattr(rounds.FederatedTrainer, "_round", recorded)
    _, events = play(prepared, _changing)
    folded = {key: torch.zeros_like(learnt[key].product()) for key in learnt}
    for members, state in zip(seen, ends, strict=True):
        total = sum(weight for weight, _ in members)
        wanted = {
            str(key): folded[key] + sum(w / total * products[key] for w, products in members)
            for key in learnt
        }
        found = {str(k): f.product() for k, f in with_folded(state.adapters, state.folded).items()}
        assert largest_relative_difference(found, wanted) < 1e-6
        folded = {k: state.folded[k].product() if k in state.folded else folded[k] for k in learnt}
        assert set(state.adapters.ranks().values()) == {4}
    errors = [e.aggregation_error for e in events if type(e).__name__ == "RoundDone"]
    assert len(errors) == ROUNDS
    assert max(errors) < 1e-6


@pytest.mark.parametrize(("rule", "halves"), [("ffa", "B"), ("fedsa", "A")])
def test_only_the_shared_factor_travels(rule, halves, parties):
    """Bytes of adapters up and down are those of one factor; the first round's start is known to all."""
    prepared, plain = parties(rule, [2, 2, 2]), parties("factors", [2, 2, 2])
    counted = {}
    for name, one in (("half", prepared), ("both", plain)):
        _, events = play(one)
        done = [e for e in events if type(e).__name__ == "RoundDone"]
        counted[name] = sum(t.up["adapter"] + t.down["adapter"] for e in done for t in e.traffic.values())
    state = prepared.initial().adapters.within(Span(0, 2))
    share = sum(getattr(f, halves).numel() for f in state.values()) / sum(
        f.A.numel() + f.B.numel() for f in state.values()
    )
    assert counted["half"] / counted["both"] == pytest.approx(share, rel=0.25)  # and headers of messages


def test_each_client_is_evaluated_with_its_own_b(parties):
    prepared = parties("fedsa", [1, 2, 3])
    state, _ = play(prepared)
    updates = _updates(prepared, state)
    first, second = (
        {k.partition("/")[2]: u for k, u in updates.items() if k.startswith(f"client-{i}/")} for i in (1, 2)
    )
    assert largest_relative_difference(first, second) > 0.05
