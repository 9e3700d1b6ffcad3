"""FIARSE: devices of several sizes train nested sparse models, each the largest weights of the one model that all share.

Wu et al., "FIARSE: Model-Heterogeneous Federated Learning via Importance-Aware Submodel Extraction", NeurIPS 2024;
docs/decisions/personal-baselines.md says what was filled in and why.

* A size s keeps the fraction s of all weights of largest magnitude, so that a smaller size is within a larger one. They are
  chosen anew in every round from the weights of then. ``by`` says whether from all layers together (``model``, the paper's) or
  from each by itself (``layer``).
* Ours: with ``fractions`` a size has so many of the channels as well, ranked as in NestFL, and keeps the fraction s of the
  weights that these have. So sizes are nested and sparse at once, and who has no room for all channels takes part too.
* Each device gets the widest size that its memory holds, as an ordinary masked order: values alone, and the masks of its size.
* A device's gradient says what a weight is worth for being kept (the rule `fiarse`); the threshold of the device's size, the
  least magnitude that is kept, goes with its order.
* ``x_j += server sum_n delta_n,j / count_j`` over the devices whose size keeps weight j. Masks are counted, not values that
  moved: a device whose weight stood still is one of them.

Only weights of linear layers and convolutions are masked; biases and norms go to everybody who has their channels. Without
``fractions`` a size that keeps all is sent without masks. `evaluate` measures every size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import moved, summed
from coordinator.blocks.fixed import TRAINING
from coordinator.blocks.masks import (
    NEVER,
    capacities_of,
    nested_levels,
    structure_at,
    top_global,
    top_per_tensor,
)
from coordinator.blocks.nesting import kept_counts, levels_of, rank, widths_of
from coordinator.blocks.widths import fractions_of
from coordinator.fitting import Means, Plan, fit
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError, Malformed
from wire.masked import maskable
from wire.spec import ModelSpec, Structure, TensorSpec, statistics
from wire.structure import cut, to_wire

ABOUT = About("Wu et al., NeurIPS 2024", "baseline", "tests/unit/test_fiarse.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "sizes": "0.015625 0.0625 0.25 1",
        "fractions": "",
        "by": "model",
        "server": 1.0,
        **TRAINING,
        "recipe.rule": "fiarse",
    }
)
"""Names of all parameters with their defaults; the sizes are the paper's, which cuts no channels."""

