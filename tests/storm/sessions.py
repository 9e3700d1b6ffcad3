"""A device of the storm around the real session table: what the agent's shell does for it, in small and in any order."""

from __future__ import annotations

import random
from dataclasses import replace

from edge_runtime import session as table
from tests.storm.devices import PIECES, UPDATE
from tests.storm.world import Bus, Piece
from tests.support.messages import a_presence, a_reply
from wire.messages import Ack, Beat, Lead, Order, Reply


class SessionDevice:
    """Performs the effects of `edge_runtime.session.step`; its fetcher and worker answer late, or to nobody."""

    def __init__(self, name: str, bus: Bus, refuses: float) -> None:
        self.name = name
        self.alive = False
        self.told: dict[str, set[str]] = {}
        self.promoted: list[str] = []  # on disk, as is
        self._kept = "", 0  # what the Keep says of its last promotion
        self._bus = bus
        self._refuses = refuses
        self._seq = 0
        self._session = table.Session(name, "0" * 16)
        self._due: list[table.Event] = []

    @property
    def waiting(self) -> str:
        return self._session.order.id if self._session.order is not None else ""

    @property
    def _boot(self) -> str:
        return f"{self._seq:016x}"

    def born(self) -> None:
        self.alive = True
        self._seq += 1
        run, ended = self._kept
        self._session = table.Session(self.name, self._boot, run=run, ended=ended)
        self.up()

    def up(self) -> None:
        self._bus.present(a_presence(self.name, self._seq))
        if self._bus.lead is not None:
            self._happen(table.Led(self._bus.lead))

    def killed(self) -> None:
        self.alive = False
        self._session = table.Session(self.name, self._boot)
        self._due = []
        self._bus.present(a_presence(self.name, self._seq, "lost"))

    def hear(self, message: Order | Ack | Lead) -> None:
        match message:
            case Order():
                self._happen(table.Ordered(message))
            case Ack():
                if message.order == self.waiting and message.state != "more":
                    self.told.setdefault(message.order, set()).add(message.state)
                self._happen(table.Acked(message))
            case Lead():
                self._happen(table.Led(message))

    def turn(self, rng: random.Random, *, calm: bool) -> None:
        if self._due and (calm or rng.random() < 0.7):
            self._happen(self._due.pop(0 if calm else rng.randrange(len(self._due))))
        if calm or rng.random() < 0.2:
            self._happen(table.Silence())
        self._bus.post("", self.name, Beat(self._boot, self._seq, self.waiting))

    def _happen(self, event: table.Event) -> None:
        self._session, effects = table.step(self._session, event)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: table.Effect) -> None:
        match effect:
            case table.Fetch(order=order):
                self._due.append(table.Fetched(order.id))
            case table.Work(order=order):
                self._due.append(self._work(order))
            case table.Offer(reply=reply):
                self._bus.post("", self.name, reply)
            case table.Push(have=have):
                self._push(have)
            case table.Refuse(refusal=refusal):
                self._bus.post("", self.name, refusal)
            case table.Promote(order=order):
                self.promoted.append(order.id)
                self._kept = order.run, order.round
            case table.Forget():
                if self._bus.rng.random() < 0.5:  # else what is on its way in the shell's queue still comes
                    self._due = []

    def _work(self, order: Order) -> table.Event:
        if self._bus.rng.random() < self._refuses:
            return table.Failed(order.id, "memory", "does not fit", 2, 1)
        reply: Reply = replace(a_reply(self.name, order.id, boot=self._boot), update=UPDATE)
        return table.Worked(reply)

    def _push(self, have: bytes) -> None:
        bits = int.from_bytes(have, "little")
        for index in range(PIECES):
            if not bits >> index & 1:
                self._bus.post("", self.name, Piece(self.waiting, index))
