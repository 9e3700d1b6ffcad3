"""What can happen to a round and what a round can ask for; only `round.step` turns the one into the other."""

from __future__ import annotations

from dataclasses import dataclass

from wire.messages import Reason, Refusal, Reply


@dataclass(frozen=True, slots=True)
class Issued:
    """The orders are durable and go out; `now` starts the clock of the deadline (seconds, any fixed origin)."""

    now: float


@dataclass(frozen=True, slots=True)
class Arrived:
    """A reply, its update included, is durable and finite."""

    device: str
    order: str
    reply: Reply


@dataclass(frozen=True, slots=True)
class Refused:
    """A device will not or could not, its update cannot be used, or it was taken back."""

    device: str
    order: str
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Lost:
    """A device's life `seq` has fallen silent or left."""

    device: str
    seq: int


@dataclass(frozen=True, slots=True)
class Born:
    """A device's life `seq` has come, or come back."""

    device: str
    seq: int


@dataclass(frozen=True, slots=True)
class Deadline:
    """A timer fired; it means something only from the round's deadline on."""

    now: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The coordinator came back: the time that it was away is not the devices' fault, so the deadline starts anew."""

    now: float


@dataclass(frozen=True, slots=True)
class Stopped:
    """The operator ended the round."""

    why: str = "stopped by the operator"


Event = Issued | Arrived | Refused | Lost | Born | Deadline | Resumed | Stopped


@dataclass(frozen=True, slots=True)
class Arm:
    """Give `Deadline` at this instant; replaces an earlier `Arm`."""

    at: float


@dataclass(frozen=True, slots=True)
class Send:
    """Send a device its order."""

    device: str
    order: str


@dataclass(frozen=True, slots=True)
class Settle:
    """Tell a device that its reply is committed (after the events of this batch are durable)."""

    device: str
    order: str


@dataclass(frozen=True, slots=True)
class Unwanted:
    """Tell a device to drop an order and whatever it has made of it."""

    device: str
    order: str


@dataclass(frozen=True, slots=True)
class Close:
    """Aggregate the replies of these devices, in this (sorted) order."""

    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give the round up; the state stays what it was."""

    why: str


Effect = Arm | Send | Settle | Unwanted | Close | Abandon


def unusable(reply: Reply, reason: Reason, detail: str) -> Refused:
    """Give what a reply that cannot be used comes to."""
    return Refused(reply.device, reply.order, Refusal(reply.order, reply.device, reply.boot, reason, detail[:2000]))
