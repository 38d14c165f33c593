"""Peak memory of clients and server by hand-computed examples."""

from __future__ import annotations

from schedule.cases import client, costs
from splitft.schedule.memory import (
    ALLOCATOR_SLACK,
    RUNTIME_BYTES,
    client_memory,
    server_memory,
    server_peak_bytes,
    server_weights_bytes,
)
from splitft.schedule.workload import Workload


def test_the_memory_of_a_client_part_by_part():
    memory = client_memory(costs(), client(), cut=3)
    adapters = (4 + 4 + 2) * 20 * 4
    assert (memory.weights, memory.adapters) == ((1000 + 3 * 1000 + 10) * 2, adapters)
    assert (memory.gradients, memory.moments) == (adapters, 2 * adapters)
    assert memory.activations == ALLOCATOR_SLACK * 3 * 16 * 70 * 2
    assert memory.logits == 8 * 100 * (4 + 4 + 2)  # 8 labelled positions are less than a chunk
    assert memory.total == 8020 + 4 * adapters + ALLOCATOR_SLACK * 6720 + 8000 + RUNTIME_BYTES


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
    assert server_memory(with_head, both[0], 2).logits == 8000
    assert client_memory(with_head, both[0], 2).logits == 0
