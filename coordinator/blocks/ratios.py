"""What a coordinator remembers of each device to choose its ratio: its bandit, its measured turns, its last loss.

A round's losses come with its answers; how long its turns took is known when the next round is planned. So an answer waits
(`heard`) until its device is seen again with a time (`settled`), and only then does the bandit learn.

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

from coordinator.algorithm import Answer, DeviceView, State
from coordinator.blocks import bandit

TURNS = 24
"""Measured turns that are remembered of a device."""

_ROOM = "clients/"
_LINES = ("edges", "ratios", "rewards", "turns", "loss", "due")
_TURN = 4


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
    """What is remembered of one device.

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
    due = client.due
    return (
        client.edges,
        client.ratios,
        client.rewards,
        [number for turn in client.turns for number in (turn.round, turn.ratio, turn.seconds, turn.loss)],
        () if client.loss is None else (client.loss,),
        ()
        if due is None
        else (due.round, due.ratio, math.nan if due.decrease is None else due.decrease, due.before, due.first),
    )


def _lines(field: str, rows: Sequence[Sequence[float]]) -> dict[str, NDArray[Any]]:
    """Lay rows of any length end to end."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return {field: np.concatenate([np.zeros(0), *(np.asarray(row, np.float64) for row in rows)]), f"{field}.ends": ends}


def _rows(state: State, field: str) -> list[tuple[float, ...]]:
    line, ends = state.arrays[_ROOM + field].tolist(), state.arrays[f"{_ROOM}{field}.ends"].tolist()
    return [tuple(line[start:end]) for start, end in pairwise([0, *ends])]


def _client(rows: Sequence[Sequence[float]]) -> Client:
    edges, played, rewards, turns, loss, due = rows
    each = [turns[place : place + _TURN] for place in range(0, len(turns), _TURN)]
    told = tuple(Turn(int(number), ratio, seconds, said) for number, ratio, seconds, said in each)
    return Client(edges, played, rewards, told, loss[0] if loss else None, _due(*due) if due else None)


def _due(number: float, ratio: float, decrease: float, before: float, first: float) -> Due:
    return Due(int(number), ratio, None if math.isnan(decrease) else decrease, before, first)


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


def settled(
    clients: Clients, devices: Sequence[DeviceView], terms: bandit.Terms, reward: Reward | None
) -> dict[str, Client]:
    """Give each device that is here its last turn's time, and its bandit what the turn earned; no reward, no bandit.

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
            earned = math.nan if reward is None else reward(due, took, rounds[due.round])
            found[name] = _timed(clients[name], due, took, terms, earned)
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
