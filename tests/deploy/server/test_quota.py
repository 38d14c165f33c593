"""A site that sends too much is turned away, and the messages of the others are read as ever."""

from __future__ import annotations

import threading
import time

import pytest

from deploy.network import BATCH_TOKENS, KEY, LIMIT, registration
from laws.federations import federation, write_text
from splitft.deploy.requests import Envelope
from splitft.deploy.server.arrivals import Arrival, ArrivalQueue, Fault
from splitft.deploy.server.inbox import Inbox
from splitft.deploy.server.quota import CREDIT, CREDIT_PER_S, INVALID, InboxLimits, Quota
from splitft.errors import ProtocolError, TransportError
from splitft.protocol import Heartbeat, Next, Refused

LIMITS = InboxLimits(LIMIT, BATCH_TOKENS, in_flight=2)
FLOODER, HONEST = "client-1", "client-2"


@pytest.fixture(scope="module")
def serializer(tiny_llama, tmp_path_factory):
    text = write_text(tmp_path_factory.mktemp("text") / "notes.jsonl")
    return federation(tiny_llama, text, [1, 2], training={"rounds": 1, "steps": 1}).serializer


@pytest.fixture
def inbox(serializer):
    return Inbox([FLOODER, HONEST], KEY, serializer, LIMITS)


def ask(inbox, serializer, site, message, number=0, channel=0):
    data = Envelope(KEY, channel, number, serializer.to_bytes(message)).to_bytes()
    return serializer.from_bytes(Envelope.from_bytes(inbox.answer(site, data), KEY, LIMIT).frame)


def until_turned_away(send, most=2000):
    for count in range(most):
        try:
            send(count)
        except TransportError:
            return count
    return most


@pytest.mark.hostile("a site sends heartbeats without end", "it is turned away; others are read")
def test_heartbeats_are_answered_until_there_are_too_many(inbox, serializer):
    def beat(count):
        ask(inbox, serializer, FLOODER, Heartbeat(client=FLOODER), number=count)

    began = time.monotonic()
    count = until_turned_away(beat)
    refilled = (time.monotonic() - began) * CREDIT_PER_S
    assert CREDIT <= count <= CREDIT + refilled + 1
    assert inbox.turned_away(FLOODER) == 1
    ask(inbox, serializer, HONEST, Heartbeat(client=HONEST))
    time.sleep(2 / CREDIT_PER_S)
    beat(count)  # the same number: it was not read, so it is still due


@pytest.mark.hostile("a site sends invalid messages without end", "two a second are read")
def test_invalid_messages_are_read_until_there_are_too_many_and_reported_once(inbox, serializer):
    def spoil(count):
        inbox.answer(FLOODER, bytes(100))

    assert CREDIT / INVALID <= until_turned_away(spoil) < 2 * CREDIT / INVALID
    assert [type(one) for one in inbox.take(0, 0)] == [Fault]
    assert inbox.turned_away(HONEST) == 0


def test_a_message_that_is_repeated_costs_points_before_it_is_hashed(inbox, serializer):
    data = Envelope(KEY, 0, 0, serializer.to_bytes(registration(FLOODER))).to_bytes()
    count = until_turned_away(lambda count: inbox.answer(FLOODER, data))
    assert CREDIT - INVALID <= count < 2 * CREDIT
    assert len(inbox.take(0, 0)) == 1


@pytest.mark.hostile("a site asks on 64 channels at once", "8 wait, the rest are turned away")
def test_a_site_has_so_many_messages_underway_and_no_more(inbox, serializer):
    """Each waits two seconds for an order; those of the other site are answered meanwhile."""
    outcomes = []

    def wait(channel):
        try:
            outcomes.append(
                type(ask(inbox, serializer, FLOODER, Next(client=FLOODER), channel=channel)).__name__
            )
        except TransportError:
            outcomes.append("turned away")

    threads = [threading.Thread(target=wait, args=(channel,)) for channel in range(64)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    began = time.monotonic()
    assert ask(inbox, serializer, HONEST, Heartbeat(client=HONEST)) is not None
    assert time.monotonic() - began < 1
    for thread in threads:
        thread.join()
    assert outcomes.count("Wait") == LIMITS.messages == 8
    assert outcomes.count("turned away") == 64 - 8


def test_bytes_underway_are_bounded():
    quota = Quota(LIMITS)
    for _ in range(4):
        quota.admit(FLOODER, LIMIT)
    with pytest.raises(TransportError, match="4 messages of 4000000 bytes underway"):
        quota.admit(FLOODER, 1)
    quota.release(LIMIT)
    quota.admit(FLOODER, LIMIT)


def test_a_stranger_is_refused_every_time_and_named_once(inbox, serializer):
    for _ in range(50):
        reply = ask(inbox, serializer, "client-9", Next(client="client-9"))
        assert isinstance(reply, Refused)
    [fault] = inbox.take(0, 0)
    assert fault.site == "client-9"


def test_sites_take_turns():
    queue = ArrivalQueue()
    for site in ("a", "a", "a", "b", "a", "c", "b"):
        queue.add(Arrival(site, Heartbeat(client=site)))
    queue.add(Fault("c", ProtocolError("first")))
    queue.add(Fault("c", ProtocolError("second")))
    assert len(queue) == 3
    assert [one.site for one in queue.take()] == ["a", "b", "c", "a", "b", "c", "a", "a"]
    assert not queue.take()
