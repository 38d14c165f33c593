"""The parties and the algorithm: client, server, rounds, checkpoints, and all of it in one process."""

from splitft.training.client import Client
from splitft.training.rounds import RunState, train_rounds
from splitft.training.server import Server
from splitft.training.simulation import Simulation

__all__ = ["Client", "RunState", "Server", "Simulation", "train_rounds"]
