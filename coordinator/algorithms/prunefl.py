"""PruneFL: prunes and grows so that the loss falls fastest per second, first at one device, then with all of them.

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022. Its algorithm 1:

* *Initial pruning*: one device trains alone on a few of its samples (`initial.samples`), an order being the `initial.passes`
  over them between two reconfigurations, at most `initial.rounds` orders. Reconfiguring starts once the accuracy there is
  `initial.start` times chance, and the stage ends when `initial.calm` of them in a row have moved the density by at most
  `initial.stop` of itself. The device stays the same whoever else is drawn, unless it leaves three orders in a row unanswered
  or the coordinator begins anew while it is away; till then it is waited for.
* *Further pruning*: federated averaging of the masked model, reconfigured every `every` rounds. `stages` has the ablation.

A reconfiguration keeps what maximises importance per second (`coordinator.blocks.importance`), among the weights that are not
kept and the fraction ``prunable * 0.5 ^ (round / half_life)`` of smallest magnitude in every layer; all others stay. Masks
change at no other time, so that between two of them values alone travel.

* `window`: ``all_rounds``, devices sum squared gradients after every local step and keep the sums; or
  ``reconfiguration_round``, only the (last `last`) steps of that round count, and no device ever holds a dense vector.
* `importance`: ``top``, devices tell their largest values only, `top` times as many as are kept of a tensor (all, where that
  were a quarter), and a bound on the rest, from which follows how many choices are not certain. Are these more than `doubt`
  of what would be kept, nothing changes, and the next round asks for twice as many: with 0 every mask is the one that all
  importance gives. Or ``dense``, as it is wherever nothing follows: with ``cap = stop`` and more than one line of `time`.
* `target`: at most this density, from `target.from` in a straight line over the fraction `ramp` of `horizon` rounds; 0 for
  none. `cap`: ``exact``, or ``stop`` for the paper's sorted pass that ends early. Where the cap falls faster than weights may
  be pruned, more may be. The round in which it gets there reconfigures too.
* `time`: ``fit``, learnt from all rounds so far, training and transfers (`coordinator.blocks.roundtime`); ``fit devices``, a
  line for every device, a round taking as long as the slowest (algorithm 3); or the seconds of a step themselves, ``c t1 t2
  ...``, and after semicolons those of slower devices. `link`: bytes per second by which 8 bytes for every kept weight are
  charged beside the training, instead of what transfers took; with 0 nothing is added to what was measured or given.
* `regrown`: ``zero``, or ``stale`` for the value from before pruning (public code). `initial.regrow`: ``yes``; or ``no``, as
  the public code does, where initial pruning only shrinks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, Masks, State
from coordinator.blocks import roundtime, timecost
from coordinator.blocks.aggregate import Expected
from coordinator.blocks.drafts import drafted, ranked_from
from coordinator.blocks.feedback import choice, fraction, rounds
from coordinator.blocks.importance import Base, Chosen, Layer, climb, protected, solve, stopped, undecided
from coordinator.blocks.masks import densities, density, masked_mean, masked_weights, top_global
from coordinator.blocks.schedule import linear, progress
from coordinator.blocks.told import Told, told
from coordinator.recipes import Params, merged, recipe_of, scheduled
from wire.errors import ConfigError
from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.structure import masked

ABOUT = About("Jiang et al., IEEE TNNLS 2022", "paper", "tests/unit/test_prunefl.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "stages": "both",
        "initial.rounds": 20.0,
        "initial.passes": 50.0,
        "initial.samples": 200.0,
        "initial.start": 1.5,
        "initial.stop": 0.1,
        "initial.calm": 5.0,
        "initial.prunable": 0.3,
        "initial.regrow": "yes",
        "every": 50.0,
        "prunable": 0.3,
        "half_life": 10000.0,
        "window": "all_rounds",
        "last": 0.0,
        "importance": "top",
        "top": 1.0,
        "doubt": 0.0,
        "target": 0.0,
        "target.from": 1.0,
        "horizon": 200.0,
        "ramp": 1.0,
        "cap": "exact",
        "time": "fit",
        "trust": 0.01,
        "link": 0.0,
        "regrown": "zero",
        "schedule": "constant",
        "recipe.rule": "sgd",
        "recipe.epochs": 1.0,
        "recipe.steps": 5.0,
        "recipe.batch": 20.0,
        "recipe.rate": 0.1,
        "recipe.momentum": 0.0,
        "recipe.decay": 0.0,
        "recipe.clip": 0.0,
    }
)
"""Names of all parameters with their defaults; those of training are the paper's but for the rate."""

