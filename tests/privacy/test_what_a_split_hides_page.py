"""`docs/what-a-split-hides.md` lists every field of every message, so that none is added unseen."""

from __future__ import annotations

import re
from pathlib import Path

from splitft.audit.attacks import ATTACKS
from splitft.protocol import MESSAGES
from splitft.protocol.control import CONTROL_MESSAGES

PAGE = (Path(__file__).parents[2] / "docs/what-a-split-hides.md").read_text(encoding="utf-8")


def _rows() -> list[list[str]]:
    table = re.search(r"<!-- fields -->(.*?)<!-- /fields -->", PAGE, re.DOTALL).group(1)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_field_of_every_message_is_in_the_table_once_with_what_it_tells():
    listed = [field for fields, *_ in _rows() for field in re.findall(r"`([^`]+)`", fields)]
    kinds = [*MESSAGES.values(), *CONTROL_MESSAGES]
    sent = {f"{kind.frame_kind()}.{name}" for kind in kinds for name in kind.model_fields}
    assert sorted(listed) == sorted(sent)
    assert all(tells for _, tells, _ in _rows())
    assert {kind.frame_kind() for kind in kinds if not kind.model_fields} == {"Wait"}
    assert "`Wait` has no field" in PAGE


def test_every_attack_is_described():
    for name in ATTACKS:
        assert re.search(rf"\*\*{name}\*\*", PAGE), name
