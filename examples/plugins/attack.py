"""An attack: guess the most frequent public token everywhere. What any real attack has to beat.

splitft audit run.yaml --attacks most-frequent
"""

import torch

from splitft.audit.attacks.suite import ATTACKS, Attack


def most_frequent(attacker, batches):
    """Return for each text of all batches as many guesses as it has tokens."""
    guess = int(torch.mode(attacker.public.flatten()).values)
    return [[guess] * len(rows) for batch in batches for rows in batch.sequences()]


ATTACKS.add("most-frequent", Attack("hidden", most_frequent))
