"""Taper: our own. Begin sparse, let the coordinator carry the momentum, and narrow the model while it trains.

No device ever holds a dense model to train, a dense gradient or an importance; every order is plain SGD over kept weights:

* The first masks are `start` dense (or `density`, where that is more) and need no data: synaptic flow through the initial
  weights (Tanaka et al., NeurIPS 2020), one order to one device. Where nobody can hold that, or flow does not run through the
  model, they are random by layer shapes (Erdos-Renyi kernel). ``first = erk`` asks for these.
* The round's mean movement D feeds a momentum at the coordinator, ``V = beta V + D`` and ``w += D + beta V`` (Nesterov's; as
  FedAvgM, Hsu et al., 2019, with a step of 1), on kept weights and biases. With few devices a round it averages the rounds'
  noise, which sparse models suffer from most, and costs devices nothing.
* Every `every` rounds, until `until` of the `horizon`, the kept weights that have moved least from where they began leave for
  good, over all layers together (movement is what training made of a weight; its magnitude is half the draw of its start,
  which the flow has judged already). Density falls along a cubic. Nothing grows back: growth by gradients did not help here.
* Values travel as bfloat16 both ways; what a device's update loses goes with its next one.

What was tried and left out, with figures: docs/decisions/taper.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, Masks, State
from coordinator.blocks.aggregate import shares
from coordinator.blocks.drafts import drafted, one_of
from coordinator.blocks.erk import erk_counts
from coordinator.blocks.fixed import TRAINING, ask_to_train, density_of, joined, mean_scores, recipe_at, told_scores
from coordinator.blocks.flow import flow_order, obstacle
from coordinator.blocks.masks import masked_weights, random_masks, top_global
from coordinator.blocks.momentum import PREFIX, beta_of, carried
from coordinator.blocks.schedule import cubic
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.forms import FORMS
from wire.masked import maskable
from wire.spec import ModelSpec, Structure

ABOUT = About("ours; docs/decisions/taper.md", "ours", "tests/unit/test_taper.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        **TRAINING,
        "density": 0.1,
        "start": 0.2,
        "first": "flow",
        "iterations": 100.0,
        "beta": 0.8,
        "every": 2.0,
        "until": 0.5,
        "horizon": 200.0,
        "form": "bfloat16",
        "schedule": "linear 200",
        "recipe.momentum": 0.0,
        "recipe.form": "bfloat16",
    }
)
"""Names of all parameters with their defaults."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    for name, most in (("iterations", 10_000.0), ("every", math.inf), ("horizon", math.inf)):
        if not 1.0 <= float(known[name]) <= most or not float(known[name]).is_integer():
            bounds = "at least 1" if most == math.inf else f"from 1 to {most:g}"
            raise ConfigError(f"parameter {name} = {known[name]}: write a whole number, {bounds}")
    if "schedule" not in params:
        known["schedule"] = f"linear {known['horizon']:g}"
    recipe_at(known, 1)
    density_of(known)
    for name, most in (("start", 1.0), ("until", 1.0)):
        if not 0.0 <= float(known[name]) <= most:
            raise ConfigError(f"parameter {name} = {known[name]}: write a number from 0 to {most:g}")
    beta_of(known)
    if known["first"] not in ("flow", "erk") or known["form"] not in FORMS:
        raise ConfigError("parameter first is flow or erk, parameter form is empty, bfloat16, float16 or int8")
    state = State(spec, 0, dict(weights), scalars={"params": known, "begun": 0}, form=str(known["form"]))
    return state if known["first"] == "flow" and not obstacle(spec) else _begun(state, _by_shape(state))


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: the flow from one device, then training under the masks."""
    if not state.masks:
        params = state.scalars["params"]
        drafts = drafted(state.spec, Structure(), flow_order(float(params["iterations"]), _start(params)), devices, rng)
        if drafts or not devices:
            return dataclasses.replace(state, round=round_number), one_of(drafts, round_number)
        state = _begun(state, _by_shape(state))
    return ask_to_train(state, round_number, devices, rng)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Memory: three models (weights, momentum, the start) and one sum.

    Raises:
        Malformed: An answer is of other masks than were asked for.
        NonFinite: A weight or score is no number.
    """
    if not state.masks:
        return _scored(state, answers)
    if not sum(answer.samples for answer in answers):
        return state  # not even the momentum moves it
    return _narrowed(carried(state, joined(state, answers)))


def _scored(state: State, answers: Answers | Iterable[Answer]) -> State:
    told = told_scores(state.spec, answers)
    if not any(told):
        return state
    scores = mean_scores(state.spec, answers, shares(told))
    size = sum(array.size for array in scores.values())
    return _begun(state, top_global(scores, round(_start(state.scalars["params"]) * size)))


def _narrowed(state: State) -> State:
    """Let go of what has moved least, when a round for that has come."""
    params = state.scalars["params"]
    done = (state.round - state.scalars["begun"]) / max(1.0, float(params["until"]) * float(params["horizon"]))
    size = sum(mask.size for mask in state.masks.values())
    wanted = round(cubic(_start(params), density_of(params), min(1.0, done)) * size)
    kept = sum(int(np.count_nonzero(mask)) for mask in state.masks.values())
    due = state.round % int(params["every"]) == 0 or done >= 1.0
    if not due or wanted >= kept:
        return state
    first = _first(state)
    scores = {
        name: np.where(mask, np.abs(state.weights[name] - first[name]), np.float32(-1.0))
        for name, mask in state.masks.items()
    }
    masks = top_global(scores, wanted)
    momentum = masked_weights(_part(state, PREFIX), masks)
    weights = masked_weights(state.weights, masks)
    return dataclasses.replace(state, masks=masks, weights=weights, arrays=_arrays(momentum, first))


def _begun(state: State, masks: Masks) -> State:
    """Take the first masks: what they do not keep is zero from now on, and movement is counted from here."""
    weights = masked_weights(state.weights, masks)
    still = {name: np.zeros_like(array) for name, array in weights.items()}
    first = {name: weights[name] for name in masks}
    scalars = {**state.scalars, "begun": state.round}
    return dataclasses.replace(state, masks=masks, weights=weights, arrays=_arrays(still, first), scalars=scalars)


def _by_shape(state: State) -> dict[str, NDArray[np.bool_]]:
    shapes = {name: state.weights[name].shape for name in maskable(state.spec)}
    size = sum(state.weights[name].size for name in shapes)
    counts = erk_counts(shapes, round(_start(state.scalars["params"]) * size))
    return random_masks(shapes, counts, np.random.default_rng(0))


def _start(params: Mapping[str, float | str]) -> float:
    return max(float(params["start"]), density_of(params))


def _arrays(momentum: Arrays, first: Arrays) -> dict[str, NDArray[np.float32]]:
    named = {PREFIX + name: array for name, array in momentum.items()}
    return {**named, **{f"first/{name}": array for name, array in first.items()}}


def _first(state: State) -> dict[str, NDArray[np.float32]]:
    return _part(state, "first/")


def _part(state: State, prefix: str) -> dict[str, NDArray[np.float32]]:
    return {name.removeprefix(prefix): a for name, a in state.arrays.items() if name.startswith(prefix)}
