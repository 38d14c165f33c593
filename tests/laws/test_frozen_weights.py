"""The weights of the base model are in memory once for all clients and the server, and nobody writes them."""

from __future__ import annotations

import gc

import pytest
import torch
from safetensors.torch import load_file

from laws.federations import federation, play, write_text
from splitft.geometry import Span
from splitft.model import Segment

CLIENTS = 8
CPU = {"server": "cpu", "clients": "cpu"}
"""Where a tensor's storage has an address to compare; a fake device has none."""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl", examples=60)


def weights(segment: Segment) -> dict[str, torch.Tensor]:
    """The frozen parameters that a segment holds, by name."""
    modules = (*segment._shared, *segment._frozen)
    places = {name: place for module in modules for name, place in module.places.items()}
    held = {name: part._parameters[attribute] for name, (part, attribute) in places.items()}
    return {name: parameter for name, parameter in held.items() if not parameter.is_meta}


def memory(segments) -> int:
    """Bytes of distinct storages, counted by where the numbers lie."""
    found = {one.data_ptr(): one.nbytes for segment in segments for one in weights(segment).values()}
    return sum(found.values())


def segments_of(prepared) -> list[Segment]:
    return [client.segment for client in prepared.clients]


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # as in the file, mapped; and converted
def test_eight_clients_hold_the_weights_of_one(tiny_llama, text, dtype):
    one = federation(tiny_llama, text, [2], model={"dtype": dtype}, devices=CPU)
    alone = memory(segments_of(one))
    assert alone > 4 * 272 * 32 * 2  # embedding and head, and two blocks
    del one
    many = federation(tiny_llama, text, [2] * CLIENTS, model={"dtype": dtype}, devices=CPU)
    assert len({id(segment) for segment in segments_of(many)}) == CLIENTS
    assert memory(segments_of(many)) <= 1.05 * alone


def test_clients_with_any_cuts_and_the_server_hold_the_model_once(tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2, 3, 2, 1], devices=CPU)
    whole = prepared.model.segment(Span(0, 4), embedding=True, head=True)
    assert memory([*segments_of(prepared), prepared.server.segment]) <= memory([whole])


RUNS = {
    "updates folded into the base": {"aggregate": {"rule": "exact"}, "wire": {"hidden": "int8"}},
    "another base each round": {"aggregate": {"rule": "stack"}},
    "norms of weight rows": {"lora": {"method": "dora"}},
    "noise on hidden states": {
        "privacy": {"hidden": {"defence": "gaussian", "clip_norm": 1.0, "noise": 0.1}}
    },
    "a server with the head": {"split": {"labels": "server"}},
    "shared factors": {"split": {"server_adapters": "shared"}},
}


@pytest.mark.parametrize("sections", RUNS.values(), ids=RUNS)
def test_a_run_writes_no_frozen_weight(tiny_llama, text, sections):
    training = {"rounds": 2, "steps": 2, "lr": 0.1}
    prepared = federation(tiny_llama, text, [1, 2, 3], **{"training": training, "devices": CPU, **sections})
    segments = [*segments_of(prepared), prepared.server.segment]
    before = {name: one._version for segment in segments for name, one in weights(segment).items()}
    play(prepared)
    files = load_file(tiny_llama / "model.safetensors")
    found = {name: one for segment in segments for name, one in weights(segment).items()}
    assert set(found) == set(files)
    for name, parameter in found.items():
        assert torch.equal(parameter, files[name].to(parameter.dtype)), name
        assert parameter._version == before[name]
        assert not parameter.requires_grad


def test_a_client_that_leaves_takes_its_deeper_blocks_along(tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 3], devices=CPU)
    shallow, deep = segments_of(prepared)
    server = prepared.server.segment
    server.resize(Span(3, 4))
    before = memory([shallow, deep, server])
    deep.resize(Span(0, 1))
    gc.collect()
    blocks = memory([deep]) - memory([prepared.model.segment(Span(0, 0), embedding=True, head=True)])
    assert memory([shallow, deep, server]) == before - 2 * blocks
