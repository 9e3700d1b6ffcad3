"""SNIP: the weights whose loss would change the loss most stay; found in round 1 at the initial weights, fixed from then on.

Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019, equation 6 and algorithm 1: with
``c = w * dL/dw`` on one mini-batch, the ``density`` of all weights with the largest ``|c|`` is kept, over all layers together.

* ``saliency`` says whose data decide. ``one``: those of one device, the first by name that can hold the dense model, and the
  next one if it does not answer (PruneFL's comparison; a device with few classes may empty a whole layer at low densities).
  ``mean``: the mean over all devices that are asked, by samples (SSFL: Ohib et al., 2024).
* ``batches`` mini-batches of ``score_batch`` samples are looked at; 0 for all that a device has.
* ``told`` says how many of the largest scores a device sends; 0 for all. More than are kept change nothing at one device.
* ``guard``: ``none`` is the paper. ``layer`` also keeps the largest score of every layer, so that none can be empty.

Biases are never masked here; the first public code had them among the candidates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import shares
from coordinator.blocks.drafts import drafted, one_of
from coordinator.blocks.fixed import TRAINING, ask_to_train, density_of, joined, mean_scores, recipe_at, told_scores
from coordinator.blocks.masks import top_global
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure

ABOUT = About("Lee et al., ICLR 2019", "baseline", "tests/unit/test_snip.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        **TRAINING,
        "density": 0.1,
        "saliency": "mean",
        "batches": 1.0,
        "score_batch": 100.0,
        "told": 0.0,
        "guard": "none",
    }
)
"""Names of all parameters with their defaults."""

_CHOICES = {"saliency": ("one", "mean"), "guard": ("none", "layer")}
_WHOLE = {"batches": (0, 1 << 53), "score_batch": (1, 65536), "told": (0, 1 << 53)}
"""What orders can say."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    for name, choices in _CHOICES.items():
        if known[name] not in choices:
            raise ConfigError(f"parameter {name} = {known[name]!r}: write {' or '.join(choices)}")
    for name, (least, most) in _WHOLE.items():
        value = float(known[name])
        if not least <= value <= most or not value.is_integer():
            raise ConfigError(f"parameter {name} = {value:g}: write a whole number from {least} to {most}")
    count = round(density_of(known) * sum(weights[name].size for name in maskable(spec)))
    if 0 < float(known["told"]) < count:
        raise ConfigError(f"parameter told = {known['told']:g}: {count} weights are kept; write as many at least, or 0")
    return State(spec, 0, dict(weights), scalars={"params": known, "count": count})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: scores until there are some, then training under the masks."""
    if state.masks:
        return ask_to_train(state, round_number, devices, rng)
    params = state.scalars["params"]
    recipe = Recipe(
        rule="score",
        steps=int(params["batches"]),
        batch=int(params["score_batch"]),
        loss=recipe_at(params, 1).loss,
        knobs={"top": float(params["told"])},
    )
    drafts = drafted(state.spec, Structure(), recipe, devices, rng)
    drafts = one_of(drafts, round_number) if params["saliency"] == "one" else drafts
    return dataclasses.replace(state, round=round_number), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Memory: one array of scores for each that may be masked.

    Raises:
        Malformed: An answer is of other masks than were asked for.
        NonFinite: A score is no number.
    """
    if state.masks:
        return joined(state, answers)
    told = told_scores(state.spec, answers)
    samples = [answer.samples * tells for answer, tells in zip(answers, told, strict=True)]
    if not sum(samples):
        return state
    scores = mean_scores(state.spec, answers, shares(samples))
    if state.scalars["params"]["guard"] == "layer":
        _guard(scores)
    return dataclasses.replace(state, masks=top_global(scores, state.scalars["count"]))


def _guard(scores: Mapping[str, NDArray[np.float32]]) -> None:
    """Put the best weight of every layer before all others."""
    for array in scores.values():
        array.flat[np.argmax(array)] = np.inf
