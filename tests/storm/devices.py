"""The devices' half of the storm: what the world may do to a device, and the simplest one that keeps its promises."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Protocol

from tests.storm.world import Bus, Piece
from tests.support.messages import a_presence, a_refusal, a_reply
from wire.messages import Ack, Beat, BlobRef, Lead, Order, Refusal, Reply

PIECES = 3
UPDATE = BlobRef("d" * 64, 25, 10)


class Device(Protocol):
    """The world brings letters, deaths, births and turns; everything else is the device's own law."""

    name: str
    alive: bool
    told: dict[str, set[str]]
    promoted: list[str]

    @property
    def waiting(self) -> str:
        """The order that it has been given and has not been told the end of; empty when there is none."""

    def born(self) -> None:
        """Start a new life with what the disk still has."""

    def up(self) -> None:
        """Be connected again, to a broker that was killed."""

    def killed(self) -> None:
        """Forget everything that is not on the disk."""

    def hear(self, message: Order | Ack | Lead) -> None:
        """Take in a message."""

    def turn(self, rng: random.Random, *, calm: bool) -> None:
        """Work on, time out, give a sign of life, or do nothing."""


class PlainDevice:
    """A device written from the contract alone: one order at a time, its answer on disk until the end is told."""

    def __init__(self, name: str, bus: Bus, refuses: float) -> None:
        self.name = name
        self.alive = False
        self.told: dict[str, set[str]] = {}
        self.promoted: list[str] = []
        self._bus = bus
        self._refuses = refuses
        self._seq = 0
        self._order: Order | None = None
        self._answer: Reply | Refusal | None = None  # on disk
        self._newest = 0
        self._have: set[int] = set()

    @property
    def waiting(self) -> str:
        if self._answer is not None:
            return self._answer.order
        return self._order.id if self._order is not None else ""

    @property
    def _boot(self) -> str:
        return f"{self._seq:016x}"

    def born(self) -> None:
        self.alive = True
        self._seq += 1
        self.up()

    def up(self) -> None:
        self._bus.present(a_presence(self.name, self._seq))
        self._offer()

    def killed(self) -> None:
        self.alive = False
        self._order = None
        self._have = set()
        self._bus.present(a_presence(self.name, self._seq, "lost"))

    def hear(self, message: Order | Ack | Lead) -> None:
        match message:
            case Order():
                self._ordered(message)
            case Ack(order=order, state=state, have=have) if self._answer is not None and order == self._answer.order:
                if state == "more":
                    bits = int.from_bytes(have, "little")
                    self._have = {i for i in range(PIECES) if bits >> i & 1}
                    self._push()
                else:
                    self.told.setdefault(order, set()).add(state)
                    if state == "committed":
                        self.promoted.append(order)
                    self._order = self._answer = None
            case Ack(order=order, state="unwanted") if self._order is not None and order == self._order.id:
                self.told.setdefault(order, set()).add("unwanted")
                self._order = None
            case Lead():
                self._offer()
            case _:
                pass

    def turn(self, rng: random.Random, *, calm: bool) -> None:
        if self._answer is not None and (calm or rng.random() < 0.3):
            self._offer()
        elif self._order is not None and (calm or rng.random() < 0.5):
            order = self._order
            if rng.random() < self._refuses:
                self._answer = a_refusal(self.name, order.id, boot=self._boot)
            else:
                self._answer = replace(a_reply(self.name, order.id, boot=self._boot), update=UPDATE)
            self._have = set()
            self._offer()
        self._bus.post("", self.name, Beat(self._boot, self._seq, self.waiting))

    def _ordered(self, order: Order) -> None:
        if order.id in self.told or order.round < self._newest or order.id == self.waiting:
            return
        self._newest = order.round
        self._order = order
        self._answer = None

    def _offer(self) -> None:
        if self._answer is not None:
            self._bus.post("", self.name, self._answer)

    def _push(self) -> None:
        assert self._answer is not None
        for index in range(PIECES):
            if index not in self._have:
                self._bus.post("", self.name, Piece(self._answer.order, index))
