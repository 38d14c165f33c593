"""How much memory a cut takes, on the client and on the server, at its peak.

    part          client (cut k)                              server, for one client
      weights     embedding, blocks [0, k), head if labels    blocks [min k, L) once for all clients, head
                  are there                                    if labels are there: `server_weights_bytes`
      adapters    A and B of its blocks, in fp32              of its blocks (per-client adapters)
      gradients   the same again                              the same again
      moments     `job.moments` times the same                the same
      activations what its blocks keep for the backward pass  the same; every client may be waiting at once
      logits      one chunk of 256 positions, fp32, and its   if labels are there
                  gradient

The peak is their sum: the head runs while the activations of the blocks are kept. What the allocator, the
runtime and the text take is not in it; `Device.memory_bytes` is what remains for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from splitft.errors import ScheduleError
from splitft.geometry import check_cut
from splitft.schedule.cost import Client, Job

HEAD_CHUNK = 256
"""Positions whose logits exist at one time."""

ADAPTER_BYTES = 4
"""Adapters, their gradients and moments are fp32, whatever the frozen weights are."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what they hold."""

    weights: float = 0.0
    """Frozen weights."""
    adapters: float = 0.0
    """LoRA factors."""
    gradients: float = 0.0
    """Gradients of the factors."""
    moments: float = 0.0
    """The optimizer's moments."""
    activations: float = 0.0
    """What is kept between forward and backward pass."""
    logits: float = 0.0
    """Logits of a chunk of positions, and their gradient."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.moments + self.activations + self.logits


def client_memory(job: Job, client: Client, cut: int) -> Memory:
    """Peak memory of a client; the whole model on the client (k = L) includes the head."""
    check_cut(cut, job.sizes.blocks)
    head = job.labels == "client" or cut == job.sizes.blocks
    parameters = job.sizes.embedding_parameters + cut * job.sizes.block_parameters
    if head:  # with tied embeddings the output matrix is there already
        parameters += job.sizes.head_parameters
    return _trained(job, client, range(cut), cut, parameters * job.weight_bytes, head)


def server_memory(job: Job, client: Client, cut: int) -> Memory:
    """What one client adds to the server's peak; the frozen weights, shared by all, are not in it."""
    L = job.sizes.blocks
    check_cut(cut, L)
    head = job.labels == "server" and cut < L
    return _trained(job, client, range(cut, L), cut, 0.0, head)


def server_weights_bytes(job: Job, shallowest: int) -> float:
    """Frozen weights on the server, once for all clients, when the least cut among them is `shallowest`."""
    check_cut(shallowest, job.sizes.blocks)
    if shallowest == job.sizes.blocks:
        return 0.0
    parameters = (job.sizes.blocks - shallowest) * job.sizes.block_parameters
    if job.labels == "server":  # the embedding is not here, so a tied output matrix counts
        parameters += job.sizes.output_parameters
    return parameters * job.weight_bytes


def server_peak_bytes(job: Job, clients: Sequence[Client], cuts: Sequence[int]) -> float:
    """Peak memory of the server with all these clients in the middle of a step."""
    if not clients or len(clients) != len(cuts):
        raise ScheduleError(f"{len(clients)} clients but {len(cuts)} cuts; give one cut a client")
    shared = server_weights_bytes(job, min(cuts))
    return shared + sum(
        server_memory(job, client, cut).total for client, cut in zip(clients, cuts, strict=True)
    )


def _trained(job: Job, client: Client, blocks: range, cut: int, weights: float, head: bool) -> Memory:
    """Memory of training these blocks for this client, with the head or without."""
    work, sizes = client.workload, job.sizes
    ranks = job.ranks(cut)
    adapters = float(sizes.adapter_parameters([ranks[block] for block in blocks]) * ADAPTER_BYTES)
    kept = len(blocks) * work.padded_tokens * sizes.kept_elements_per_token
    chunk = min(float(HEAD_CHUNK), work.labelled_tokens)
    return Memory(
        weights=float(weights),
        adapters=adapters,
        gradients=adapters,
        moments=job.moments * adapters,
        activations=kept * job.weight_bytes,
        logits=2 * chunk * sizes.vocab * 4 if head else 0.0,
    )
