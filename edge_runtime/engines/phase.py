"""What an engine's ops know of the pass that is under way, and where training passes draw from; no engine in particular."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_runtime.engines.arrays import Floats
from wire.segments import Cuts

FOLLOWS = 0.1
"""How far the running mean and variance of a batch norm move towards those of each batch."""


@dataclass(slots=True)
class Source:
    """Where an engine and its narrower widths draw from: a counter, so that the same order draws the same again.

    Attributes:
        numbers: What the order gives: its recipe's seed and its round.
        calls: Training passes so far.
    """

    numbers: tuple[int, ...] = ()
    calls: int = 0


@dataclass(slots=True)
class Phase:
    """What an engine's ops need to know of the pass that is under way.

    Attributes:
        source: Shared with narrower widths.
        follows: How far running statistics move in training; those of a narrower width, views of the wide ones, do not.
        training: Whether this pass is one.
        drops: Whether dropout drops in training.
        cuts: Where training passes are cut into segments that run again (`wire.segments`).
    """

    source: Source = field(default_factory=Source)
    follows: float = FOLLOWS
    training: bool = False
    drops: bool = True
    cuts: Cuts = ()


def draw_keeps(source: Source, place: int, share: float, into: Floats) -> None:
    """Draw a dropout's factors: 0 with probability `share`, else ``1 / (1 - share)``.

    What is dropped follows from the order, the pass and the node's place among the nodes by a counter generator (Philox), so
    that the same order drops the same values again, in every engine.

    Args:
        source: The engine's.
        place: Of the node.
        share: Of the values that is dropped, below 1.
        into: Written, float32, C-contiguous.
    """
    keep_some(drawing(source, place), share, into.reshape(-1))


def drawing(source: Source, place: int) -> np.random.Generator:
    """Give what the factors of one node and pass are drawn from, the first ones first."""
    seeds: Sequence[int] = [*source.numbers, source.calls, place]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seeds)))


def keep_some(generator: np.random.Generator, share: float, into: Floats) -> None:
    """Draw a dropout's next factors: in parts they are the same as at once (see `draw_keeps`)."""
    generator.random(into.size, np.float32, into)
    np.greater_equal(into, np.float32(share), out=into)
    into *= np.float32(1 / (1 - share))
