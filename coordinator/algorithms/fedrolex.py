"""FedRolex: each device trains a window of every layer's channels, and all windows move on by one channel in every round.

Alam et al., "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction", NeurIPS 2022.

* In round j, counted from 0, a width that keeps k of a layer's C channels has those from ``j mod C`` on, k of them, beginning
  again at 0 behind the last (rolling sub-model extraction). All widths of a round begin at the same channel, so that a narrow
  one is a part of every wider one. Over C rounds each channel is trained k times at every width: a model wider than any device
  can hold is trained in all its channels.
* A device trains the widest width that its memory holds. Each weight becomes the plain mean over the devices that had it in
  that round, by count and not by samples; what nobody had stays (selective averaging).
* Batch norms (static, as in HeteroFL): with ``calibrate`` n > 0 training moves no running statistics, and every n-th round
  trains nothing but observes them (`coordinator.blocks.norms`). Windows stand still in such a round, or channels would be
  passed over. With 0 they follow as in any training and are joined like weights.

What to know before it is chosen: layers of one size move in step, so a weight between two channels that lie farther apart than
a window is trained by wider devices alone; and narrow widths are no models of their own, since what they consist of changes
from round to round. A round that is given up takes its windows with it. The authors' code moves windows backwards, which is
the same turn the other way round, and can mask absent labels as HeteroFL does, which is left out here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import norms, pace
from coordinator.blocks.aggregate import evenly, joined
from coordinator.blocks.fixed import TRAINING, recipe_at
from coordinator.blocks.nesting import prefix, widths_of
from coordinator.blocks.widths import fractions_of
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.spec import ModelSpec

ABOUT = About("Alam et al., NeurIPS 2022", "baseline", "tests/unit/test_fedrolex.py")
PARAMS: Mapping[str, float | str] = MappingProxyType({**TRAINING, "fractions": "0.2 0.4 0.6 0.8 1", **norms.CALIBRATE})
"""Names of all parameters with their defaults: FedAvg's recipe, FjORD's fractions. The paper's are 1/16 to 1, by halves."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    widths = widths_of(spec, fractions_of(str(known["fractions"])))
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; fedrolex needs some, fedavg does not")
    norms.check(spec, known)
    return State(spec, 0, dict(weights), windows(spec, widths, 0), widths, {"params": known})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: move the windows on, then give each device the widest that it can hold."""
    params = state.scalars["params"]
    levels = windows(state.spec, state.widths, _start(int(params["calibrate"]), round_number))
    state, recipe = dataclasses.replace(state, round=round_number, levels=levels), recipe_at(params, round_number)
    if norms.due(params, round_number):
        return norms.asked(state, recipe, devices, rng)
    return pace.asked(state, recipe, devices, rng, {})


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers twice.

    Memory: one sum of the model's size, which becomes the new weights, and one answer.

    Raises:
        Malformed: An answer is of another round's windows.
    """
    if norms.due(state.scalars["params"], state.round):
        return norms.pooled(state, answers)
    return norms.unmoved(state, joined(state, answers, evenly))


def windows(spec: ModelSpec, widths: Mapping[str, Sequence[int]], start: int) -> dict[str, NDArray[np.uint8]]:
    """Rank channels by how far they lie behind a window's first one, ``start mod C``: every width is a window from there on.

    Returns:
        As `coordinator.blocks.nesting.rank`.
    """
    return {group: np.roll(levels, start) for group, levels in prefix(spec, widths).items()}


def _start(every: int, round_number: int) -> int:
    """Count the rounds before this one that trained; every `every`-th calibrates, none where that is 0."""
    past = round_number - 1
    return past - past // every if every else past
