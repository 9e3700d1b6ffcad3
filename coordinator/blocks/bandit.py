"""Choosing a number from an interval by what it earns: discounted upper confidence bounds over leaves that split (E-UCB).

FedMP, ICDE 2022, doi 10.1109/ICDE53745.2022.00062: every device has a tree whose leaves tile the pruning ratios; the leaf
with the highest index is played with a ratio drawn from it, and is then split there until leaves are as fine as asked for.
The paper's constants are not public, so that each is a parameter here (docs/decisions/fedmp.md).

Counts are discounted as in discounted UCB (Garivier and Moulines, 2008): ``N(P) <- lam N(P) + 1`` for the leaf that was
played and ``N(P) <- lam N(P)`` for all others. Plays are remembered one by one, since a split tells apart what was one leaf's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Line = NDArray[np.float64]

_WINDOW_MAX = 1000


@dataclass(frozen=True, slots=True)
class Terms:
    """The constants of a bandit.

    Attributes:
        low: Least ratio.
        high: All ratios are below it.
        granularity: Leaves that are no wider are not split (theta).
        discount: What a play counts for when the next one is made (lam), above 0 and at most 1.
        padding: Factor of the confidence term (c); 1 for the textbook's.
        clip: Rewards are divided by this quantile of their own magnitudes and cut to 0 .. 1; 0 to take them as they are.
    """

    low: float = 0.0
    high: float = 0.8
    granularity: float = 0.1
    discount: float = 0.98
    padding: float = 0.1
    clip: float = 0.95

    @property
    def window(self) -> int:
        """Give how many plays are remembered: what is older counts for less than a hundredth of the newest."""
        return _WINDOW_MAX if self.discount >= 1.0 else min(_WINDOW_MAX, math.ceil(5.0 / (1.0 - self.discount) - 1e-6))


@dataclass(frozen=True, slots=True)
class Bandit:
    """What is remembered of one device; plain once it is taken apart by `dataclasses.asdict`.

    Attributes:
        edges: Ascending; leaf i is ``[edges[i], edges[i + 1])``.
        ratios: What was played, the oldest first.
        rewards: What it earned, unscaled.
    """

    edges: Sequence[float]
    ratios: Sequence[float] = ()
    rewards: Sequence[float] = ()


def fresh(terms: Terms) -> Bandit:
    """Give a bandit that has not played: one leaf."""
    return Bandit((terms.low, terms.high))


def counts(bandit: Bandit, terms: Terms) -> tuple[Line, Line]:
    """Give each leaf's discounted number of plays and sum of rewards.

    Cost: one pass over the plays that are remembered.
    """
    plays = len(bandit.ratios)
    leaves = np.searchsorted(bandit.edges, bandit.ratios, side="right") - 1
    leaves = np.clip(leaves, 0, len(bandit.edges) - 2)
    weights = terms.discount ** np.arange(plays - 1, -1, -1, dtype=np.float64)
    size = len(bandit.edges) - 1
    number, total = np.zeros(size), np.zeros(size)
    np.add.at(number, leaves, weights)
    np.add.at(total, leaves, weights * scaled(bandit.rewards, terms.clip))
    return number, total


def scaled(rewards: Sequence[float], clip: float) -> Line:
    """Divide rewards by a quantile of their magnitudes, and cut them to 0 .. 1; quantile 0 leaves them as they are."""
    line = np.asarray(rewards, np.float64)
    if not clip or not len(line):
        return line
    scale = float(np.quantile(np.abs(line), clip))
    return np.clip(line, 0.0, scale) / scale if scale > 0.0 else np.zeros_like(line)


def indices(bandit: Bandit, terms: Terms) -> Line:
    """Give each leaf's mean reward and confidence term, ``c sqrt(2 ln n / N(P))``; infinite where it was never played."""
    number, total = counts(bandit, terms)
    played = number > 0.0
    spread = 2.0 * math.log(max(1.0, float(number.sum())))
    found = np.full(len(number), np.inf)
    found[played] = total[played] / number[played] + terms.padding * np.sqrt(spread / number[played])
    return found


def choose(bandit: Bandit, terms: Terms, rng: np.random.Generator, least: float = 0.0) -> float:
    """Draw a ratio from the leaf of the highest index; of several, from any.

    Args:
        bandit: As it is.
        terms: Its constants.
        rng: Drawn from twice.
        least: The least ratio that the device can do. A leaf below it can never be played, so that it would be the one of the
            highest index for ever; where there is none above it, the very top is given.
    """
    found = indices(bandit, terms)
    found[:-1][np.asarray(bandit.edges[1:-1]) <= least] = -np.inf
    leaf = int(rng.choice(np.flatnonzero(found == found.max())))
    high = bandit.edges[leaf + 1]
    low = min(high, max(bandit.edges[leaf], least))
    return float(min(low + (high - low) * rng.random(), np.nextafter(high, bandit.edges[leaf])))


def learnt(bandit: Bandit, terms: Terms, ratio: float, reward: float, least: float = 0.0) -> Bandit:
    """Remember a play, and split its leaf there if that is wider than the granularity.

    Args:
        bandit: As it was.
        terms: Its constants.
        ratio: What was played. Where a device could not do what was chosen, what it did; it counts in the nearest leaf.
        reward: Finite.
        least: As for `choose`; how wide a leaf is is counted from there.
    """
    keep = terms.window - 1
    ratios = (*bandit.ratios[max(0, len(bandit.ratios) - keep) :], ratio)
    rewards = (*bandit.rewards[max(0, len(bandit.rewards) - keep) :], reward)
    return replace(bandit, edges=_split(bandit.edges, terms.granularity, ratio, least), ratios=ratios, rewards=rewards)


def _split(edges: Sequence[float], granularity: float, ratio: float, least: float) -> Sequence[float]:
    leaf = int(np.searchsorted(edges, ratio, side="right")) - 1
    if not 0 <= leaf < len(edges) - 1:
        return edges
    low = max(edges[leaf], least)
    if not low < ratio or edges[leaf + 1] - low <= granularity:
        return edges
    return (*edges[: leaf + 1], ratio, *edges[leaf + 1 :])


def gap_reward(decrease: float, seconds: float, mean: float, floor: float) -> float:
    """Give FedMP's reward: what the loss fell by, over the distance of a device's time from the mean of all.

    Args:
        decrease: Loss before minus loss after; may be negative.
        seconds: The device's.
        mean: Of all devices of the round; above 0.
        floor: Least distance, as a share of the mean; without it the device in the middle would own all means.
    """
    return decrease / max(abs(seconds - mean), floor * mean)


def speed_reward(share: float, longest: float) -> float:
    """Give the share of its loss that a device lost, at most all of it, per second of the round, which its slowest ends."""
    return min(1.0, max(0.0, share)) / longest