_CHOICES = {
    "stages": ("both", "initial", "further"),
    "initial.regrow": ("yes", "no"),
    "window": ("all_rounds", "reconfiguration_round"),
    "importance": ("top", "dense"),
    "cap": ("exact", "stop"),
    "regrown": ("zero", "stale"),
}
_HISTORY, _LINES = 12, 4
"""Reconfigurations whose facts are remembered, and kinds of devices in each of them."""

_STARTS = 3
"""Kinds of devices, the slowest, from whose best set the search for all of them begins."""

_PATIENCE = 3
"""Orders of initial pruning that a device may leave unanswered before another one is asked."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    for name, words in _CHOICES.items():
        choice(known, name, words)
    for name in ("initial.rounds", "initial.passes", "initial.calm", "every", "horizon"):
        rounds(known, name)
    for name in ("initial.stop", "initial.prunable", "prunable", "doubt", "target", "target.from", "ramp"):
        fraction(known, name)
    for name in ("initial.samples", "initial.start", "half_life", "last", "top", "trust", "link"):
        whole = name in ("initial.samples", "last")  # devices refuse parts of samples and steps
        above = name in ("half_life", "top", "trust")
        value = float(known[name])
        if not 0.0 <= value < math.inf or (above and not value) or (whole and not value.is_integer()):
            kind = "a whole number" if whole else "a number above 0" if above else "a number"
            raise ConfigError(f"parameter {name} = {value:g}: write {kind}, not negative, such as {PARAMS[name]}")
    for name in ("initial.prunable", "prunable"):
        if known[name] == 1.0:
            raise ConfigError(f"parameter {name} = 1 protects nothing: write a number below 1, such as {PARAMS[name]}")
    names = maskable(spec)
    if not names or max(map(len, names)) > 56:  # a message has 64 for "seconds." and the name
        raise ConfigError(f"model {spec.name!r} has no weights that can be masked, or with names beyond 56 characters")
    if known["time"] not in ("fit", "fit devices"):
        lines = timecost.read(str(known["time"]), len(names))
        if not known["link"] and not all(line.constant for line in lines):
            raise ConfigError(
                f"parameter time = {known['time']!r}: c is above 0, unless a link takes time for each weight"
            )
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    memo: dict[str, Any] = {"stage": "further" if known["stages"] == "further" else "initial"}
    memo |= {"since": 0, "last": 0, "orders": 0, "client": "", "unanswered": 0, "started": False, "calm": 0}
    memo |= {"reconfigured": 0, "certified": 0, "widen": 1.0, "seen": [], "layers": {}, "history": []}
    return State(spec, 0, dict(weights), scalars={"params": known, "prunefl": memo})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`."""
    params, memo = state.scalars["params"], state.scalars["prunefl"]
    state = dataclasses.replace(state, round=round_number)
    structure = _structure(state)
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    if memo["stage"] != "initial":
        recipe = _further(state, recipe)
        return state, drafted(state.spec, structure, recipe, devices, rng)
    recipe = _importance(state, recipe, send=True, window=1.0, measure=1.0, samples=float(params["initial.samples"]))
    recipe = dataclasses.replace(recipe, epochs=int(params["initial.passes"]), steps=0)
    waited = memo["unanswered"] >= _PATIENCE
    for device in ranked_from(devices, memo["client"], after=waited):
        if waited and device.name == memo["client"] and not device.drawn:
            continue  # it is away for good, for all that is known: rather nobody than it again
        drafts = drafted(state.spec, structure, recipe, (device,), rng)
        if drafts:
            before = memo["unanswered"] if device.name == memo["client"] else 0
            return _noted(state, client=device.name, unanswered=min(before, _PATIENCE - 1) + 1), drafts
    return state, ()


