"""Joining updates: ``x[c] += sum of a_n(c) delta_n[c] over the devices n that have coordinate c``.

All methods differ in ``a_n(c)`` alone. With nested widths it is constant over each partition, that is over what one width has
beyond the next narrower one (`joined`): arrays are in wire order, where a partition is a few boxes of slices. Where devices
have single coordinates, by masks or by levels, it is a product, ``u_n v(c)``: `summed` adds up and `landed` does the rest.

Sums are float32. One answer is in memory at a time: whoever goes through answers lets go of one (``del``) before the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, State
from coordinator.blocks.nesting import partition, whole_of
from wire.errors import Malformed
from wire.spec import ModelSpec, Structure
from wire.structure import add_scaled, paste_add, to_canonical

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

Owns = Callable[[Answer], NDArray[np.bool_]]
"""Says which rows of the head an answer counts for, ``(rows,)``."""

Cover = Callable[[Answer, str], NDArray[np.bool_] | None]
"""Says which coordinates of a tensor an answer has; None for all."""

Factor = Callable[[str, NDArray[np.float32]], object]
"""Multiplies the sums of a tensor in place."""


def counted(answers: Answers | Iterable[Answer], whole: Structure) -> Iterator[Answer]:
    """Give the answers that have samples behind them.

    Raises:
        Malformed: One is of another ranking than the round's, or of other widths.
    """

    def counts(answer: Answer) -> bool:
        if answer.structure != whole.narrowed(answer.structure.capacity):
            raise Malformed(f"{answer.device} answers with a structure of another ranking")
        return answer.samples > 0

    return filter(counts, answers)


@dataclass(frozen=True, slots=True)
class Expected:
    """Answers that are all about one structure, as often as one likes; Malformed says which one is not.

    Attributes:
        answers: The round's.
        wanted: What every device was asked for: the whole model, where nothing else is said.
    """

    answers: Answers | Iterable[Answer]
    wanted: Structure = field(default_factory=Structure)

    def __iter__(self) -> Iterator[Answer]:
        """Start over."""
        return map(self._checked, self.answers)

    def _checked(self, answer: Answer) -> Answer:
        if answer.structure != self.wanted:
            raise Malformed(
                f"{answer.device} answers about another part of the model, or other masks, than it was asked for"
            )
        return answer


def summed(
    spec: ModelSpec,
    weights: Arrays,
    answers: Iterable[Answer],
    share: Mapping[str, float],
    *,
    cover: Cover | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Give ``sum of u_n delta_n`` over the devices that have a coordinate.

    Args:
        spec: The model.
        weights: Whole arrays, where answers have widths in wire order; the sums are as these.
        answers: Gone through once.
        share: Device to its u; an answer of any other device counts for nothing.
        cover: Which coordinates of a tensor an answer has, where its update is not 0 in all others.

    Memory: the sums, one answer, and what `cover` gives for one tensor.
    """
    total = {name: np.zeros_like(array) for name, array in weights.items()}
    for answer in answers:
        if answer.device in share:
            where = None if cover is None else partial(cover, answer)
            paste_add(spec, total, answer.update, answer.structure, share[answer.device], where=where)
            del where
        del answer
    return total


def landed(
    weights: Arrays, total: dict[str, NDArray[np.float32]], factor: Factor | None = None
) -> dict[str, NDArray[np.float32]]:
    """Give the weights moved by ``v(c)`` times the sums, which become the new weights.

    Args:
        weights: As they were, in the order of `total`.
        total: See `summed`; changed in place.
        factor: Multiplies a tensor's sums by v in place; None for 1.
    """
    for name, array in weights.items():
        if factor is not None:
            factor(name, total[name])
        np.add(total[name], array, out=total[name])
    return total


def covers_of(answers: Answers | Iterable[Answer], whole: Structure) -> list[list[Seat]]:
    """Give the cover of every partition; all are empty when nobody has answered. Goes through the answers once.

    Raises:
        Malformed: As `counted`.
    """
    seats = [*map(_seat, counted(answers, whole))]
    return [[seat for seat in seats if seat.capacity >= k] for k in range(whole.capacity + 1)]


def _seat(answer: Answer) -> Seat:
    return Seat(answer.device, answer.samples, answer.structure.capacity)


def joined(state: State, answers: Answers | Iterable[Answer], weigh: Weigh) -> State:
    """Add the answers to the model, on each partition with the weights that its cover is given.

    Args:
        state: With levels and widths.
        answers: Gone through twice. None leave the model as it is, and so does a partition that nobody covers.
        weigh: Expected once for each partition that somebody covers.

    Raises:
        Malformed: As `counted`.

    Memory: one sum of the model's size, which becomes the new weights, and one answer, however many there are.
    """
    whole = whole_of(state)
    covers = covers_of(answers, whole)
    if not covers[0]:
        return state
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    add_up(state.spec, total, counted(answers, whole), covers, [weigh(cover) if cover else [] for cover in covers])
    return moved(state, total)


