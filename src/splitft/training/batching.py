"""Batches of several clients in one pass through the server's blocks.

    batches in order of length  ->  groups of similar lengths, each up to `group_tokens` padded tokens

    client a, cut 2   leaf (B_a, T, D) --[2,5)--+
    client b, cut 5   leaf (B_b, T, D) ---------+--[5,L)--> outputs (M_a, D), (M_b, D)
    gradients at the outputs --backward--> gradients (N, D) at the leaves, without padding

Larger products use a processor better, but all rows of a group are padded to its longest sequence, which
costs work that grouping must first win back (`benchmarks/server_batching.py`).

B sequences, T tokens of the longest, D model width, N real tokens, M labelled tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from splitft.adapters import AdapterBank
from splitft.adapters.dropout import DropoutRows
from splitft.errors import ProtocolError
from splitft.geometry import Span
from splitft.model import Segment, pack, pad, pick
from splitft.protocol import Activations, HeadGradient, expect
from splitft.seeds import Draw

MOST_PADDING = 1.25
"""Padded tokens of a group over those of its clients' own batches, at most."""


@dataclass
class Group:
    """A batch of several clients between its forward and its backward pass."""

    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    """(B, T, D) by client, as it arrived."""
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """(M, D) by client, with the graph."""
    messages: dict[str, Activations] = field(default_factory=dict)
    """The message of each client."""

    def check(self, message: HeadGradient) -> None:
        """Raise ProtocolError if the gradient does not belong to this group's batch."""
        awaited = self.messages[message.client]
        expect(message, HeadGradient, round=awaited.round, step=awaited.step)
        if message.gradient.shape != (awaited.labelled_tokens, awaited.hidden.shape[1]):
            raise ProtocolError(f"{message.client}: gradient {tuple(message.gradient.shape)} does not fit")

    def labelled(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return each client's output (M, D) and labels (M,), where labels are on the server."""
        return {
            client: (self.outputs[client], message.labels)
            for client, message in self.messages.items()
            if message.labels is not None
        }


def group_by_length(messages: Sequence[Activations], group_tokens: int) -> list[list[Activations]]:
    """Group batches of similar length, up to `group_tokens` padded tokens and `MOST_PADDING`."""
    by_length = sorted(messages, key=lambda one: (max(one.lengths), one.client))
    return group_neighbours(by_length, group_tokens)


def group_neighbours(messages: Sequence[Activations], group_tokens: int) -> list[list[Activations]]:
    """Group batches with those before them while they fit together, as above; keep the order."""
    groups: list[list[Activations]] = []
    for message in messages:
        candidate = [*(groups[-1] if groups else []), message]
        separate = sum(len(one.lengths) * max(one.lengths) for one in candidate)
        together = sum(len(one.lengths) for one in candidate) * max(max(one.lengths) for one in candidate)
        if groups and together <= min(group_tokens, MOST_PADDING * separate):
            groups[-1].append(message)
        else:
            groups.append([message])
    return groups


def in_random_order(messages: Sequence[Activations], seed: Sequence[int]) -> list[list[Activations]]:
    """Return groups of one in an order drawn for each step (SplitFedV2, arXiv 2004.12088)."""
    order = Draw.TURN.generator(*seed).permutation(len(messages))
    return [[messages[place]] for place in order]


def forward_together(
    segment: Segment,
    bank: AdapterBank,
    cuts: Mapping[str, int],
    slot: Callable[[str], str],
    messages: Sequence[Activations],
    dropout: Callable[[Activations], Sequence[DropoutRows]],
) -> Group:
    """Run the blocks from each client's cut to the end; `slot` names the factors of a client's rows.

    `dropout` returns the rows of a message with what fixes their masks, or none.
    Messages come from any device; leaves, outputs and the graph are on the devices of the blocks.
    """
    group = Group(messages={message.client: message for message in messages})
    order = sorted(messages, key=lambda one: (cuts[one.client], one.client))
    training = order[0].training
    width = max(max(message.lengths) for message in order)
    stops = [*(cuts[message.client] for message in order[1:]), segment.shape.blocks]
    rows: list[tuple[str | None, int]] = []
    masks: list[DropoutRows] = []
    hidden: torch.Tensor | None = None
    # a client's rows join the batch at its cut; the batch runs on to the next client's cut
    for message, stop in zip(order, stops, strict=True):
        device = segment.device_of(cuts[message.client])
        leaf = pad(message.hidden.to(device), message.lengths, width).requires_grad_(training)
        group.leaves[message.client] = leaf
        hidden = leaf if hidden is None else torch.cat([hidden.to(device), leaf])
        rows.append((slot(message.client), len(message.lengths)))
        masks += dropout(message)
        span = Span(cuts[message.client], stop)
        if len(span):
            with bank.routed(merge_runs(rows), masks):
                hidden = segment.run(hidden, span)
    assert hidden is not None
    # only the labelled positions go back
    parts = torch.split(hidden, [len(message.lengths) for message in order])
    for message, part in zip(order, parts, strict=True):
        group.outputs[message.client] = pick(part, message.labelled)
    return group


def backward_together(
    group: Group, gradients: Mapping[str, torch.Tensor], weights: Mapping[str, int], retain_graph: bool
) -> dict[str, torch.Tensor]:
    """Run backward from gradients (M, D) at these clients' outputs; return gradients (N, D) at their cuts.

    With shared adapters a client's gradient is weighted with its labelled tokens, so that one backward pass
    is that of the concatenated batch; the gradient at its cut is divided by the weight again. Retain the
    graph while gradients of other clients of the group are still to come.
    """
    outputs = [group.outputs[client] for client in gradients]
    weighted = [gradient.to(output) * weights[client]
                for (client, gradient), output in zip(gradients.items(), outputs, strict=True)]  # fmt: skip
    torch.autograd.backward(outputs, weighted, retain_graph=retain_graph)
    at_cuts = {}
    for client in gradients:
        gradient = group.leaves[client].grad
        assert gradient is not None
        at_cuts[client] = pack(gradient, group.messages[client].lengths) / weights[client]
    return at_cuts


def merge_runs(rows: Sequence[tuple[str | None, int]]) -> list[tuple[str | None, int]]:
    """Merge neighbouring rows (slot, sequences) of the same slot."""
    runs: list[tuple[str | None, int]] = []
    for slot, count in rows:
        if runs and runs[-1][0] == slot:
            runs[-1] = (slot, runs[-1][1] + count)
        else:
            runs.append((slot, count))
    return runs
