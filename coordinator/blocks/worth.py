"""What a pruning ratio costs in progress, learnt from the losses that devices report.

A device's loss in a round is taken as a product of three things: how far the model is, what the device's data are like, and
what its ratio costs. So ``log loss = round + device + h(ratio)``, where h is convex, grows from 0, and is fitted by
non-negative least squares over hinges ``max(0, ratio - knot)``. Where the loss falls as 1/t, a sub-model whose loss is e times
as large makes 1/e of the progress; so the worth of a ratio is ``exp(-h)``. docs/decisions/fedmp.md holds that against what
whole runs at one ratio took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.blocks.timecost import nnls

Numbers = NDArray[np.float64]

KNOTS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Where h may bend."""
BELIEF = (0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Slope gained at each knot before any loss is known: worth 0.82 at ratio 0.5, 0.55 at 0.7, 0.37 at 0.9."""
_PASSES = 20
_SHRINK = 2.0
_LEAST, _MOST = 1e-3, 100.0


@dataclass(frozen=True, slots=True)
class Said:
    """One device's word of one round.

    Attributes:
        device: Who.
        round: When.
        ratio: Of the sub-model that it trained.
        loss: Its mean training loss; above 0. It is the device's word, so that it is taken as 0.001 at least and 100 at most.
    """

    device: str
    round: int
    ratio: float
    loss: float


def worth(said: Sequence[Said], ratios: Numbers, trust: float) -> Numbers:
    """Give what a round at each ratio is worth, as a share of one with the whole model.

    Args:
        said: What devices reported; see `Said`.
        ratios: What is asked about.
        trust: Strength of `BELIEF`: as so many reports, spread evenly over the ratios, that agree with it.

    Returns:
        Values above 0 and at most 1, falling. Cost: some passes over the reports.
    """
    slopes = np.array(BELIEF)
    if said:
        y = np.log(np.clip([one.loss for one in said], _LEAST, _MOST))
        x = hinges(np.array([one.ratio for one in said]))
        x, y = _within(said, np.column_stack([x, y]))
        spread = np.sqrt(trust * np.square(hinges(np.linspace(0.0, 1.0, 101))).mean(axis=0))
        slopes = nnls(np.vstack([x, np.diag(spread)]), np.concatenate([y, spread * slopes]))
    return np.asarray(np.exp(-hinges(ratios) @ slopes), np.float64)


def hinges(ratios: Numbers) -> Numbers:
    """Give ``max(0, ratio - knot)``, ``(ratios, knots)``."""
    return np.asarray(np.maximum(0.0, ratios[:, None] - np.array(KNOTS)), np.float64)


def _within(said: Sequence[Said], columns: Numbers) -> tuple[Numbers, Numbers]:
    """Take out of each column what is a round's, and what is a device's as far as its few reports can tell.

    Rounds have any level. Devices' levels are drawn to 0, as if each had `_SHRINK` more reports of 0: otherwise a device that
    always has the same ratio would say nothing about it. Rows for what is drawn so are appended.
    """
    rounds = np.unique([one.round for one in said], return_inverse=True)[1]
    devices = np.unique([one.device for one in said], return_inverse=True)[1]
    count = np.bincount(devices)[:, None]
    own = np.zeros((len(count), columns.shape[1]))
    for _ in range(_PASSES):
        level = _sums(columns - own[devices], rounds) / np.bincount(rounds)[:, None]
        own = _sums(columns - level[rounds], devices) / (count + _SHRINK)
    left = np.vstack([columns - level[rounds] - own[devices], -np.sqrt(_SHRINK) * own])
    return left[:, :-1], left[:, -1]


def _sums(rows: Numbers, groups: NDArray[np.intp]) -> Numbers:
    """Add up the rows of each group."""
    total = np.zeros((int(groups.max()) + 1, rows.shape[1]))
    np.add.at(total, groups, rows)
    return total
