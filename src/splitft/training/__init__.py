"""The algorithm: clients, server and rounds; checkpoints; and the federation in one process."""

from splitft.training.client import Client, ClientSetup
from splitft.training.rounds import FederatedTrainer, RunState
from splitft.training.server import Server
from splitft.training.simulation import Simulation

__all__ = ["Client", "ClientSetup", "FederatedTrainer", "RunState", "Server", "Simulation"]
