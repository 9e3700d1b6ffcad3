"""A good guest: whether the owner's conditions hold, and what is to be done when they cease or come back.

========= ============================================== ========= ==============================================
standing  what is found                                  becomes   move
========= ============================================== ========= ==============================================
present   a condition fails                              still     ``still``: the worker stands still where it is
still     all hold again                                 present   ``on``: it goes on where it was
still     nothing has changed for `seconds_still`        away      ``away``: it is ended, its memory comes back
away      all have held for `seconds_settle`             present   ``back``: orders are taken again
========= ============================================== ========= ==============================================

So what flaps faster than the one costs nothing, and what flaps faster than the other costs one pause. The agent does the
moves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edge_runtime import probes
from edge_runtime.config import ConditionsConfig
from edge_runtime.probes import Reading
from edge_runtime.probes.machine import Machine
from wire.messages import Order

Standing = Literal["present", "still", "away"]
Move = Literal["still", "on", "away", "back"]

NEVER = float("inf")
SECONDS_IDLE = 2.0
SECONDS_BUSY = 0.25
SECONDS_ASKED = 0.25
SECONDS_FRESH_BUSY = 20.0
"""How old a command's answer may be while an order is being worked on; `SECONDS_FRESH` otherwise."""
SECONDS_FRESH = 60.0
_NETWORK = "unmetered"
_SECONDS_SEEN = 1.0
_SECONDS_LOAD = 60.0
"""The time constant of the load that /proc/loadavg tells of."""


@dataclass(frozen=True, slots=True)
class Held:
    """An order's time on this device.

    Attributes:
        order: Its id.
        until: When the coordinator stops waiting, on the monotonic clock.
        begun: When a worker began with it.
        seconds: What it takes from its beginning to its end, as far as that was seen.
        seen: When it was first seen to get on, and how far it was by then; loading an engine comes before that.
    """

    order: str
    until: float
    begun: float = NEVER
    seconds: float = 0.0
    seen: tuple[float, float] | None = None


