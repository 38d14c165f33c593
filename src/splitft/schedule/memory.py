"""Peak memory of a cut, on the client and on the server.

    part          client (cut k)                              server, for one client
      weights     embedding, blocks [0, k), head if labels    blocks [min k, L) once for all clients, head
                  are there                                    if labels are there: `server_weights_bytes`
      adapters    A and B of its blocks, in fp32              of its blocks (per-client adapters)
      gradients   the same again                              the same again
      moments     `costs.moments` times the same                the same
      activations kept by its blocks for the backward pass    the same; every client may be waiting at once
      logits      of the positions that the head takes at     if labels are there, once for all clients:
                  once (`geometry.head_positions`)            `server_working_bytes`
      recomputed  one block's activations, with               of one group of clients at a time: as well there
                  `training.checkpoint_blocks`
      runtime     threads and workspace of kernels            the same, once

With micro-batches, only the activations of those in progress are kept. With activation checkpointing they are
the blocks' inputs and the last one's output.

The peak is the sum: the head runs while the activations of the blocks are kept. Logits and a block that is
computed again do not exist at one time, so the larger counts. Activations take more than their bytes, since
an allocator leaves holes between batches of unequal lengths; how many, depends on the device. Libraries and
text are not included; `Device.memory_bytes` is the memory that remains for training.
`benchmarks/cost_model.py` checks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from splitft.errors import ScheduleError
from splitft.geometry import check_cut, head_positions, logits_bytes
from splitft.schedule.profile import ALLOCATOR_SLACK as ALLOCATOR_SLACK
from splitft.schedule.profile import RUNTIME_BYTES as RUNTIME_BYTES
from splitft.schedule.profile import Device
from splitft.schedule.round_timeline import SERVER
from splitft.schedule.workload import ClientProfile, SharedCosts

BACKWARD = 1.5
"""Memory of one block's backward pass over its activations: those, and the gradients of the widest part."""

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
    """Logits of the positions that the head takes at once, and the arrays of their backward pass."""
    recomputed: float = 0.0
    """Activations of one block that is computed again in the backward pass, with their gradients."""
    runtime: float = 0.0
    """Threads and workspace of kernels; the server's is included in its weights."""

    @property
    def total(self) -> float:
        """The sum of all parts; of logits and recomputed activations the larger, which excludes the other."""
        parts = sum(float(getattr(self, part.name)) for part in fields(self))
        return parts - min(self.logits, self.recomputed)


def client_memory(costs: SharedCosts, client: ClientProfile, cut: int) -> Memory:
    """Return the peak memory of a client; the whole model on the client (k = L) includes the head."""
    check_cut(cut, costs.sizes.blocks)
    head = costs.labels == "client" or cut == costs.sizes.blocks
    rows = costs.sizes.embedding_parameters
    if head:  # with tied embeddings the output matrix is loaded already
        rows += costs.sizes.head_parameters
    own = costs.quantized.client_block if costs.quantized else costs.weight_bytes
    work = client.workload
    return replace(
        _trained(costs, client, range(cut), cut, client.device),
        weights=_weights_bytes(costs, cut, own, rows),
        logits=_logits_bytes(costs, work.labelled_tokens) if head else 0.0,
        recomputed=_recomputed_bytes(costs, work.peak_tokens * costs.share_in_flight(work, 1), client.device),
        runtime=client.device.runtime_bytes,
    )


def server_memory(costs: SharedCosts, client: ClientProfile, cut: int) -> Memory:
    """Return what one client adds to the server's peak, without the weights and the work that all share."""
    check_cut(cut, costs.sizes.blocks)
    return _trained(costs, client, range(cut, costs.sizes.blocks), cut, costs.server.device)


def server_weights_bytes(costs: SharedCosts, shallowest: int) -> float:
    """Return the bytes of frozen weights and runtime on the server; `shallowest` is the least of all cuts."""
    check_cut(shallowest, costs.sizes.blocks)
    if shallowest == costs.sizes.blocks:
        return 0.0
    # the server has no embedding, so a tied output matrix counts
    rows = costs.sizes.output_parameters if costs.labels == "server" else 0
    own = costs.quantized.server_block if costs.quantized else costs.weight_bytes
    return (
        _weights_bytes(costs, costs.sizes.blocks - shallowest, own, rows) + costs.server.device.runtime_bytes
    )


