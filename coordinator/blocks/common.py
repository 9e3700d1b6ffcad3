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

from coordinator.algorithm import DeviceView
from coordinator.blocks import bandit, ratios


def fresh(terms: bandit.Terms) -> dict[str, Any]:
    """Give what is remembered before the first play."""
    return _plain(bandit.fresh(_whole(terms)), ())


def settled(
    common: Mapping[str, Any], clients: ratios.Clients, devices: Sequence[DeviceView], terms: bandit.Terms
) -> dict[str, Any]:
    """Teach the bandit its last play, from the answers and times of that round; one of which nothing is known is forgotten."""
    known = bandit.Bandit(*(tuple(common[name]) for name in ("edges", "ratios", "rewards")))
    if common["played"]:
        round_number, share = common["played"]
        earned = _earned(clients, devices, int(round_number))
        if earned is not None:
            known = bandit.learnt(known, _whole(terms), share, earned)
    return _plain(known, ())


def played(
    common: Mapping[str, Any], round_number: int, terms: bandit.Terms, rng: np.random.Generator
) -> dict[str, Any]:
    """Choose a round's deadline, as the share that `deadline.at` takes; it stands in ``played``."""
    known = bandit.Bandit(*(tuple(common[name]) for name in ("edges", "ratios", "rewards")))
    share = bandit.choose(known, _whole(terms), rng)
    return _plain(known, (round_number, share))


def _earned(clients: ratios.Clients, devices: Sequence[DeviceView], round_number: int) -> float | None:
    """Give the mean share of its loss that a device lost in a round, per second of the slowest; None if nobody says."""
    took = {d.name: d.seconds_turn for d in devices if d.name in clients and d.seconds_turn > 0.0}
    dues = {name: due for name in took if (due := clients[name].due) is not None and due.round == round_number}
    lost = [due.decrease / due.before for due in dues.values() if due.decrease is not None and due.before > 0.0]
    if not lost:
        return None
    return bandit.speed_reward(sum(lost) / len(lost), max(took[name] for name in dues))


def _whole(terms: bandit.Terms) -> bandit.Terms:
    return dataclasses.replace(terms, low=0.0, high=1.0)


def _plain(known: bandit.Bandit, waiting: Sequence[float]) -> dict[str, Any]:
    return {**{name: list(line) for name, line in dataclasses.asdict(known).items()}, "played": list(waiting)}
