"""One site sends whatever is drawn, in any order; the others learn what they learn without it.

Messages have the right types and mostly the right shapes, so that they get far. Numbers are extreme, fields
are false, and orders are carried out in part. Uploads are never valid, so the site never counts.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.network import deployed, registration
from deploy.test_hostile import EVIL, Hand, whole_evaluation
from laws.federations import federation, largest_relative_difference, play, write_text
from splitft.adapters import AdapterState, Factors
from splitft.errors import SplitftError
from splitft.protocol import (
    Activations,
    AdapterUpload,
    EndSession,
    Evaluate,
    Evaluation,
    HeadGradient,
    Heartbeat,
    Join,
    LastHidden,
    LocalStep,
    Message,
    Next,
    Register,
    RoundReady,
    RoundStart,
    Train,
)

CUTS = [1, 2, 3]
EXAMPLES = 200 if os.environ.get("SPLITFT_SLOW") else 10
WIDTH = 32
SCALE = st.sampled_from([0.0, 1e-300, 1e-3, 1.0, 1e10, 1e150, 1e300])
SMALL = st.integers(0, 4)
LARGE = st.sampled_from([1, 2, 64, 2**31, 2**63 - 1])


def rows(count, scale):
    return (torch.randn(count, WIDTH, dtype=torch.float64) * scale).nan_to_num()


@st.composite
def activations(draw):
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    labelled = [(start := draw(st.integers(0, n - 1)), draw(st.integers(start + 1, n))) for n in lengths]
    parts = draw(st.sampled_from([1, 1, 2, 64]))
    total = sum(stop - start for start, stop in labelled)
    return Activations(
        client=EVIL, round=draw(SMALL), step=draw(SMALL | LARGE), training=draw(st.booleans()),
        lengths=tuple(lengths), labelled=tuple(labelled), micro_batch=draw(st.integers(0, parts - 1)),
        micro_batches=parts, step_labelled=None if parts == 1 else total + draw(st.sampled_from([63, 10**9])),
        seconds=draw(st.dictionaries(st.just("client_forward"), st.sampled_from([0.0, 1e6]))),
        hidden=rows(sum(lengths), draw(SCALE)),
    )  # fmt: skip


@st.composite
def gradients(draw):
    return HeadGradient(
        client=EVIL, round=draw(SMALL), step=draw(SMALL), micro_batch=draw(st.sampled_from([0, 0, 1, 63])),
        loss=draw(st.sampled_from([-1.7e308, 0.0, 3.0, 1.7e308])), gradient=rows(draw(SMALL), draw(SCALE)),
    )  # fmt: skip


@st.composite
def moments(draw):
    found = {}
    for field in draw(st.lists(st.sampled_from(["exp_avg", "exp_avg_sq", "step", "other"]), unique=True)):
        block = draw(st.integers(0, 5))
        shape = draw(st.sampled_from([(4, WIDTH), (1, 1), (WIDTH,)]))
        tensor = torch.full(shape, draw(st.sampled_from([-1.0, 0.0, 1e300])), dtype=torch.float64)
        if field == "step":
            tensor = torch.tensor(draw(st.sampled_from([-1.0, 0.0, 3e38])))
        found[f"{block}.self_attn.q_proj.{draw(st.sampled_from('ABM'))}.{field}"] = tensor
    return found


OTHERS = st.one_of(
    st.builds(Evaluation, client=st.just(EVIL), round=SMALL,
              loss=st.sampled_from([-1.7e308, 0.0, 1.7e308]), tokens=SMALL | LARGE),
    st.builds(RoundReady, client=st.just(EVIL), round=st.integers(1, 2), moments=moments()),
    st.builds(Heartbeat, client=st.just(EVIL)),
    st.builds(LocalStep, client=st.just(EVIL), round=SMALL, step=SMALL, training=st.booleans(),
              sequences=st.integers(1, 9) | LARGE, tokens=st.integers(1, 99) | LARGE,
              loss=st.sampled_from([None, -1.7e308, 0.0, 1.7e308])),
    st.builds(Next, client=st.just(EVIL)),
    st.builds(
        Register, client=st.just(EVIL), train_examples=LARGE, train_tokens=LARGE, eval_examples=LARGE,
        truncated=LARGE, **{name: st.sampled_from([5e-324, 1.0, 1.7e308]) for name in (
            "tokens_per_batch", "labelled_per_batch", "sequences_per_batch", "padded_length")},
    ),
)  # fmt: skip


@st.composite
def uploads(draw):
    """Factors that are never those that are due: of another size, or of blocks and ranks drawn."""
    rank, scale = draw(st.integers(1, 5)), draw(st.sampled_from([1e7, 1e150, 1e300]))
    keys = draw(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["self_attn.q_proj", "x"])), unique=True)
    )
    pair = Factors(rows(rank, scale), rows(rank, scale).T.contiguous())
    return AdapterUpload(
        client=EVIL, round=draw(st.integers(1, 2)), adapters=AdapterState(dict.fromkeys(keys, pair)),
        moments=draw(moments()), tokens=draw(LARGE),
    )  # fmt: skip


HONEST = st.sampled_from(["order", "step", "spoilt gradient", "huge upload"])
WILD = st.lists(HONEST | activations() | gradients() | uploads() | OTHERS, min_size=3, max_size=12)
ACTIONS = st.tuples(st.sampled_from([Join, Evaluate, RoundStart, Train, Train]), st.integers(0, 2), WILD)
"""Behave until an order of this type, then take so many steps of a round, then do what was drawn."""


def honest_part(hand, order, action):
    """Carry out an order in part, or do what an honest site does, with something wrong at its end."""
    client = hand.client
    if action == "step":
        return client.forward()
    if action == "gradient" and isinstance(order, LastHidden):
        return client.head(order)
    if action == "spoilt gradient" and isinstance(order, LastHidden):
        gradient = client.head(order)
        return gradient.model_copy(update={"gradient": gradient.gradient * 1e300})
    if action == "huge upload":
        upload = client.upload()
        huge = {key: Factors(one.A * 1e150, one.B + 1e150) for key, one in upload.adapters.items()}
        return upload.model_copy(update={"adapters": AdapterState(huge)})
    if isinstance(order, Join):
        client.join(order, {})
    if isinstance(order, Evaluate):
        return whole_evaluation(hand)
    return client.start(order) if isinstance(order, RoundStart) else Next(client=EVIL)


def play_anything(hand, until, steps, wild):
    """Do what was drawn, one action for each reply; then only ask, until the session ends."""
    order, left = hand.ask(registration(EVIL)), list(wild)
    while not isinstance(order, until | EndSession):
        order = hand.ask(honest_part(hand, order, "order"))
    if isinstance(order, Train):
        left = ["step", "gradient", "end of step"] * steps + left
    while not isinstance(order, EndSession):
        action = left.pop(0) if left else Next(client=EVIL)
        if action == "end of step":
            hand.client.backward(order)
            continue
        try:
            order = hand.ask(action if isinstance(action, Message) else honest_part(hand, order, action))
        except SplitftError:  # it cannot be done or sent now
            order = hand.ask(Next(client=EVIL))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture(scope="module")
def without(tiny_llama, text):
    """What the others learn if the hostile site is not there."""
    prepared = parties(tiny_llama, text)
    others = tuple(client for client in prepared.clients if client.name != EVIL)
    alone = type(prepared)(**{**prepared.__dict__, "clients": others})
    return play(alone, lambda number, cuts: {n: k for n, k in cuts.items() if n != EVIL})[0]


def parties(tiny_llama, text):
    training = {"rounds": 1, "steps": 2, "optimizer_state": "keep"}
    return federation(tiny_llama, text, CUTS, training=training)


@pytest.mark.hostile(
    "a site sends anything, in any order", "the others learn what they learn without it (1e-6)"
)
def test_whatever_a_site_sends_the_others_learn_what_they_learn_without_it(tiny_llama, text, without):
    reached = set()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
    @given(ACTIONS)
    def holds(drawn):
        outcome = deployed(
            parties(tiny_llama, text),
            impostors={EVIL: lambda inbox, prepared: play_anything(Hand(inbox, prepared), *drawn)},
        )
        assert outcome.error is None, outcome.error
        assert {event.site for event in outcome.of("SiteChanged")} <= {EVIL}
        assert outcome.participants() == [("client-1", "client-3")]
        ours, theirs = outcome.state.adapters.tensors(), without.adapters.tensors()
        assert largest_relative_difference(ours, theirs) < 1e-6
        reached.update(outcome.reasons(EVIL).split("; "))

    holds()
    assert len(reached) > 5, reached
