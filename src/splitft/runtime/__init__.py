"""The parties and the algorithm: client, server, rounds, checkpoints, and all of it in one process."""

from splitft.runtime.client import Client
from splitft.runtime.rounds import RunState, train_rounds
from splitft.runtime.server import Server
from splitft.runtime.simulation import Simulation

__all__ = ["Client", "RunState", "Server", "Simulation", "train_rounds"]
