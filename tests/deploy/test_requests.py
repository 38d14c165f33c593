"""Numbered requests: each is answered by the reply to it, whatever else comes."""

from __future__ import annotations

import threading

import pytest

from deploy.network import KEY, LIMIT
from splitft.deploy.requests import Envelope, Pipeline, RequestChannel
from splitft.errors import TransportError, WireError


class Echo:
    """A transport whose server sends every frame back, after some requests were lost."""

    def __init__(self, lost: int = 0):
        self.lost = lost

    def ask(self, data, within_s):
        if self.lost:
            self.lost -= 1
            raise TransportError("lost")
        return data


def test_a_site_does_not_take_the_answer_to_another_message():
    class Wrong:
        def ask(self, data, within_s):
            return Envelope(KEY, 0, 3, b"").to_bytes()

    with pytest.raises(WireError, match="the answer to message 3 came"):
        RequestChannel(Wrong(), KEY, 0, LIMIT).ask(b"next", 1)


def test_a_lost_request_is_sent_again_until_the_time_is_up():
    assert RequestChannel(Echo(lost=2), KEY, 0, LIMIT).ask(b"next", 5) == b"next"
    with pytest.raises(TransportError):
        RequestChannel(Echo(lost=99), KEY, 0, LIMIT).ask(b"next", 0.2)


def test_replies_come_in_the_order_of_the_requests_whichever_is_first():
    first_may_go = threading.Event()

    class Late(Echo):
        def ask(self, data, within_s):
            first_may_go.wait(5)
            return data

    pipeline = Pipeline([RequestChannel(one, KEY, n, LIMIT) for n, one in enumerate((Late(), Echo()))], 5)
    pipeline.send(b"first")
    pipeline.send(b"second")
    assert pipeline.full
    first_may_go.set()
    assert [pipeline.reply(), pipeline.reply()] == [b"first", b"second"]
    pipeline.close()
