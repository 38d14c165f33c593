"""The step that all clients take together on shared factors: who has completed it, and what is unfinished.

    client a  part 0, part 1 --+                              M_a labelled tokens
    client b  part 0 ----------+--all completed--> one optimizer step on sum_i M_i gradient_i / sum_i M_i
    client c  rests, has left: not awaited

Gradients of a step in several parts are kept apart until the step is complete. A client that is lost in the
middle leaves nothing behind, and the others lose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from splitft.adapters.optimizer import ParameterKey

Parameters = Callable[[], Mapping[ParameterKey, nn.Parameter]]
"""Returns the trainable tensors of the shared factors."""


class CommonStep:
    """The common steps of one round, one after the other."""

    def __init__(self, parameters: Parameters, awaited: Iterable[str]) -> None:
        """Begin the first step, which waits for these clients."""
        self._parameters, self._awaited = parameters, set(awaited)
        self.number = 0
        """Steps that have ended."""
        self._finished: dict[str, int] = {}  # weights of completed steps, by client
        self._parts: dict[str, dict[ParameterKey, torch.Tensor]] = {}  # gradients of unfinished steps

    @property
    def finished(self) -> set[str]:
        """Clients that have completed their part of the current step, and wait for the others."""
        return set(self._finished)

    @property
    def awaited(self) -> set[str]:
        """Clients that they wait for."""
        return self._awaited - self._finished.keys()

    def complete(self, client: str, weight: int) -> None:
        """Count a client's step, with the labelled tokens that its gradients are weighted by."""
        parameters = self._parameters()
        for key, gradient in self._parts.pop(client, {}).items():
            parameter = parameters[key]
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._finished[client] = weight

    def forget(self, client: str) -> None:
        """Drop the parts of a client's unfinished step."""
        self._parts.pop(client, None)

    def rest(self, client: str) -> None:
        """Wait for no further step of this client; one that it has completed counts."""
        self._awaited.discard(client)

    def take(self) -> int:
        """End the step if nobody is awaited any more: return the weights of all, 0 if it has not ended."""
        if not self._finished or self.awaited:
            return 0
        weight = sum(self._finished.values())
        self._finished, self.number = {}, self.number + 1
        return weight

    @contextmanager
    def apart(self, client: str) -> Iterator[None]:
        """Keep what a backward pass adds to the gradients apart, until the client's step is complete."""
        parameters = self._parameters()
        before = {key: parameter.grad for key, parameter in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        yield
        parts = self._parts.setdefault(client, {})
        for key, parameter in parameters.items():
            if parameter.grad is not None:
                parts[key] = parts[key] + parameter.grad if key in parts else parameter.grad
            parameter.grad = before[key]
