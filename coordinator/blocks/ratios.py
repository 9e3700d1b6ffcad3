"""What a coordinator remembers of each device to choose its ratio: its bandit, its measured turns, its last loss.

A round's losses come with its answers; how long its turns took is known when the next round is planned. So an answer waits
(`heard`) until its device is seen again with a time (`settled`), and only then does the bandit learn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.algorithm import Answer, DeviceView
from coordinator.blocks import bandit

TURNS = 24
"""Measured turns that are remembered of a device."""


@dataclass(frozen=True, slots=True)
class Due:
    """An answer whose time is not known yet.

    Attributes:
        round: Its round.
        ratio: What was trained.
        decrease: Loss before minus loss after, see `heard`; None where the device did not say.
        before: The loss before.
        first: Mean training loss of the first local pass; 0 where the device did not say.
    """

    round: int
    ratio: float
    decrease: float | None = None
    before: float = 1.0
    first: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished turn of a device.

    Attributes:
        round: When.
        ratio: What was trained.
        seconds: From the issue of the order to the answer's arrival.
        loss: Mean training loss of the first local pass; 0 where the device did not say.
    """

    round: int
    ratio: float
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Client:
    """What is remembered of one device; plain once it is taken apart by `plain`.

    Attributes:
        edges: See `bandit.Bandit`.
        ratios: Likewise.
        rewards: Likewise.
        turns: Its last turns, the oldest first.
        loss: Mean training loss of the last pass of its last answer.
        due: Its last answer, until its time is known.
    """

    edges: Sequence[float]
    ratios: Sequence[float] = ()
    rewards: Sequence[float] = ()
    turns: Sequence[Turn] = ()
    loss: float | None = None
    due: Due | None = None

    @property
    def bandit(self) -> bandit.Bandit:
        """Give its bandit."""
        return bandit.Bandit(self.edges, self.ratios, self.rewards)


Clients = Mapping[str, Client]

Reward = Callable[[Due, float, Sequence[float]], float]
"""Gives what an answer earned, from itself, its seconds, and those of all answers of its round."""


def plain(clients: Clients) -> dict[str, Any]:
    """Take clients apart for `State.scalars`."""
    return {name: dataclasses.asdict(client) for name, client in clients.items()}


def read(scalars: Mapping[str, Any]) -> dict[str, Client]:
    """Undo `plain`."""
    return {name: _client(one) for name, one in scalars.items()}


def _client(one: Mapping[str, Any]) -> Client:
    due = None if one["due"] is None else Due(**one["due"])
    return Client(**{**one, "due": due, "turns": tuple(Turn(**turn) for turn in one["turns"])})


def heard(client: Client, round_number: int, ratio: float, answer: Answer) -> Client:
    """Take in an answer.

    The decrease is the ``loss`` (mean training loss of the last local pass) of the device's answer before this one, less that
    of this one: the same samples, each seen once in either, and each time after training. At its first answer it is
    ``loss.first`` less ``loss``, first pass less last.

    Args:
        client: As it was.
        round_number: The answer's.
        ratio: What was trained.
        answer: Its metrics are the device's word; what is no number in them is not used.
    """
    after, first = (answer.metrics.get(name, math.nan) for name in ("loss", "loss.first"))
    before = first if client.loss is None else client.loss
    if not (math.isfinite(after) and math.isfinite(first)):
        return dataclasses.replace(client, due=Due(round_number, ratio))
    decrease = before - after
    due = Due(round_number, ratio, decrease if math.isfinite(decrease) else None, before, max(0.0, first))
    return dataclasses.replace(client, loss=after, due=due)


def settled(clients: Clients, devices: Sequence[DeviceView], terms: bandit.Terms, reward: Reward) -> dict[str, Client]:
    """Give each device that is here its last turn's time, and its bandit what the turn earned.

    The times of a round are those of its devices that are here; of one that is not selected again they come later, and with
    the times that are known then.
    """
    times = {d.name: d.seconds_turn for d in devices if d.seconds_turn > 0.0}
    rounds: dict[int, list[float]] = {}
    for name, took in times.items():
        due = clients[name].due if name in clients else None
        if due is not None:
            rounds.setdefault(due.round, []).append(took)
    found = dict(clients)
    for name, took in times.items():
        due = clients[name].due if name in clients else None
        if due is not None:
            found[name] = _timed(clients[name], due, took, terms, reward(due, took, rounds[due.round]))
    return found


def _timed(client: Client, due: Due, took: float, terms: bandit.Terms, earned: float) -> Client:
    turns = (*client.turns, Turn(due.round, due.ratio, took, due.first))[-TURNS:]
    client = dataclasses.replace(client, turns=turns, due=None)
    if not math.isfinite(earned):
        return client
    after = bandit.learnt(client.bandit, terms, due.ratio, earned)
    return dataclasses.replace(client, edges=after.edges, ratios=after.ratios, rewards=after.rewards)


def by_gap(floor: float) -> Reward:
    """Give the paper's reward; see `bandit.gap_reward`."""

    def earned(due: Due, took: float, all_took: Sequence[float]) -> float:
        if due.decrease is None:
            return math.nan
        return bandit.gap_reward(due.decrease, took, sum(all_took) / len(all_took), floor)

    return earned


def by_speed(due: Due, took: float, all_took: Sequence[float]) -> float:
    """Give the bounded reward; see `bandit.speed_reward`."""
    del took
    if due.decrease is None or not due.before > 0.0:
        return math.nan
    return bandit.speed_reward(due.decrease / due.before, max(all_took))
