"""Seeded damage to bytes that have a form: msgpack trees, blobs, framed documents and plain bytes.

A mutation of plain bytes alone rarely gets past the first check. So a document is also taken apart, changed in one place and
written again by a writer that can lie: about lengths, with keys that stand twice, in longer forms than are needed.
"""

from __future__ import annotations

import contextlib
import math
import struct

import msgpack

INTEGERS = (0, 1, -1, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**53 + 1)
EXTREMES = (*INTEGERS, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, 1.0, 0.5, math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, 1e18, -1e-9)
TEXTS = ("", "a", "\0", "..", "a/b", "#", "x" * 65, "x" * 2001, "\u2713" * 40, "abcdef0123456789", "ab" * 32, "AB" * 32)

JUNK = (b"\xc1", b"\xd4\x01\x00", b"\xd6\xff\0\0\0\0", b"\xc7\x00\x05", b"\xa1\xff", b"\xdd\xff\xff\xff\xff")


class Pairs:
    """A map as a list of its pairs, so that a key can stand twice."""

    def __init__(self, pairs):
        self.pairs = list(pairs)


def opened(data):
    """Read a msgpack document into lists and `Pairs`; None when it is none.

    An extension, which msgpack gives as a tuple, stands for itself: tuples are pairs here.
    """
    try:
        return msgpack.unpackb(data, object_pairs_hook=Pairs, strict_map_key=False, ext_hook=_extension)
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError):
        return None


def _head(size, forms, rng, lies):
    if rng.random() < lies:
        size = rng.choice((0, max(0, size - 1), size + 1, size + 16, 15, 16, 255, 65_535, 65_536, 2**31, 2**32 - 1))
    fitting = [(mark, code, top) for mark, code, top in forms if size <= top]
    mark, code, _ = fitting[0] if rng.random() < 0.95 else rng.choice(fitting)
    return bytes([mark | size]) if not code else struct.pack(f">B{code}", mark, size)


_TEXT = ((0xA0, "", 31), (0xD9, "B", 255), (0xDA, "H", 65_535), (0xDB, "I", 2**32 - 1))
_BYTES = ((0xC4, "B", 255), (0xC5, "H", 65_535), (0xC6, "I", 2**32 - 1))
_LIST = ((0x90, "", 15), (0xDC, "H", 65_535), (0xDD, "I", 2**32 - 1))
_MAP = ((0x80, "", 15), (0xDE, "H", 65_535), (0xDF, "I", 2**32 - 1))


