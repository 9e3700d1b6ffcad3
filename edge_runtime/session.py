"""A device's life with one order at a time, as a table: ``step(session, event) -> (session, effects)``. Pure.

============ ==================== ============ =====================================================
phase        event                becomes      effects
============ ==================== ============ =====================================================
any          `Ordered`, new       fetching     `Forget` the old one, `Fetch`
any          `Ordered`, older     same
any          `Ordered`, ended     same         (a late copy; done again, its Keep would be promoted twice)
any          `Ordered`, unmet     refusing     `Forget` the old one, `Refuse`: the owner's conditions do not hold
offering     `Ordered`, next      offering     `Offer` again: the next one of the run, unmet or not, waits for the end of this
fetching     `Ordered`, same      fetching     (it is being worked on)
working      `Ordered`, same      working
offering     `Ordered`, same      offering     `Offer` again
waiting      `Ordered`, same      waiting
refusing     `Ordered`, same      refusing     `Refuse` again
fetching     `Fetched`            working      `Work`
working      `Worked`             offering     `Offer`
working      `Again`              working      `Work`: a worker ran out of memory, a fresh one tries something smaller
fetching     `Failed`             refusing     `Refuse`
working      `Failed`             refusing     `Refuse`
offering     `Failed`             refusing     `Refuse` (the update's file was lost)
fetching     `Unmet`              waiting      `Hold`: no traffic, no worker, no memory
working      `Unmet`              waiting      `Hold`
waiting      `Met`                fetching     `Fetch` what is not here yet; the work begins anew
waiting      `Failed`             refusing     `Refuse` (the order is given back)
offering     `Acked` more         offering     `Push` on from what is durable there
any but idle `Acked` committed    idle         `Promote` the Keep, `Forget` (in other phases than offering, an earlier
                                               life's reply was counted: there is nothing left to do)
any but idle `Acked` unwanted     idle         `Forget`
any but idle `Cancelled`          idle         `Forget`
any but idle `Led`, another run   idle         `Forget`
offering     `Led`, `Silence`     offering     `Offer` again
offering     `Unmet`, `Met`       offering     (what is told of the order that waits, if one does)
offering     `Acked` unwanted or  offering     (if it is about the order that waits: it does no more)
             `Cancelled`
refusing     `Led`, `Silence`     refusing     `Refuse` again
============ ==================== ============ =====================================================

Where the table says idle and an order waits, that one is begun. A new order means that the round of the old one is over, not
whether the answer was counted: the word on that may have been lost with a broker, and a Keep that is dropped although its
update counts has that update's residual sent once more.

What is not in the table changes nothing. `Forget` stops the worker and drops everything but the blobs, which stay cached. A
new life starts idle, or offering when an earlier one had an answer (`Session.recalled`). An order that was not answered yet
is given again at the next birth, and the same order over the same data gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from wire.messages import Ack, Cancel, Lead, Order, Reason, Refusal, Reply

Phase = Literal["idle", "fetching", "working", "waiting", "offering", "refusing"]


@dataclass(frozen=True, slots=True)
class Ordered:
    """The coordinator asks.

    Attributes:
        order: For what.
        unmet: Which of the owner's conditions does not hold now; empty when all do.
    """

    order: Order
    unmet: str = ""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Every blob of the order is here."""

    order: str


@dataclass(frozen=True, slots=True)
class Worked:
    """The worker has an answer."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Again:
    """The order may be worked on once more."""

    order: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The order cannot be done, or could not."""

    order: str
    reason: Reason
    detail: str
    bytes_needed: int = 0
    bytes_free: int = 0


@dataclass(frozen=True, slots=True)
class Acked:
    """The coordinator's word on our upload."""

    ack: Ack


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The coordinator takes an order back."""

    cancel: Cancel


@dataclass(frozen=True, slots=True)
class Led:
    """A coordinator is there, perhaps a new one."""

    lead: Lead


@dataclass(frozen=True, slots=True)
class Silence:
    """Nobody has answered our offer or refusal for a while."""


@dataclass(frozen=True, slots=True)
class Unmet:
    """The owner's conditions no longer hold."""


@dataclass(frozen=True, slots=True)
class Met:
    """They hold again."""


Event = Unmet | Met | Ordered | Fetched | Worked | Again | Failed | Acked | Cancelled | Led | Silence


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the order's blobs."""

    order: Order


@dataclass(frozen=True, slots=True)
class Work:
    """Give the order to a worker."""

    order: Order


@dataclass(frozen=True, slots=True)
class Offer:
    """Send the reply and, from the start of the window, its update."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Push:
    """Send more of the update; the coordinator has these pieces."""

    have: bytes


@dataclass(frozen=True, slots=True)
class Refuse:
    """Send the refusal."""

    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Promote:
    """The reply counts: what the worker left for the Keep becomes the device's state."""

    order: Order


