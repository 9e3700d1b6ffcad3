"""One round as a fold, `step(round, event) -> (round, effects)`: no clock, socket or file; O(log devices) per event.

A round has one seat per device that was asked. While the round is open, this table is the whole behaviour of a seat;
what is not in the table changes nothing and has no effect.

============ ======================= ================= ==========================================================
seat         event                   seat becomes      effect
============ ======================= ================= ==========================================================
asked, lost  `Arrived`               arrived           `Settle`
asked, lost  `Refused`               refused           `Unwanted` (the receipt of a refusal)
asked        `Lost`                  lost
lost, asked  `Born`                  asked             `Send` (again at every birth: the broker may have lost it)
arrived      `Arrived` `Refused`     arrived           `Settle` (its receipt was lost; counted once all the same)
arrived      `Born`                  arrived           `Settle`
refused      `Arrived` `Refused`     refused           `Unwanted`
refused      `Born`                  refused           `Unwanted`
any          `Lost` or `Born` of a life older than one seen: as if it had not come
none         `Arrived` `Refused`     none              `Settle` if this device's last counted order, else `Unwanted`
============ ======================= ================= ==========================================================

When a round is over nothing changes any more: arrived seats answer `Settle`, all others `Unwanted`. So the word that a
device once had on an order, committed or unwanted, is its word for ever; `word` gives it without an event.

============ ======================================== ============ ================================================
phase        event                                    phase        effects
============ ======================================== ============ ================================================
planned      `Issued`                                 open         `Arm`, a `Send` per seat
open         every seat settled, one or more arrived  closed       `Close`
open         every seat settled, none arrived         abandoned    `Abandon`
open         all unsettled seats lost, quorum there   closed       `Close`, an `Unwanted` per unsettled seat
open         `Deadline`, quorum there                 closed       `Close`, an `Unwanted` per unsettled seat
open         `Deadline`, no quorum                    abandoned    `Abandon`, an `Unwanted` per unsettled seat
open         `Deadline` before its time               open         `Arm`
planned,open `Stopped`                                abandoned    `Abandon`, an `Unwanted` per unsettled seat
open         `Resumed`                                open         `Arm` with the full time, a `Send` per asked seat
closed       `Resumed`                                closed       `Close` again, an `Unwanted` per unsettled seat
abandoned    `Resumed`                                abandoned    `Abandon` again, an `Unwanted` per unsettled seat
============ ======================================== ============ ================================================

The shell journals every event for which `step` returned another round than it was given (`Resumed` aside, which says
that a coordinator came back), in one transaction, *before* it performs the effects. Replaying those events gives the
same round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from immutables import Map

from coordinator.events import (
    Abandon,
    Arm,
    Arrived,
    Born,
    Close,
    Deadline,
    Effect,
    Event,
    Issued,
    Lost,
    Refused,
    Resumed,
    Send,
    Settle,
    Stopped,
    Unwanted,
)
from wire.messages import Refusal, Reply

__all__ = [
    "Abandon",
    "Arm",
    "Arrived",
    "Born",
    "Close",
    "Deadline",
    "Effect",
    "Event",
    "Issued",
    "Lost",
    "Phase",
    "Refused",
    "Resumed",
    "Round",
    "Seat",
    "SeatState",
    "Send",
    "Settle",
    "Stopped",
    "Unwanted",
    "departed",
    "interrupted",
    "open_round",
    "step",
    "word",
]

_NOBODY: Map[str, str] = Map()
SeatState = Literal["asked", "lost", "arrived", "refused"]
Phase = Literal["planned", "open", "closed", "abandoned"]


@dataclass(frozen=True, slots=True)
class Seat:
    """What a round knows of one device.

    Attributes:
        device: Its name.
        order: Id of the order that it was given.
        state: ``asked``, ``lost`` (advisory), ``arrived`` or ``refused``; the last two are settled.
        seq: Highest life of the device that was seen.
        reply: Present when arrived.
    """

    device: str
    order: str
    state: SeatState = "asked"
    seq: int = 0
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One round.

    Attributes:
        number: From 1.
        run: Token of the run.
        seats: Device to seat.
        quorum: Replies that a close before everybody settled needs; each refusal lowers it to what can still arrive.
        seconds: From `Issued` to the deadline.
        deadline: Absolute, on the clock of `Issued`; infinite before.
        phase: ``planned``, ``open``, ``closed`` or ``abandoned``.
        arrived: Seats in that state.
        refused: Seats in that state.
        lost: Seats in that state.
        counted: Device to the last order that was counted, of this round or an earlier one.
    """

    number: int
    run: str
    seats: Map[str, Seat]
    quorum: int
    seconds: float
    deadline: float = float("inf")
    phase: Phase = "planned"
    arrived: int = 0
    refused: int = 0
    lost: int = 0
    counted: Map[str, str] = _NOBODY

    @property
    def over(self) -> bool:
        """Say whether the round has settled."""
        return self.phase in ("closed", "abandoned")

    @property
    def unsettled(self) -> int:
        """Count the seats that may still answer."""
        return len(self.seats) - self.arrived - self.refused

    @property
    def replies(self) -> tuple[Reply, ...]:
        """All replies, sorted by device. Cost: O(devices log devices)."""
        return tuple(s.reply for _, s in sorted(self.seats.items()) if s.reply is not None)