def packed(value, rng, lies=0.0):
    """Write a document; every length is a lie with the chance `lies`."""
    if isinstance(value, Pairs):
        inner = b"".join(packed(half, rng, lies) for pair in value.pairs for half in pair)
        return _head(len(value.pairs), _MAP, rng, lies) + inner
    if isinstance(value, dict):
        return packed(Pairs(value.items()), rng, lies)
    if isinstance(value, list):
        return _head(len(value), _LIST, rng, lies) + b"".join(packed(item, rng, lies) for item in value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return _head(len(data), _TEXT, rng, lies) + data
    if isinstance(value, bytes):
        return _head(len(value), _BYTES, rng, lies) + value
    if isinstance(value, Raw):
        return value.data
    if type(value) is int:
        value = max(-(2**63), min(value, 2**64 - 1))
    return msgpack.packb(value)


class Raw:
    """Bytes that stand for themselves in a document."""

    def __init__(self, data):
        self.data = data


def _extension(code, data):
    return Raw(msgpack.packb(msgpack.ExtType(code, data)))


def nasty(rng):
    """Make a value that nobody expects."""
    kind = rng.randrange(12) if rng.random() < 0.3 else rng.randrange(8)
    if kind < 3:
        return rng.choice(EXTREMES) + (rng.randrange(-2, 3) if rng.random() < 0.2 else 0) * (kind == 0)
    if kind < 5:
        return rng.choice(FLOATS)
    if kind == 5:
        return rng.choice(TEXTS)
    if kind == 6:
        return rng.randbytes(rng.choice((0, 1, 8, 33)))
    if kind == 7:
        return rng.choice((None, True, False, [], Pairs([])))
    if kind == 8:
        mark = rng.choice((b"\x91", b"\x81\xa1v", b"\x81\x01", b"\xdc\x40\x00", b"\xdd\x00\x00\x04\x00"))
        return Raw(mark * rng.choice((2, 30, 500, 990, 1015, 1024, 3000)) + b"\xc0")
    if kind == 9:
        return Raw(rng.choice(JUNK))
    if kind == 10:
        return [rng.choice((0, "a", None, [], Pairs([])))] * rng.choice((1, 9, 65, 1025, 5000))
    return Pairs((f"k{i}", i) for i in range(rng.choice((1, 100, 2000))))


def _places(tree, found):
    """List every (container, key) of a tree."""
    items = tree.pairs if isinstance(tree, Pairs) else tree if isinstance(tree, list) else ()
    for i, item in enumerate(items):
        found.append((items, i))
        _places(item[1] if isinstance(tree, Pairs) else item, found)
    return found


def tree(value, rng):
    """Change a tree in one to three places; gives the tree."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value, [])
        if not places:
            return nasty(rng)
        items, i = rng.choice(places)
        item = items[i]
        pair = isinstance(item, tuple)
        action = rng.randrange(10)
        if action < 5:
            items[i] = (item[0], _changed(item[1], rng)) if pair else _changed(item, rng)
        elif action == 5:
            del items[i]
        elif action == 6:
            items.insert(i, item)  # a key twice, an item twice
        elif action == 7:
            other, j = rng.choice(places)
            taken = other[j] if j < len(other) else item
            taken = taken[1] if isinstance(taken, tuple) else taken
            if not _holds(taken, items):
                items[i] = (item[0], taken) if pair else taken
        elif action == 8 and pair:
            items[i] = (rng.choice((*TEXTS[:8], item[0], 1, b"k")), item[1])
        else:
            rng.shuffle(items)
    return value


def _holds(tree_, items):
    """Say whether a part of a tree holds this list: it must not be put into itself."""
    inner = tree_.pairs if isinstance(tree_, Pairs) else tree_ if isinstance(tree_, list) else ()
    return inner is items or any(_holds(item[1] if isinstance(item, tuple) else item, items) for item in inner)


def _changed(value, rng):
    """Change a value a little, or put something else in its place."""
    if rng.random() < 0.5:
        if type(value) is int and abs(value) < 2**62:
            return value + rng.choice((-1, 1, 7, 8, 64, 2**16, value, -2 * value))
        if type(value) is bytes and value:
            return plain(value, value, rng)
        if type(value) is str and value:
            place = rng.randrange(len(value))
            return value[:place] + rng.choice(("", "\n", "\0", "A", "/", "\u0661")) + value[place + 1 :]
    return nasty(rng)


def plain(data, other, rng):
    """Damage plain bytes: flips, cuts, splices, integers of extreme value at any place, repeats."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if not found:
            return bytes(other[: rng.randrange(64)])
        place = rng.randrange(len(found))
        action = rng.randrange(9)
        if action < 2:
            found[place] ^= 1 << rng.randrange(8)
        elif action == 2:
            found[place] = rng.choice((0, 1, 0x7F, 0x80, 0x90, 0xA0, 0xC0, 0xC1, 0xC6, 0xDB, 0xDC, 0xDD, 0xDF, 0xFF))
        elif action == 3:
            del found[place:]
        elif action == 4:
            width = rng.choice((1, 2, 4, 8))
            number = (rng.choice(EXTREMES) & (1 << 8 * width) - 1).to_bytes(width, rng.choice(("big", "little")))
            found[place : place + width] = number
        elif action == 5:
            start = rng.randrange(len(other) or 1)
            found[place : place + rng.randrange(32)] = other[start : start + rng.randrange(64)]
        elif action == 6:
            end = place + rng.randrange(1, 64)
            found[place:place] = found[place:end] * rng.choice((1, 2, 50))
        elif action == 7:
            del found[place : place + rng.randrange(1, 16)]
        else:
            found[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(found)


def document(data, other, rng):
    """Damage a msgpack document."""
    read = opened(data) if rng.random() < 0.75 else None
    if read is None:
        return plain(data, other, rng)
    with contextlib.suppress(RecursionError):  # what an earlier mutation nested too deep for this writer
        return packed(tree(read, rng), rng, rng.choice((0.0, 0.0, 0.02, 0.2)))
    return plain(data, other, rng)


def framed(data, other, rng):
    """Damage a document that stands behind its length."""
    if rng.random() < 0.2:
        return plain(data, other, rng)
    inner = document(data[4:], other[4:], rng)
    lie = rng.choice((0, 0, 0, 0, 1, -1, 2**20, 2**31))
    return struct.pack(">I", max(0, min(len(inner) + lie, 2**32 - 1))) + inner


def blob(data, other, rng):
    """Damage a blob: its header, one of its bodies, or the container."""
    read = opened(data) if rng.random() < 0.85 else None
    if not isinstance(read, list) or len(read) % 2 == 0 or not isinstance(read[0], Pairs):
        return plain(data, other, rng)
    header, bodies = read[0], [body for body in read[2::2] if isinstance(body, bytes)]
    action = rng.randrange(8)
    if bodies and action < 4:
        place = rng.randrange(len(bodies))
        strange = opened(other)
        spare = [b for b in strange if isinstance(b, bytes)] if isinstance(strange, list) else []
        if action == 0 and spare:
            bodies[place] = rng.choice(spare)
        elif action == 1 and len(bodies) > 1:
            rng.shuffle(bodies)
        else:
            bodies[place] = plain(bodies[place], rng.choice(spare or [other]), rng)
    made = b""
    with contextlib.suppress(RecursionError):
        if action > 2:
            tree(header, rng)
        made = packed(header, rng, rng.choice((0.0, 0.0, 0.0, 0.05)))
    made = struct.pack(">BI", 0xDD, 1 + 2 * len(bodies)) + made
    for body in bodies:
        pad = -(len(made) + 10) % 64
        made += struct.pack(">BI", 0xC6, pad) + bytes(pad) + struct.pack(">BI", 0xC6, len(body)) + body
    return made if rng.random() < 0.9 else plain(made, other, rng)
