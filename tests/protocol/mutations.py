"""Damaged and forged frames without end.

    good frame --mutation--> (bytes, must they be refused?)

Damage leaves the checksums wrong, so every damaged frame must be refused. A forger computes them anew, so a
forged frame reaches the checks behind: those that break a rule by construction must be refused, too, and
others may be accepted if what comes out is a message that could have been sent (`judge`).
"""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Callable

from splitft.codecs import CODECS
from splitft.protocol import MESSAGES

PREFIX = struct.Struct("<4sHHIQII")
"""As the page on the format has it, written anew."""

Mutation = Callable[[bytes, random.Random], tuple[bytes, bool]]
"""A frame -> what became of it, and whether it must be refused."""


def opened(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, table of tensors and payload of a good frame."""
    header_bytes = PREFIX.unpack_from(data)[3]
    body = data[PREFIX.size + header_bytes :]
    (table_bytes,) = struct.unpack_from("<Q", body)
    return data[PREFIX.size : PREFIX.size + header_bytes], body[8 : 8 + table_bytes], body[8 + table_bytes :]


def forged(header: bytes, table: bytes, payload: bytes, version: int = 3) -> bytes:
    """A frame of these parts with the right lengths and checksums."""
    body = struct.pack("<Q", len(table)) + table + payload
    start = struct.pack("<4sHHIQ", b"SPFT", version, 0, len(header), len(body))
    return start + struct.pack("<II", zlib.crc32(start + header), zlib.crc32(body)) + header + body


# --- damage: the checksums do not fit any more ---------------------------------------------------


def flip_bits(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    damaged = bytearray(data)
    for place in rng.sample(range(8 * len(data)), rng.choice((1, 1, 2, 8, 64))):
        damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged), True


def truncate(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    return data[: rng.randrange(len(data))], True


def lengthen(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    return data + rng.randbytes(rng.randint(1, 64)), True


def splice(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    start, stop = sorted(rng.sample(range(len(data)), 2))
    moved = data[stop:] + data[start:stop]
    return data[:start] + moved, data[:start] + moved != data


def lie_in_prefix(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    values = list(PREFIX.unpack_from(data))
    place = rng.randrange(1, len(values))
    largest = (0, 2**16, 2**16, 2**32, 2**64, 2**32, 2**32)[place] - 1
    values[place] = rng.choice([v for v in (0, 1, largest, largest // 2) if v != values[place]])
    return PREFIX.pack(*values) + data[PREFIX.size :], True


# --- forgery: right lengths and checksums, wrong contents ----------------------------------------


def another_version(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    return forged(*opened(data), version=rng.choice((0, 2, 4, 65535))), True


def flip_behind_checksums(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    parts = [bytearray(part) for part in opened(data)]
    part = rng.choice([part for part in parts if part])
    for _ in range(rng.choice((1, 1, 2, 5))):
        part[rng.randrange(len(part))] ^= 1 << rng.randrange(8)
    return forged(*map(bytes, parts)), False


def cut_behind_checksums(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    parts = list(opened(data))
    place = rng.choice([i for i, part in enumerate(parts) if part])
    parts[place] = parts[place][: rng.randrange(len(parts[place]))]
    return forged(*parts), place != 1  # a table's trailing blanks may go


def not_finite(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """NaN or infinity in a tensor of floating point: numbers, scales, whatever there is."""
    header, text, payload = opened(data)
    sizes = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
    floats = [f for f in json.loads(text).values() if f["dtype"] in sizes and math.prod(f["shape"])]
    if not floats:
        return forged(b"\xff" + header, text, payload), True
    facts = rng.choice(floats)
    exponent = {
        "F16": b"\x00\x7c",
        "BF16": b"\x80\x7f",
        "F32": b"\0\0\x80\x7f",
        "F64": b"\0" * 6 + b"\xf0\x7f",
    }
    pattern = bytearray(exponent[facts["dtype"]])
    pattern[0] |= rng.choice((0, 1))  # infinity or NaN
    start = facts["data_offsets"][0] + sizes[facts["dtype"]] * rng.randrange(math.prod(facts["shape"]))
    return forged(header, text, payload[:start] + bytes(pattern) + payload[start + len(pattern) :]), True


NASTY = (
    -1, 2**63, 2**64, 10**400, 2**40, 2**62, 0, 1, True, None, "", "x" * 300, "\ud800", [], {},
    [[[[[[[[[0]]]]]]]]], 1e300, -0.0, [1, 2], {"a": 1}, "hidden", "fp32", "F64", [2**40, 2**40], [-5, 64],
)  # fmt: skip
REFUSED = (2**63, 2**64, 10**400, [[[[[[[[[0]]]]]]]]])
"""Of these, what no header may have anywhere."""


def another_value(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Something unfit somewhere in the header or in the table."""
    header, table, payload = opened(data)
    texts, which = [header, table], rng.randrange(2)
    tree = json.loads(texts[which])
    value = rng.choice(NASTY)
    if not _replace_somewhere(tree, value, rng):
        return flip_bits(data, rng)
    texts[which] = json.dumps(tree).encode()
    return forged(*texts, payload), value in REFUSED


def key_twice(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    header, table, payload = opened(data)
    texts, which = [header, table], rng.randrange(2)
    if which and json.loads(table) == {}:
        which = 0
    text = texts[which]
    key, _, _ = text[1:].partition(b":")
    texts[which] = b"{" + key + b":1," + text[1:]
    return forged(*texts, payload), True


def key_missing(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Something left out of the header or of the table; what has a default may be."""
    header, table, payload = opened(data)
    texts, which = [header, table], rng.randrange(2)
    tree = json.loads(texts[which])
    objects, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        objects += [node] if node else []
        waiting += [child for child in node.values() if isinstance(child, dict)]
    if not objects:
        return another_version(data, rng)
    node = rng.choice(objects)
    del node[rng.choice(list(node))]
    texts[which] = json.dumps(tree).encode()
    return forged(*texts, payload), False


def shape_that_lies(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A huge, negative or empty shape, announced or stored; it differs from the true one."""
    header, table, payload = opened(data)
    texts, which = [header, table], rng.randrange(2)
    tree = json.loads(texts[which])
    tensors = tree["tensors"] if which == 0 else tree
    if not tensors:
        return another_version(data, rng)
    facts = tensors[rng.choice(list(tensors))]
    lies = (
        [2**31, 2**31],
        [-1, 64],
        [2**62],
        [0, 64],
        [2**40, 64],
        [0],
        [1] * 9,
        [2**40] * 8,
        [1.5, 2],
    )
    facts["shape"] = rng.choice([lie for lie in lies if lie != facts["shape"]])
    texts[which] = json.dumps(tree).encode()
    return forged(*texts, payload), True


def overlapping(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """Offsets that overlap, leave a gap, run backwards or lie outside."""
    header, table, payload = opened(data)
    tree = json.loads(table)
    if not payload:
        return forged(header, table, b"\0"), True
    filled = [name for name, facts in tree.items() if facts["data_offsets"][0] < facts["data_offsets"][1]]
    facts = tree[rng.choice(filled)]  # where a tensor without a byte lies says nothing
    start, stop = facts["data_offsets"]
    shift = rng.choice((-8, -1, 1, 8, 2**40, -(2**40), 2**63))
    places = ([start + shift, stop + shift], [start, stop + shift], [start + shift, stop], [stop, start])
    facts["data_offsets"] = rng.choice([place for place in places if place != [start, stop]])
    return forged(header, json.dumps(tree).encode(), payload), True


def renamed(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    """A tensor under another name, in one table or in both; or one that is not announced."""
    header, table, payload = opened(data)
    facts, stored = json.loads(header), json.loads(table)
    if not facts["tensors"]:
        return key_twice(data, rng)
    old = rng.choice(list(facts["tensors"]))
    new = rng.choice(
        ("labels", "hidden/x", "adapters/x", "moments/0.q.A.step/", "__metadata__", "x#", "", "\0")
    )
    facts["tensors"][new] = facts["tensors"].pop(old)
    if rng.random() < 0.5:
        stored = {
            new + name.removeprefix(old) if name.startswith(old) else name: v for name, v in stored.items()
        }
    return forged(json.dumps(facts).encode(), json.dumps(stored).encode(), payload), new != old


def another_codec(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    header, table, payload = opened(data)
    facts = json.loads(header)
    if not facts["tensors"]:
        return another_version(data, rng)
    entry = facts["tensors"][rng.choice(list(facts["tensors"]))]
    key = rng.choice(("codec", "role", "dtype"))
    choices = {"codec": [*CODECS, "raw", "lzma"], "role": ["hidden", "gradient", "adapter", "label", "x"],
               "dtype": ["F32", "BF16", "F64", "I64", "U8", "F99"]}[key]  # fmt: skip
    entry[key] = rng.choice([one for one in choices if one != entry[key]])
    return forged(json.dumps(facts).encode(), table, payload), True


def another_kind(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    header, table, payload = opened(data)
    facts = json.loads(header)
    kinds = [*MESSAGES, "Pickle", ""]
    facts["kind"] = rng.choice([kind for kind in kinds if kind != facts["kind"]])
    return forged(json.dumps(facts).encode(), table, payload), facts["kind"] in ("Pickle", "")


def deep(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    header, table, payload = opened(data)
    bracket = rng.choice((b"[", b'{"a":'))
    tower = bracket * rng.choice((20, 1000, 20_000))
    return forged(*rng.choice(((header[:-1] + b',"x":' + tower, table), (header, tower))), payload), True


def not_text(data: bytes, rng: random.Random) -> tuple[bytes, bool]:
    header, table, payload = opened(data)
    strange = rng.choice((b"\xff\xfe", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\0", b"NaN", b"Infinity"))
    texts, which = [header, table], rng.randrange(2)
    place = rng.randrange(len(texts[which]))
    texts[which] = texts[which][:place] + strange + texts[which][place:]
    return forged(*texts, payload), strange[0] >= 0x80


DAMAGE: tuple[Mutation, ...] = (flip_bits, truncate, lengthen, splice, lie_in_prefix)
FORGERY: tuple[Mutation, ...] = (
    another_version, flip_behind_checksums, cut_behind_checksums, not_finite, another_value, key_twice,
    key_missing, shape_that_lies, overlapping, renamed, another_codec, another_kind, deep, not_text,
)  # fmt: skip
MUTATIONS = (*DAMAGE, *FORGERY)


def _replace_somewhere(tree: object, value: object, rng: random.Random) -> bool:
    """Put a value in the place of another one, chosen among all places of a JSON tree."""
    places: list[tuple[object, object]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            places.append((node, key))
            waiting.append(child)
    if not places:
        return False
    node, key = rng.choice(places)
    node[key] = value  # type: ignore[index]
    return True
