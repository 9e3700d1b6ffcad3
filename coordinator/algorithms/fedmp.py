"""FedMP: every device trains a sub-model of its own size, and the coordinator gives back what the sub-model lacked.

Jiang et al., "FedMP: Federated Learning through Adaptive Model Pruning in Heterogeneous Edge Computing", ICDE 2022, doi
10.1109/ICDE53745.2022.00062. docs/decisions/fedmp.md says what the paper leaves open, how it was filled, and what came out.

* A pruning ratio per device and round, the same in every layer: ``max(1, ceil((1 - ratio) * channels))`` channels stay, those
  of the largest sums of absolute weights, scored once over all inputs. All sub-models of a round share one ranking.
* R2SP: each sub-model is put back among the pruned weights as they were, and the mean over all devices is taken. With x the
  model that is ``x + 1/N sum of (trained - x)`` over the devices that have a coordinate, N being all that answer: no residual
  is stored, and what few devices train moves little.
* ``policy`` says how ratios are chosen: ``eucb``, the paper's bandit for each device; ``bounded``, the same bandit with a
  reward that knows how fast the round was; ``deadline``, from a model of each device's measured times; ``uniform``, the same
  ``ratio`` for all (UP-FL). The bandits ship with rewards that are bounded and little confidence term; as published, `eucb`
  has ``padding`` 1, ``quantile`` 0 and ``floor`` 1e-6, the least there is.
* What a common deadline is worth `deadline` learns by a regression of the losses on the ratios (`blocks.worth`), or, with
  ``curve`` ``bandit``, by one bandit for the whole fleet (`blocks.common`).
* A device whose memory does not hold its ratio gets the least that fits; its bandit chooses from there on.
* With `deadline`, not with the others: what is read of channels that nobody trains fades (`blocks.fade`). As they were drawn
  they make the whole model worse than its own sub-models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from types import MappingProxyType
from typing import Any

import numpy as np

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks import bandit, common, deadline, ratios, roster, worth
from coordinator.blocks.aggregate import counted, joined
from coordinator.blocks.fade import faded
from coordinator.blocks.fixed import TRAINING, recipe_at
from coordinator.blocks.nesting import rank, whole_of, widths_of
from coordinator.fitting import Means, Plan, fit
from coordinator.recipes import merged
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.spec import ModelSpec

ABOUT = About("Jiang et al., ICDE 2022", "paper", "tests/unit/test_fedmp.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        "policy": "deadline",
        "curve": "regression",
        "ratio": 0.5,
        "high": 0.95,
        "granularity": 0.1,
        "discount": 0.98,
        "padding": 0.1,
        "quantile": 0.95,
        "floor": 0.1,
        "probes": "0.95 0.9",
        "trust": 0.05,
        "belief": 2.0,
        "learnt": 0.05,
        "grow": 0.5,
        "fade": 0.2,
        "fade.others": 0.0,
        **TRAINING,
    }
)
"""Names of all parameters with their defaults.

