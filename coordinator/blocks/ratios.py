"""What a coordinator remembers of each device to choose its ratio: its bandit, its measured turns, its last loss.

An answer says what its device lost and how long it took (`heard`); once all of a round are there, the devices' bandits learn
what that earned (`settled`).

A device's memory is some kilobytes, so that it goes into a state's arrays and only its name into the header.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, State
from coordinator.blocks import bandit

TURNS = 24
"""Turns that are remembered of a device."""

_ROOM = "clients/"
_LINES = ("edges", "ratios", "rewards", "turns", "loss")
_TURN = 4


@dataclass(frozen=True, slots=True)
class Due:
    """What an answer says of its round.

    Attributes:
        round: Its round.
        ratio: What was trained.
        decrease: Loss before minus loss after, see `heard`; None where the device did not say.
        before: The loss before.
        first: Mean training loss of the first local pass; 0 where the device did not say.
        took: Seconds from the issue of the order to the answer's arrival; 0 where they are not known.
        least: The least ratio that the device can do.
    """

    round: int
    ratio: float
    decrease: float | None = None
    before: float = 1.0
    first: float = 0.0
    took: float = 0.0
    least: float = 0.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished turn of a device.

    Attributes:
        round: When.
        ratio: What was trained.
        seconds: From the issue of the order to the answer's arrival; 0 where they are not known.
        loss: Mean training loss of the first local pass; 0 where the device did not say.
    """

    round: int
    ratio: float
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True)
class Client:
    """What is remembered of one device.

    Attributes:
        edges: See `bandit.Bandit`.
        ratios: Likewise.
        rewards: Likewise.
        turns: Its last turns, the oldest first.
        loss: Mean training loss of the last pass of its last answer.
    """

    edges: Sequence[float]
    ratios: Sequence[float] = ()
    rewards: Sequence[float] = ()
    turns: Sequence[Turn] = ()
    loss: float | None = None

    @property
    def bandit(self) -> bandit.Bandit:
        """Give its bandit."""
        return bandit.Bandit(self.edges, self.ratios, self.rewards)


Clients = Mapping[str, Client]

Reward = Callable[[Due, Sequence[float]], float]
"""Gives what an answer earned, from itself and the seconds of all answers of its round."""


def remembered(state: State, clients: Clients) -> State:
    """Put clients into a state, those that were heard of last at the end; `read` undoes it, to the bit."""
    names = list(clients)
    arrays: dict[str, NDArray[Any]] = {}
    parts = [_parts(client) for client in clients.values()]
    for place, field in enumerate(_LINES):
        arrays |= _lines(field, [rows[place] for rows in parts])
    return dataclasses.replace(
        state, scalars={**state.scalars, "clients": names}, arrays={_ROOM + name: line for name, line in arrays.items()}
    )


def read(state: State) -> dict[str, Client]:
    """Take the clients out of a state."""
    names = state.scalars["clients"]
    if not names:
        return {}
    columns = [_rows(state, field) for field in _LINES]
    return {name: _client(rows) for name, *rows in zip(names, *columns, strict=True)}


def _parts(client: Client) -> tuple[Sequence[float], ...]:
    """Take a client apart, in the order of `_LINES`; what there is not is no number, or one that is none."""
    return (
        client.edges,
        client.ratios,
        client.rewards,
        [number for turn in client.turns for number in (turn.round, turn.ratio, turn.seconds, turn.loss)],
        () if client.loss is None else (client.loss,),
    )


def _lines(field: str, rows: Sequence[Sequence[float]]) -> dict[str, NDArray[Any]]:
    """Lay rows of any length end to end."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return {field: np.concatenate([np.zeros(0), *(np.asarray(row, np.float64) for row in rows)]), f"{field}.ends": ends}


def _rows(state: State, field: str) -> list[tuple[float, ...]]:
    line, ends = state.arrays[_ROOM + field].tolist(), state.arrays[f"{_ROOM}{field}.ends"].tolist()
    return [tuple(line[start:end]) for start, end in pairwise([0, *ends])]


def _client(rows: Sequence[Sequence[float]]) -> Client:
    edges, played, rewards, turns, loss = rows
    each = [turns[place : place + _TURN] for place in range(0, len(turns), _TURN)]
    told = tuple(Turn(int(number), ratio, seconds, said) for number, ratio, seconds, said in each)
    return Client(edges, played, rewards, told, loss[0] if loss else None)


def heard(client: Client, round_number: int, ratio: float, answer: Answer, least: float = 0.0) -> tuple[Client, Due]:
    """Take in an answer: give its device as it is then, and what is to be settled.

    The decrease is the ``loss`` (mean training loss of the last local pass) of the device's answer before this one, less that
    of this one: the same samples, each seen once in either, and each time after training. At its first answer it is
    ``loss.first`` less ``loss``, first pass less last.

    Args:
        client: As it was.
        round_number: The answer's.
        ratio: What was trained.
        answer: Its metrics are the device's word; what is no number in them is not used.
        least: The least ratio that the device could have been asked for.
    """
    after, first = (answer.metrics.get(name, math.nan) for name in ("loss", "loss.first"))
    before, took = first if client.loss is None else client.loss, max(0.0, answer.seconds_turn)
    if not (math.isfinite(after) and math.isfinite(first)):
        return client, Due(round_number, ratio, took=took, least=least)
    decrease = before - after
    due = Due(round_number, ratio, decrease if math.isfinite(decrease) else None, before, max(0.0, first), took, least)
    return dataclasses.replace(client, loss=after), due


def settled(told: Mapping[str, tuple[Client, Due]], terms: bandit.Terms, reward: Reward | None) -> dict[str, Client]:
    """Give each device that has answered its turn, and its bandit what that earned; without reward or time it learns nothing.

    Args:
        told: All answers of a round, see `heard`, by device.
        terms: Of the bandits.
        reward: What they learn; None for no bandit.
    """
    times = [due.took for _, due in told.values() if due.took > 0.0]
    return {name: _turned(client, due, terms, reward and reward(due, times)) for name, (client, due) in told.items()}


def _turned(client: Client, due: Due, terms: bandit.Terms, earned: float | None) -> Client:
    turns = (*client.turns, Turn(due.round, due.ratio, due.took, due.first))[-TURNS:]
    client = dataclasses.replace(client, turns=turns)
    if earned is None or not math.isfinite(earned):
        return client
    after = bandit.learnt(client.bandit, terms, due.ratio, earned, due.least)
    return dataclasses.replace(client, edges=after.edges, ratios=after.ratios, rewards=after.rewards)


def timed(client: Client) -> list[tuple[float, float]]:
    """Give the ratio and seconds of each turn whose time is known."""
    return [(turn.ratio, turn.seconds) for turn in client.turns if turn.seconds > 0.0]


def by_gap(floor: float) -> Reward:
    """Give the paper's reward; see `bandit.gap_reward`."""

    def earned(due: Due, times: Sequence[float]) -> float:
        if due.decrease is None or not due.took:
            return math.nan
        return bandit.gap_reward(due.decrease, due.took, sum(times) / len(times), floor)

    return earned


def by_speed(due: Due, times: Sequence[float]) -> float:
    """Give the bounded reward; see `bandit.speed_reward`."""
    if due.decrease is None or not due.before > 0.0 or not due.took:
        return math.nan
    return bandit.speed_reward(due.decrease / due.before, max(times))
