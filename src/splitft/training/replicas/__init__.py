"""The server's blocks in several processes, with the clients divided among them."""

from splitft.training.replicas.division import ReplicaPlan, plan_replicas
from splitft.training.replicas.server_replicas import ServerReplicas

__all__ = ["ReplicaPlan", "ServerReplicas", "plan_replicas"]