``ratio`` is that of `uniform`; the others choose from 0 up to ``high``. For `deadline` it, and the probes, are brought down so
far that each layer keeps two channels, unless memory asks for less. For all bandits: ``granularity`` (theta),
``discount`` (lambda), ``padding`` (factor of the confidence term), ``quantile`` (of rewards, see `bandit.Terms.clip`);
``floor`` is the least distance from the mean time that `eucb` divides by, as a share of that mean. For `deadline`: the
ratios of the fleet's first rounds (``probes``), what learns the worth of deadlines (``curve``), and how strongly it is
believed, in rounds, what times (``trust``) and worth (``belief``) of ratios are before any is measured. With the regression,
once the devices' loss is below ``learnt``, a share of what guessing costs, the deadline grows by the loss's fall to the power
of ``grow``; 0 is never. After each round ``fade`` of every weight that reads a channel which nobody trained is taken away
(`blocks.fade`); ``fade.others`` is that of the other policies, which as in the paper do not fade.
"""

_POLICIES = ("eucb", "bounded", "deadline", "uniform")
_BANDITS = ("eucb", "bounded")
_CURVES = ("regression", "bandit")
_WIDTHS_MAX = 64
_HEARD = 3
"""Rounds whose losses say how far the fleet is."""
_FLEET, _SLOW = 64, 0.9
"""Devices, heard of last, whose times stand for those of one that is not known, and which quantile of theirs does."""
_FLEET_ASKED = 20
"""What ratios are worth is learnt of as many turns as so many devices are remembered by, or as many as are asked."""


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    recipe_at(known, 1)
    _check(known)
    widths = widths_of(spec, (1.0,))
    if not widths:
        raise ConfigError(f"model {spec.name!r} has no prunable channels; fedmp needs some, fedavg does not")
    levels = rank(spec, weights, widths, progressive=False)
    load: tuple[tuple[int, ...], ...] = ()
    if known["policy"] == "deadline":
        load = dataclasses.astuple(deadline.load_of(spec))
        known |= _capped(known, deadline.most(spec))
    scalars = {"params": known, "ratios": [0.0], "clients": [], "load": load, "stretch": 1.0}
    if known["policy"] == "deadline" and known["curve"] == "bandit":
        scalars["common"] = common.fresh(_terms(known))
    return State(spec, 0, dict(weights), levels, widths, scalars)


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: ratios are chosen, channels ranked."""
    params = state.scalars["params"]
    recipe = recipe_at(params, round_number)
    devices = tuple(sorted(devices, key=lambda d: d.name))
    clients = ratios.read(state)
    least = _least(state.spec, recipe, devices)
    known = dict(state.scalars)
    devices = tuple(d for d in devices if d.name in least)
    known["stretch"] = _stretched(state, clients)
    if "common" in known and len(_probing(params, clients, devices)) < len(devices):
        known["common"] = common.played(known["common"], round_number, _terms(params), rng)
    chosen = _chosen(known, clients, devices, least, rng)
    wanted = {name: max(ratio, least[name]) for name, ratio in chosen.items()}
    distinct = _distinct(wanted.values())
    widths = widths_of(state.spec, [1.0 - ratio for ratio in distinct])
    levels = rank(state.spec, state.weights, widths, progressive=False)
    bound = {name: ratio for name, ratio in least.items() if ratio and params["policy"] in _BANDITS}
    scalars = {**known, "ratios": distinct, "least": roster.latest({}, bound)}
    state = dataclasses.replace(state, round=round_number, levels=levels, widths=widths, scalars=scalars)
    return state, _drafts(state, recipe, devices, wanted, rng)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`: what devices lost and what it took is learnt, and the answers are joined.

    Memory: one sum of the model's size, which becomes the new weights, and one answer.

    Raises:
        Malformed: An answer is of another ranking than this round's.
    """
    params, clients = state.scalars["params"], ratios.read(state)
    told, whole, widest = dict[str, tuple[ratios.Client, ratios.Due]](), whole_of(state), 0
    for answer in counted(answers, whole):
        client = clients.get(answer.device) or ratios.Client(bandit.fresh(_terms(params)).edges)
        ratio = state.scalars["ratios"][answer.structure.capacity]
        least = state.scalars.get("least", {}).get(answer.device, 0.0)  # a run of before knows none in its first round
        told[answer.device] = ratios.heard(client, state.round, ratio, answer, least)
        widest = max(widest, answer.structure.capacity)
        del answer
    state = joined(state, answers, lambda cover: [1.0 / len(told)] * len(cover))
    if "common" in state.scalars:
        learnt = common.settled(state.scalars["common"], [due for _, due in told.values()], _terms(params))
        state = dataclasses.replace(state, scalars={**state.scalars, "common": learnt})
    share = float(params["fade" if params["policy"] == "deadline" else "fade.others"])
    if told and share:
        state = dataclasses.replace(state, weights=faded(state.spec, state.weights, state.levels, widest, share))
    rewards = {"eucb": ratios.by_gap(float(params["floor"])), "bounded": ratios.by_speed}
    settled = ratios.settled(told, _terms(params), rewards.get(str(params["policy"])))
    return ratios.remembered(state, roster.latest(clients, settled))


def facts(state: State) -> Mapping[str, float]:
    """See `coordinator.algorithm.Algorithm`: least, mean and most of the ratios that the round's devices trained by."""
    now = [turn.ratio for one in ratios.read(state).values() for turn in one.turns[-1:] if turn.round == state.round]
    return {"ratio.least": min(now), "ratio.mean": sum(now) / len(now), "ratio.most": max(now)} if now else {}


def _chosen(
    scalars: Mapping[str, Any],
    clients: ratios.Clients,
    devices: Sequence[DeviceView],
    least: Mapping[str, float],
    rng: np.random.Generator,
) -> dict[str, float]:
    """Let the policy choose a ratio for each device."""
    params = scalars["params"]
    if params["policy"] == "uniform":
        return {d.name: float(params["ratio"]) for d in devices}
    if params["policy"] == "deadline":
        return _by_deadline(scalars, clients, devices, least)
    terms = _terms(params)
    known = {d.name: clients[d.name].bandit if d.name in clients else bandit.fresh(terms) for d in devices}
    return {name: bandit.choose(one, terms, rng, least[name]) for name, one in known.items()}


def _by_deadline(
    scalars: Mapping[str, Any],
    clients: ratios.Clients,
    devices: Sequence[DeviceView],
    least: Mapping[str, float],
) -> dict[str, float]:
    """Probe while little is known of the fleet; then solve ratios against a common deadline."""
    params, loads = scalars["params"], scalars["load"]
    chosen = _probing(params, clients, devices)
    rest = [device.name for device in devices if device.name not in chosen]
    if rest:
        load = deadline.Load(*(tuple(line) for line in loads))
        seconds = _seconds(load, clients, rest, float(params["trust"]))
        said = [
            worth.Said(name, t.round, t.ratio, t.loss) for name, t in _newest(clients, len(devices)) if t.loss > 0.0
        ]
        held, high = [least[name] for name in rest], float(params["high"])
        if "common" in scalars:
            found = deadline.at(seconds, held, high, float(scalars["common"]["played"][1]))
        else:
            value = worth.worth(said, deadline.RATIOS, float(params["belief"]))
            found = deadline.equalised(seconds, held, high, value, float(scalars["stretch"]))
        chosen |= dict(zip(rest, (float(ratio) for ratio in found), strict=True))
    return chosen


def _seconds(load: deadline.Load, clients: ratios.Clients, names: Sequence[str], trust: float) -> deadline.Numbers:
    """Give what a turn of each device takes at every ratio; a device without measured turns is taken for a slow one."""
    timed = {name: ratios.timed(clients[name]) for name in names if name in clients}
    found = {name: deadline.seconds_of(load, turns, trust) for name, turns in timed.items() if turns}
    strangers = [name for name in names if name not in found]
    if strangers:
        others = islice(filter(None, map(ratios.timed, reversed(list(clients.values())))), _FLEET)
        slow = np.quantile([deadline.seconds_of(load, turns, trust) for turns in others], _SLOW, axis=0)
        found |= dict.fromkeys(strangers, slow)
    return np.array([found[name] for name in names])


def _newest(clients: ratios.Clients, asked: int) -> list[tuple[str, ratios.Turn]]:
    """Give the turns of the fleet that were last, in whole rounds, of which worth is learnt: all where all are asked."""
    turns = [(name, turn) for name, one in clients.items() for turn in one.turns]
    count = ratios.TURNS * max(_FLEET_ASKED, asked)
    oldest = sorted((turn.round for _, turn in turns), reverse=True)[:count][-1:]
    return [(name, turn) for name, turn in turns if turn.round >= oldest[0]]


def _probing(params: Mapping[str, Any], clients: ratios.Clients, devices: Sequence[DeviceView]) -> dict[str, float]:
    """Give devices a probe as long as little is known: as many turns as there are probes, of each or of the fleet.

    Where few of many devices are asked in a round, most have had no turn or one for a long time. What the others' turns say
    of the fleet must do for them.
    """
    probes = _numbers(str(params["probes"]))
    turns = {name: len(ratios.timed(one)) for name, one in clients.items()}
    heard = sum(turns.values()) // max(1, len(devices))
    stage = {device.name: max(heard, turns.get(device.name, 0)) for device in devices}
    return {name: probes[count] for name, count in stage.items() if count < len(probes)}


def _stretched(state: State, clients: ratios.Clients) -> float:
    """Give how many times the deadline is what pays best, by the losses of the last rounds; it never shrinks."""
    params = state.scalars["params"]
    since = state.round - _HEARD
    turns = [[t.loss for t in one.turns if t.round > since and t.loss > 0.0] for one in clients.values()]
    learnt = float(params["learnt"]) * math.log(max(2, state.spec.classes))
    wanted = deadline.stretch([sum(line) / len(line) for line in turns if line], learnt, float(params["grow"]))
    return max(wanted, float(state.scalars["stretch"]))


def _least(spec: ModelSpec, recipe: Recipe, devices: Sequence[DeviceView]) -> dict[str, float]:
    """Give each device the least ratio that its memory holds; those that hold none are left out."""
    known: dict[Means, float | None] = {}  # many devices are alike, and a prediction is not free
    found = {}
    for device in devices:
        means = device.means
        if means not in known:
            known[means] = deadline.least_ratio(spec, recipe, means)
        ratio = known[means]
        if ratio is not None:
            found[device.name] = ratio
    return found


def _distinct(wanted: Iterable[float]) -> list[float]:
    """Give the ratios that become widths, the narrowest first and the whole model last.

    More than a state can have are rounded up to a grid of as many steps, so that nobody gets more than its memory holds.
    """
    found = sorted({0.0, *wanted}, reverse=True)
    if len(found) <= _WIDTHS_MAX:
        return found
    step = found[0] / (_WIDTHS_MAX - 1)
    return sorted({min(found[0], math.ceil(ratio / step - 1e-9) * step) for ratio in found}, reverse=True)


def _drafts(
    state: State, recipe: Recipe, devices: Sequence[DeviceView], wanted: Mapping[str, float], rng: np.random.Generator
) -> tuple[Draft, ...]:
    whole, steps = whole_of(state), state.scalars["ratios"]
    known: dict[tuple[Means, int], Plan | None] = {}  # many devices are alike, and a prediction is not free
    drafts = []
    for device in devices:
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        # Of the widths that are not wider than wanted; a narrower one where a count was rounded past the budget.
        most = next(k for k in reversed(range(len(steps))) if steps[k] >= wanted[device.name] - 1e-12)
        means = device.means, most
        if means not in known:
            known[means] = fit(state.spec, [whole.narrowed(k) for k in range(most + 1)], recipe, device.means)
        fits = known[means]
        if fits is not None:
            drafts.append(Draft(device.name, "train", whole.narrowed(fits.capacity), seeded, fits.bytes_bound))
    return tuple(drafts)


def _capped(params: Mapping[str, Any], most: float) -> dict[str, Any]:
    """Give the largest ratio, at most `most`, and the probes, brought down by as much as their largest is above it."""
    probes = _numbers(str(params["probes"]))
    share = min(1.0, most / max(most, *probes))
    return {"high": min(float(params["high"]), most), "probes": " ".join(f"{share * ratio:g}" for ratio in probes)}


def _terms(params: Mapping[str, Any]) -> bandit.Terms:
    return bandit.Terms(
        high=float(params["high"]),
        granularity=float(params["granularity"]),
        discount=float(params["discount"]),
        padding=float(params["padding"]),
        clip=float(params["quantile"]),
    )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split())
    except ValueError:
        return (math.nan,)


def _check(params: Mapping[str, Any]) -> None:
    if params["curve"] not in _CURVES:
        raise ConfigError(f"parameter curve = {params['curve']!r}: there are {', '.join(_CURVES)}")
    if params["policy"] not in _POLICIES:
        raise ConfigError(f"parameter policy = {params['policy']!r}: there are {', '.join(_POLICIES)}")
    for name in ("ratio", "high"):
        if not 0.0 <= float(params[name]) < 1.0:
            raise ConfigError(f"parameter {name} = {params[name]:g}: write a ratio from 0 to below 1, such as 0.5")
    probes = _numbers(str(params["probes"]))
    if not 1 <= len(probes) <= ratios.TURNS or not all(0.0 <= ratio < 1.0 for ratio in probes):
        raise ConfigError(
            f"parameter probes = {params['probes']!r}: write up to {ratios.TURNS} ratios from 0 to below 1, such as '0.9 0.8'"
        )
    if not 0.0 < float(params["discount"]) <= 1.0:
        raise ConfigError(f"parameter discount = {params['discount']:g}: write a number above 0 and at most 1")
    if not float(params["high"]) > 0.0 or not float(params["granularity"]) > 0.0:
        raise ConfigError("parameters high and granularity: write numbers above 0, such as 0.8 and 0.1")
    for name in ("fade", "fade.others"):
        if not 0.0 <= float(params[name]) <= 1.0:
            raise ConfigError(f"parameter {name} = {params[name]:g}: write 0 for none, or a share up to 1 such as 0.2")
    if not 0.0 <= float(params["quantile"]) <= 1.0:
        raise ConfigError(f"parameter quantile = {params['quantile']:g}: write 0 for rewards as they are, or up to 1")
    for name in ("padding", "floor", "trust", "belief", "learnt", "grow"):
        if not (
            math.isfinite(float(params[name]))
            and float(params[name]) >= (1e-6 if name in ("floor", "trust", "belief") else 0)
        ):
            raise ConfigError(f"parameter {name} = {params[name]:g}: write a number that is not negative")
