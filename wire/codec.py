"""Messages to bytes and back: one msgpack map each, small, with the version and the kind in front.

``{"v": 1, "k": "order", ...fields}``. Unknown keys are ignored, so that a newer peer may add some; a missing or mistyped
one is `Malformed` with its path.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack

from wire import VERSION, messages
from wire.errors import Malformed, TooLarge, Unsupported
from wire.schema import from_plain, shown, to_plain, unpack

T = TypeVar("T")

KINDS: dict[str, type[Any]] = {
    "lead": messages.Lead,
    "presence": messages.Presence,
    "beat": messages.Beat,
    "order": messages.Order,
    "reply": messages.Reply,
    "refusal": messages.Refusal,
    "ack": messages.Ack,
    "need": messages.Need,
    "cancel": messages.Cancel,
    "csr": messages.Csr,
    "cert": messages.Cert,
    "signed": messages.Signed,
}
"""The word in ``k`` to the class of the message; topics use the same words."""

_NAMES = {cls: kind for kind, cls in KINDS.items()}


def encode(message: Any) -> bytes:
    """Give a message's bytes.

    Raises:
        TooLarge: It is longer than `messages.MESSAGE_BYTES`.
    """
    data: bytes = msgpack.packb({"v": VERSION, "k": _NAMES[type(message)], **to_plain(message)})
    if len(data) > messages.MESSAGE_BYTES:
        raise TooLarge(f"a {_NAMES[type(message)]} of {len(data)} bytes; the limit is {messages.MESSAGE_BYTES}")
    return data


def decode(data: bytes | memoryview, cls: type[T]) -> T:
    """Read a message of a known kind. Time and memory are linear in `data`, which is bounded first.

    Raises:
        TooLarge: `data` is longer than the limit.
        Malformed: It is not one msgpack map, or a field is missing, mistyped or out of bounds.
        Unsupported: It speaks another major version.
    """
    plain = unpack(data, messages.MESSAGE_BYTES)
    if not isinstance(plain, dict):
        raise Malformed(f"expected a map, got {type(plain).__name__}")
    version = plain.get("v")
    if type(version) is not int or version != VERSION:
        raise Unsupported(f"wire version {shown(version)}; this side speaks {VERSION}")
    kind = _NAMES[cls]
    if plain.get("k") != kind:
        raise Malformed(f"expected a {kind}, got {shown(plain.get('k'))}", "$.k")
    return from_plain(cls, plain)
