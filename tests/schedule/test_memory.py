"""Peak memory of clients and server by hand-computed examples."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedule.cases import DEVICE, SERVER, client, costs
from splitft.schedule.memory import (
    ALLOCATOR_SLACK,
    BACKWARD,
    RUNTIME_BYTES,
    client_memory,
    server_memory,
    server_peak_bytes,
    server_weights_bytes,
    server_working_bytes,
)
from splitft.schedule.profile import ServerProfile
from splitft.schedule.workload import Workload


def test_the_memory_of_a_client_part_by_part():
    memory = client_memory(costs(), client(), cut=3)
    adapters = (4 + 4 + 2) * 20 * 4
    assert (memory.weights, memory.adapters) == ((1000 + 3 * 1000 + 10) * 2, adapters)
    assert (memory.gradients, memory.moments) == (adapters, 2 * adapters)
    assert memory.activations == ALLOCATOR_SLACK * 16 * (3 * 70 * 2)
    assert memory.logits == 8 * 100 * (4 + 4 + 2)  # 8 labelled positions are less than a chunk
    assert memory.total == 8020 + 4 * adapters + ALLOCATOR_SLACK * 6720 + 8000 + RUNTIME_BYTES


def test_each_device_has_its_own_allocator_and_runtime():
    gpu = replace(DEVICE, allocator_slack=1.1, runtime_bytes=5e8)
    memory = client_memory(costs(), client(device=gpu), cut=3)
    assert memory.activations == 1.1 * 16 * (3 * 70 * 2)
    assert memory.runtime == 5e8
    served = costs(server=replace(SERVER, device=gpu), checkpoint_blocks=True)
    assert server_memory(served, client(), 3).activations == 1.1 * 16 * (4 * 10 * 2)
    assert server_weights_bytes(served, 2) == 4 * 1000 * 2 + 5e8
    assert server_working_bytes(served, [client()]) == BACKWARD * 1.1 * 16 * 70 * 2


def test_logits_exist_for_one_chunk_of_256_positions_at_most():
    one = client(workload=Workload(1000, 1000, 10, 100, 1))
    assert client_memory(costs(), one, 1).logits == 256 * 100 * (4 + 4 + 2)


def test_the_memory_of_the_server_holds_the_weights_once():
    both = [client("a"), client("b")]
    assert server_weights_bytes(costs(), 2) == 4 * 1000 * 2 + RUNTIME_BYTES
    assert server_peak_bytes(costs(), both, [2, 4]) == (
        8000
        + RUNTIME_BYTES
        + server_memory(costs(), both[0], 2).total
        + server_memory(costs(), both[1], 4).total
    )
    with_head = costs(labels="server")
    assert (
        server_weights_bytes(with_head, 2) == (4 * 1000 + 10 + 1000) * 2 + RUNTIME_BYTES
    )  # tied: its own copy
    assert server_working_bytes(with_head, both) == 8000  # one client's logits at a time
    assert server_working_bytes(costs(), both) == 0
    assert client_memory(with_head, both[0], 2).logits == 0


def test_checkpointed_blocks_keep_their_inputs_and_compute_one_block_again():
    again = costs(checkpoint_blocks=True)
    memory = client_memory(again, client(), cut=3)
    assert memory.activations == ALLOCATOR_SLACK * 16 * 4 * 10 * 2  # 16 padded tokens, 3 inputs and an output
    assert memory.recomputed == BACKWARD * ALLOCATOR_SLACK * 16 * 70 * 2
    assert memory.logits == 8000
    kept = client_memory(costs(), client(), cut=3)
    # the head is done when blocks are computed again
    assert kept.total - memory.total == kept.activations - memory.activations
    deep = client_memory(again, client(workload=Workload(120, 8, 2, 80, 5)), cut=3)
    assert deep.total == deep.weights + 4 * deep.adapters + deep.activations + deep.recomputed + RUNTIME_BYTES


def test_one_micro_batch_at_a_time_is_computed_again():
    work = Workload(60, 60, 3, 20, 5)
    parts = client_memory(
        costs(checkpoint_blocks=True, micro_batches=2, in_flight=2), client(workload=work), 3
    )
    assert parts.activations == ALLOCATOR_SLACK * 60 * 4 * 10 * 2
    assert parts.recomputed == BACKWARD * ALLOCATOR_SLACK * 40 * 70 * 2  # 2 of 3 sequences


def test_the_server_computes_a_block_again_for_one_group_of_clients():
    both = [client("a"), client("b", workload=Workload(30, 8, 3, 20, 5))]
    largest, together = (BACKWARD * ALLOCATOR_SLACK * tokens * 70 * 2 for tokens in (60, 76))
    for group_tokens, expected in ((0, largest), (70, largest * 70 / 60), (1000, together)):
        server = ServerProfile(SERVER.device, group_tokens=group_tokens)
        again = costs(checkpoint_blocks=True, server=server)
        assert server_working_bytes(again, both) == pytest.approx(expected)
        assert server_peak_bytes(again, both, [2, 4]) == pytest.approx(
            server_weights_bytes(again, 2)
            + expected
            + server_memory(again, both[0], 2).total
            + server_memory(again, both[1], 4).total
        )
    assert server_peak_bytes(again, both, [6, 6]) == 0
