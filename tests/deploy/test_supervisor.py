"""The supervisor starts session after session until the run is done, stopped, or going nowhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from splitft.deploy import supervisor
from splitft.deploy.supervisor import Ending, supervise
from splitft.errors import AwayError, DeployError

SITES = ("north", "south")


class Scripted:
    """A federation whose sessions end as a test has it."""

    def __init__(self, *endings: Ending, present: Callable[[int], set[str]] = lambda look: set(SITES)):
        self._endings, self._present = list(endings), present
        self.submitted, self.rooms, self.given_up, self.looks, self.answers = 0, 0, 0, 0, True
        self.status = {"started": True, "sites": [{"name": name, "state": "training"} for name in SITES]}
        self.length, self.others, self.known, self._left = 2, [], [], 2

    def connected(self):
        self.looks += 1
        return self._present(self.looks)

    def running(self):
        return self.others.pop(0) if self.others else None

    def submit_session(self, rounds):
        self.known.append(rounds)
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
        self._left = self.length
        return self._endings.pop(0)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(supervisor, "POLL_S", 0.001)
    monkeypatch.setattr(supervisor, "PAUSE_S", 0.001)
    monkeypatch.setattr(supervisor, "AWAY_S", 0.02)


def played(federation, min_clients=1, gather_s=0.05, on_status=None):
    said = []
    return supervise(federation, SITES, min_clients, gather_s, said.append, on_status), said


def test_sessions_follow_one_another_until_all_rounds_are_trained():
    federation = Scripted(Ending(1, "back", "south can join"), Ending(3), Ending(6, "finished"))
    ending, said = played(federation)
    assert (ending.rounds, federation.submitted) == (6, 3)
    assert [line for line in said if "ended" in line] == [
        "session 1 ended after round 1: south can join",
        "session 2 ended: its job died",
    ]


def test_a_session_is_told_how_far_the_run_was():
    federation = Scripted(Ending(1), Ending(3), Ending(6, "finished"))
    played(federation)
    assert federation.known == [0, 1, 3]


def test_a_run_that_was_stopped_is_not_started_again():
    federation = Scripted(Ending(2, "stopped"))
    ending, _ = played(federation)
    assert (ending, federation.submitted) == (Ending(2, "stopped"), 1)


def test_a_run_that_gets_nowhere_is_given_up_and_says_where_it_was_and_why():
    federation = Scripted(*[Ending(2, "failed", "the disk is full")] * 9)
    with pytest.raises(DeployError, match=r"5 sessions in a row .*the disk is full.* round 2"):
        played(federation)
    assert federation.submitted == 6  # the first of them had come to round 2


def test_sessions_that_crash_after_finished_rounds_are_no_reason_to_give_up():
    """A killed job leaves no result; the rounds that its status has shown count."""
    federation = Scripted(*[Ending(0)] * 8, Ending(9, "finished"))
    federation.status["rounds_done"] = 0
    submit = federation.submit_session

    def one_round_further(rounds):
        federation.status["rounds_done"] += 1
        return submit(rounds)

    federation.submit_session = one_round_further
    ending, said = played(federation)
    assert (ending.rounds, federation.submitted) == (9, 9)
    assert "session 8 ended: its job died" in said


def test_an_error_that_would_come_again_ends_the_run_at_once():
    federation = Scripted(Ending(0, "unusable", "the run folder is gone; --restart begins anew"))
    with pytest.raises(DeployError, match="cannot go on: the run folder is gone; --restart"):
        played(federation)
    assert federation.submitted == 1


def test_what_a_session_noted_is_passed_on_when_it_has_ended():
    heard = []
    federation = Scripted(Ending(1, "finished", notes=((1, "south has declined: no"),)))
    played(federation, on_status=lambda session, status: heard.extend(status.get("notes", ())))
    assert heard == [(1, "south has declined: no")]


def test_with_too_few_sites_it_waits_and_says_so():
    federation = Scripted(Ending(1, "finished"), present=lambda look: {"north"} if look < 200 else set(SITES))
    _, said = played(federation, min_clients=2)
    assert said[0] == "paused: 1 of 2 sites are connected, 2 are needed"
    assert said[1] == "session 1: north, south"


def test_it_makes_room_once_for_who_has_come_back():
    federation = Scripted(Ending(1, "finished"))
    federation.length = 5
    federation.status = {"started": True, "sites": [{"name": "south", "state": "lost"}]}
    _, said = played(federation)
    assert federation.rooms == 1
    assert "south can join after this round" in said


# --- one run, one session -------------------------------------------------------------------------


def test_a_session_that_is_running_is_followed():
    federation = Scripted(Ending(2), Ending(6, "finished"))
    federation.others = ["session-of-another"]
    ending, said = played(federation)
    assert (ending.rounds, federation.submitted) == (6, 1)
    assert said[0] == "a session of this run is running: following it"


def test_of_two_that_submit_at_once_one_says_that_it_follows_the_other():
    federation = Scripted(Ending(0, "busy", "another session trains it"), Ending(6, "finished"))
    federation.others = [None, None, "session-of-another", "session-of-another"]
    _, said = played(federation)
    assert federation.submitted == 1
    assert said[1:] == [
        "session 1 ended after round 0: another session trains it",
        "a session of this run is running: following it",
    ]


def test_a_folder_that_stays_busy_ends_the_run_with_who_holds_it():
    federation = Scripted(*[Ending(0, "busy", "it is being trained into by process 7")] * 9)
    with pytest.raises(DeployError, match="by process 7"):
        played(federation)


def test_a_session_with_another_configuration_is_not_followed():
    def running():
        raise DeployError("it is being trained with another configuration")

    federation = Scripted()
    federation.running = running
    with pytest.raises(DeployError, match="another configuration"):
        played(federation)


# --- silence --------------------------------------------------------------------------------------


def test_a_session_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(supervisor, "UNANSWERED_S", 0.02)
    federation = Scripted(Ending(0), Ending(1, "finished"))
    federation.length, federation.answers = 10**6, False
    submit = federation.submit_session

    def submit_and_answer_later(rounds):
        federation.answers = federation.submitted == 1
        federation.length = 2 if federation.answers else 10**6
        return submit(rounds)

    federation.submit_session = submit_and_answer_later
    ending, said = played(federation)
    assert ending.finished
    assert federation.given_up == 1
    assert "the session does not answer; starting the next" in said


def test_a_server_that_is_away_ends_no_session(monkeypatch):
    """Whatever fails between this machine and the server, the session may be well."""
    monkeypatch.setattr(supervisor, "UNANSWERED_S", 0.02)
    federation = Scripted(Ending(1, "finished"))
    until, state = time.monotonic() + 0.2, federation.state

    def away(session):
        if time.monotonic() < until:
            raise AwayError("the federation's server does not answer: no route to host")
        return state(session)

    federation.state = away
    _, said = played(federation)
    assert (federation.submitted, federation.given_up) == (1, 0)
    assert said[1:] == [
        "the federation's server does not answer; waiting for it",
        "the federation's server answers again",
    ]


def test_a_pause_of_its_own_process_ends_no_session(monkeypatch):
    """A closed lid: minutes go by between two looks, and the first look after it finds nobody yet."""
    monkeypatch.setattr(supervisor, "UNANSWERED_S", 0.1)
    federation = Scripted(Ending(1, "finished"))
    looks, state = [], federation.state

    def asleep(session):
        looks.append(session)
        if len(looks) == 2:
            time.sleep(0.5)
            return False, None
        return state(session)

    federation.state = asleep
    played(federation)
    assert federation.given_up == 0
