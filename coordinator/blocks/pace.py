"""Widths by time: what a device's turn would take at every width, from the turns that were measured there.

A turn is measured from the issue of an order to its answer, both transfers and the work. At a width that a device has trained
lately it is what that took; at any other it is the device's newest turn, scaled by the work of a step. Only a device's last
`TURNS` turns count, so that one that was slow for a while is tried at a wider width again.

What is in time is said by parameters: ``deadline`` in seconds, and ``slack`` as so many times the median, over the devices of
the round whose turns are known, of what a turn is expected to take at the widest width that the device's memory holds (of two
devices, the faster one's). The shorter of the two counts. 0, the default, is no limit; without limits a run does not depend on
what was measured.

What is remembered is plain, by device name: ``turns``, a list of [capacity, seconds], the newest last, and ``due``, the
capacity of an answer whose time will be known when the device is seen next. Both are bounded (`roster.latest`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from coordinator.algorithm import Answer, DeviceView, Draft, State
from coordinator.blocks.roster import latest
from coordinator.blocks.widths import structures_of, widest
from coordinator.fitting import Means, Plan, fit
from coordinator.recipes import Params
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure
from wire.work import multiplications

LIMITS: Mapping[str, float] = MappingProxyType({"deadline": 0.0, "slack": 0.0})
"""Parameters that limit a turn, see above, with their defaults."""
_ALONE: Mapping[str, float] = MappingProxyType({})
TURNS = 8
"""Measured turns that are remembered of a device."""

Turns = Sequence[Sequence[float]]
"""Of one device: capacity and seconds, the newest last."""


def loads(spec: ModelSpec, structures: Sequence[Structure], knobs: Mapping[str, float] = _ALONE) -> tuple[float, ...]:
    """Give the multiplications of one sample's forward pass at each width, those of narrower widths in the same step included.

    Args:
        spec: The model.
        structures: The widths, narrowest first.
        knobs: Of the rule `sgd`: with ``widths`` n > 0 a step also trains the narrowest and n random ones between, with
            ``mutual`` it passes through the narrowest once more.

    Raises:
        SpecError: The model cannot be run.

    Cost: one walk over the model for each width; of the same widths again, a look at each.
    """
    alone = [multiplications(spec, structure) for structure in structures]
    widths = int(knobs.get("widths", 0.0))
    narrowest = alone[0] * (2.0 if knobs.get("mutual") else 1.0) if widths else 0.0
    found = [float(alone[0])]
    for capacity in range(1, len(alone)):
        between = alone[1:capacity]
        drawn = min(widths, len(between)) * sum(between) / len(between) if between else 0.0
        found.append(alone[capacity] + narrowest + drawn)
    return tuple(found)


def seconds_at(turns: Turns, load: Sequence[float]) -> tuple[float, ...]:
    """Give what a turn takes at each width; nothing is less than at a narrower width.

    Args:
        turns: At least one.
        load: See `loads`.
    """
    newest, took = turns[-1]
    known = {int(capacity): float(seconds) for capacity, seconds in turns}
    found: list[float] = []
    for capacity, work in enumerate(load):
        seconds = known.get(capacity, float(took) * work / load[int(newest)])
        found.append(max(seconds, *found[-1:]) if found else seconds)
    return tuple(found)


def widest_in_time(turns: Turns, load: Sequence[float], deadline: float) -> int:
    """Give the widest width whose turn is over in `deadline` seconds; the narrowest where none is, all without a turn."""
    if not turns:
        return len(load) - 1
    return max(0, sum(seconds <= deadline for seconds in seconds_at(turns, load)) - 1)


def check(params: Params) -> None:
    """Refuse limits that cannot be meant.

    Raises:
        ConfigError: One is.
    """
    if not float(params["deadline"]) >= 0.0:
        raise ConfigError(f"parameter deadline = {params['deadline']}: write seconds, or 0 for none")
    if not (float(params["slack"]) == 0.0 or float(params["slack"]) >= 1.0):
        raise ConfigError(f"parameter slack = {params['slack']}: write a number from 1, such as 2, or 0 for none")


def timed(params: Params) -> bool:
    """Say whether time is a matter at all."""
    return bool(params.get("deadline") or params.get("slack"))


def end_of(params: Params, seconds: Sequence[float]) -> float:
    """Give the seconds in which a turn has to be over.

    Args:
        params: See `LIMITS`.
        seconds: Of each device that was measured, what it takes at the widest width that its memory holds.

    Returns:
        Infinity where nothing limits.
    """
    ends = [float(params["deadline"])] if params.get("deadline") else []
    if params.get("slack") and seconds:
        ends.append(float(params["slack"]) * statistics.median_low(seconds))
    return min(ends, default=math.inf)


def asked(
    state: State, recipe: Recipe, devices: Sequence[DeviceView], rng: np.random.Generator, params: Params
) -> tuple[State, tuple[Draft, ...]]:
    """Ask each device to train the widest width that its memory holds and, judged by its own turns, that is over in time.

    Args:
        state: With levels and widths.
        recipe: How; each device gets a seed of its own.
        devices: In any order; one that cannot hold the narrowest width even with one sample at a time gets no draft.
        rng: Of the round. It is drawn from once for every device, whether anything fits there or not.
        params: See `LIMITS`; without them it is memory alone. A device without a turn is asked by its memory, and one for
            which even the narrowest width takes longer trains that.

    Returns:
        The state with the times that became known, and the drafts in the order of the devices' names.
    """
    structures = structures_of(state)
    plans = widest(state.spec, structures, recipe, devices)
    if timed(params):
        state = dataclasses.replace(state, scalars=settled(state.scalars, devices))
        plans = _in_time(state, recipe, devices, plans, params)
    drafts = []
    for device in sorted(devices, key=lambda d: d.name):
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        fits = plans.get(device.name)
        if fits is not None:
            drafts.append(Draft(device.name, "train", structures[fits.capacity], seeded, fits.bytes_bound))
    return state, tuple(drafts)


def _in_time(
    state: State, recipe: Recipe, devices: Sequence[DeviceView], plans: Mapping[str, Plan], params: Params
) -> dict[str, Plan]:
    """Put a narrower plan in the place of one whose turn would not be over in time."""
    structures = structures_of(state)
    load = loads(state.spec, structures, recipe.knobs)
    turns = {name: state.scalars["turns"].get(name, ()) for name in plans}
    end = end_of(params, [seconds_at(turns[name], load)[plan.capacity] for name, plan in plans.items() if turns[name]])
    found = {}
    fits: dict[tuple[Means, int], Plan | None] = {}  # many devices are alike, and a prediction is not free
    for device in devices:
        plan = plans.get(device.name)
        if plan is not None and (most := widest_in_time(turns[device.name], load, end)) < plan.capacity:
            means = device.means, most
            if means not in fits:
                fits[means] = fit(state.spec, structures[: most + 1], recipe, device.means)
            plan = fits[means]
        if plan is not None:
            found[device.name] = plan
    return found


def heard(scalars: Mapping[str, Any], answers: Iterable[Answer]) -> dict[str, Any]:
    """Remember at which width each device has answered, until its time is known. Goes through the answers once.

    A device that is not selected in the next round is heard of later: what was due of it stays. One without samples trains
    nothing, and its turn says nothing of how long that takes, neither there nor where others are held against it.
    """
    told = {answer.device: (answer.samples, answer.structure.capacity) for answer in answers}
    known = {name: capacity for name, capacity in scalars.get("due", {}).items() if name not in told}
    return {**scalars, "due": latest(known, {name: capacity for name, (samples, capacity) in told.items() if samples})}


def known(state: State, devices: Sequence[DeviceView]) -> State:
    """Take in the times that are due before a round that trains nothing, whose own times would stand in their place."""
    if "due" not in state.scalars:
        return state
    return dataclasses.replace(state, scalars=settled(state.scalars, devices))


def settled(scalars: Mapping[str, Any], devices: Sequence[DeviceView]) -> dict[str, Any]:
    """Take in the times of the answers that were due, of the devices that are here."""
    turns, due = scalars.get("turns", {}), dict(scalars.get("due", {}))
    news = {}
    for device in devices:
        if device.name in due and device.seconds_turn > 0.0:
            new = [due.pop(device.name), float(device.seconds_turn)]
            news[device.name] = [*turns.get(device.name, ()), new][-TURNS:]
    return {**scalars, "turns": latest(turns, news), "due": due}