def joined_by_rows(
    state: State, answers: Answers | Iterable[Answer], weigh: Weigh, head: Collection[str], owns: Owns
) -> State:
    """Add the answers to the model as `joined` does, but share each row of some tensors among those only that own it.

    Args:
        state: With levels and widths.
        answers: Gone through twice.
        weigh: As for `joined`; for the head it is asked once for each row of each partition that somebody covers and owns.
        head: Names of tensors whose first axis is the rows, and is never cut. A row that nobody owns stays as it is.
        owns: Which rows.

    Raises:
        Malformed: As `counted`.

    Memory: as `joined`. Cost: beside the sums, one step for each row, partition and answer.
    """
    whole = whole_of(state)
    owned = {a.device: (a.samples, a.structure.capacity, owns(a)) for a in counted(answers, whole)}
    if not owned:
        return state
    seats = [Seat(device, samples, capacity) for device, (samples, capacity, _) in owned.items()]
    covers = [[seat for seat in seats if seat.capacity >= k] for k in range(whole.capacity + 1)]
    total = {name: np.zeros_like(array) for name, array in state.weights.items()}
    body, ends = (
        dataclasses.replace(state.spec, tensors=tuple(t for t in state.spec.tensors if (t.name in head) == named))
        for named in (False, True)
    )
    rows = {device: own for device, (_, _, own) in owned.items()}
    weights = [_weights(cover, weigh) for cover in covers]
    row_weights = [_row_weights(cover, weigh, rows) for cover in covers]
    for answer in counted(answers, whole):
        own = range(answer.structure.capacity + 1)
        structure, device = answer.structure, answer.device
        add_partitions(body, total, answer.update, structure, [weights[k][device] for k in own])
        for k in own:
            _add_rows(ends, total, answer, k, row_weights[k][device])
        del answer
    return moved(state, total)


def _weights(cover: Sequence[Seat], weigh: Weigh) -> dict[str, float]:
    given = weigh(cover) if cover else ()
    return {seat.device: weight for seat, weight in zip(cover, given, strict=True)}


def _row_weights(
    cover: Sequence[Seat], weigh: Weigh, rows: Mapping[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.float32]]:
    """Give each member of a cover its weight in each row, 0 where it owns none."""
    found = {seat.device: np.zeros(len(rows[seat.device]), np.float32) for seat in cover}
    for row in range(max((len(weights) for weights in found.values()), default=0)):
        for device, weight in _weights([seat for seat in cover if rows[seat.device][row]], weigh).items():
            found[device][row] = weight
    return found


def _add_rows(spec: ModelSpec, total: Arrays, answer: Answer, capacity: int, weights: NDArray[np.float32]) -> None:
    whole = answer.structure.narrowed(_top(answer.structure))
    places = partition(spec, total, whole, capacity)
    for place, part in zip(places, partition(spec, answer.update, answer.structure, capacity), strict=True):
        by_row = weights.reshape(part.shape[:3] + (1,) * (part.ndim - 3))  # three dimensions for each axis
        np.add(place, by_row * part, out=place)


def moved(state: State, total: dict[str, NDArray[np.float32]], factor: Factor | None = None) -> State:
    """Give the state with its weights moved by `total`, which is in wire order and is emptied on the way.

    Args:
        state: With levels, where anything is cut.
        total: See `summed`.
        factor: Multiplies a tensor's sums in place, once they are in canonical order; None for 1.

    Memory: the new weights take the place of the sums, tensor by tensor.
    """
    weights = {}
    for tensor in state.spec.tensors:
        name = tensor.name
        alone = dataclasses.replace(state.spec, tensors=(tensor,))
        levels = {axis.group: state.levels[axis.group] for axis in tensor.axes if axis.group in state.levels}
        step = to_canonical(alone, {name: total.pop(name)}, levels)[name]
        if factor is not None:
            factor(name, step)
        weights[name] = np.add(step, state.weights[name], out=step)
    return dataclasses.replace(state, weights=weights)


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
        del answer


def shares(samples: Sequence[int]) -> list[float]:
    """Give ``D_n / sum of D`` (McMahan et al., AISTATS 2017, algorithm 1); not all samples may be zero."""
    total = sum(samples)
    return [count / total for count in samples]


def shares_of(samples: Mapping[str, int]) -> dict[str, float]:
    """Give `shares` by device."""
    return dict(zip(samples, shares(list(samples.values())), strict=True))


def by_samples(cover: Sequence[Seat]) -> list[float]:
    """Give `shares` of a cover's samples."""
    return shares([seat.samples for seat in cover])


def evenly(cover: Sequence[Seat]) -> list[float]:
    """Give every member of a cover the same weight, whatever samples it has: ``1 / |cover|`` (HeteroFL, FedRolex)."""
    return [1.0 / len(cover)] * len(cover)


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

    Cost: one multiply-add per weight of the structure; memory for one block of products.
    """
    whole = structure.narrowed(_top(structure))
    for capacity, weight in zip(range(structure.capacity + 1), weights, strict=True):
        places = partition(spec, total, whole, capacity)
        for place, part in zip(places, partition(spec, update, structure, capacity), strict=True):
            add_scaled(place, part, weight)


def _top(structure: Structure) -> int:
    return len(next(iter(structure.widths.values()))) - 1 if structure.widths else 0