class Guest:
    """Looks at the conditions, remembers what was, and says what is to be done.

    Attributes:
        standing: See the table. Without conditions it is ``present`` for ever, and nothing is loaded or read.
        why: What fails, for people; empty when nothing does.
    """

    __slots__ = ("_due", "_good", "_held", "_machine", "_own", "_since", "_wanted", "standing", "why")

    def __init__(self, wanted: ConditionsConfig, machine: Machine | None = None) -> None:
        """Look nowhere yet.

        Args:
            wanted: What the owner demands.
            machine: Where to look; this one, as far as `wanted` says where that is, when None.
        """
        self.standing: Standing = "present"
        self.why = ""
        self._wanted = wanted
        self._machine = machine or Machine(Path(wanted.root))
        self._good: Mapping[str, bool] = {}
        self._since = -NEVER  # of `still`: when it began; of `away`: since when all has held, NEVER when not all does
        self._due = 0.0 if probes.demanded(wanted) else NEVER
        self._held: Held | None = None
        self._own = (0.0, 0.0)  # when it was looked last, and our share of the load by then

    @property
    def due(self) -> float:
        """When `tick` wants to be called."""
        return self._due

    @property
    def wanting(self) -> str:
        """What an order waits for, for people: what fails, or that all has to hold for longer."""
        return self.why or f"all conditions hold, but not yet for {self._wanted.seconds_settle:g} s"

    @property
    def quiet(self) -> bool:
        """Nothing large may be sent: the network costs."""
        return self.standing == "away" and not self._good.get(_NETWORK, True)

    def tick(self, now: float, threads: int = 0, done: float = 0.0) -> Move | None:
        """Look, when it is time to.

        Args:
            now: On the monotonic clock.
            threads: Threads of ours that train right now.
            done: Fraction of the order in work that is done.

        Cost: some ten small files; commands are not waited for.
        """
        if now < self._due:
            return None
        if threads and done and self._held is not None and self._held.seen is None:
            self._held = replace(self._held, seen=(now, done))
        self._own = now, faded(self._own[1], threads, now - self._own[0])
        self._machine.threads_own = self._own[1]
        self._machine.seconds_fresh = SECONDS_FRESH_BUSY if threads else SECONDS_FRESH
        readings = probes.look(self._machine, self._wanted)
        first = not self._good
        self._good = judged(self._good, readings)
        self.why = "; ".join(readings[name].found for name, good in self._good.items() if not good)
        asked = any(reading.verdict == "asked" for reading in readings.values())
        move = self._first(asked=asked) if first else self._moved(now, asked=asked)
        busy = threads or self.standing == "still"
        self._due = now + (SECONDS_ASKED if asked else SECONDS_BUSY if busy else SECONDS_IDLE)
        if self.standing == "still":
            self._due = min(self._due, self._since + self._wanted.seconds_still)
        return move

    def close(self) -> None:
        """End what was asked and has not answered."""
        self._machine.close()

    def _first(self, *, asked: bool) -> Move | None:
        """Begin: where all holds at once, or as soon as a command has answered, nothing needs to settle."""
        if not self.why:
            return None
        self.standing, self._since = "away", -NEVER if asked else NEVER
        return "away"

    def _moved(self, now: float, *, asked: bool) -> Move | None:
        if self.standing == "present" and self.why:
            self.standing, self._since = "still", now
            return "still" if self._wanted.seconds_still else self._moved(now, asked=asked)
        if self.standing == "still":
            if not self.why:
                self.standing = "present"
                return "on"
            if now - self._since >= self._wanted.seconds_still:
                self.standing, self._since = "away", NEVER
                return "away"
        elif self.standing == "away":
            if self.why:
                self._since = self._since if asked and self._since == -NEVER else NEVER
                return None
            self._since = now if self._since == NEVER else self._since
            if now - self._since >= self._wanted.seconds_settle:
                self.standing = "present"
                return "back"
        return None

    # --- an order's time -----------------------------------------------------------------------------------------

    @property
    def hopeless(self) -> float:
        """When what is left of the order's time no longer suffices to do it from its beginning."""
        return NEVER if self._held is None else self._held.until - self._held.seconds

    def took(self, order: Order, now: float) -> None:
        """Note an order; the same one sent again has the time that it had."""
        if self._held is None or self._held.order != order.id:
            self._held = Held(order.id, now + order.seconds if order.seconds else NEVER)

    def began(self, now: float) -> None:
        """Note that a worker begins with it: from now on it is looked more often."""
        if self._held is not None:
            self._held = replace(self._held, begun=now, seen=None)
        if self._due < NEVER:
            self._due = min(self._due, now)

    def broke(self, now: float, done: float) -> None:
        """Note that the worker was ended when a fraction `done` was through: that tells how long all of it takes.

        At least what was spent would have to be spent again. What is left counts as well when it was seen to get on for a
        second or more.
        """
        held = self._held
        if held is None or held.begun >= now:
            return
        seconds = now - held.begun
        if held.seen is not None:
            since, first = held.seen
            if now - since >= _SECONDS_SEEN and done > first:
                seconds += (1.0 - done) * (now - since) / (done - first)
        self._held = replace(held, begun=NEVER, seconds=max(held.seconds, seconds))


def faded(before: float, threads: int, seconds: float) -> float:
    """Say what so many threads are of the load by now: that is a mean, and comes and goes slowly."""
    return threads + (before - threads) * math.exp(-max(0.0, seconds) / _SECONDS_LOAD)


def judged(known: Mapping[str, bool], readings: Mapping[str, Reading]) -> dict[str, bool]:
    """Say which conditions hold: between its thresholds, or not answered yet, one stays as it was; at first it fails."""
    decided = {"holds": True, "fails": False, "unknown": False}
    return {name: decided.get(found.verdict, known.get(name, False)) for name, found in readings.items()}
