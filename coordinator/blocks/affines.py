"""Weights and biases of norms by width: a set for each, moved by whoever has trained just that width.

With the parameter ``norms`` of ``own`` a channel's weight and bias are other ones in each width, as its statistics are (Yu et
al., "Slimmable Neural Networks", ICLR 2019). A device says how it moved those of the width that it trained, and, where its
steps train narrower widths as well, of each that came up. The moves of a width are joined over just these devices, by the
algorithm's own weights (NeFL's rule for what sub-models do not share: Kang et al., 2023), and feed a momentum of that width.

The sets stand in `State.norms`, beside the statistics, of every channel and in canonical order. What a width lacks has there
what the next wider width has, which is where a new ranking may take it from; the widest set is also that of `State.weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, Arrays, State
from coordinator.blocks import momentum
from coordinator.blocks.aggregate import Seat, Weigh, counted
from coordinator.blocks.nesting import whole_of
from coordinator.blocks.norms import filled
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.norms import APART, affine, affines
from wire.spec import ModelSpec, Structure
from wire.structure import cut, paste_add, to_canonical, to_wire

NORMS: Mapping[str, float | str] = MappingProxyType({"norms": "shared"})
"""The parameter with its default: one weight and bias of each channel for all widths."""

Sets = dict[int, dict[str, NDArray[np.float32]]]


def check(spec: ModelSpec, params: Mapping[str, float | str]) -> None:
    """Hold the parameter ``norms`` against the model.

    Raises:
        ConfigError: It is another word, or asks for sets of a model without norms.
    """
    said = params["norms"]
    if said not in ("shared", "own"):
        raise ConfigError(f"parameter norms = {said!r}: write 'shared' or 'own'")
    if said == "own" and not affines(spec):
        raise ConfigError(f"parameter norms = 'own', and model {spec.name!r} has no norms: write 'shared'")


def begun(spec: ModelSpec, weights: Arrays, widths: Mapping[str, Sequence[int]], params: Mapping[str, object]) -> Sets:
    """Give the sets that a state starts with, all alike; none where widths share one."""
    if params["norms"] != "own":
        return {}
    count = len(next(iter(widths.values())))
    return {capacity: {name: weights[name] for name in sorted(affines(spec))} for capacity in range(count)}


def named(sets: Mapping[int, Arrays]) -> dict[str, NDArray[np.float32]]:
    """Give the sets' tensors by ``CAPACITY/NAME``, as a momentum knows them."""
    return {f"{capacity}/{name}": array for capacity, held in sets.items() for name, array in held.items()}


def told(recipe: Recipe, params: Mapping[str, object]) -> Recipe:
    """Say in a recipe that narrower widths have norms of their own."""
    if params.get("norms", "shared") != "own":
        return recipe
    return dataclasses.replace(recipe, knobs={**recipe.knobs, APART: 1.0})


def shared(state: State, answers: Answers | Iterable[Answer]) -> Answers | Iterable[Answer]:
    """Give the answers without what is not shared by widths."""
    return answers if not _apart(state) else _Shared(answers, affines(state.spec))


def joined(before: State, after: State, answers: Answers | Iterable[Answer], weigh: Weigh) -> State:
    """Move the set of each width by the answers that trained it.

    Args:
        before: The state that the round began with.
        after: The same with everything else joined, its momentum included.
        answers: Gone through twice.
        weigh: Asked once for each width that somebody trained, given who did.

    Raises:
        Malformed: As `coordinator.blocks.aggregate.counted`.

    Memory: one sum of each set.
    """
    names = _apart(before)
    if not names:
        return after
    spec, whole = affine(before.spec), whole_of(before)
    seats: dict[int, list[Seat]] = {}
    for answer in counted(answers, whole):
        for capacity in _trained(answer, names):
            seats.setdefault(capacity, []).append(Seat(answer.device, answer.samples, capacity))
        del answer
    if not seats:
        return after
    weights = {
        capacity: {seat.device: weight for seat, weight in zip(cover, weigh(cover), strict=True)}
        for capacity, cover in seats.items()
    }
    totals = {k: {name: np.zeros_like(before.weights[name]) for name in names} for k in seats}
    for answer in counted(answers, whole):
        for capacity in _trained(answer, names):
            moves = _moves(answer, names, capacity)
            paste_add(spec, totals[capacity], moves, whole.narrowed(capacity), weights[capacity][answer.device])
        del answer
    sets = {k: dict(held) for k, held in after.norms.items()}
    for capacity, total in totals.items():
        for name, step in to_canonical(spec, total, before.levels).items():
            sets[capacity][name] = np.add(step, before.norms[capacity][name], out=step)
    sets, arrays = _carried(before, after, sets, names)
    _filled(spec, sets, before.levels, whole)
    weights_now = {**after.weights, **{name: sets[whole.capacity][name] for name in names}}
    return dataclasses.replace(after, weights=weights_now, norms=sets, arrays=arrays)


@dataclass(frozen=True, slots=True)
class _Shared:
    """Answers without some tensors, as often as anybody likes."""

    answers: Answers | Iterable[Answer]
    names: frozenset[str]

    def __iter__(self) -> Iterator[Answer]:
        return map(self._without, self.answers)

    def _without(self, answer: Answer) -> Answer:
        update = {name: array for name, array in answer.update.items() if name not in self.names}
        return dataclasses.replace(answer, update=update)


def _apart(state: State) -> frozenset[str]:
    """Name what widths do not share; nothing in a state of before there was the parameter."""
    return affines(state.spec) if state.scalars["params"].get("norms", "shared") == "own" else frozenset()


def _trained(answer: Answer, names: frozenset[str]) -> list[int]:
    """Name the widths that an answer has trained: its own, and the narrower ones of which it says all."""
    own = answer.structure.capacity
    narrower = (k for k in range(own) if all(f"{k}/{name}" in answer.norms for name in names))
    return [*narrower, *([own] if answer.update.keys() & names else [])]


def _moves(answer: Answer, names: frozenset[str], capacity: int) -> Arrays:
    if capacity == answer.structure.capacity:
        return {name: answer.update[name] for name in names & answer.update.keys()}
    return {name: answer.norms[f"{capacity}/{name}"] for name in names}


def _carried(
    before: State, after: State, sets: Sets, names: frozenset[str]
) -> tuple[Sets, Mapping[str, NDArray[np.float32]]]:
    """Feed the momentum of each set with how the round has moved it."""

    def learnt(norms: Mapping[int, Arrays]) -> dict[str, NDArray[np.float32]]:
        return named({k: {name: held[name] for name in names} for k, held in norms.items()})

    old = dataclasses.replace(before, weights=learnt(before.norms))
    moved = momentum.carried(old, dataclasses.replace(after, weights=learnt(sets)))
    found = {k: {**held, **{name: moved.weights[f"{k}/{name}"] for name in names}} for k, held in sets.items()}
    return found, moved.arrays


def _filled(spec: ModelSpec, sets: Sets, levels: Mapping[str, NDArray[np.uint8]], whole: Structure) -> None:
    """Give each width, in the channels that it lacks, what the next wider one has."""
    wider = to_wire(spec, sets[whole.capacity], levels)
    for capacity in reversed(range(whole.capacity)):
        structure = whole.narrowed(capacity)
        wider = filled(spec, wider, cut(spec, to_wire(spec, sets[capacity], levels), structure), structure)
        sets[capacity] |= to_canonical(spec, wider, levels)
