"""Online: devices send the k largest of their gathered gradients, k of these count, and k is searched for as it goes.

Han, Wang and Leung, "Adaptive Gradient Sparsification for Efficient Federated Learning: An Online Learning Approach", ICDCS
2020: fairness-aware top-k (algorithm 1) and the sign-based search for k (algorithms 2 and 3); see `blocks.sparsify`.

What is not as in the paper, and why:

* There all devices take part in every round and are told which of their entries counted; the others stay in their own
  residuals. Here a device may be away for many rounds. It sets to zero all that it sent (the rule `topk`), and what was sent
  and not taken stays in a residual *of the coordinator's own*. That is ranked as if it came from one more device, and where
  an entry is taken, what waits there is added. So nothing is lost: what devices sent, weighted, and what waited before is
  what the model moves by and what waits after. With it the fairness floor is k over one device more.
* The model travels down whole, because a device may have missed any number of sparse steps. So k bounds the upload alone,
  and the time that is held against the drop of the loss says so (`blocks.sparsify.exchange_time`).
* The losses of k and the probed k' are measured by each device for its own update, cut to either, on one batch of its own
  samples, and averaged over those that tell them; in the paper for the joined update, with one sample per device.

With ``first = 1`` and ``adaptive = 0`` this is FedAvg of the same local steps, to the bit; with one step, FedSGD.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import sparsify
from coordinator.blocks.aggregate import shares
from coordinator.blocks.drafts import drafted
from coordinator.recipes import merged, recipe_of, scheduled
from wire.errors import ConfigError, Malformed
from wire.spec import ModelSpec, Structure, parameter_count

ABOUT = About("Han, Wang and Leung, ICDCS 2020", "baseline", "tests/unit/test_online.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "first": 1.0,
        "least": 0.002,
        "adaptive": 1.0,
        "compute": 1.0,
        "exchange": 10.0,
        "schedule": "constant",
        "recipe.rule": "topk",
        "recipe.epochs": 1.0,
        "recipe.steps": 1.0,
        "recipe.batch": 32.0,
        "recipe.rate": 0.01,
        "recipe.momentum": 0.0,
        "recipe.decay": 0.0,
        "recipe.clip": 0.0,
    }
)
"""Names of all parameters with their defaults.

``first`` and ``least`` are fractions of the weights: k of the first round, and the least k. With ``adaptive`` 0 k stays.
``compute`` and ``exchange`` are the times of local steps and of exchanging the whole model, in the same unit.
"""

_LOSSES = ("loss.start", "loss.sent", "loss.probe")


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    first, least = float(known["first"]), float(known["least"])
    if not 0.0 < least <= first <= 1.0:
        raise ConfigError(f"parameters least = {least:g}, first = {first:g}: write 0 < least <= first <= 1")
    if known["adaptive"] not in (0.0, 1.0):
        raise ConfigError(f"parameter adaptive = {known['adaptive']}: write 0 or 1")
    for name in ("compute", "exchange"):
        if not 0.0 <= float(known[name]) < math.inf:
            raise ConfigError(f"parameter {name} = {known[name]}: write a time, at least 0")
    size = parameter_count(spec, Structure())
    low, high = _bounds(known, size)
    search = sparsify.Search(max(low, first * size), low, high)
    scalars = {"params": known, "search": _plain(search), "k": 0, "probe": 0}
    return State(spec, 0, dict(weights), scalars=scalars, arrays={"residual": np.zeros(size, np.float32)})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: whole numbers are drawn for k and for the k' to hold against it."""
    params = state.scalars["params"]
    search = _search(state)
    (least, most) = _bounds(params, state.arrays["residual"].size)
    k = min(int(most), max(1, sparsify.rounded(search.count, rng.random())))
    probe = min(k - 1, sparsify.rounded(sparsify.probed(search, least), rng.random())) if params["adaptive"] else 0
    knobs = {"k": float(k), "probe": float(max(0, probe))}
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    recipe = dataclasses.replace(recipe, knobs={**recipe.knobs, **knobs})
    scalars = {**state.scalars, "k": k, "probe": max(0, probe)}
    drafts = drafted(state.spec, Structure(), recipe, devices, rng)
    return dataclasses.replace(state, round=round_number, scalars=scalars), drafts


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers three times: samples, sum, ranks.

    Memory: the residual, one sum of the model's size, and two numbers of 8 bytes per weight for the ranks.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    samples = [answer.samples for answer in _whole(answers)]
    if not sum(samples):
        return state
    total = state.arrays["residual"].copy()
    losses = dict.fromkeys(_LOSSES, 0.0)
    for answer, share in zip(answers, shares(samples), strict=True):
        _add(state, total, answer, share)
        told = [answer.metrics.get(name, math.nan) for name in _LOSSES]
        for name, loss in zip(_LOSSES, told, strict=True) if answer.samples and all(map(math.isfinite, told)) else ():
            losses[name] += share * loss
    step = total
    if state.scalars["k"] < total.size:
        chosen = sparsify.fair_top(_lists(state, answers), state.scalars["k"], total.size)
        step = np.zeros_like(total)
        step[chosen] = total[chosen]
    waiting = total - step
    state = _learnt(state, losses)
    return dataclasses.replace(state, weights=_added(state, step), arrays={"residual": waiting})