def server_working_bytes(costs: SharedCosts, clients: Sequence[ClientProfile]) -> float:
    """Return the memory of the server's work on one group of these clients: logits or a block again."""
    works = [client.workload for client in clients]
    parts = [work.peak_tokens * costs.share_in_flight(work, 1) for work in works]
    group = max(*parts, min(sum(parts), costs.server.group_tokens))
    labelled = max(work.labelled_tokens for work in works)
    logits = _logits_bytes(costs, labelled) if costs.labels == "server" else 0.0
    return max(logits, _recomputed_bytes(costs, group, costs.server.device))


def server_peak_bytes(costs: SharedCosts, clients: Sequence[ClientProfile], cuts: Sequence[int]) -> float:
    """Return the peak memory of the server with all these clients in the middle of a step."""
    if not clients or len(clients) != len(cuts):
        raise ScheduleError(f"{len(clients)} clients but {len(cuts)} cuts; give one cut a client")
    own = sum(server_memory(costs, client, cut).total for client, cut in zip(clients, cuts, strict=True))
    return server_shared_bytes(costs, clients, min(cuts)) + own


def peak_bytes(
    costs: SharedCosts, clients: Sequence[ClientProfile], cuts: Mapping[str, int]
) -> dict[str, float]:
    """Predict the peak memory of each of these clients, and of SERVER with all of them."""
    needed = {one.name: client_memory(costs, one, cuts[one.name]).total for one in clients}
    return {**needed, SERVER: server_peak_bytes(costs, clients, [cuts[one.name] for one in clients])}


def server_shared_bytes(costs: SharedCosts, clients: Sequence[ClientProfile], shallowest: int) -> float:
    """Return the part of the server's peak that these clients share: weights, runtime and work."""
    if shallowest == costs.sizes.blocks:
        return 0.0
    return server_weights_bytes(costs, shallowest) + server_working_bytes(costs, clients)


def _weights_bytes(costs: SharedCosts, blocks: int, a_weight: float, rows: int) -> float:
    """Return the bytes of some blocks, whose weights take `a_weight` each, and of embedding and head."""
    held = costs.quantized
    of_rows, made = (held.rows, held.made) if held else (costs.weight_bytes, 0.0)
    return float(blocks * costs.sizes.block_parameters * a_weight + rows * of_rows + made)


def _trained(costs: SharedCosts, client: ClientProfile, blocks: range, cut: int, device: Device) -> Memory:
    """Return the memory of training these blocks on a device for this client, without weights and head."""
    work, sizes = client.workload, costs.sizes
    tokens = work.peak_tokens * costs.share_in_flight(work)
    ranks = costs.ranks(cut, client.rank)
    adapters = float(sizes.adapter_parameters([ranks[block] for block in blocks]) * ADAPTER_BYTES)
    kept_bytes = len(blocks) * _block_bytes(costs)
    if costs.checkpoint_blocks and blocks:  # the blocks' inputs, and the last one's output
        kept_bytes = (len(blocks) + 1) * sizes.width * costs.weight_bytes
    return Memory(
        adapters=adapters,
        gradients=adapters,
        moments=costs.moments * adapters,
        activations=device.allocator_slack * tokens * kept_bytes,
    )


def _block_bytes(costs: SharedCosts) -> float:
    """Return the bytes that a block's forward pass keeps for each token."""
    wide = costs.sizes.kept_wide_elements_per_token * max(WIDE_BYTES, costs.weight_bytes)
    return costs.sizes.kept_elements_per_token * costs.weight_bytes + wide


def _recomputed_bytes(costs: SharedCosts, tokens: float, device: Device) -> float:
    """Return the memory of one block that is computed again for these tokens, and of its backward pass."""
    if not costs.checkpoint_blocks:
        return 0.0
    return BACKWARD * device.allocator_slack * tokens * _block_bytes(costs)


def _logits_bytes(costs: SharedCosts, labelled: float) -> float:
    """Return the memory of the logits of a step's labelled tokens, as many as exist at one time."""
    vocab, weight_bytes = costs.sizes.vocab, costs.weight_bytes
    return min(float(head_positions(vocab, weight_bytes)), labelled) * logits_bytes(vocab, weight_bytes)
