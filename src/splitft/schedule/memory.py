"""Peak memory of a cut, on the client and on the server.

    part          client (cut k)                              server, for one client
      weights     embedding, blocks [0, k), head if labels    blocks [min k, L) once for all clients, head
                  are there                                    if labels are there: `server_weights_bytes`
      adapters    A and B of its blocks, in fp32              of its blocks (per-client adapters)
      gradients   the same again                              the same again
      moments     `costs.moments` times the same                the same
      activations kept by its blocks for the backward pass    the same; every client may be waiting at once
      logits      of the positions that the head takes at     if labels are there
                  once (`geometry.head_positions`)
      runtime     threads and workspace of kernels            the same, once

With micro-batches, only the activations of those in progress are kept.

The peak is the sum: the head runs while the activations of the blocks are kept. Activations take more than
their bytes, since an allocator leaves holes between batches of unequal lengths. Libraries and text are not
included; `Device.memory_bytes` is the memory that remains for training. `benchmarks/cost_model.py` checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from splitft.errors import ScheduleError
from splitft.geometry import check_cut, head_positions, logits_bytes
from splitft.schedule.workload import ClientProfile, SharedCosts

ALLOCATOR_SLACK = 1.3
"""Memory of activations over their bytes, as measured with glibc's allocator on a CPU."""

RUNTIME_BYTES = 64 * 2**20
"""Memory of a process when it begins to compute, as measured with torch on a CPU."""

WIDE_BYTES = 4
"""Bytes of an element that norms and attention keep: float32 at least."""

ADAPTER_BYTES = 4
"""Bytes of a number of adapters, gradients and moments: fp32 with any type of frozen weights."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by content."""

    weights: float = 0.0
    """Frozen weights."""
    adapters: float = 0.0
    """LoRA factors."""
    gradients: float = 0.0
    """Gradients of the factors."""
    moments: float = 0.0
    """The optimizer's moments."""
    activations: float = 0.0
    """Activations kept between forward and backward pass."""
    logits: float = 0.0
    """Logits of a chunk of positions, and the arrays of their backward pass."""
    runtime: float = 0.0
    """Threads and workspace of kernels; the server's is included in its weights."""

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return sum(float(getattr(self, part.name)) for part in fields(self))


def client_memory(costs: SharedCosts, client: ClientProfile, cut: int) -> Memory:
    """Return the peak memory of a client; the whole model on the client (k = L) includes the head."""
    check_cut(cut, costs.sizes.blocks)
    head = costs.labels == "client" or cut == costs.sizes.blocks
    parameters = costs.sizes.embedding_parameters + cut * costs.sizes.block_parameters
    if head:  # with tied embeddings the output matrix is loaded already
        parameters += costs.sizes.head_parameters
    trained = _trained(costs, client, range(cut), cut, parameters * costs.weight_bytes, head)
    return replace(trained, runtime=RUNTIME_BYTES)


def server_memory(costs: SharedCosts, client: ClientProfile, cut: int) -> Memory:
    """Return what one client adds to the server's peak, without the frozen weights that all share."""
    L = costs.sizes.blocks
    check_cut(cut, L)
    head = costs.labels == "server" and cut < L
    return _trained(costs, client, range(cut, L), cut, 0.0, head)


def server_weights_bytes(costs: SharedCosts, shallowest: int) -> float:
    """Return the bytes of frozen weights and runtime on the server; `shallowest` is the least of all cuts."""
    check_cut(shallowest, costs.sizes.blocks)
    if shallowest == costs.sizes.blocks:
        return 0.0
    parameters = (costs.sizes.blocks - shallowest) * costs.sizes.block_parameters
    if costs.labels == "server":  # the server has no embedding, so a tied output matrix counts
        parameters += costs.sizes.output_parameters
    return parameters * costs.weight_bytes + RUNTIME_BYTES


def server_peak_bytes(costs: SharedCosts, clients: Sequence[ClientProfile], cuts: Sequence[int]) -> float:
    """Return the peak memory of the server with all these clients in the middle of a step."""
    if not clients or len(clients) != len(cuts):
        raise ScheduleError(f"{len(clients)} clients but {len(cuts)} cuts; give one cut a client")
    shared = server_weights_bytes(costs, min(cuts))
    return shared + sum(
        server_memory(costs, client, cut).total for client, cut in zip(clients, cuts, strict=True)
    )


def _trained(
    costs: SharedCosts, client: ClientProfile, blocks: range, cut: int, weights: float, head: bool
) -> Memory:
    """Return the memory of training these blocks for this client, with the head or without."""
    work, sizes = client.workload, costs.sizes
    tokens = work.peak_tokens * costs.share_in_flight(work)
    ranks = costs.ranks(cut, client.rank)
    adapters = float(sizes.adapter_parameters([ranks[block] for block in blocks]) * ADAPTER_BYTES)
    wide = sizes.kept_wide_elements_per_token * max(WIDE_BYTES, costs.weight_bytes)
    kept_bytes = sizes.kept_elements_per_token * costs.weight_bytes + wide
    positions = min(float(head_positions(sizes.vocab, costs.weight_bytes)), work.labelled_tokens)
    return Memory(
        weights=float(weights),
        adapters=adapters,
        gradients=adapters,
        moments=costs.moments * adapters,
        activations=ALLOCATOR_SLACK * len(blocks) * tokens * kept_bytes,
        logits=positions * logits_bytes(sizes.vocab, costs.weight_bytes) if head else 0.0,
    )
