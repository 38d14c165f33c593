"""Changed software of a hostile site, for `test_hostile_over_flare.py`: Python imports this when it starts.

In the second step of each round its hidden states are spoilt, each round otherwise. Frames are written by
hand, since the site's own sending would refuse.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace


def not_finite(fields, hidden):
    spoilt = hidden.parts[""].clone()
    spoilt[0, 0] = math.nan
    return fields, replace(hidden, parts={"": spoilt})


def another_width(fields, hidden):
    narrow = hidden.parts[""][:, :-1].contiguous()
    return fields, replace(hidden, shape=tuple(narrow.shape), parts={"": narrow})


def another_step(fields, hidden):
    return {**fields, "step": 99}, hidden


def another_name(fields, hidden):
    return {**fields, "client": "client-1"}, hidden


MISDEEDS = (not_finite, another_width, another_step, another_name)


def change_software() -> None:
    from splitft.deploy.site.session import SiteSession
    from splitft.protocol import Activations, RoundStart
    from splitft.protocol.frame import Frame

    honest, do = SiteSession._send, SiteSession._carry_out

    def order(self, message):
        if isinstance(message, RoundStart):
            self.sent = 0
        return do(self, message)

    def send(self, message):
        if not (isinstance(message, Activations) and message.training):
            return honest(self, message)
        self.sent += 1
        if self.sent != 2:
            return honest(self, message)
        frame = self._serializer.pack(message, self._codec_state)
        fields, hidden = MISDEEDS[message.round - 1](dict(frame.fields), frame.tensors["hidden"])
        self._steps.send(Frame(frame.kind, fields, {**frame.tensors, "hidden": hidden}).to_bytes())
        return None

    SiteSession._carry_out, SiteSession._send = order, send


if any("client.worker_process" in word for word in sys.orig_argv):
    change_software()
