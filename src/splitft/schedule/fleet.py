"""All machines of a run, and what a script says will happen to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from splitft.schedule.workload import ClientProfile, SharedCosts
from splitft.specs import ChangeSpec


@dataclass(frozen=True)
class Fleet:
    """All machines of a run."""

    job: SharedCosts
    """What all clients share, the server among it."""
    clients: tuple[ClientProfile, ...]
    """As they are before any scripted change."""
    changes: tuple[ChangeSpec, ...] = ()
    """What happens to them, and when."""

    def at(self, number: int) -> tuple[ClientProfile, ...]:
        """The clients under the conditions of a round."""
        clients = list(self.clients)
        for change in sorted(self.changes, key=lambda one: one.round):
            if change.round <= number:
                clients[change.client - 1] = _changed(self.clients[change.client - 1], change)
        return tuple(clients)


def _changed(client: ClientProfile, change: ChangeSpec) -> ClientProfile:
    link = replace(
        client.link,
        up_bytes_per_s=client.link.up_bytes_per_s * change.link,
        down_bytes_per_s=client.link.down_bytes_per_s * change.link,
    )
    return replace(client, device=client.device.scaled(change.compute), link=link)
