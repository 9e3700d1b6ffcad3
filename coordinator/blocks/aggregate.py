"""Joining updates: ``x[c] += sum of a_n(c) delta_n[c] over the devices n that have coordinate c``.

All methods of this family differ in ``a_n(c)`` alone. Here it is constant over each partition, that is over what one width
has beyond the next narrower one. Arrays are in wire order, where a partition is a few boxes of slices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, State
from coordinator.blocks.nesting import partition, whole_of
from wire.errors import Malformed
from wire.spec import ModelSpec, Structure
from wire.structure import to_canonical, to_wire

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Seat:
    """What weighting must know of one answer.

    Attributes:
        device: Its name.
        samples: Behind the update; above 0.
        capacity: Index of the width that was trained.
    """

    device: str
    samples: int
    capacity: int


Covers = Sequence[Sequence[Seat]]
"""For each partition, narrowest first, the answers that cover it, in the order in which answers come."""

Weigh = Callable[[Sequence[Seat]], Sequence[float]]
"""Gives each member of a partition's cover its weight."""


def counted(answers: Answers | Iterable[Answer], whole: Structure) -> Iterator[Answer]:
    """Yield the answers that have samples behind them.

    Raises:
        Malformed: One is of another ranking than the round's, or of other widths.
    """
    for answer in answers:
        if answer.structure != whole.narrowed(answer.structure.capacity):
            raise Malformed(f"{answer.device} answers with a structure of another ranking")
        if answer.samples > 0:
            yield answer


def covers_of(answers: Answers | Iterable[Answer], whole: Structure) -> list[list[Seat]]:
    """Give the cover of every partition; all are empty when nobody has answered. Goes through the answers once.

    Raises:
        Malformed: As `counted`.
    """
    seats = [Seat(a.device, a.samples, a.structure.capacity) for a in counted(answers, whole)]
    return [[seat for seat in seats if seat.capacity >= k] for k in range(whole.capacity + 1)]


def joined(state: State, answers: Answers | Iterable[Answer], weigh: Weigh) -> State:
    """Add the answers to the model, on each partition with the weights that its cover is given.

    Args:
        state: With levels and widths.
        answers: Gone through twice. None leave the model as it is, and so does a partition that nobody covers.
        weigh: Asked once for each partition that somebody covers.

    Raises:
        Malformed: As `counted`.

    Memory: the model in wire order and one sum of its size, however many answers there are.
    """
    whole = whole_of(state)
    covers = covers_of(answers, whole)
    if not covers[0]:
        return state
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    add_up(state.spec, total, counted(answers, whole), covers, [weigh(cover) if cover else [] for cover in covers])
    return moved(state, total)


def moved(state: State, total: Mapping[str, NDArray[np.float32]]) -> State:
    """Give the state with its weights moved by `total`, which is in wire order and is written to."""
    for name, array in to_wire(state.spec, state.weights, state.levels).items():
        np.add(total[name], array, out=total[name])
    return dataclasses.replace(state, weights=to_canonical(state.spec, total, state.levels))


def add_up(
    spec: ModelSpec, total: Arrays, answers: Iterable[Answer], covers: Covers, weights: Sequence[Sequence[float]]
) -> None:
    """Add every answer into `total`, on each partition with its own weight.

    Args:
        spec: The model.
        total: Whole arrays in wire order; changed in place.
        answers: Those that the covers were made of.
        covers: See `covers_of`.
        weights: One for each member of each cover.
    """
    of = [
        {seat.device: weight for seat, weight in zip(*both, strict=True)} for both in zip(covers, weights, strict=True)
    ]
    for answer in answers:
        own = [of[k][answer.device] for k in range(answer.structure.capacity + 1)]
        add_partitions(spec, total, answer.update, answer.structure, own)


def shares(samples: Sequence[int]) -> list[float]:
    """Give ``D_n / sum of D`` (McMahan et al., AISTATS 2017, algorithm 1); not all samples may be zero."""
    total = sum(samples)
    return [count / total for count in samples]


def add_partitions(
    spec: ModelSpec, total: Arrays, update: Arrays, structure: Structure, weights: Sequence[float]
) -> None:
    """Add ``weights[j] * update`` into whole arrays, on each partition j of a structure.

    Args:
        spec: The model.
        total: Whole arrays in wire order; changed in place.
        update: Compact arrays of the structure.
        structure: What the update covers.
        weights: One for each capacity from 0 to the structure's.

    Cost: one multiply-add per weight of the structure; memory for one box of products.
    """
    whole = structure.narrowed(_top(structure))
    for capacity, weight in zip(range(structure.capacity + 1), weights, strict=True):
        scale = np.float32(weight)
        places = partition(spec, total, whole, capacity)
        for place, part in zip(places, partition(spec, update, structure, capacity), strict=True):
            np.add(place, scale * part, out=place)


def _top(structure: Structure) -> int:
    return len(next(iter(structure.widths.values()))) - 1 if structure.widths else 0