def _learnt(state: State, losses: Mapping[str, float]) -> State:
    """Move k by what the losses say."""
    params, k, probe = state.scalars["params"], state.scalars["k"], state.scalars["probe"]
    size = state.arrays["residual"].size
    if not params["adaptive"]:
        return state
    start, sent, probed = (losses[name] for name in _LOSSES)
    compute, exchange = float(params["compute"]), float(params["exchange"])
    time, time_probe = (sparsify.exchange_time(count, size, compute, exchange) for count in (k, probe))
    projected = sparsify.projected_time(time_probe, start - sent, start - probed)
    sign = None if projected is None else sparsify.slope_sign(time, projected, k, probe)
    search = sparsify.moved(_search(state), sign, _bounds(params, size))
    return dataclasses.replace(state, scalars={**state.scalars, "search": _plain(search)})


def _whole(answers: Answers | Iterable[Answer]) -> Iterator[Answer]:
    for answer in answers:
        if answer.structure != Structure():
            raise Malformed(f"{answer.device} answers with a part of the model; it was asked for all of it")
        yield answer


def _lists(state: State, answers: Answers | Iterable[Answer]) -> Iterator[tuple[sparsify.Places, sparsify.Floats]]:
    """Give what every device sent, then what waits."""
    waiting = state.arrays["residual"]
    for answer in answers:
        if answer.samples:
            yield _sent(state, answer)
    places = np.flatnonzero(waiting)
    if len(places):
        yield places, waiting[places]


def _sent(state: State, answer: Answer) -> tuple[sparsify.Places, sparsify.Floats]:
    """Give what an answer says as places and values in one line of all tensors, in the spec's order."""
    places, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for name, (start, size) in _spans(state).items():
        if name in answer.update:
            mask = answer.sent.get(name)
            here = np.arange(size) if mask is None else np.flatnonzero(mask)
            places.append(here + start)
            values.append(np.ravel(answer.update[name])[here])
    return np.concatenate(places), np.concatenate(values)


def _add(state: State, total: NDArray[np.float32], answer: Answer, share: float) -> None:
    """Add a share of what an answer says to one line of all tensors; what it did not send is zero there."""
    for name, (start, size) in _spans(state).items():
        if name in answer.update:
            total[start : start + size] += np.ravel(answer.update[name]) * np.float32(share)


def _added(state: State, step: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Move the model by one line of all its weights."""
    return {
        name: state.weights[name] + step[start : start + size].reshape(state.weights[name].shape)
        for name, (start, size) in _spans(state).items()
    }


def _spans(state: State) -> dict[str, tuple[int, int]]:
    """Give where each tensor starts in one line of all, and its length."""
    found, start = {}, 0
    for tensor in state.spec.tensors:
        found[tensor.name] = (start, state.weights[tensor.name].size)
        start += state.weights[tensor.name].size
    return found


def _bounds(params: Mapping[str, Any], size: int) -> tuple[float, float]:
    return max(1.0, float(params["least"]) * size), float(size)


def _search(state: State) -> sparsify.Search:
    return sparsify.Search(**state.scalars["search"])


def _plain(search: sparsify.Search) -> dict[str, float]:
    return dataclasses.asdict(search)