_SIZES_MAX = 64


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    if known["by"] not in ("model", "layer"):
        raise ConfigError(f"parameter by = {known['by']!r}: write 'model' or 'layer'")
    if not 0.0 < float(known["server"]) <= float(np.finfo(np.float32).max):
        raise ConfigError(f"parameter server = {known['server']}: write a rate above 0, such as 1")
    sizes = _sizes(str(known["sizes"]))
    if not maskable(spec):
        raise ConfigError(f"model {spec.name!r} has no weights that can be masked; fiarse needs some, fedavg does not")
    widths = _widths(spec, str(known["fractions"]), len(sizes))
    if widths and statistics(spec):
        raise ConfigError(
            f"model {spec.name!r} has batch norms, whose statistics each width needs of its own, and masks travel without;"
            " write no fractions"
        )
    state = ranked(State(spec, 0, dict(weights), widths=widths, scalars={"params": known}))
    kept = [sum(int(np.count_nonzero(level <= k)) for level in state.mask_levels.values()) for k in range(len(sizes))]
    if any(few >= many for few, many in pairwise(kept)):
        raise ConfigError(
            f"parameter sizes = {known['sizes']!r}: they keep {', '.join(map(str, kept))} weights; each must keep more"
            " than the one before"
        )
    least = 0 if known["by"] == "layer" else len(sizes) - 1  # of the model's largest a small size may get some later
    for name, level in state.mask_levels.items():
        if (level > least).all():
            raise ConfigError(
                f"parameter sizes = {known['sizes']!r}: size {least} keeps no weight of {name!r}, so that nothing could be"
                " learnt; write larger sizes" + " or by = layer" * bool(least)
            )
    return state


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: choose the sizes' weights, and give each device the widest that it holds."""
    params = state.scalars["params"]
    state = ranked(state)
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    structures = [structure_at(state, k) for k in range(capacities_of(state))]
    least = thresholds(state)
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
    return dataclasses.replace(state, round=round_number), tuple(drafts)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: one sum of the model's size, and what one tensor takes; with widths the levels of all weights once more.

    Raises:
        Malformed: An answer is about other masks than those of its size.
    """
    capacities = capacities_of(state)
    counts = partial(_counts, [structure_at(state, k) for k in range(capacities)])
    seats = dict(map(_seat, filter(counts, answers)))
    if not seats:
        return state
    server = np.float32(state.scalars["params"]["server"])
    sizes = np.bincount(list(seats.values()), minlength=capacities)
    by_level = np.ones(NEVER + 1, np.float32)  # where there is none to divide by, nothing has been added
    by_level[:capacities] = np.maximum(1, np.cumsum(sizes[::-1])[::-1])
    masked = dataclasses.replace(state.spec, tensors=_masked(state))
    placed = to_wire(masked, state.mask_levels, state.levels) if state.widths else state.mask_levels
    tensors = {tensor.name: tensor for tensor in state.spec.tensors}

    def having(answer: Answer, name: str) -> NDArray[np.bool_] | None:
        if name not in placed:
            return None
        alone = dataclasses.replace(masked, tensors=(tensors[name],))
        return cut(alone, placed, answer.structure)[name] <= answer.structure.capacity

    def spread(name: str, sums: NDArray[np.float32]) -> None:
        known = state.mask_levels.get(name)
        level = levels_of(tensors[name], state.levels) if known is None else known
        np.divide(sums, by_level[level], out=sums)
        np.multiply(sums, server, out=sums)

    total = summed(state.spec, state.weights, filter(counts, answers), dict.fromkeys(seats, 1.0), cover=having)
    return moved(state, total, spread)


def ranked(state: State) -> State:
    """Give the state with channels ranked, where there are widths, and for each weight the narrowest size that keeps it.

    By magnitude; of equal ones the first are kept. Like channels, weights are pruned progressively: each size out of the next
    larger one. Where that keeps fewer in a size's channels than the size is to keep, it has these.

    Raises:
        NonFinite: A weight is no number.

    Cost: a partial sort of all weights for each size.
    """
    params, tensors = state.scalars["params"], _masked(state)
    scores = {tensor.name: np.abs(state.weights[tensor.name]) for tensor in tensors}
    levels = rank(state.spec, state.weights, state.widths) if state.widths else {}
    channels = {tensor.name: levels_of(tensor, levels) for tensor in tensors}
    kept = {name: np.ones(score.shape, np.bool_) for name, score in scores.items()}
    found = []
    for capacity, size in reversed([*enumerate(_sizes(str(params["sizes"])))]):
        had = {name: np.broadcast_to(channels[name] <= capacity, score.shape) for name, score in scores.items()}
        left = {name: kept[name] & had[name] for name in scores}
        for name, score in scores.items():  # what is gone stays gone
            np.copyto(score, np.float32(-1), where=~left[name])
        if params["by"] == "model":
            kept = top_global(scores, min(_share(size, had.values()), sum(map(np.count_nonzero, left.values()))))
        else:
            counts = {name: min(_share(size, [had[name]]), int(np.count_nonzero(left[name]))) for name in scores}
            kept = top_per_tensor(scores, counts)
        found.append(kept)
    return dataclasses.replace(state, levels=levels, mask_levels=nested_levels(found[::-1]))


def _share(size: float, had: Iterable[NDArray[np.bool_]]) -> int:
    """Count the weights that are to be kept of those that there are."""
    return kept_counts(sum(int(np.count_nonzero(mask)) for mask in had), [size])[0]


def _masked(state: State) -> tuple[TensorSpec, ...]:
    """Give the tensors that are masked."""
    names = set(maskable(state.spec))
    return tuple(tensor for tensor in state.spec.tensors if tensor.name in names)


def thresholds(state: State) -> list[float]:
    """Give the least magnitude that each size keeps; 0 for one that keeps every weight that it has.

    Cost: a few passes for each size.
    """
    tensors, found = _masked(state), []
    for capacity in range(capacities_of(state)):
        least = math.inf
        whole = True
        for tensor in tensors:
            kept = state.mask_levels[tensor.name] <= capacity
            had = np.broadcast_to(levels_of(tensor, state.levels) <= capacity, kept.shape)
            whole = whole and bool((kept == had).all())
            least = min(least, float(np.abs(state.weights[tensor.name][kept]).min(initial=math.inf)))
        found.append(0.0 if whole or math.isinf(least) else least)
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
    if not 1 <= len(sizes) <= _SIZES_MAX or not all(0.0 < size <= 1.0 for size in sizes):
        raise ConfigError(f"parameter sizes = {text!r}: write numbers above 0 and at most 1, such as '0.1 1'")
    return sizes


def _widths(spec: ModelSpec, text: str, sizes: int) -> dict[str, tuple[int, ...]]:
    """Give the channels that each size has; nothing where no size lacks any."""
    if not text:
        return {}
    fractions = fractions_of(text)
    if len(fractions) != sizes:
        raise ConfigError(f"parameter fractions = {text!r}: write one for each of the {sizes} sizes")
    widths = widths_of(spec, fractions)
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; fiarse runs it without fractions")
    return widths