def wanted(state: State) -> tuple[str, ...]:
    """See `coordinator.algorithm.Algorithm`: the device of initial pruning, once there is one."""
    memo = state.scalars["prunefl"]
    return (memo["client"],) if memo["stage"] == "initial" and memo["client"] else ()


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`.

    Memory: a sum of the model's size; at a reconfiguration about six times as much more.

    Raises:
        Malformed: An answer is about other masks.
    """
    turns, accuracy = [], 0.0
    for answer in Expected(answers, _structure(state)):
        if answer.samples:
            turns.append(roundtime.took(state.spec, answer, _shortened(state, answer.samples)))
            accuracy = answer.metrics.get("accuracy.train", 0.0)
        del answer
    if not turns:
        return state
    params, memo = state.scalars["params"], state.scalars["prunefl"]
    timed = roundtime.remembered(state.spec, params, memo, _kept(state), turns)
    state = _noted(dataclasses.replace(state, weights=masked_mean(state.spec, state.weights, answers)), **timed)
    if memo["stage"] == "initial":
        return _initial(state, accuracy, answers)
    if not _due(state):
        return state
    share = float(params["prunable"]) * 0.5 ** (state.round / float(params["half_life"]))
    return _reconfigured(state, _told(state, answers), share, grows=True)


def _structure(state: State) -> Structure:
    return masked(state.masks) if state.masks else Structure()


def _kept(state: State) -> list[int]:
    """Count what is kept of each layer."""
    masks, names = state.masks, maskable(state.spec)
    return [int(np.count_nonzero(masks[n])) if n in masks else state.weights[n].size for n in names]


def _shortened(state: State, samples: int) -> float:
    """Give the steps of a round of further pruning over those of this round's order, at a device of so many samples."""
    params, recipe = state.scalars["params"], recipe_of(state.scalars["params"])
    if state.scalars["prunefl"]["stage"] != "initial":
        return 1.0
    few = min(samples, int(params["initial.samples"]) or samples)
    made = int(params["initial.passes"]) * -(-few // recipe.batch)
    return (recipe.steps or recipe.epochs * -(-samples // recipe.batch)) / made


def _noted(state: State, **facts: Any) -> State:
    """Remember facts in scalar ``prunefl``."""
    return dataclasses.replace(state, scalars={**state.scalars, "prunefl": {**state.scalars["prunefl"], **facts}})


def _due(state: State) -> bool:
    """Tell whether a round of further pruning reconfigures; one that could not leaves it to the next."""
    memo, params = state.scalars["prunefl"], state.scalars["params"]
    since, every = memo["since"], int(params["every"])
    last = max(memo["last"], since)
    regular = (state.round - since) // every > (last - since) // every
    return bool(memo["stage"] == "further" and (regular or _capped(state)))


def _capped(state: State) -> bool:
    """Tell whether the cap has come to `target` and no mask has followed: a run may end here, so nothing is put off."""
    params = state.scalars["params"]
    return bool(params["target"]) and state.scalars["prunefl"]["last"] < _ramp(params) <= state.round


def _ramp(params: Params) -> int:
    """Give the first round for which the cap is `target` itself."""
    return math.ceil(float(params["ramp"]) * float(params["horizon"]))


def _further(state: State, recipe: Recipe) -> Recipe:
    params, due = state.scalars["params"], _due(state)
    if state.scalars["prunefl"]["stage"] == "fixed":
        return recipe
    if params["window"] == "all_rounds":
        memo = state.scalars["prunefl"]
        return _importance(state, recipe, send=due, since=float(max(memo["last"], memo["since"])))
    return _importance(state, recipe, send=True, window=1.0, last=float(params["last"])) if due else recipe


def _importance(state: State, recipe: Recipe, *, send: bool, **knobs: float) -> Recipe:
    """Ask for importance along with training (rule `importance`)."""
    names = maskable(state.spec)
    more = any(node.params and node.params.get("weight") not in names for node in state.spec.nodes)  # such as norms
    knobs |= {"send": float(send), "gradients": float(more or not state.masks)}
    if send:
        knobs |= {f"top.{name}": float(count) for name, count in _tops(state).items()}
    knobs = {name: value for name, value in knobs.items() if value}
    return dataclasses.replace(recipe, rule="importance", knobs={**recipe.knobs, **knobs})


def _tops(state: State) -> dict[str, int]:
    """Give how many of the largest values are asked for, by tensor; of a tensor that is not named, all."""
    params, widen = state.scalars["params"], state.scalars["prunefl"]["widen"]
    several = params["time"] == "fit devices" or ";" in str(params["time"])
    if params["importance"] == "dense" or params["cap"] == "stop" or several or _capped(state):
        return {}
    counts = {
        name: math.ceil(min(mask.size, float(params["top"]) * widen * max(1, int(np.count_nonzero(mask)))))
        for name, mask in state.masks.items()
    }
    # Beyond a quarter to find them takes more memory than all do.
    return {name: count for name, count in counts.items() if 4 * count < state.masks[name].size}


def _told(state: State, answers: Answers | Iterable[Answer]) -> Told:
    return told(answers, {name: state.weights[name].size for name in maskable(state.spec)})


def _initial(state: State, accuracy: float, answers: Answers | Iterable[Answer]) -> State:
    """End an order of initial pruning, after which the device has this accuracy."""
    params, memo = state.scalars["params"], state.scalars["prunefl"]
    going = memo["started"] or accuracy * state.spec.classes >= float(params["initial.start"])
    calm, before = memo["calm"], density(state.masks)
    if going:
        grows = params["initial.regrow"] == "yes"
        state = _reconfigured(state, _told(state, answers), float(params["initial.prunable"]), grows=grows)
        still = abs(density(state.masks) / before - 1.0) <= float(params["initial.stop"]) if before else True
        if state.scalars["prunefl"]["reconfigured"] > memo["reconfigured"]:  # who told nothing changed nothing
            calm = calm + 1 if still else 0
    state = _noted(state, started=going, calm=calm, orders=memo["orders"] + 1, unanswered=0)
    if calm < int(params["initial.calm"]) and memo["orders"] + 1 < int(params["initial.rounds"]):
        return state
    return _noted(state, stage="further" if params["stages"] == "both" else "fixed", since=state.round)


def _reconfigured(state: State, heard: Told, share: float, *, grows: bool) -> State:
    """Decide on new masks; as it is, when nobody told anything, or too little: then more is asked for the next time."""
    if not heard.devices:
        return state
    params = state.scalars["params"]
    lines, explained = roundtime.lines(state.spec, params, state.scalars["prunefl"])
    names, total = list(heard.lower), sum(line.size for line in heard.lower.values())
    kept = {
        n: state.masks[n].reshape(-1) if n in state.masks else np.ones(state.weights[n].size, np.bool_) for n in names
    }
    room = total
    if params["target"]:
        done = progress(state.round, 0, float(params["ramp"]) * float(params["horizon"]))
        room = max(1, int(linear(float(params["target.from"]), float(params["target"]), done) * total))
    held = sum(int(np.count_nonzero(mask)) for mask in kept.values())
    # Where the cap falls faster than weights may be pruned, as large a share of what it leaves stays protected.
    share = 1.0 - (1.0 - share) * min(1.0, room / max(1, held))
    fixed = [protected(state.weights[n].reshape(-1), kept[n], share) for n in names]
    if sum(int(np.count_nonzero(stays)) for stays in fixed) > room:  # equal weights and rounding may protect too many
        sizes = (np.where(s, np.abs(state.weights[n].reshape(-1)), -1.0) for n, s in zip(names, fixed, strict=True))
        fixed = list(top_global(dict(zip(names, sizes, strict=True)), room).values())
    free = [~stays if grows else kept[n] & ~stays for n, stays in zip(names, fixed, strict=True)]
    layers = [
        Layer(heard.lower[n], stays, may, t)
        for n, stays, may, t in zip(names, fixed, free, lines[0].weights, strict=True)
    ]
    most = max(0, room - sum(int(np.count_nonzero(stays)) for stays in fixed)) if params["target"] else None
    chosen, doubtful = _choice(layers, heard, lines, most, stops=params["cap"] == "stop")
    if doubtful > float(params["doubt"]) * sum(map(np.count_nonzero, chosen.masks)) and _tops(state):
        return _noted(state, widen=2.0 * state.scalars["prunefl"]["widen"])
    masks = {n: mask.reshape(state.weights[n].shape) for n, mask in zip(names, chosen.masks, strict=True)}
    return _remembered(state, masks, chosen, doubtful, (lines, explained))


def _choice(
    layers: list[Layer], heard: Told, lines: tuple[timecost.Line, ...], most: int | None, *, stops: bool
) -> tuple[Chosen, int]:
    """Choose, and count what is not certain: nothing where all was told, and -1 where else nothing is known about that."""
    whole = all(heard.upper[name] is lower for name, lower in heard.lower.items())
    starts, always = [], [int(np.count_nonzero(layer.fixed)) for layer in layers]
    for line in sorted(lines, key=lambda one: -one.seconds(always))[:_STARTS]:
        timed = [dataclasses.replace(layer, seconds=t) for layer, t in zip(layers, line.weights, strict=True)]
        base = Base(line.constant, heard.rest)
        chosen = stopped(timed, base, most) if stops else solve(timed, base, most)
        if len(lines) == 1:
            if whole or stops:
                return chosen, 0 if whole else -1
            return chosen, undecided(timed, list(heard.upper.values()), base, chosen, most)
        starts.append([int(np.count_nonzero(mask & one.free)) for mask, one in zip(chosen.masks, layers, strict=True)])
    found = [climb(layers, lambda kept: timecost.slowest(lines, kept), heard.rest, most, start) for start in starts]
    return max(found, key=lambda one: one.ratio), 0 if whole else -1


def _remembered(
    state: State, masks: Masks, chosen: Chosen, doubtful: int, model: tuple[tuple[timecost.Line, ...], float]
) -> State:
    """Put new masks into force and note what is to be told about them."""
    lines, explained = model
    params, memo = state.scalars["params"], state.scalars["prunefl"]
    fact = {"round": state.round, "density": density(masks), "layers": densities(masks), "gamma": chosen.ratio}
    fact |= {
        "undecided": doubtful,
        "r2": explained,
        "seconds": [[line.constant, *line.weights] for line in lines][:_LINES],
    }
    state = _noted(
        state,
        last=state.round,
        reconfigured=memo["reconfigured"] + 1,
        certified=memo["certified"] + (doubtful == 0),
        history=[*memo["history"], fact][-_HISTORY:],
    )
    weights = masked_weights(state.weights, masks) if params["regrown"] == "zero" else state.weights
    whole = all(mask.all() for mask in masks.values())
    return dataclasses.replace(state, masks={} if whole else masks, weights=weights)


def facts(state: State) -> Mapping[str, float]:
    """See `coordinator.algorithm.Algorithm`: of the latest reconfiguration."""
    return {k: f[k] for f in state.scalars["prunefl"]["history"][-1:] for k in ("round", "gamma", "r2", "undecided")}
