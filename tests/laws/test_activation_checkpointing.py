"""Blocks that are computed again in the backward pass: the same gradients, a fraction of the memory."""

from __future__ import annotations

import pytest
import torch

from laws.federations import federation, play, write_text
from splitft.adapters import AdapterState, Factors, attach
from splitft.geometry import Span
from splitft.model import Segment, checkpoint_blocks, open_model
from splitft.protocol import RoundStart
from splitft.specs import ModelSpec
from tiny import WIDTH, tiny_model

CUTS = [1, 2, 3]
BLOCKS = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


def _learnt(folder, text, again: bool, training, sections):
    training = {"rounds": 2, "steps": 2, "batch_size": 3, **training, "checkpoint_blocks": again}
    state, _ = play(federation(folder, text, CUTS, training=training, **sections))
    return state


@pytest.mark.parametrize(
    ("training", "sections"),
    [
        ({}, {"model": {"dtype": "bfloat16"}, "wire": {"hidden": "bf16", "gradient": "bf16"}}),
        (
            {"micro_batches": 3},
            {"lora": {"rank_at_cut": 2, "client_ranks": "halving"}, "aggregate": {"rule": "svd"}},
        ),
        (
            {},
            {"model": {"dtype": "float16"}, "wire": dict.fromkeys(("hidden", "gradient", "adapter"), "fp32")},
        ),
        ({}, {"split": {"labels": "server"}}),
        ({"micro_batches": 2}, {"split": {"server_adapters": "shared"}}),
        ({}, {"split": {"server_adapters": "shared-in-turn"}}),
        ({}, {"clients": {"cuts": "whole"}, "lora": {"method": "dora"}}),
        ({}, {"lora": {"scaling": "rslora"}, "aggregate": {"rule": "stack"}}),
    ],
    ids=str,
)
def test_a_run_with_activation_checkpointing_learns_the_same_bit_for_bit(
    tiny_llama, text, training, sections
):
    kept, again = (_learnt(tiny_llama, text, again, training, sections) for again in (False, True))
    assert kept.losses == again.losses
    for name, tensor in kept.adapters.tensors().items():
        assert torch.equal(again.adapters.tensors()[name], tensor), name


def _step(folder, dtype: str, again: bool) -> tuple[dict, torch.Tensor, int]:
    """One pass of two clients through a model's blocks: gradients of factors and input, bytes kept."""
    segment: Segment = open_model(ModelSpec(name=str(folder), dtype=dtype)).segment(Span(0, BLOCKS))
    bank = attach(segment.blocks, "all-linear", 2.0, segment.dtype)
    if again:
        checkpoint_blocks(segment.blocks, bank.recorded)
    generator = torch.manual_seed(1)
    for slot, rank in (("a", 4), ("b", 2)):
        bank.put(slot, AdapterState({
            key: Factors(*(torch.randn(shape, generator=generator) / 8 for shape in ((rank, i), (o, rank))))
            for key, (i, o) in bank.sizes.items()
        }))  # fmt: skip
    leaf = torch.randn(3, 12, WIDTH, generator=generator).to(segment.dtype).requires_grad_()
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):  # weights are in memory anyway
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        bank.routed([("a", 2), ("b", 1)]),
    ):
        hidden = segment.run(leaf)
    hidden.float().square().sum().backward()
    gradients = {key: p.grad for slot in "ab" for key, p in _named(bank, slot) if p.grad is not None}
    return gradients, leaf.grad, sum(kept.values())


def _named(bank, slot):
    return [((slot, *key), parameter) for key, parameter in bank.parameters(slot).items()]


def test_gradients_are_the_same_bit_for_bit_and_a_fifth_of_the_activations_is_kept(tmp_path, family):
    dtype = "bfloat16" if family in ("llama", "gpt2") else "float32"
    folder = tiny_model(tmp_path, family, dtype, blocks=BLOCKS)
    (kept, input_kept, bytes_kept), (again, input_again, bytes_again) = (
        _step(folder, dtype, again) for again in (False, True)
    )
    assert kept.keys() == again.keys()
    assert len(kept) > 2 * 2 * BLOCKS
    for key, gradient in kept.items():
        assert torch.equal(again[key], gradient), key
    assert torch.equal(input_again, input_kept)
    print(family, f"{bytes_again / bytes_kept:.3f} of {bytes_kept} bytes")
    assert bytes_again <= 0.2 * bytes_kept


def _two_in_flight(folder, text, again: bool):
    training = {"batch_size": 3, "checkpoint_blocks": again}
    prepared = federation(folder, text, [2, 2], training=training)
    server, clients = prepared.server, {one.name: one for one in prepared.clients}
    state = prepared.initial()
    server.place(state.cuts)
    server.start(1, list(clients), state.adapters)
    for one in clients.values():
        one.start(RoundStart(round=1, cut=2))
    answers = server.forward([one.forward() for one in clients.values()])
    return server, {name: clients[name].head(answers[name]) for name in clients}


def test_a_client_that_leaves_costs_the_others_of_its_group_nothing(tiny_llama, text):
    at_cuts = []
    for again in (False, True):
        server, gradients = _two_in_flight(tiny_llama, text, again)
        gone, stays = gradients
        server.leave(gone)
        at_cuts.append(server.backward([gradients[stays]])[stays].gradient)
    assert torch.equal(*at_cuts)


def test_clients_of_a_group_may_return_one_after_the_other(tiny_llama, text):
    results = []
    for again in (False, True):
        server, gradients = _two_in_flight(tiny_llama, text, again)
        replies = [server.backward([gradient]) for gradient in gradients.values()]
        trained = [factor for name in gradients for factor in server.trained(name)[0].tensors().values()]
        results.append([reply.gradient for one in replies for reply in one.values()] + trained)
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_nothing_is_recorded_without_a_gradient(tiny_llama, monkeypatch):
    segment = open_model(ModelSpec(name=str(tiny_llama), dtype="float32")).segment(Span(0, 4))
    checkpoint_blocks(segment.blocks, lambda block: pytest.fail("recorded"))
    with torch.no_grad():
        segment.run(torch.randn(1, 5, WIDTH))
