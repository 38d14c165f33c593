"""Where a block runs is a question of placement, never of mathematics: so unequal cuts are sound."""

from __future__ import annotations

import pytest
import torch

from laws.federations import Losing, federation, largest_relative_difference, play, write_text
from laws.peft_oracle import train

STEPS, ROUNDS = 20, 3
VECTORS = {"equal": [1, 1, 1], "rising": [1, 2, 3], "mixed": [3, 1, 2], "with a whole model": [1, 4, 2]}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture(scope="module")
def oracle(tiny_llama, text):
    """Whole models trained with peft and averaged, on the clients' batches and from the same start."""
    prepared = federation(tiny_llama, text, VECTORS["equal"])
    names = prepared.model.block_names()
    initial = {
        f"base_model.model.{names[block]}.{target}.lora_{factor}.weight": tensor
        for (block, target), factors in prepared.initial().adapters.items()
        for factor, tensor in (("A", factors.A), ("B", factors.B))
    }
    batches = []
    for number in range(ROUNDS):
        steps = range(number * STEPS, (number + 1) * STEPS)
        batches.append([[_with_labels(c.setup.stream.batch(s)) for s in steps] for c in prepared.clients])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return train(tiny_llama, initial, batches, targets, rank=4, alpha=8, lr=5e-3)


@pytest.fixture(scope="module")
def trained(tiny_llama, text):
    """Factors by name of cut vector, each trained once; `changing` has other cuts in every round."""
    results = {}
    for name, cuts in VECTORS.items():
        results[name] = play(federation(tiny_llama, text, cuts))
    by_round = [[1, 2, 4], [4, 3, 1], [2, 1, 4]]  # four is the whole model

    def changing(number, cuts):
        return dict(zip(cuts, by_round[number - 1], strict=True))

    results["changing"] = play(federation(tiny_llama, text, by_round[0]), changing)
    return results


@pytest.mark.parametrize("vector", [*VECTORS, "changing"])
def test_any_cuts_train_the_adapters_that_whole_models_would(vector, trained, oracle, tiny_llama, text):
    state, _ = trained[vector]
    names = federation(tiny_llama, text, [1]).model.block_names()
    ours = {
        f"base_model.model.{names[block]}.{target}.lora_{factor}.weight": tensor
        for (block, target), factors in state.adapters.items()
        for factor, tensor in (("A", factors.A), ("B", factors.B))
    }
    assert largest_relative_difference(ours, oracle) < 1e-5


@pytest.mark.parametrize("vector", ["rising", "mixed", "with a whole model", "changing"])
def test_any_cuts_give_the_same_adapters(vector, trained):
    ours, equal = (trained[name][0].adapters.tensors() for name in (vector, "equal"))
    assert largest_relative_difference(ours, equal) < 1e-5


def test_any_cuts_give_the_same_held_out_losses(trained):
    losses = {
        name: [event.loss for event in events if type(event).__name__ == "Evaluated"]
        for name, (_, events) in trained.items()
    }
    for curve in losses.values():
        assert len(curve) == ROUNDS + 1
        assert curve == pytest.approx(losses["equal"], rel=1e-9)


def test_training_moved_the_adapters_at_all(trained):
    state, _ = trained["equal"]
    assert all(float(factors.B.abs().max()) > 1e-3 for factors in state.adapters.values())


@pytest.mark.parametrize("rule", ["zero-pad", "svd"])
def test_cuts_do_not_matter_under_the_other_rules_either(rule, tiny_llama, text):
    training = {"rounds": 2, "steps": 5}
    results = [
        play(federation(tiny_llama, text, cuts, aggregate={"rule": rule}, training=training))[0].adapters
        for cuts in ([1, 1, 1], [3, 1, 2])
    ]
    products = [{str(key): f.product() for key, f in state.items()} for state in results]
    assert largest_relative_difference(*products) < 1e-5


def test_cuts_do_not_matter_when_moments_are_kept_and_move_with_their_blocks(tiny_llama, text):
    training = {"rounds": 3, "steps": 5, "optimizer_state": "keep"}
    by_round = [[1, 2, 4], [4, 1, 2], [2, 4, 1]]

    def changing(number, cuts):
        return dict(zip(cuts, by_round[number - 1], strict=True))

    still, _ = play(federation(tiny_llama, text, [2, 2, 2], training=training))
    moved, _ = play(federation(tiny_llama, text, by_round[0], training=training), changing)
    reset, _ = play(federation(tiny_llama, text, [2, 2, 2], training={"rounds": 3, "steps": 5}))
    assert largest_relative_difference(moved.adapters.tensors(), still.adapters.tensors()) < 1e-5
    assert largest_relative_difference(reset.adapters.tensors(), still.adapters.tensors()) > 1e-2


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("lost", ["client-1", "client-2"])  # on its way to a deeper cut, to a shallower one
def test_a_client_lost_on_its_way_to_a_new_cut_trains_as_one_that_was_merely_absent(
    lost, moved, tiny_llama, text
):
    training = {"rounds": 4, "steps": 5, "optimizer_state": "keep"}
    by_round = [[2, 2, 2], [3, 1, 2], [3, 1, 2], [1, 3, 2]]

    def changing(number, cuts):
        return dict(zip(cuts, by_round[number - 1], strict=True))

    def lose(moved):
        return lambda simulation: Losing(simulation, lost, 2, moved)

    prepared = federation(tiny_llama, text, by_round[0], training=training)
    ours, events = play(prepared, changing, around=lose(moved))
    absent, _ = play(federation(tiny_llama, text, by_round[0], training=training), around=lose(False))
    assert largest_relative_difference(ours.adapters.tensors(), absent.adapters.tensors()) < 1e-5
    cuts = [event.cuts[lost] for event in events if event.event == "CutsChanged" and event.round == 2]
    assert len(cuts) == 2  # as decided, and as it came to be
    assert cuts[-1] == 2
    assert dict(zip(ours.cuts, by_round[-1], strict=True)) == ours.cuts


def test_where_the_labels_live_does_not_matter(tiny_llama, text):
    training = {"rounds": 2, "steps": 5}
    at_home, _ = play(federation(tiny_llama, text, [1, 2, 3], training=training))
    at_server, _ = play(
        federation(tiny_llama, text, [1, 2, 3], training=training, split={"labels": "server"})
    )
    assert largest_relative_difference(at_server.adapters.tensors(), at_home.adapters.tensors()) < 1e-5


def _with_labels(batch):
    labels = torch.full_like(batch.tokens, -100)
    for row, (first, length) in enumerate(zip(batch.labelled_from, batch.lengths, strict=True)):
        labels[row, first:length] = batch.tokens[row, first:length]
    return batch.tokens, labels
