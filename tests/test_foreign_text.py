"""Texts of other parties never steer a terminal and never forge a line of a log."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from splitft.cli.app import say
from splitft.errors import ProtocolError
from splitft.foreign_text import LONGEST, printable, printable_data
from splitft.protocol import Declined, EndSession, Refused
from splitft.protocol.frame import Frame, open_frame
from splitft.tracking.table import Table

STEERING = (
    "\x1b[2J",
    "\r",
    "\u202e",
    "\0",
    "\n",
    "\x9b31m",
    "\x07",
    "\u2028",
    "\x7f",
    "\u2066",
    "\ufeff",
    "\t",
)
ANY = st.text(st.characters(), max_size=50)


@pytest.mark.parametrize("text", STEERING)
def test_what_steers_becomes_visible(text):
    shown = printable(f"a{text}b")
    assert shown.isprintable()
    assert text not in shown
    assert "\\" in shown


@given(ANY)
def test_what_is_shown_has_no_control_characters_and_is_shown_the_same_again(text):
    shown = printable(text)
    assert {unicodedata.category(one) for one in shown} & {"Cc", "Cs", "Zl", "Zp"} == set()
    assert all(one in "\u200c\u200d" for one in shown if unicodedata.category(one) == "Cf")
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["Klinik Süd", "病院 3", "می\u200cخواهم", "עברית", "👩\u200d⚕️", "a\u00a0b"])
def test_letters_of_all_scripts_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize("letter", ["x", "\x1b", "\U000e0001"])
def test_the_length_is_bounded(letter):
    assert len(printable(letter * 10**6)) == LONGEST


def test_plain_data_is_made_printable_all_through():
    found = printable_data({"a\r": ["\x1b[2J", 1, None, {"b": ("\0",)}]})
    assert found == {"a\\r": ["\\x1b[2J", 1, None, {"b": ["\\x00"]}]}


@pytest.mark.parametrize("text", STEERING)
def test_no_message_hands_it_on(text):
    for message in (
        Refused(error=f"Error{text}", reason=f"so{text}"),
        EndSession(reason=f"so{text}"),
        Declined(client="north", reason=f"so{text}"),
    ):
        assert message.reason == printable(f"so{text}")
    assert Refused(error=f"Error{text}", reason="").error == printable(f"Error{text}")
    assert str(ProtocolError(f"so{text}")) == printable(f"so{text}")
    frame = open_frame(Frame("Wait", {}, {}, sender=f"splitft{text}").to_bytes())
    assert frame.sender == printable(f"splitft{text}")


@pytest.mark.parametrize("text", STEERING)
def test_no_terminal_gets_it_from_a_table_or_a_line(text):
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    screen.print(Table(["client"], [[f"north{text}south"]]).to_rich())
    if text != "\n":  # a line break in our own text is meant
        say(screen, f"north{text}south")
    written = screen.file.getvalue()
    assert printable(f"north{text}south") in written
    assert text == "\n" or text not in written
