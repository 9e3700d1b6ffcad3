"""One bandit for the whole fleet: it learns which common deadline pays, as a share between the shortest and the longest.

Where every device has a bandit of its own, a device that is not the slowest cannot see in a round's length what its own ratio
did. Here a round is one play: all devices' ratios follow from one number (`deadline.at`), and what the round earned is what
the devices' losses fell by, per second of the slowest. So the mean reward of the bandit's leaves is the curve of what a
deadline brings for what it costs. (docs/decisions/fedmp.md; no paper has this.)

What is remembered is plain: the fields of a `bandit.Bandit`, and ``played``, the round and share of the play whose reward is
not known yet; empty where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coordinator.blocks import bandit, ratios


def fresh(terms: bandit.Terms) -> dict[str, Any]:
    """Give what is remembered before the first play."""
    return _plain(bandit.fresh(_whole(terms)), ())


def settled(common: Mapping[str, Any], answers: Sequence[ratios.Due], terms: bandit.Terms) -> dict[str, Any]:
    """Teach the bandit the round that it has played; one that it did not play, or of which nothing is known, teaches nothing.

    Args:
        common: What is remembered.
        answers: What each device that answered said.
        terms: The bandit's constants, but for the interval.
    """
    known, waiting = _bandit(common), common["played"]
    earned = _earned([due for due in answers if due.round == waiting[0]]) if waiting else None
    return _plain(known if earned is None else bandit.learnt(known, _whole(terms), waiting[1], earned), ())


def played(
    common: Mapping[str, Any], round_number: int, terms: bandit.Terms, rng: np.random.Generator
) -> dict[str, Any]:
    """Choose a round's deadline, as the share that `deadline.at` takes; it stands in ``played``."""
    known = _bandit(common)
    share = bandit.choose(known, _whole(terms), rng)
    return _plain(known, (round_number, share))


def _earned(answers: Sequence[ratios.Due]) -> float | None:
    """Give the mean share of its loss that a device lost, per second of the slowest; None if nobody says.

    A device counts for no more than all of its loss, lost or gained: what it says is its word, and small losses may double.
    """
    timed = [due for due in answers if due.took > 0.0]
    lost = [due.decrease / due.before for due in timed if due.decrease is not None and due.before > 0.0]
    if not lost:
        return None
    mean = sum(min(1.0, max(-1.0, share)) for share in lost) / len(lost)
    return bandit.speed_reward(mean, max(due.took for due in timed))


def _bandit(common: Mapping[str, Any]) -> bandit.Bandit:
    return bandit.Bandit(*(tuple(common[name]) for name in ("edges", "ratios", "rewards")))


def _whole(terms: bandit.Terms) -> bandit.Terms:
    return dataclasses.replace(terms, low=0.0, high=1.0)


def _plain(known: bandit.Bandit, waiting: Sequence[float]) -> dict[str, Any]:
    return {**{name: list(line) for name, line in dataclasses.asdict(known).items()}, "played": list(waiting)}
