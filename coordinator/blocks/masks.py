"""Masks: which weights may be masked at all, choosing exactly as many as are wanted, and the mean of masked models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import Answer, Answers, Arrays, Levels, Masks, State
from coordinator.blocks.aggregate import landed, shares_of, summed
from wire.errors import NonFinite
from wire.largest import largest
from wire.spec import ModelSpec, Structure
from wire.structure import add_scaled, cut, masked, ranking_digest, to_wire

Scores = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]

NEVER = 255
"""Level of a weight that no capacity keeps."""


def top_global(scores: Scores, count: int) -> dict[str, Mask]:
    """Keep the `count` largest scores of all tensors together.

    Args:
        scores: By tensor name; of equal scores the first tensor's, and within it the first in C order, are kept.
        count: How many.

    Returns:
        Masks of the scores' shapes with `count` ones in all.

    Raises:
        NonFinite: A score is not a number; infinities are fine.
        ValueError: There are not as many.

    Cost: a copy of the scores and a partial sort, O(weights).
    """
    line = np.concatenate([np.zeros(0, np.float32), *(np.ravel(array) for array in scores.values())])
    kept = _largest(line, count)
    masks, start = {}, 0
    for name, array in scores.items():
        masks[name] = kept[start : start + array.size].reshape(array.shape).copy()
        start += array.size
    return masks


def top_per_tensor(scores: Scores, counts: Mapping[str, int]) -> dict[str, Mask]:
    """Keep in each tensor so many of its largest scores; otherwise as `top_global`.

    Args:
        scores: By tensor name.
        counts: For each of them, how many are kept.
    """
    return {name: _largest(np.ravel(array), counts[name]).reshape(array.shape) for name, array in scores.items()}


def random_masks(
    shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int], rng: np.random.Generator
) -> dict[str, Mask]:
    """Keep in each tensor so many weights, all choices being equally likely."""
    masks = {}
    for name, shape in shapes.items():
        mask = np.zeros(shape, np.bool_)
        mask.reshape(-1)[rng.choice(mask.size, counts[name], replace=False, shuffle=False)] = True
        masks[name] = mask
    return masks


def masked_weights(weights: Arrays, masks: Masks) -> dict[str, NDArray[np.float32]]:
    """Give the weights with zeros where nothing is kept: copies of masked tensors, the others as they are."""
    none = np.float32(0.0)
    return {name: np.where(masks[name], w, none) if name in masks else w for name, w in weights.items()}


def density(masks: Masks) -> float:
    """Give the kept fraction of all weights that masks are about; 1 where there is no mask."""
    total = sum(mask.size for mask in masks.values())
    return sum(int(np.count_nonzero(mask)) for mask in masks.values()) / total if total else 1.0


def densities(masks: Masks) -> dict[str, float]:
    """Give the kept fraction by tensor name."""
    return {name: density({name: mask}) for name, mask in masks.items()}


def nested_levels(sizes: Sequence[Masks]) -> dict[str, NDArray[np.uint8]]:
    """Give the narrowest capacity that keeps each weight (`coordinator.algorithm.State.mask_levels`).

    Args:
        sizes: The masks of every capacity, narrowest first, each of the same tensors and each within the next.

    Raises:
        ValueError: One is not within the next.
    """
    levels = {name: np.full(mask.shape, NEVER, np.uint8) for name, mask in sizes[-1].items()}
    for capacity in reversed(range(len(sizes))):
        for name, mask in sizes[capacity].items():
            if (levels[name][mask] != (capacity + 1 if capacity + 1 < len(sizes) else NEVER)).any():
                raise ValueError(f"capacity {capacity} keeps weights of {name} that the next one does not")
            levels[name][mask] = capacity
    return levels


def capacities_of(state: State) -> int:
    """Count the sizes of nested masks, with widths as many as these; 0 when there are none. Cost: one pass.

    Without widths a size adds weights to the one before. With widths two may keep the same ones, and differ by channels.
    """
    if not state.mask_levels:
        return 0
    if state.widths:
        return len(next(iter(state.widths.values())))
    return 1 + max(int(level[level != NEVER].max(initial=0)) for level in state.mask_levels.values())


def masks_at(levels: Levels, capacity: int) -> dict[str, Mask]:
    """Give the masks of one size of nested ones; none at all where that keeps every weight."""
    masks = {name: level <= capacity for name, level in levels.items()}
    return {} if all(mask.all() for mask in masks.values()) else masks


def kept_by(state: State, capacity: int | None = None) -> Masks:
    """Give what a state keeps of which weights, whole, in canonical order: of nested masks one size, None for the largest."""
    if not state.mask_levels:
        return state.masks
    return masks_at(state.mask_levels, capacities_of(state) - 1 if capacity is None else capacity)


def held_at(state: State, capacity: int) -> dict[str, Mask]:
    """Give the masks of one size of a state's nested ones, as devices of that size hold them.

    Without widths they are whole; with widths compact, in wire order, and there is one for each tensor that has levels,
    whatever it keeps. Cost: a pass over the levels, with widths beside a copy of them.
    """
    if not state.widths:
        return masks_at(state.mask_levels, capacity)
    some = dataclasses.replace(state.spec, tensors=tuple(t for t in state.spec.tensors if t.name in state.mask_levels))
    found = cut(some, to_wire(some, state.mask_levels, state.levels), _width_at(state, capacity))
    return {name: level <= capacity for name, level in found.items()}


def structure_at(state: State, capacity: int) -> Structure:
    """Give what a device of that size is asked for. Cost: as `held_at`, and one pass over the masks, to name them."""
    return masked(held_at(state, capacity), _width_at(state, capacity))


def _width_at(state: State, capacity: int) -> Structure:
    return Structure(capacity, state.widths, ranking_digest(state.levels))


def masked_mean(
    spec: ModelSpec, weights: Arrays, answers: Answers | Iterable[Answer], *, evenly: bool = False
) -> dict[str, NDArray[np.float32]]:
    """Give the mean of what the devices trained over those that have a weight, by samples or each counting once.

    ``w_j = sum_k n_k m_kj w_kj / sum_k n_k m_kj``; a weight that nobody sent keeps the server's value. Where all devices
    sent the same weights of a tensor this is FedAvg of the masked models, in the same order of sums and so to the same bit.

    Args:
        spec: The model.
        weights: What the server has, whole, by tensor name; what devices received of it is what they started from.
        answers: The round's; they are gone through twice. A tensor that one did not send at all did not move there.
        evenly: Whether n_k is 1 for all who have samples, instead of how many.

    Returns:
        New arrays; those given, when no answer has any sample.

    Cost: one sum of the model's size; for tensors of which devices sent different weights, how much has each weight: of a
    byte or two each, or from 65,536 samples on of a second sum's size.
    """
    samples, uneven = _read(spec, answers)
    counts = {device: min(count, 1) if evenly else count for device, count in samples.items()}
    everybody = sum(counts.values())
    if not everybody:
        return dict(weights)
    kind = np.min_scalar_type(everybody) if everybody < 1 << 16 else np.dtype(np.float32)
    held = {name: np.zeros(weights[name].shape, kind) for name in uneven}

    def noted(answer: Answer) -> Answer:
        for name, having in held.items():
            if name in answer.sent:
                add_scaled(having, answer.sent[name], counts[answer.device])
            else:
                np.add(having, kind.type(counts[answer.device]), out=having)
        return answer

    def spread(name: str, total: NDArray[np.float32]) -> None:
        if name in held:
            having = held.pop(name)
            np.divide(total, np.divide(having, everybody, dtype=np.float32), out=total, where=having > 0)

    return landed(weights, summed(spec, weights, map(noted, answers), shares_of(counts)), spread)


def _read(spec: ModelSpec, answers: Answers | Iterable[Answer]) -> tuple[dict[str, int], list[str]]:
    """Give all samples by device, and the tensors of which not all that count sent the same weights."""
    samples: dict[str, int] = {}
    first: Masks | None = None
    uneven: dict[str, None] = {}
    for answer in answers:
        samples[answer.device] = answer.samples
        sent = answer.sent
        if answer.samples and first is None:
            first = sent
        elif answer.samples and first is not None:
            uneven |= dict.fromkeys(tensor.name for tensor in spec.tensors if not _same(tensor.name, first, sent))
        del answer, sent
    return samples, list(uneven)


def _same(name: str, a: Masks, b: Masks) -> bool:
    one, other = a.get(name), b.get(name)
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _largest(line: NDArray[Any], count: int) -> Mask:
    """Mark the `count` largest of a line; of equal ones the first."""
    if not 0 <= count <= line.size:
        raise ValueError(f"{count} of {line.size} weights cannot be kept")
    kept = largest(line, count)
    if int(np.count_nonzero(kept)) != count or np.isnan(line).any():
        raise NonFinite("a score is not a number")
    return kept