_TABLE: Mapping[tuple[SeatState, type], tuple[SeatState, type[Send | Settle | Unwanted] | None]] = {
    ("asked", Arrived): ("arrived", Settle),
    ("lost", Arrived): ("arrived", Settle),
    ("asked", Refused): ("refused", Unwanted),
    ("lost", Refused): ("refused", Unwanted),
    ("asked", Lost): ("lost", None),
    ("lost", Lost): ("lost", None),
    ("asked", Born): ("asked", Send),
    ("lost", Born): ("asked", Send),
    ("arrived", Arrived): ("arrived", Settle),
    ("arrived", Refused): ("arrived", Settle),
    ("arrived", Born): ("arrived", Settle),
    ("refused", Arrived): ("refused", Unwanted),
    ("refused", Refused): ("refused", Unwanted),
    ("refused", Born): ("refused", Unwanted),
}


def open_round(
    number: int,
    run: str,
    orders: Mapping[str, str],
    *,
    quorum: int | None,
    seconds: float,
    earlier: Round | None = None,
) -> Round:
    """Lay out a round that is not issued yet.

    Args:
        number: From 1.
        run: Token of the run.
        orders: Device to the id of its order.
        quorum: Least number of replies; None means all.
        seconds: Time that the devices have.
        earlier: The round before, for whose devices a lost receipt can still be repeated.
    """
    seats = Map({device: Seat(device, order) for device, order in orders.items()})
    size = len(seats)
    return Round(
        number=number,
        run=run,
        seats=seats,
        quorum=size if quorum is None else min(quorum, size),
        seconds=seconds,
        counted=_NOBODY if earlier is None else earlier.counted,
    )


def counted(round_: Round | None, done: int) -> set[str]:
    """Name the updates that an open round counts on; those of a closed one (up to number `done`) nobody needs any more."""
    if round_ is None or done >= round_.number:
        return set()
    return {reply.update.digest for reply in round_.replies if reply.update is not None}


def word(current: Round, device: str, order: str) -> Literal["more", "committed", "unwanted"]:
    """Say what a device is to be told about an order that it offers; ``more`` means that its reply is still wanted."""
    seat = current.seats.get(device)
    if current.counted.get(device) == order:
        return "committed"
    if current.phase == "open" and seat is not None and seat.order == order and seat.state in ("asked", "lost"):
        return "more"
    return "unwanted"


def interrupted(current: Round | None, device: str) -> bool:
    """Say whether a device was lost in this round, or born anew: how long it took till it answered is then no turn of it."""
    seat = current.seats.get(device) if current is not None else None
    return seat is not None and seat.seq > 0


def departed(current: Round | None, hears: Callable[[str], bool]) -> tuple[Refused, ...]:
    """Give what an open round is to be told of devices that were taken back: nobody hears what they might still answer.

    One that is enrolled again is another device, and takes part from the next round on. Cost: one look per seat.
    """
    if current is None or current.phase != "open":
        return ()
    waited = [(s.device, s.order) for s in current.seats.values() if s.state in ("asked", "lost")]
    gone = sorted((device, order) for device, order in waited if not hears(device))
    why = "the device is not in the fleet any more"
    return tuple(Refused(d, order, Refusal(order, d, current.run, "cancelled", why)) for d, order in gone)


def step(current: Round, event: Event) -> tuple[Round, tuple[Effect, ...]]:
    """Fold one event into a round.

    Returns:
        The round after the event, the very same object when nothing changed, and what to do in this order. Cost:
        O(log devices), and O(devices) once when the round is issued, resumed or settles.
    """
    match event:
        case Arrived() | Refused():
            return _answered(current, event)
        case Lost() | Born():
            return _seen(current, event)
        case Deadline(now=now):
            return _timed(current, now)
        case Issued(now=now) if current.phase == "planned":
            return _opened(current, now)
        case Resumed(now=now):
            return _resumed(current, now)
        case Stopped(why=why) if not current.over:
            return _settled(replace(current, phase="abandoned"), Abandon(why))
        case _:
            return current, ()


