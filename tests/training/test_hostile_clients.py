"""Rounds with clients that send what they like: who is bounded, what is undone, which loss is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from laws.federations import federation, write_text
from splitft.adapters import AdapterState
from splitft.errors import RunError
from splitft.protocol import AdapterUpload, Evaluation
from splitft.tracking.events import Evaluated, RoundUndone, UpdatesBounded

SHORT = {"rounds": 2, "steps": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


class Spoilt:
    """A simulation in which some clients send factors times a number, or claim a loss."""

    def __init__(self, simulation, times, rounds=(1, 2, 3, 4, 5), claims=None):
        self._simulation, self._times, self._rounds, self._claims = simulation, times, rounds, claims or {}
        self.start, self.install = simulation.start, simulation.install
        self._evaluated: dict[str, int] = {}
        self.traffic, self.undo = simulation.traffic, simulation.undo

    def train(self, number, participants, steps, listener):
        uploads = self._simulation.train(number, participants, steps, listener)
        return {name: self._sent(name, number, upload) for name, upload in uploads.items()}

    def _sent(self, name: str, number: int, upload: AdapterUpload) -> AdapterUpload:
        if name not in self._times or number not in self._rounds:
            return upload
        spoilt = {
            key: replace(one, A=one.A * self._times[name], B=one.B * self._times[name])
            for key, one in upload.adapters.items()
        }
        return upload.model_copy(update={"adapters": AdapterState(spoilt)})

    def evaluate(self):
        evaluated = dict(self._evaluated)  # a claim is made once for each round, not again after an undo

        def claimed(name: str, result: Evaluation) -> Evaluation:
            number = result.round
            self._evaluated[name] = number
            if name in self._claims and number in self._rounds and evaluated.get(name) != number:
                return result.model_copy(update={"loss": self._claims[name] * result.tokens})
            return result

        return {name: claimed(name, one) for name, one in self._simulation.evaluate().items()}


def _play(prepared, times, rounds=(1, 2, 3, 4, 5), claims=None):
    events, states = [], []
    spoilt = Spoilt(prepared.simulation(None), times, rounds, claims)
    trainer = prepared.trainer(spoilt, events.append, states.append)
    return trainer, events, states


def _of(kind, events):
    return [event for event in events if isinstance(event, kind)]


def _run(tiny_llama, text, times, rule="factors", cuts=(2, 2, 2, 2), **options):
    aggregate = {"rule": rule, "norm_bound": options.pop("norm_bound", 5.0)}
    sections = {"aggregate": aggregate, "training": options.pop("training", SHORT)}
    sections["lora"] = options.pop("lora", {"rank": 4, "rank_at_cut": None})
    prepared = federation(tiny_llama, text, list(cuts), **sections)
    trainer, events, states = _play(prepared, times, **options)
    return trainer.train(prepared.initial()), events, states


@pytest.mark.parametrize("times", [1e2, 1e15, 1e30])
@pytest.mark.parametrize(
    ("rule", "cuts", "rank_at_cut"), [("factors", (2, 2, 2, 2), None), ("svd", (1, 2, 3, 2), 2)]
)
@pytest.mark.hostile("a client uploads {times} times its update, rule {rule}", "scaled down to the bound")
def test_a_huge_update_is_scaled_down_to_the_bound(tiny_llama, text, times, rule, cuts, rank_at_cut):
    lora = {"rank": 4, "rank_at_cut": rank_at_cut}
    state, events, _ = _run(tiny_llama, text, {"client-2": times}, rule, cuts, lora=lora)
    bounded = _of(UpdatesBounded, events)
    assert [list(event.scale) for event in bounded] == [["client-2"]] * 2
    assert all(event.limit == pytest.approx(5 * event.typical) for event in bounded)
    assert "client-2 (to" in bounded[0].message
    losses = [event.loss for event in _of(Evaluated, events)]
    assert losses[-1] < losses[0] + 0.5
    assert state.adapters.all_finite()
    assert not _of(RoundUndone, events)


@pytest.mark.parametrize("rule", ["factors", "svd", "exact", "ffa", "fedsa", "stack"])
def test_the_bound_changes_nothing_unless_it_bites(tiny_llama, text, rule):
    one, events, _ = _run(tiny_llama, text, {}, rule)
    other, _, _ = _run(tiny_llama, text, {}, rule, norm_bound=None)
    assert not _of(UpdatesBounded, events)
    for name, tensor in one.adapters.tensors().items():
        assert torch.equal(tensor, other.adapters.tensors()[name])


def test_one_alone_is_bounded_by_its_own_last_rounds(tiny_llama, text):
    training = {"rounds": 4, "steps": 2}
    _, events, _ = _run(tiny_llama, text, {"client-1": 100.0}, cuts=(2,), training=training, rounds=(4,))
    assert [event.round for event in _of(UpdatesBounded, events)] == [4]


@pytest.mark.parametrize("rule", ["factors", "exact", "stack"])
@pytest.mark.hostile("a round ruins most clients' loss, rule {rule}", "the round is undone; the run goes on")
def test_a_round_that_ruins_most_is_undone_and_the_run_goes_on(tiny_llama, text, rule):
    """The tiny model's loss is bounded by its last norm: that it exploded is what the sites say."""
    most = ("client-1", "client-2", "client-3")
    state, events, states = _run(
        tiny_llama, text, dict.fromkeys(most, 1e4), rule, norm_bound=None, rounds=(2,),
        training={"rounds": 3, "steps": 2}, claims=dict.fromkeys(most, 60.0),
    )  # fmt: skip
    (undone,) = _of(RoundUndone, events)
    assert (undone.round, undone.in_a_row) == (2, 1)
    assert "on 3 of 4 clients" in undone.message
    losses = [event.loss for event in _of(Evaluated, events)]
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)  # after round 1 and after the undone round 2
    assert losses[3] < losses[0]
    assert [one.undone for one in states] == [0, 1, 0]
    assert (states[1].round, state.round) == (2, 3)


def test_a_run_that_is_undone_again_and_again_stops_and_says_so(tiny_llama, text):
    claims = dict.fromkeys(("client-1", "client-2", "client-3"), 60.0)
    with pytest.raises(RunError, match=r"4th in a row in which most clients failed.*lower training.lr"):
        _run(tiny_llama, text, {}, claims=claims, training={"rounds": 6, "steps": 1})


@pytest.mark.hostile("a client claims an absurd loss", "shown apart, left out of the loss")
def test_an_absurd_claim_is_shown_and_left_out_of_the_loss(tiny_llama, text):
    state, events, _ = _run(tiny_llama, text, {}, claims={"client-3": 1e-3}, rounds=(1, 2))
    honest, plain, _ = _run(tiny_llama, text, {})
    last, true = _of(Evaluated, events)[-1], _of(Evaluated, plain)[-1]
    assert set(last.outliers) == {"client-3"}
    assert last.by_client["client-3"] == pytest.approx(1e-3)
    others = [loss for name, loss in true.by_client.items() if name != "client-3"]
    assert min(others) <= last.loss <= max(others)
    # the controller goes on with its last loss that fitted, that of round 0
    assert state.losses["client-3"] == _of(Evaluated, events)[0].by_client["client-3"]
    assert honest.losses == true.by_client
