"""One batch of several clients through the server's blocks: each client's rows join where its cut is.

    client a, cut 2   leaf (B_a, T, D) --[2,5)--+
    client b, cut 5   leaf (B_b, T, D) ---------+--[5,L)--> outputs (M_a, D), (M_b, D)
    gradients at the outputs --backward--> gradients (N, D) at the leaves, padding left out

The loss is not formed here. With shared adapters a client's gradient is weighted with its labelled tokens,
so that one backward pass is that of the concatenated batch; what goes back to the client is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from splitft.adapters import AdapterBank
from splitft.geometry import Span
from splitft.model import Segment, pack, pad, pick
from splitft.protocol import Activations
from splitft.training.batching import Group, merge_runs


def forward_together(
    segment: Segment,
    bank: AdapterBank,
    cuts: Mapping[str, int],
    slot: Callable[[str], str],
    messages: Sequence[Activations],
    training: bool,
) -> Group:
    """Run the blocks from each client's cut to the end; `slot` names the factors that its rows meet."""
    group = Group(messages={message.client: message for message in messages})
    order = sorted(messages, key=lambda one: (cuts[one.client], one.client))
    width = max(max(message.lengths) for message in order)
    stops = [*(cuts[message.client] for message in order[1:]), segment.shape.blocks]
    rows: list[tuple[str | None, int]] = []
    hidden: torch.Tensor | None = None
    for message, stop in zip(order, stops, strict=True):
        leaf = pad(message.hidden, message.lengths, width).requires_grad_(training)
        group.leaves[message.client] = leaf
        hidden = leaf if hidden is None else torch.cat([hidden, leaf])
        rows.append((slot(message.client), len(message.lengths)))
        span = Span(cuts[message.client], stop)
        if len(span):
            with bank.routed(merge_runs(rows)):
                hidden = segment.run(hidden, span)
    assert hidden is not None
    parts = torch.split(hidden, [len(message.lengths) for message in order])
    for message, part in zip(order, parts, strict=True):
        group.outputs[message.client] = pick(part, message.labelled)
    return group


def backward_together(
    group: Group, gradients: Mapping[str, torch.Tensor], weights: Mapping[str, int], again: bool
) -> dict[str, torch.Tensor]:
    """Backward from gradients (M, D) at these clients' outputs; returns gradients (N, D) at their cuts.

    With `again` the graph is kept for those of the group whose gradients are still awaited.
    """
    outputs = [group.outputs[client] for client in gradients]
    wanted = [gradient.to(output.dtype) * weights[client]
              for (client, gradient), output in zip(gradients.items(), outputs, strict=True)]  # fmt: skip
    torch.autograd.backward(outputs, wanted, retain_graph=again)
    at_cuts = {}
    for client in gradients:
        gradient = group.leaves[client].grad
        assert gradient is not None
        at_cuts[client] = pack(gradient, group.messages[client].lengths) / weights[client]
    return at_cuts
