"""The replicas of one server: started together, asked together, ended together.

requests by replica --> post to each, then wait for each --> replies by replica, or the first error
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from splitft.errors import ReplicaError
from splitft.training.replicas.packet import Packet
from splitft.training.replicas.process import Carrier, Replica, ReplicaProcess, threads_each
from splitft.training.replicas.worker import ReplicaSetup


def start_replica(setup: ReplicaSetup, threads: int) -> Carrier:
    """Start a replica in a process of its own; tests replace this to run it on a thread."""
    return ReplicaProcess(setup, threads)


class ReplicaPool:
    """Replicas that work at the same time."""

    def __init__(self, setups: Sequence[ReplicaSetup]) -> None:
        """Start the replicas, and wait until each has loaded its blocks.

        Raises ReplicaError if one ends meanwhile, or the error with which one has failed.
        """
        self._replicas: list[Replica] = []
        count = len(setups)
        try:
            for number, setup in enumerate(setups, 1):
                carrier = start_replica(setup, threads_each(count))
                self._replicas.append(Replica(f"process {number} of {count}", carrier))
            for replica in self._replicas:
                replica.await_ready()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._replicas)

    def ask(self, requests: Mapping[int, Packet]) -> dict[int, Packet]:
        """Hand each replica its request, then wait for all; raise the first error when all have answered."""
        tickets = {place: self._replicas[place].post(request) for place, request in requests.items()}
        replies, errors = dict[int, Packet](), list[Exception]()
        for place, ticket in tickets.items():
            try:
                replies[place] = self._replicas[place].result(ticket)
            except Exception as error:
                errors.append(error)
        if errors:
            raise next((one for one in errors if isinstance(one, ReplicaError)), errors[0])
        return replies

    def ask_all(self, requests: Sequence[Packet]) -> list[Packet]:
        """Hand every replica a request, and wait for all."""
        return list(self.ask(dict(enumerate(requests))).values())

    def post(self, requests: Mapping[int, Packet]) -> None:
        """Hand replicas requests that have no answer but an error, which is raised at the next one."""
        for place, request in requests.items():
            self._replicas[place].post(request, answered=False)

    def close(self) -> None:
        """End the replicas."""
        for replica in self._replicas:
            replica.close()