@dataclass(frozen=True, slots=True)
class Forget:
    """Stop working on the order and drop what it has made."""

    order: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Stop working on the order, but keep it: what was fetched, and its place."""

    order: str


Effect = Hold | Fetch | Work | Offer | Push | Refuse | Promote | Forget


@dataclass(frozen=True, slots=True)
class Session:
    """Where the device stands.

    Attributes:
        device: Its name.
        boot: Name of this life.
        phase: See the table.
        order: The order in hand; None when idle.
        reply: What is being offered.
        refusal: What is being refused.
        run: Run of the last order whose end was told.
        ended: Round of that order; give both to a new life from the Keep.
        following: What came while an answer was offered: the next order, once the end of this one is told.
    """

    device: str
    boot: str
    phase: Phase = "idle"
    order: Order | None = None
    reply: Reply | None = None
    refusal: Refusal | None = None
    run: str = ""
    ended: int = 0
    following: Ordered | None = None

    @property
    def idle(self) -> Session:
        """The same device with nothing in hand."""
        return Session(self.device, self.boot, run=self.run, ended=self.ended)

    def recalled(self, order: Order, reply: Reply) -> Session:
        """The same device with an answer that an earlier life has made."""
        return replace(self.idle, phase="offering", order=order, reply=reply)

    @property
    def told(self) -> Session:
        """The same device once it was told the end of its order."""
        assert self.order is not None
        return replace(self.idle, run=self.order.run, ended=self.order.round)


Step = tuple[Session, tuple[Effect, ...]]


def step(session: Session, event: Event) -> Step:
    """Fold one event. Cost: constant."""
    match event:
        case Ordered():
            return _ordered(session, event)
        case Fetched():
            return _fetched(session, event)
        case Worked():
            return _worked(session, event)
        case Again(order=order_id) if session.order is not None and session.order.id == order_id:
            return session, (Work(session.order),) if session.phase == "working" else ()
        case Failed():
            return _failed(session, event)
        case Acked():
            return _acked(session, event)
        case Cancelled():
            return _cancelled(session, event)
        case Led():
            return _led(session, event)
        case Silence():
            return session, _again(session)
        case Unmet() | Met() if session.following is not None:
            unmet = "the owner's conditions do not hold" if isinstance(event, Unmet) else ""
            return replace(session, following=replace(session.following, unmet=unmet)), ()
        case Unmet() if session.order is not None and session.phase in ("fetching", "working"):
            return replace(session, phase="waiting"), (Hold(session.order.id),)
        case Met() if session.order is not None and session.phase == "waiting":
            return replace(session, phase="fetching"), (Fetch(session.order),)
        case _:
            return session, ()


def _ordered(session: Session, event: Ordered) -> Step:
    order, held = event.order, session.order
    if order.device != session.device or (order.run == session.run and order.round <= session.ended):
        return session, ()
    if held is not None and held.id == order.id:
        return session, _again(session)
    if held is not None and held.run == order.run and held.round > order.round:
        return session, ()
    if held is not None and held.run == order.run and session.phase == "offering":
        older = session.following is not None and session.following.order.round > order.round
        return session if older else replace(session, following=event), _again(session)
    forget = () if held is None else (Forget(held.id),)
    if event.unmet:
        taken = replace(session.idle, phase="fetching", order=order)
        refusing, effects = _failed(taken, Failed(order.id, "busy", event.unmet))
        return refusing, (*forget, *effects)
    return replace(session.idle, phase="fetching", order=order), (*forget, Fetch(order))


def _fetched(session: Session, event: Fetched) -> Step:
    if session.phase != "fetching" or session.order is None or session.order.id != event.order:
        return session, ()
    return replace(session, phase="working"), (Work(session.order),)


def _worked(session: Session, event: Worked) -> Step:
    if session.phase != "working" or session.order is None or session.order.id != event.reply.order:
        return session, ()
    return replace(session, phase="offering", reply=event.reply), (Offer(event.reply),)


def _failed(session: Session, event: Failed) -> Step:
    if session.phase in ("idle", "refusing") or session.order is None or session.order.id != event.order:
        return session, ()
    refusal = Refusal(
        order=event.order,
        device=session.device,
        boot=session.boot,
        reason=event.reason,
        detail=event.detail[:2000],
        bytes_needed=event.bytes_needed,
        bytes_free=event.bytes_free,
    )
    return replace(session, phase="refusing", reply=None, refusal=refusal), (Refuse(refusal),)


def _acked(session: Session, event: Acked) -> Step:
    ack, held = event.ack, session.order
    if held is None or held.id != ack.order:
        return _without(session, ack.order) if ack.state == "unwanted" else session, ()
    if ack.state == "unwanted":
        return _over(session, Forget(held.id))
    if ack.state == "committed":
        return _over(session, Promote(held), Forget(held.id))
    return session, (Push(ack.have),) if session.phase == "offering" else ()


def _cancelled(session: Session, event: Cancelled) -> Step:
    if session.order is None or session.order.id != event.cancel.order:
        return _without(session, event.cancel.order), ()
    return _over(session, Forget(session.order.id))


def _without(session: Session, order: str) -> Session:
    """Forget an order that waited to be begun, if it is that one."""
    waits = session.following is not None and session.following.order.id == order
    return replace(session, following=None) if waits else session


def _over(session: Session, *effects: Effect) -> Step:
    """End the order in hand, and begin the one that waited for that."""
    if session.following is None:
        return session.told, effects
    begun, more = _ordered(session.told, session.following)
    return begun, (*effects, *more)


def _led(session: Session, event: Led) -> Step:
    if session.order is None or event.lead.state != "online":
        return session, ()
    if session.order.run != event.lead.run:
        return session.idle, (Forget(session.order.id),)
    return session, _again(session)


def _again(session: Session) -> tuple[Effect, ...]:
    if session.phase == "offering" and session.reply is not None:
        return (Offer(session.reply),)
    if session.phase == "refusing" and session.refusal is not None:
        return (Refuse(session.refusal),)
    return ()
