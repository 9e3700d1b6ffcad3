"""Where each message goes: at most seven levels, no wildcard ever needed for a piece.

============================== ===================== ========= ============================================
topic                          direction             retained  payload
============================== ===================== ========= ============================================
``e1/F/m``                     coordinator -> all    yes       `Lead`
``e1/F/b/H/I``                 coordinator -> cache  yes       piece I of the blob whose digest starts with H
``e1/F/s/D``                   device -> all         yes       `Presence`
``e1/F/d/D/KIND``              coordinator -> device no        ``order`` `Order`, ``ack`` `Ack`, ``cancel`` `Cancel`,
                                                               ``cert`` `Cert`, ``signed`` `Signed`
``e1/F/u/S/D/KIND``            device -> coordinator no        ``reply``, ``refusal``, ``beat``, ``need``, ``csr``
``e1/F/u/S/D/X/I``             device -> coordinator no        piece I of the update for order X
``e1/F/k/T/csr``               device -> coordinator no        `Csr`, by invitation T
``e1/F/k/T/cert``              coordinator -> device no        `Cert`, by invitation T
============================== ===================== ========= ============================================

F is the federation, D the device, S the shard (always ``0`` for now), H the first 32 hex digits of a digest,
T the 16 hex digits of an invitation's id.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from wire.errors import ConfigError, Malformed

SHARD = "0"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_INVITATION = re.compile(r"[0-9a-f]{16}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,6}")  # one spelling per number


def valid_name(name: str, what: str) -> str:
    """Return a federation's or device's name if it can stand in a topic and in a client id.

    Raises:
        ConfigError: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{what} {name!r}: use 1 to 64 letters, digits, '-' or '_'")
    return name


def lead(federation: str) -> str:
    """Topic of the coordinator's retained state."""
    return f"e1/{federation}/m"


def piece(federation: str, digest: str, index: int) -> str:
    """Topic of one piece of a published blob."""
    return f"e1/{federation}/b/{digest[:32]}/{index}"


def presence(federation: str, device: str) -> str:
    """Topic of a device's retained state; ``+`` stands for all devices."""
    return f"e1/{federation}/s/{device}"


def down(federation: str, device: str, kind: str) -> str:
    """Topic of a message to a device; ``+`` stands for all kinds."""
    return f"e1/{federation}/d/{device}/{kind}"


def up(federation: str, device: str, kind: str) -> str:
    """Topic of a message from a device."""
    return f"e1/{federation}/u/{SHARD}/{device}/{kind}"


def up_piece(federation: str, device: str, order: str, index: int) -> str:
    """Topic of one piece of a device's update."""
    return f"e1/{federation}/u/{SHARD}/{device}/{order}/{index}"


def enrolment(federation: str, invitation: str, kind: str) -> str:
    """Topic of a message by invitation, ``csr`` or ``cert``; ``+`` stands for all invitations."""
    return f"e1/{federation}/k/{invitation}/{kind}"


def all_up(federation: str) -> str:
    """Filter that matches everything that devices send upward."""
    return f"e1/{federation}/u/{SHARD}/#"


@dataclass(frozen=True, slots=True)
class Place:
    """A topic taken apart.

    Attributes:
        room: ``m``, ``b``, ``s``, ``d``, ``u`` or ``k``.
        device: Empty in rooms ``m``, ``b`` and ``k``.
        kind: Kind of message; for a piece, the order's id (room ``u``) or the digest's prefix (room ``b``).
        index: Number of the piece; -1 for everything else.
        invitation: Its id in room ``k``; else empty.
    """

    room: str
    device: str = ""
    kind: str = ""
    index: int = -1
    invitation: str = ""


def parse(topic: str) -> Place:
    """Take a topic apart.

    Raises:
        Malformed: It is none of ours.
    """
    match topic.split("/"):
        case ["e1", _, "m"]:
            return Place("m")
        case ["e1", _, "b", digest, index] if _INDEX.fullmatch(index):
            return Place("b", kind=digest, index=int(index))
        case ["e1", _, "s", device] if _NAME.fullmatch(device):
            return Place("s", device)
        case ["e1", _, "d", device, kind] if _NAME.fullmatch(device):
            return Place("d", device, kind)
        case ["e1", _, "k", invitation, kind] if _INVITATION.fullmatch(invitation):
            return Place("k", kind=kind, invitation=invitation)
        case ["e1", _, "u", _, device, kind] if _NAME.fullmatch(device):
            return Place("u", device, kind)
        case ["e1", _, "u", _, device, order, index] if _INDEX.fullmatch(index) and _NAME.fullmatch(device):
            return Place("u", device, order, int(index))
        case _:
            raise Malformed(f"topic {topic[:120]!r} is none of ours")
