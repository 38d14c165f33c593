"""An aggregation rule: every client counts alike, however many tokens it trained on.

aggregate: {rule: one-vote}        lora: {rank_at_cut: null}
"""

from splitft.adapters import Factors, United
from splitft.specs.rules import RULES, Rule


def one_vote(key, members, rank, fresh):
    """Return the plain mean of A and of B for one layer; `key` is (block, target)."""
    everybody = [factors for _, factors in members]  # the weights are left aside
    A = sum(factors.A for factors in everybody) / len(everybody)  # (R, in)
    B = sum(factors.B for factors in everybody) / len(everybody)  # (out, R)
    return United(Factors(A, B))


RULES.add("one-vote", Rule(one_vote, equal_ranks=True, keeps_axes=True, bounded=True))
