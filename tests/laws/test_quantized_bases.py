"""On a quantized base, too, a block is the same wherever it runs: no cut changes what is trained."""

from __future__ import annotations

import pytest
import torch

from laws.federations import federation, largest_relative_difference, play, write_text
from laws.peft_oracle import train
from quantized import KINDS, needs_bitsandbytes, rounded_folder
from splitft.errors import ConfigError

pytestmark = needs_bitsandbytes

ROUNDS, STEPS = 2, 3
TRAINING = {"rounds": ROUNDS, "steps": STEPS}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def _named(prepared, adapters) -> dict[str, torch.Tensor]:
    names = prepared.model.block_names()
    return {
        f"base_model.model.{names[block]}.{target}.lora_{factor}.weight": tensor
        for (block, target), factors in adapters.items()
        for factor, tensor in (("A", factors.A), ("B", factors.B))
    }


@pytest.mark.parametrize("kind", KINDS)
def test_any_cuts_train_the_adapters_of_whole_models_with_the_rounded_weights(
    kind, tiny_llama, text, tmp_path
):
    model = {"quantize": kind}
    prepared = federation(tiny_llama, text, [2, 2, 2], model=model, training=TRAINING)
    steps = [range(number * STEPS, (number + 1) * STEPS) for number in range(ROUNDS)]
    batches = [
        [[_with_labels(client.setup.stream.batch(s)) for s in each] for client in prepared.clients]
        for each in steps
    ]
    start = _named(prepared, prepared.initial().adapters)
    folder = rounded_folder(tiny_llama, kind, tmp_path)
    oracle = train(folder, start, batches, TARGETS, rank=4, alpha=8, lr=5e-3)
    by_round = [[1, 2, 3], [3, 1, 2]]

    def changing(number, cuts):
        return dict(zip(cuts, by_round[number - 1], strict=True))

    found = []
    for cuts, controller in (([3, 1, 2], []), (by_round[0], [changing])):
        split = federation(tiny_llama, text, cuts, model=model, training=TRAINING)
        found.append(_named(split, play(split, *controller)[0].adapters))
    assert largest_relative_difference(*found) < 1e-5
    assert largest_relative_difference(found[0], oracle) < 1e-4  # the full base is 1e-3 away


def test_cuts_do_not_matter_with_rows_in_int8_and_dora_either(tiny_llama, text):
    sections = {"model": {"quantize": "nf4", "embedding": "int8"}, "training": TRAINING}
    lora = {"method": "dora"}
    results = [
        play(federation(tiny_llama, text, cuts, lora=lora, **sections))[0].adapters.tensors()
        for cuts in ([1, 1, 1], [3, 1, 2])
    ]
    assert largest_relative_difference(*results) < 1e-5


def test_cuts_matter_if_only_one_side_is_quantized_so_they_must_be_fixed(tiny_llama, text):
    sections = {"model": {"quantize": "nf4", "quantize_at": "clients"}, "training": TRAINING}
    one, other = (
        play(federation(tiny_llama, text, cuts, **sections))[0].adapters.tensors()
        for cuts in ([1, 1, 1], [3, 3, 3])
    )
    assert largest_relative_difference(one, other) > 1e-3
    with pytest.raises(ConfigError, match=r"model\.quantize_at: found clients, but controller makespan"):
        federation(tiny_llama, text, [1, 1], **sections, schedule={"controller": "makespan"})


def _with_labels(batch) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.full_like(batch.tokens, -100)
    for row, (first, length) in enumerate(zip(batch.labelled_from, batch.lengths, strict=True)):
        labels[row, first:length] = batch.tokens[row, first:length]
    return batch.tokens, labels
