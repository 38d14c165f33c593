"""The supervisor starts session after session until the run is done, stopped, or going nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from splitft.deploy import supervisor
from splitft.deploy.supervisor import Ending, supervise
from splitft.errors import DeployError

SITES = ("north", "south")


class Scripted:
    """A federation whose sessions end as a test has it."""

    def __init__(self, *endings: Ending, present: Callable[[int], set[str]] = lambda look: set(SITES)):
        self._endings, self._present = list(endings), present
        self.submitted, self.rooms, self.given_up, self.looks, self.answers = 0, 0, 0, 0, True
        self.status = {"started": True, "sites": [{"name": name, "state": "training"} for name in SITES]}
        self.length = 2

    def connected(self):
        self.looks += 1
        return self._present(self.looks)

    def submit_session(self):
        self.submitted, self._left = self.submitted + 1, self.length
        return f"session-{self.submitted}"

    def state(self, session):
        self._left -= 1
        return self._left < 0, self.status if self.answers else None

    def make_room(self, session):
        self.rooms += 1

    def give_up(self, session):
        self.given_up += 1

    def ending(self, session):
        return self._endings.pop(0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.001)


def played(federation, min_clients=1, gather_s=0.05):
    said = []
    return supervise(federation, SITES, min_clients, gather_s, said.append), said


def test_sessions_follow_one_another_until_all_rounds_are_trained():
    federation = Scripted(Ending(1), Ending(3), Ending(6, finished=True))
    ending, said = played(federation)
    assert (ending.rounds, federation.submitted) == (6, 3)
    assert [line for line in said if "ended" in line] == [
        "session 1 ended after round 1",
        "session 2 ended after round 3",
    ]


def test_a_run_that_was_stopped_is_not_started_again():
    federation = Scripted(Ending(2, stopped=True))
    ending, _ = played(federation)
    assert (ending, federation.submitted) == (Ending(2, stopped=True), 1)


def test_a_run_that_gets_nowhere_is_given_up_and_says_where_it_was():
    federation = Scripted(*[Ending(2)] * 9)
    with pytest.raises(DeployError, match=r"5 sessions in a row .* round 2"):
        played(federation)
    assert federation.submitted == 6  # the first of them had come to round 2


def test_with_too_few_sites_it_waits_and_says_so():
    federation = Scripted(
        Ending(1, finished=True), present=lambda look: {"north"} if look < 200 else set(SITES)
    )
    _, said = played(federation, min_clients=2)
    assert said[0] == "paused: 1 of 2 sites are connected, 2 are needed"
    assert said[1] == "session 1: north, south"


def test_it_makes_room_once_for_who_has_come_back():
    federation = Scripted(Ending(1, finished=True))
    federation.length = 5
    federation.status = {"started": True, "sites": [{"name": "south", "state": "lost"}]}
    _, said = played(federation)
    assert federation.rooms == 1
    assert "south can join after this round" in said


def test_a_session_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(supervisor, "UNANSWERED_S", 0.02)
    federation = Scripted(Ending(0), Ending(1, finished=True))
    federation.length, federation.answers = 10**6, False
    submit = federation.submit_session

    def submit_and_answer_later():
        federation.answers = federation.submitted == 1
        federation.length = 2 if federation.answers else 10**6
        return submit()

    federation.submit_session = submit_and_answer_later
    ending, said = played(federation)
    assert ending.finished
    assert federation.given_up == 1
    assert "the session does not answer; starting the next" in said
