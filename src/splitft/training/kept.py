"""What the server keeps of each client from round to round: optimizer moments, and factors of its own.

    cut moves 2 -> 4    server: blocks 2 3 | 4 5 6   --what it has of blocks 2, 3-->     client
    cut moves 4 -> 2    server: blocks 2 3 | 4 5 6   <--what the client had of them--    client

What belongs to a block goes where the block goes. It is here until the client says that it has moved: one
that is lost on the way keeps its old cut, and nothing is missing on either side. Moments are kept with
`training.optimizer_state: keep`, factors of its own by rules that leave each client its B (FedSA-LoRA,
arXiv 2410.01463).
"""

from __future__ import annotations

from collections.abc import Sequence

from splitft.adapters import AdapterState, Moments, moments_within


class ClientState:
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
        return state.replace_B(self.own.get(client, AdapterState()))

    def moments_of(self, client: str, blocks: Sequence[int]) -> Moments:
        """Moments of these blocks that are the client's own; what all share stays with the others."""
        return moments_within(self.moments.get(client, {}), blocks)

    def moved(self, client: str, gained: Sequence[int], moments: Moments, own: AdapterState) -> None:
        """The client has moved: what it gained is no longer here, and what it gave up now is."""
        if self._per_client and (moments or client in self.moments):
            here = self.moments.get(client, {})
            gone = moments_within(here, gained)
            self.moments[client] = {name: value for name, value in here.items() if name not in gone} | moments
        if before := self.own.get(client, AdapterState()):
            self.own[client] = before.within(set(before.ranks()) - set(gained))
        self.take_own(client, own)

    def take_own(self, client: str, own: AdapterState) -> None:
        """Factors of its own of blocks that are here."""
        if own:
            self.own[client] = self.own.get(client, AdapterState()).updated(own)
