"""Hermes: every device finds a narrow model of its own; averaged is only what all devices of a round kept.

Li et al., "Hermes: An Efficient Federated Learning Framework for Heterogeneous Mobile Clients", MobiCom 2021. Which channels
go is the device's business (the rule `selfprune`); docs/decisions/personal-baselines.md says what was filled in and why. Here
``x_c += sum_n (D_n / D) (w_n,c - x_c)`` where every device that answered kept coordinate c, and nothing happens elsewhere.

What a device keeps is a set of channels per axis group, so that what all of them kept is one too. In its next order each
device is told the common channels of the round that it answered last (knobs ``shared.*``): between these it takes the shared
model, as it is by then, and everywhere else its own weights.

What comes of it is one personal model per device, and ``accuracy.after`` of the answers is about these. The shared model is
what `evaluate` measures; where some device dropped a weight, it stands still.

Uploads are sparse. The download is *not*, unlike in the paper: the weights of a round are published once for all devices
(DESIGN decision 2), so each is sent the whole model and masks it itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from coordinator.algorithm import About, Answer, Answers, Arrays, DeviceView, Draft, State
from coordinator.blocks.aggregate import Expected, landed, shares_of, summed
from coordinator.blocks.drafts import drafted
from coordinator.blocks.fixed import TRAINING
from coordinator.blocks.roster import latest
from coordinator.recipes import merged, recipe_of, scheduled
from wire.channels import Kept, all_kept, channels_of, tensor_masks, to_words
from wire.errors import ConfigError
from wire.spec import ModelSpec, Structure

ABOUT = About("Li et al., MobiCom 2021", "baseline", "tests/unit/test_hermes.py")
PARAMS: Mapping[str, float | str] = MappingProxyType(
    {
        **TRAINING,
        "recipe.rule": "selfprune",
        "recipe.lambda": 1e-3,
        "recipe.threshold": 0.5,
        "recipe.target": 0.5,
        "recipe.prune": 0.2,
    }
)
"""Names of all parameters with their defaults."""

_SHARED = "shared"


def init(spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
    """See `coordinator.algorithm.Algorithm.init`."""
    known = merged(PARAMS, params)
    scheduled(recipe_of(known), str(known["schedule"]), 1)
    for name in ("threshold", "target", "prune"):
        if not 0.0 <= float(known[f"recipe.{name}"]) <= 1.0:
            raise ConfigError(f"parameter recipe.{name} = {known[f'recipe.{name}']}: write a number from 0 to 1")
    if not float(known["recipe.lambda"]) >= 0.0:
        raise ConfigError(f"parameter recipe.lambda = {known['recipe.lambda']}: write a number, at least 0")
    if not all_kept(spec):
        raise ConfigError(f"model {spec.name!r} has no prunable channels; hermes needs some, fedavg does not")
    return State(spec, 0, dict(weights), scalars={"params": known, "clients": []})


def plan(
    state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
) -> tuple[State, tuple[Draft, ...]]:
    """See `coordinator.algorithm.Algorithm.plan`: everybody trains the whole model, and hears what is shared."""
    params, rows = state.scalars["params"], {name: row for row, name in enumerate(state.scalars["clients"])}
    recipe = scheduled(recipe_of(params), str(params["schedule"]), round_number)
    drafts = []
    for draft in drafted(state.spec, Structure(), recipe, devices, rng):
        if draft.device in rows:
            shared = _unpacked(state, rows[draft.device])
            words = {f"{_SHARED}.{name}": word for name, word in to_words(state.spec, shared).items()}
            own = dataclasses.replace(draft.recipe, knobs={**draft.recipe.knobs, **words})
            drafts.append(dataclasses.replace(draft, recipe=own))
        else:
            drafts.append(draft)
    return dataclasses.replace(state, round=round_number), tuple(drafts)


def close(state: State, answers: Answers | Iterable[Answer]) -> State:
    """See `coordinator.algorithm.Algorithm.close`. Goes through the answers twice.

    An answer without samples, or about weights that no set of channels leaves, counts for nothing.

    Memory: one sum of the model's size and a byte per weight.

    Raises:
        Malformed: An answer is not about the whole model.
    """
    seats: dict[str, int] = {}
    common, whole = all_kept(state.spec), Expected(answers)
    for answer in whole:
        kept = channels_of(state.spec, answer.sent) if answer.samples else None
        if kept is not None:
            seats[answer.device] = answer.samples
            common = {name: flags & kept[name] for name, flags in common.items()}
        del answer
    if not seats:
        return state
    total = summed(state.spec, state.weights, whole, shares_of(seats))
    masks = tensor_masks(state.spec, common)

    def shared(name: str, moved: NDArray[np.float32]) -> None:
        if name in masks:
            np.multiply(moved, masks[name], out=moved)

    return dataclasses.replace(_remembered(state, seats, common), weights=landed(state.weights, total, shared))


def _remembered(state: State, devices: Iterable[str], common: Kept) -> State:
    """Note for each device of the round which channels all of them kept."""
    rows = dict(zip(state.scalars["clients"], state.arrays.get(_SHARED, ()), strict=True))
    bits = np.packbits(np.concatenate(list(common.values())))
    clients = latest(rows, dict.fromkeys(sorted(devices), bits))
    scalars = {**state.scalars, "clients": list(clients)}
    return dataclasses.replace(state, scalars=scalars, arrays={_SHARED: np.stack(list(clients.values()))})


def _unpacked(state: State, row: int) -> dict[str, NDArray[np.bool_]]:
    """Give the channels that a device of the list shares, by axis group."""
    groups = all_kept(state.spec)
    sizes = [flags.size for flags in groups.values()]
    line = np.unpackbits(state.arrays[_SHARED][row], count=sum(sizes)).view(np.bool_)
    return dict(zip(groups, np.split(line, np.cumsum(sizes)[:-1]), strict=True))
