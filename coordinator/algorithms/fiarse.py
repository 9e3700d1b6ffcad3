"""FIARSE: devices of several sizes train nested sparse models, each the largest weights of the one model that all share.

Wu et al., "FIARSE: Model-Heterogeneous Federated Learning via Importance-Aware Submodel Extraction", NeurIPS 2024;
docs/decisions/personal-baselines.md says what was filled in and why.

* A size s keeps the fraction s of all weights of largest magnitude, so that a smaller size is within a larger one. They are
  chosen anew in every round from the weights of then. ``by`` says whether from all layers together (``model``, the paper's) or
  from each by itself (``layer``).
* Each device gets the widest size that its memory holds, as an ordinary masked order: values alone, and the masks of its size.
* A device's gradient says what a weight is worth for being kept (the rule `fiarse`); the threshold of the device's size, the
  least magnitude that is kept, goes with its order.
* ``x_j += server sum_n delta_n,j / count_j`` over the devices whose size keeps weight j. Masks are counted, not values that
  moved: a device whose weight stood still is one of them.

Only weights of linear layers and convolutions are masked; biases and norms go to everybody. A size that keeps all is sent
without masks. `evaluate` measures every size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, Levels, State
from coordinator.blocks.aggregate import landed, summed
from coordinator.blocks.fixed import TRAINING
from coordinator.blocks.masks import (
    NEVER,
    capacities_of,
    masks_at,
    nested_levels,
    structure_at,
    top_global,
    top_per_tensor,
)
from coordinator.blocks.nesting import kept_counts
from coordinator.fitting import Means, Plan, fit
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError, Malformed
from wire.masked import maskable
from wire.spec import ModelSpec, Structure

ABOUT = About("Wu et al., NeurIPS 2024", "baseline", "tests/unit/test_fiarse.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "sizes": "0.015625 0.0625 0.25 1",
        "by": "model",
        "server": 1.0,
        **TRAINING,
        "recipe.rule": "fiarse",
    }
)
"""Names of all parameters with their defaults; the sizes are the paper's."""

_SIZES_MAX = 64


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    if known["by"] not in ("model", "layer"):
        raise ConfigError(f"parameter by = {known['by']!r}: write 'model' or 'layer'")
    if not 0.0 < float(known["server"]) < math.inf:
        raise ConfigError(f"parameter server = {known['server']}: write a rate above 0, such as 1")
    sizes = _sizes(str(known["sizes"]))
    names = maskable(spec)
    if not names:
        raise ConfigError(f"model {spec.name!r} has no weights that can be masked; fiarse needs some, fedavg does not")
    counts = kept_counts(sum(weights[name].size for name in names), sizes)
    if len(set(counts)) < len(counts):
        raise ConfigError(f"parameter sizes = {known['sizes']!r}: two of them keep the same {min(counts)} weights")
    return State(spec, 0, dict(weights), scalars={"params": known}, mask_levels=ranked(spec, weights, known))


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: choose the sizes' weights, and give each device the widest that it holds."""
    params = state.scalars["params"]
    levels = ranked(state.spec, state.weights, params)
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    structures = [structure_at(levels, k) for k in range(capacities_of(levels))]
    least = thresholds(state.weights, levels)
    drafts, known = [], dict[Means, Plan | None]()
    for device in sorted(devices, key=lambda d: d.name):
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        means = device.means
        if means not in known:
            known[means] = fit(state.spec, structures, seeded, means)
        fits = known[means]
        if fits is not None:
            own = dataclasses.replace(seeded, knobs={**seeded.knobs, "threshold": least[fits.capacity]})
            drafts.append(Draft(device.name, "train", structures[fits.capacity], own, fits.bytes_bound))
    return dataclasses.replace(state, round=round_number, mask_levels=levels), tuple(drafts)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size, and what one tensor takes.

    Raises:
        Malformed: An answer is about other masks than those of its size.
    """
    counts = partial(_counts, [structure_at(state.mask_levels, k) for k in range(capacities_of(state.mask_levels))])
    seats = dict(map(_seat, filter(counts, answers)))
    if not seats:
        return state
    levels, server = state.mask_levels, np.float32(state.scalars["params"]["server"])
    sizes = np.bincount(list(seats.values()), minlength=capacities_of(levels))
    by_level = np.ones(NEVER + 1, np.float32)  # where there is none to divide by, nothing has been added
    by_level[: len(sizes)] = np.maximum(1, np.cumsum(sizes[::-1])[::-1])

    def having(answer: Answer, name: str) -> NDArray[np.bool_] | None:
        return levels[name] <= answer.structure.capacity if name in levels else None

    def spread(name: str, moved: NDArray[np.float32]) -> None:
        np.divide(moved, by_level[levels[name]] if name in levels else by_level[0], out=moved)
        np.multiply(moved, server, out=moved)

    total = summed(state.spec, state.weights, filter(counts, answers), dict.fromkeys(seats, 1.0), cover=having)
    return dataclasses.replace(state, weights=landed(state.weights, total, spread))


def ranked(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> Levels:
    """Give for each weight the narrowest size that keeps it, by magnitude; of equal ones the first are kept.

    Raises:
        NonFinite: A weight is no number.

    Cost: a partial sort of all weights for each size.
    """
    scores = {name: np.abs(weights[name]) for name in maskable(spec)}
    sizes = _sizes(str(params["sizes"]))
    if params["by"] == "model":
        totals = kept_counts(sum(array.size for array in scores.values()), sizes)
        return nested_levels([top_global(scores, count) for count in totals])
    counts = {name: kept_counts(array.size, sizes) for name, array in scores.items()}
    return nested_levels([top_per_tensor(scores, {n: c[k] for n, c in counts.items()}) for k in range(len(sizes))])


def thresholds(weights: Arrays, levels: Levels) -> list[float]:
    """Give the least magnitude that each size keeps; 0 for one that keeps every weight. Cost: a pass for each size."""
    found = []
    for capacity in range(capacities_of(levels)):
        masks = masks_at(levels, capacity)
        kept = [np.abs(weights[name][mask]) for name, mask in masks.items() if mask.any()]
        found.append(float(min((array.min() for array in kept), default=0.0)))
    return found


def _counts(known: Sequence[Structure], answer: Answer) -> bool:
    """Say whether an answer has samples behind it, and see that it is of a known size."""
    if answer.structure not in known:
        raise Malformed(f"{answer.device} answers about other masks than those of its size")
    return answer.samples > 0


def _seat(answer: Answer) -> tuple[str, int]:
    return answer.device, answer.structure.capacity


def _sizes(text: str) -> Sequence[float]:
    try:
        sizes = [float(word) for word in text.split()]
    except ValueError:
        sizes = []
    rising = all(low < high for low, high in zip([0.0, *sizes], sizes, strict=False))
    if not rising or not 1 <= len(sizes) <= _SIZES_MAX or sizes[-1] > 1.0:
        raise ConfigError(f"parameter sizes = {text!r}: write rising numbers above 0 and at most 1, such as '0.1 1'")
    return sizes
