"""What the server keeps of each client from round to round: optimizer moments, and factors of its own.

    cut moves 2 -> 4    server: blocks 2 3 | 4 5 6   --to_client: what it has of blocks 2, 3-->     client
    cut moves 4 -> 2    server: blocks 2 3 | 4 5 6   <--from_client: what the client had of them--  client

What belongs to a block goes where the block goes. Moments are kept with `training.optimizer_state: keep`,
factors of its own by rules that leave each client its B (FedSA-LoRA, arXiv 2410.01463).
"""

from __future__ import annotations

from collections.abc import Sequence

from splitft.adapters import AdapterState, Moments, moments_within


class Kept:
    """What is kept of all clients."""

    def __init__(self, per_client: bool) -> None:
        """Keep nothing yet. Without `per_client` the moments here are those that all clients share."""
        self._per_client = per_client
        self.moments: dict[str, Moments] = {}
        """Optimizer moments by slot."""
        self.own: dict[str, AdapterState] = {}
        """Factors B of the server's blocks by client."""

    def personal(self, client: str, state: AdapterState) -> AdapterState:
        """Global factors with those that are the client's own in their place."""
        return state.with_b_of(self.own.get(client, AdapterState()))

    def own_to_client(self, client: str, state: AdapterState) -> AdapterState:
        """Global factors of blocks that move to the client, with its own in their place."""
        leaving, own = self.personal(client, state), self.own.get(client, AdapterState())
        if own:
            self.own[client] = own.within(set(own.ranks()) - set(state.ranks()))
        return leaving

    def own_from_client(self, client: str, own: AdapterState) -> None:
        """Factors of its own of blocks that the client gave up."""
        if own:
            self.own[client] = self.own.get(client, AdapterState()).updated(own)

    def moments_to_client(self, client: str, blocks: Sequence[int]) -> Moments:
        """Moments of blocks that move to the client; shared moments stay with the others who share."""
        own = self.moments.get(client, {})
        leaving = moments_within(own, blocks)
        self.moments[client] = {name: value for name, value in own.items() if name not in leaving}
        return leaving

    def moments_from_client(self, client: str, moments: Moments) -> None:
        """Moments of blocks that the client gave up."""
        if moments and self._per_client:
            self.moments[client] = {**self.moments.get(client, {}), **moments}
