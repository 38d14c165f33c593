"""The inbox answers every request once by its number, and refuses what is not a due message of a site."""

from __future__ import annotations

import threading
import tracemalloc

import pytest

from deploy.network import BATCH_TOKENS, KEY, LIMIT, registration
from laws.federations import federation, write_text
from splitft.deploy.requests import Envelope
from splitft.deploy.server.arrivals import Fault
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.quota import InboxLimits
from splitft.protocol import Next


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")


@pytest.fixture
def inbox(tiny_llama, text):
    prepared = federation(tiny_llama, text, [1, 2, 3], training={"rounds": 2, "steps": 3})
    limits = InboxLimits(LIMIT, BATCH_TOKENS)
    return Inbox(["client-1", "client-2"], KEY, prepared.serializer, limits), prepared.serializer


def answered(inbox, serializer, data, site="client-1"):
    return serializer.from_bytes(Envelope.from_bytes(inbox.answer(site, data), KEY, LIMIT).frame)


def test_a_message_that_comes_again_gets_the_same_answer_and_is_not_heard_twice(inbox):
    inbox, serializer = inbox
    data = Envelope(KEY, 0, 0, serializer.to_bytes(registration("client-1"))).to_bytes()
    first = inbox.answer("client-1", data)
    assert inbox.answer("client-1", data) == first
    assert len(inbox.take(0, 0)) == 1


@pytest.mark.parametrize("number", [1, 5, 2**63])
def test_a_number_that_is_not_due_is_refused(inbox, number):
    inbox, serializer = inbox
    answer = answered(
        inbox, serializer, Envelope(KEY, 0, number, serializer.to_bytes(registration("client-1"))).to_bytes()
    )
    assert (answer.error, isinstance(inbox.take(0, 0)[0], Fault)) == ("RepeatError", True)


def test_an_older_message_played_back_is_refused(inbox):
    inbox, serializer = inbox
    ask = [Envelope(KEY, 0, n, serializer.to_bytes(Next(client="client-1"))).to_bytes() for n in range(2)]
    for data in ask:
        inbox.answer("client-1", data)
    assert answered(inbox, serializer, ask[0]).error == "RepeatError"


def test_another_message_under_a_used_number_is_refused(inbox):
    inbox, serializer = inbox
    inbox.answer("client-1", Envelope(KEY, 0, 0, serializer.to_bytes(Next(client="client-1"))).to_bytes())
    again = Envelope(KEY, 0, 0, serializer.to_bytes(registration("client-1"))).to_bytes()
    assert answered(inbox, serializer, again).error == "RepeatError"


def test_a_message_of_another_session_is_refused(inbox):
    inbox, serializer = inbox
    data = Envelope(bytes(16), 0, 0, serializer.to_bytes(registration("client-1"))).to_bytes()
    assert answered(inbox, serializer, data).error == "RepeatError"


def test_who_is_no_site_of_the_run_is_refused(inbox):
    inbox, serializer = inbox
    data = Envelope(KEY, 0, 0, serializer.to_bytes(registration("client-9"))).to_bytes()
    assert answered(inbox, serializer, data, "client-9").error == "ProtocolError"


def test_a_message_over_the_limit_is_refused_before_it_is_read(inbox):
    inbox, serializer = inbox
    data = Envelope(KEY, 0, 0, bytes(10 * LIMIT)).to_bytes()
    tracemalloc.start()
    answer = answered(inbox, serializer, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answer.error == "WireError"
    assert peak < 2 * LIMIT


@pytest.mark.parametrize("length", [0, 1, 31, 32, 100])
def test_bytes_that_are_no_message_are_refused(inbox, length):
    inbox, serializer = inbox
    assert answered(inbox, serializer, bytes(length)).error in ("WireError", "RepeatError")


def test_two_threads_that_send_the_same_message_are_answered_alike(inbox):
    inbox, serializer = inbox
    data = Envelope(KEY, 0, 0, serializer.to_bytes(registration("client-1"))).to_bytes()
    answers: list[bytes] = []

    def ask():
        answers.append(inbox.answer("client-1", data))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1
    assert len(inbox.take(0, 0)) == 1