def _answered(current: Round, event: Arrived | Refused) -> tuple[Round, tuple[Effect, ...]]:
    seat = current.seats.get(event.device)
    if seat is None or seat.order != event.order or current.phase != "open":
        said = word(current, event.device, event.order)
        receipt = Settle if said == "committed" else Unwanted
        return current, (receipt(event.device, event.order),)
    return _moved(current, seat, event)


def _seen(current: Round, event: Lost | Born) -> tuple[Round, tuple[Effect, ...]]:
    seat = current.seats.get(event.device)
    if seat is None or event.seq < seat.seq or current.phase == "planned":
        return current, ()
    if current.over:
        receipt = Settle if seat.state == "arrived" else Unwanted
        return current, (receipt(seat.device, seat.order),) if isinstance(event, Born) else ()
    return _moved(current, seat, event)


def _moved(current: Round, seat: Seat, event: Arrived | Refused | Lost | Born) -> tuple[Round, tuple[Effect, ...]]:
    """Look the seat's move up in the table, keep the counts and see whether that settles the round."""
    target, effect = _TABLE.get((seat.state, type(event)), (seat.state, None))
    effects: tuple[Effect, ...] = () if effect is None else (effect(seat.device, seat.order),)
    moved = replace(
        seat,
        state=target,
        seq=event.seq if isinstance(event, (Lost, Born)) else seat.seq,
        reply=event.reply if isinstance(event, Arrived) and target != seat.state else seat.reply,
    )
    if moved == seat:
        return current, effects
    following = replace(
        current,
        seats=current.seats.set(seat.device, moved),
        arrived=current.arrived + (target == "arrived") - (seat.state == "arrived"),
        refused=current.refused + (target == "refused") - (seat.state == "refused"),
        lost=current.lost + (target == "lost") - (seat.state == "lost"),
        counted=current.counted.set(seat.device, seat.order) if target == "arrived" else current.counted,
    )
    after, more = _judged(following)
    return after, effects + more


def _judged(current: Round) -> tuple[Round, tuple[Effect, ...]]:
    """Settle an open round for which nothing more is worth waiting for."""
    if not current.unsettled and not current.arrived:
        why = f"all {current.refused} devices refused" if current.refused else "there is no device to ask"
        return _settled(replace(current, phase="abandoned"), Abandon(why))
    if current.unsettled == current.lost and current.arrived >= _needed(current):
        return _closed(current)
    return current, ()


def _timed(current: Round, now: float) -> tuple[Round, tuple[Effect, ...]]:
    if current.phase != "open":
        return current, ()
    if now < current.deadline:
        return current, (Arm(current.deadline),)
    if current.arrived >= _needed(current):
        return _closed(current)
    why = f"{current.arrived} of {_needed(current)} needed replies at the deadline, {current.lost} devices lost"
    return _settled(replace(current, phase="abandoned"), Abandon(why))


def _needed(current: Round) -> int:
    return max(1, min(current.quorum, len(current.seats) - current.refused))


def _opened(current: Round, now: float) -> tuple[Round, tuple[Effect, ...]]:
    following = replace(current, phase="open", deadline=now + current.seconds)
    after, more = _judged(following)
    return after, (Arm(following.deadline), *_orders(following), *more)


def _resumed(current: Round, now: float) -> tuple[Round, tuple[Effect, ...]]:
    if current.phase == "closed":
        return _settled(current, _close(current))
    if current.phase == "abandoned":
        return _settled(current, Abandon("abandoned before the coordinator stopped"))
    if current.phase == "planned":
        return current, ()
    following = replace(current, deadline=now + current.seconds)
    return following, (Arm(following.deadline), *_orders(following))


def _orders(current: Round) -> list[Send]:
    return [Send(s.device, s.order) for _, s in sorted(current.seats.items()) if s.state == "asked"]


def _closed(current: Round) -> tuple[Round, tuple[Effect, ...]]:
    return _settled(replace(current, phase="closed"), _close(current))


def _close(current: Round) -> Close:
    return Close(tuple(sorted(s.device for s in current.seats.values() if s.state == "arrived")))


def _settled(current: Round, outcome: Close | Abandon) -> tuple[Round, tuple[Effect, ...]]:
    if not current.unsettled:
        return current, (outcome,)
    left = [s for _, s in sorted(current.seats.items()) if s.state in ("asked", "lost")]
    return current, (outcome, *(Unwanted(s.device, s.order) for s in left))
