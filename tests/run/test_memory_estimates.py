"""The memory that the schedule predicts for a client, against the memory that its step takes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from live_memory import LiveMemory
from splitft.data.text import BatchStream, Example
from splitft.geometry import Span
from splitft.model import Model, open_model
from splitft.protocol import CutGradient, LastHidden, RoundStart
from splitft.run.fleet import exact_sizes
from splitft.schedule.memory import ALLOCATOR_SLACK, client_memory, server_memory, server_working_bytes
from splitft.schedule.profile import Device, Link, ServerProfile
from splitft.schedule.workload import ClientProfile, SharedCosts, Workload
from splitft.specs import LoraSpec, ModelSpec, SplitSpec, TrainingSpec
from splitft.training import Client, ClientSetup, Server
from splitft.training.ranks import RankPolicy

BLOCKS, CUT, SEQUENCES, LENGTH = 8, 6, 4, 64
LORA = LoraSpec(rank=4, rank_at_cut=None, targets="attention")
DEVICE, LINK = Device("any", 1.0, 1.0, 1.0, 1e9), Link("none", 1.0, 1.0, 0.0)
WORK = Workload(SEQUENCES * LENGTH, SEQUENCES * (LENGTH - 1), SEQUENCES, LENGTH, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose activations are far larger than its other tensors, with proportions of the usual ones."""
    config = LlamaConfig(
        hidden_size=96, intermediate_size=256, num_attention_heads=6, num_key_value_heads=2, vocab_size=400,
        num_hidden_layers=BLOCKS, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def _model(folder, dtype: str) -> Model:
    return open_model(ModelSpec(name=str(folder), dtype=dtype))


def _costs(model: Model, ranks: RankPolicy, training: TrainingSpec) -> tuple[SharedCosts, ClientProfile]:
    costs = SharedCosts(
        exact_sizes(model, ranks), ServerProfile(DEVICE), LORA, weight_bytes=model.dtype.itemsize,
        micro_batches=training.micro_batches, in_flight=training.in_flight,
        checkpoint_blocks=training.checkpoint_blocks,
    )  # fmt: skip
    return costs, ClientProfile("c", DEVICE, LINK, WORK)


def _parties(model: Model, training: TrainingSpec) -> tuple[Client, Server, RankPolicy]:
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(400, (SEQUENCES, LENGTH), generator=generator).tolist()
    stream = BatchStream([Example(tuple(text)) for text in texts], training.batch_size)
    ranks = RankPolicy(LORA, BLOCKS, "svd", 0)
    client = Client("c", model, CUT, ClientSetup(ranks, training, stream))
    server = Server(model, Span(CUT, BLOCKS), ranks, SplitSpec(), training)
    server.place({"c": CUT})
    server.start(1, ["c"], server.initial())
    client.start(RoundStart(round=1, cut=CUT))
    return client, server, ranks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("training", [{}, {"micro_batches": 2, "in_flight": 1}], ids=str)
@pytest.mark.parametrize("again", [False, True])
def test_predicted_activations_are_those_that_a_step_keeps(folder, dtype, training, again):
    training = TrainingSpec(batch_size=SEQUENCES, checkpoint_blocks=again, **training)
    model = _model(folder, dtype)
    client, server, ranks = _parties(model, training)
    costs, profile = _costs(model, ranks, training)
    with LiveMemory() as memory:
        sent = client.forward()
        at_client = memory.live
        arrived = sent.model_copy(update={"hidden": sent.hidden.clone()})  # a server has its own memory
        last = server.forward([arrived])["c"]
        at_server = memory.live - at_client
        assert isinstance(last, LastHidden)
        memory.peak = memory.live
        reply = server.backward([client.head(last)])["c"]
        peak_of_server = memory.peak - at_client
        assert isinstance(reply, CutGradient)
        memory.peak = memory.live
        client.backward(reply)
        peak_of_client = memory.peak
    predicted = client_memory(costs, profile, CUT)
    predicted_server = server_memory(costs, profile, CUT)
    assert at_client == pytest.approx(predicted.activations / ALLOCATOR_SLACK, rel=0.12)
    assert at_server == pytest.approx(predicted_server.activations / ALLOCATOR_SLACK, rel=0.12)
    if again:
        working = predicted.recomputed, server_working_bytes(costs, [profile])
        peaks = zip((peak_of_client, peak_of_server), (predicted, predicted_server), working, strict=True)
        for peak, kept, work in peaks:
            expected = (kept.activations + work) / ALLOCATOR_SLACK
            assert peak == pytest.approx(expected, rel=0.12)
