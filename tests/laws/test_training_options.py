"""Dropout and clipping: whatever the cuts, what peft learns on whole models with the same masks, bounds."""

from __future__ import annotations

import pytest
import torch

from laws.federations import federation, largest_relative_difference, play, write_text
from laws.peft_oracle import train
from laws.test_cut_invariance import _with_labels
from laws.test_dora import TARGETS, _as_peft_names
from splitft.adapters.dropout import DropoutRows

STEPS, ROUNDS, P, CLIP = 4, 2, 0.3, 0.02
CLIENTS = {"count": 3, "shares": {"by": "length", "alpha": 1.0}}
TRAINING = {"rounds": ROUNDS, "steps": STEPS}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def _initial(prepared) -> dict[str, torch.Tensor]:
    names = prepared.model.block_names()
    return {
        f"base_model.model.{names[block]}.{target}.lora_{factor}.weight": tensor
        for (block, target), factors in prepared.initial().adapters.items()
        for factor, tensor in (("A", factors.A), ("B", factors.B))
    }


def _as_lora(prepared, state) -> dict[str, torch.Tensor]:
    names = prepared.model.block_names()
    return {
        f"base_model.model.{names[block]}.{target}.lora_{factor}.weight": getattr(factors, factor)
        for (block, target), factors in state.adapters.items()
        for factor in "AB"
    }


def _batches(prepared):
    by_round = [range(number * STEPS, (number + 1) * STEPS) for number in range(ROUNDS)]
    return [
        [[_with_labels(client.setup.stream.batch(step)) for step in steps] for client in prepared.clients]
        for steps in by_round
    ]


def _oracle(folder, prepared, **options) -> dict[str, torch.Tensor]:
    return train(folder, _initial(prepared), _batches(prepared), TARGETS, rank=4, alpha=8, lr=5e-3, **options)


def _masks(prepared):
    """What peft's dropout multiplies by, from the same words as ours."""
    keys = {
        f"{name}.{target}": (block, target)
        for block, name in enumerate(prepared.model.block_names())
        for target in TARGETS_IN_BLOCK
    }

    def mask(layer: str, client: int, step: int) -> torch.Tensor:
        own = prepared.clients[client]
        batch = own.setup.stream.batch(step)
        rows = DropoutRows(P, prepared.ranks.seed, own.name, step, 0, *batch.tokens.shape)
        return ~rows.left_out(keys[layer], 32, torch.device("cpu")) / (1 - P)

    return mask


TARGETS_IN_BLOCK = [f"self_attn.{name}" for name in TARGETS]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_dropout_at_unequal_cuts_is_that_of_peft_on_whole_models(method, tiny_llama, text):
    lora = {"dropout": P, "method": method}
    prepared = federation(tiny_llama, text, [1, 2, 3], lora=lora, training=TRAINING)
    expected = _oracle(tiny_llama, prepared, dora=method == "dora", mask=_masks(prepared))
    for cuts in ([1, 2, 3], [3, 1, 2]):
        state, _ = play(federation(tiny_llama, text, cuts, lora=lora, training=TRAINING))
        dora = method == "dora"
        found = _as_peft_names(prepared, state, tiny_llama) if dora else _as_lora(prepared, state)
        assert largest_relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("server_adapters", ["per-client", "shared"])
def test_a_client_that_shares_its_pass_with_others_has_the_masks_that_it_has_alone(
    server_adapters, tiny_llama, text
):
    one, other = (
        play(
            federation(
                tiny_llama,
                text,
                [1, 2, 2],
                lora={"dropout": P},
                training=TRAINING,
                split={"server_adapters": server_adapters, "group_tokens": tokens},
            )
        )[0].adapters.tensors()
        for tokens in (1, 4096)
    )
    assert largest_relative_difference(one, other) < 1e-5


@pytest.mark.parametrize("dtype", ["float64", "float16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_blocks_that_are_computed_again_draw_the_same_masks(dtype, method, tiny_llama, text):
    kept, again = (
        play(
            federation(
                tiny_llama,
                text,
                [1, 2, 3],
                model={"dtype": dtype},
                wire=dict.fromkeys(("hidden", "gradient", "adapter"), "fp32"),
                lora={"dropout": P, "method": method},
                training={**TRAINING, "micro_batches": 2, "checkpoint_blocks": blocks},
            )
        )[0]
        for blocks in (False, True)
    )
    assert kept.losses == again.losses
    for name, tensor in kept.adapters.tensors().items():
        assert torch.equal(again.adapters.tensors()[name], tensor), name


def test_dropout_changes_training_and_no_evaluation(tiny_llama, text):
    before, after = [], []
    for p in (0.0, P):
        training = {"rounds": 1, "steps": 2}
        state, events = play(federation(tiny_llama, text, [1, 3], lora={"dropout": p}, training=training))
        before.append(next(one.loss for one in events if type(one).__name__ == "Evaluated"))
        after.append(state.adapters.tensors())
    assert before[0] == before[1]
    assert largest_relative_difference(*after) > 1e-3


@pytest.mark.parametrize("cuts", [[1, 2, 3], "whole"], ids=str)
def test_each_party_clips_the_gradient_of_the_factors_that_it_holds(cuts, tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2, 3], training=TRAINING)
    names = prepared.model.block_names()
    held = [4, 4, 4] if cuts == "whole" else cuts

    def clip(client: int, parameters: dict[str, torch.Tensor]) -> None:
        for blocks in (range(held[client]), range(held[client], 4)):
            own = [p for n, p in parameters.items() if any(f"{names[block]}." in n for block in blocks)]
            norm = torch.nn.utils.clip_grad_norm_(own, CLIP)
            assert not own or norm > CLIP

    expected = _oracle(tiny_llama, prepared, clip=clip)
    for bound, fits in ((CLIP, True), (None, False)):
        training = {**TRAINING, "clip": bound}
        run = federation(tiny_llama, text, [1, 2, 3], training=training, clients={**CLIENTS, "cuts": cuts})
        state, _ = play(run)
        found = _as_lora(run, state)
        assert (largest_relative_difference(found, expected) < 1e-4) == fits
