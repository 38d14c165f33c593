"""A partition: deal the examples out like cards, from the shortest to the longest.

clients: {shares: {by: dealt}}
"""

import numpy as np

from splitft.specs.data import PARTITIONS, Partition


def dealt(examples, clients, spec, generator):
    """Return for each client the indices of its examples: every n-th by length."""
    by_length = np.argsort([len(example) for example in examples], kind="stable")
    return [by_length[first::clients] for first in range(clients)]


PARTITIONS.add("dealt", Partition(dealt, "dealt out by length"))
