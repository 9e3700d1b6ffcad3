"""Virtual fleets by name: how much memory, how fast, how far from the coordinator.

A fleet is a builder here, whose budgets follow the model, or a file in ``profiles`` (or anywhere: give its path) with
machines that take turns. How long an order takes on a machine is said in one of three ways, the first that the file has
for the model:

* coefficients as PruneFL publishes them: seconds of a step, and seconds more per kept weight of each layer;
* a table of measured seconds, by the share of the dense step's operations that a masked step has;
* operations per second.

Measured is the whole model: a narrower width takes as much of its seconds as of its operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np

from coordinator.fitting import least
from coordinator.simulate import flops
from wire.errors import ConfigError, Malformed
from wire.memory import uniform
from wire.messages import Order, Recipe
from wire.schema import Amount, Limit, Name, Natural, Positive, Text, from_plain
from wire.spec import ModelSpec, Structure
from wire.work import layers, per_sample

KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Fractions of the channels that the budgets of an uneven fleet are made for."""
_AMPLE = 4
"""Times of what the whole model takes that a device of an even fleet has: masks and what a rule holds beside the weights take
up to three times as much as plain training."""
_FOLDER = Path(__file__).parent / "profiles"


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds of a training step, linear in the kept weights: ``constant + sum(seconds * kept)`` over the layers.

    Attributes:
        dense: Seconds of a step of the whole model without masks, in its dense form; a width takes the share of them that its
            operations are of the whole model's.
        constant: Seconds of a step that keeps nothing, of all channels.
        weights: Seconds more for each kept weight, by layer in the order of the model.
        batch: Samples of that step; more or fewer take proportionally longer or shorter.
    """

    dense: Amount
    constant: Amount
    weights: Annotated[tuple[Amount, ...], Limit(1, 4096)]
    batch: Positive

    def seconds(self, spec: ModelSpec, structure: Structure, *, dense_gradient: bool) -> float:
        """Give the seconds of one step of `batch` samples; a dense gradient is in the published constant."""
        del dense_gradient
        if not structure.masks:
            return self.dense * _share(spec, structure)
        found = layers(spec, structure)
        return self.constant + sum(s * layer.kept for s, layer in zip(self.weights, found, strict=True))


@dataclass(frozen=True, slots=True)
class Point:
    """One measured step of a masked model: the share of the dense step's operations that it has, and its seconds."""

    share: Amount
    seconds: Amount


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured seconds of a training step.

    Attributes:
        dense: Of the whole model without masks; a width takes the share of them that its operations are.
        points: Of masked ones, by ascending share; between two of them the seconds are interpolated, beyond the ends they
            stay. Where masks keep the same fraction everywhere, the share is that density.
        batch: Samples of that step; more or fewer take proportionally longer or shorter.
    """

    dense: Amount
    batch: Positive
    points: Annotated[tuple[Point, ...], Limit(0, 64)] = ()

    def seconds(self, spec: ModelSpec, structure: Structure, *, dense_gradient: bool) -> float:
        """Give the seconds of one step of `batch` samples."""
        if not structure.masks:
            return self.dense * _share(spec, structure)
        if not self.points:
            return self.dense
        share = _share(spec, structure, dense_gradient=dense_gradient)
        return float(np.interp(share, [p.share for p in self.points], [p.seconds for p in self.points]))


def _share(spec: ModelSpec, structure: Structure, *, dense_gradient: bool = False) -> float:
    """Give what part of the whole model's operations a structure takes in a step."""
    return per_sample(spec, structure, dense_gradient=dense_gradient) / per_sample(spec, Structure())


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of machine, as a file says it.

    Attributes:
        bytes_budget: Memory that an order may take; 0 for what the whole model takes.
        flops: Operations per second in training.
        bandwidth_down: Bytes per second that it receives.
        bandwidth_up: Bytes per second that it sends.
        coefficients: Model's name to its published seconds.
        measured: Model's name to its measured seconds.
        seconds_order: What any order takes beside transfers and training: to hear of it, to load the model, to write the
            answer.
    """

    bytes_budget: Natural
    flops: Amount
    bandwidth_down: Amount
    bandwidth_up: Amount
    coefficients: Mapping[Name, Coefficients] = field(default_factory=dict)
    measured: Mapping[Name, Measured] = field(default_factory=dict)
    seconds_order: Amount = 0.0


@dataclass(frozen=True, slots=True)
class Profile:
    """A file of `profiles`: machines of its own, or the names of other files whose machines take turns."""

    about: Text
    machines: Annotated[tuple[Kind, ...], Limit(0, 4096)] = ()
    mix: Annotated[tuple[Name, ...], Limit(0, 4096)] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """One virtual device.

    Attributes:
        name: ``device-1`` and so on.
        bytes_budget: Memory that an order may take.
        flops: Floating-point operations per second in training.
        bandwidth_down: Bytes per second that it receives.
        bandwidth_up: Bytes per second that it sends.
        step: Seconds of a step of this model, where they are known better than by `flops`.
        seconds_order: As in `Kind`.
    """

    name: str
    bytes_budget: int
    flops: float
    bandwidth_down: float
    bandwidth_up: float
    step: Coefficients | Measured | None = None
    seconds_order: float = 0.0

    def seconds_down(self, size: int) -> float:
        """Give the time to receive so many bytes."""
        return size / self.bandwidth_down

    def seconds_up(self, size: int) -> float:
        """Give the time to send so many bytes."""
        return size / self.bandwidth_up


def seconds_of_work(machine: Machine, spec: ModelSpec, order: Order, samples: int) -> float:
    """Give the time that an order takes on a machine that holds so many training samples, transfers apart.

    A step that trains several widths takes what they take one after the other (`flops.widths_of_step`).
    """
    if machine.step is None or order.verb not in ("train", "score"):
        return flops.flops(spec, order, samples) / machine.flops
    structure, recipe = order.structures[0], order.recipe
    seconds = partial(machine.step.seconds, spec)
    often = flops.widths_of_step(recipe, structure).items()
    each = sum(n * seconds(structure.narrowed(k), dense_gradient=False) for k, n in often)
    dense = flops.passes_with_all_gradients(recipe, samples)
    found = (flops.passes(recipe, samples) - dense) * each
    found += dense and dense * seconds(structure, dense_gradient=True)
    own = samples * int(recipe.knobs.get("personal", 0.0))
    found += own and own * seconds(structure, dense_gradient=False)
    return found / machine.step.batch


def bytes_down(order: Order, held: Collection[str]) -> int:
    """Count the bytes that a device fetches for an order: the blobs that it does not hold.

    Args:
        order: The order.
        held: Digests of what the device has, which are the blobs of its last order (an agent drops all others).
    """
    return sum(ref.size for ref in order.blobs if ref.digest not in held)


def make(profile: str, count: int, spec: ModelSpec, recipe: Recipe, engines: Sequence[str] = ()) -> tuple[Machine, ...]:
    """Build a fleet.

    Args:
        profile: One of `names`, or the path of a file like those in ``profiles``.
        count: Devices.
        spec: The model that the budgets are measured by.
        recipe: How it will be trained; it decides what a width costs.
        engines: What trains there, as in `coordinator.fitting.Means`.

    Raises:
        ConfigError: There is no such profile, it does not fit the model, or there is no device.
    """
    if count < 1:
        raise ConfigError(f"devices = {count}: write at least 1")
    if profile in PROFILES:
        return PROFILES[profile](budgets(spec, recipe, count, engines=engines))
    found = kinds(profile)
    whole = least(spec, Structure(), recipe, engines)
    return tuple(_machine(f"device-{i + 1}", found[i % len(found)], spec, whole) for i in range(count))


def names() -> tuple[str, ...]:
    """List the profiles that have a name."""
    return (*PROFILES, *sorted(path.stem for path in _FOLDER.glob("*.json")))


def text_of(profile: str) -> str:
    """Give all that decides a profile which is a file, the files that it mixes included; empty for a builder.

    Raises:
        ConfigError: There is no such profile.
    """
    if profile in PROFILES:
        return ""
    read = _read(profile)
    return _path(profile).read_text("utf-8") + "".join(text_of(name) for name in read.mix)


def kinds(profile: str) -> tuple[Kind, ...]:
    """Give the machines of a file, in the order in which they take turns.

    Raises:
        ConfigError: There is no such file, or it is none.
    """
    read = _read(profile)
    found = (*read.machines, *(kind for name in read.mix for kind in _read(name).machines))
    if not found:
        raise ConfigError(f"fleet {profile!r} has no machines")
    return found


@cache
def _read(profile: str) -> Profile:
    path = _path(profile)
    try:
        read = from_plain(Profile, json.loads(path.read_text("utf-8")), strict=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"fleet {path}: {error}") from error
    except Malformed as error:
        raise ConfigError(f"fleet {path}: {error.path}: {error.problem}") from error
    if not all(min(kind.flops, kind.bandwidth_down, kind.bandwidth_up) > 0.0 for kind in read.machines):
        raise ConfigError(f"fleet {path}: a machine has a speed of 0")
    return read


def _path(profile: str) -> Path:
    named = _FOLDER / f"{profile}.json"
    path = named if "/" not in profile and named.exists() else Path(profile)
    if path.suffix != ".json" or not path.exists():
        raise ConfigError(f"fleet {profile!r}: there are {', '.join(names())}, or name a file that ends in .json")
    return path


def _machine(name: str, kind: Kind, spec: ModelSpec, whole: int) -> Machine:
    step = kind.coefficients.get(spec.name) or kind.measured.get(spec.name)
    if isinstance(step, Coefficients) and len(step.weights) != len(layers(spec, Structure())):
        raise ConfigError(
            f"the fleet has seconds for {len(step.weights)} layers of model {spec.name!r}, which has others"
        )
    budget = kind.bytes_budget or whole
    return Machine(name, budget, kind.flops, kind.bandwidth_down, kind.bandwidth_up, step, kind.seconds_order)


def budgets(spec: ModelSpec, recipe: Recipe, count: int, grain: int = 1, engines: Sequence[str] = ()) -> list[int]:
    """Spread memory budgets over a fleet: from what the narrowest of five widths takes to what the whole model takes.

    Args:
        spec: The model.
        recipe: How it will be trained.
        count: Devices.
        grain: Budgets are rounded up to multiples of so many bytes.
        engines: What trains there, as in `coordinator.fitting.Means`.

    Returns:
        Bytes above a worker's base, ascending.
    """
    needs = [-(-least(spec, uniform(spec, kept), recipe, engines) // grain) * grain for kept in KEPT]
    last = max(count - 1, 1)
    return [needs[-1] if count == 1 else needs[round(i * (len(needs) - 1) / last)] for i in range(count)]


def _mixed(limits: list[int]) -> tuple[Machine, ...]:
    """The less memory, the slower: from an old phone (1 GFLOP/s, 0.5 MB/s) to a small server (16 GFLOP/s, 8 MB/s)."""
    steps = max(len(limits) - 1, 1)
    factors = [16.0 ** (i / steps) for i in range(len(limits))]
    return tuple(
        Machine(f"device-{i + 1}", limit, 1e9 * factor, 0.5e6 * factor, 0.5e6 * factor)
        for i, (limit, factor) in enumerate(zip(limits, factors, strict=True))
    )


def _even(limits: list[int]) -> tuple[Machine, ...]:
    """All alike, and each can hold the whole model by any algorithm."""
    return tuple(Machine(f"device-{i + 1}", _AMPLE * limits[-1], 4e9, 2e6, 2e6) for i in range(len(limits)))


def _stragglers(limits: list[int]) -> tuple[Machine, ...]:
    """As `_even`, but every fourth device is ten times slower."""
    return tuple(
        Machine(m.name, m.bytes_budget, m.flops / 10, m.bandwidth_down / 10, m.bandwidth_up / 10) if i % 4 == 3 else m
        for i, m in enumerate(_even(limits))
    )


def _spread(limits: list[int]) -> tuple[Machine, ...]:
    """Five classes of as many devices each: the wider the model that one holds, the faster, from 2 GFLOP/s and 1 MB/s up.

    The fastest is four times as fast as the slowest. A class is a width, whatever an algorithm's rule holds beside the
    weights: budgets are what the widths take by that rule.
    """
    needs, classes = sorted(set(limits)), min(len(KEPT), len(limits))
    places = [i * classes // len(limits) for i in range(len(limits))]
    factors = [4.0 ** (place / max(classes - 1, 1)) for place in places]
    return tuple(
        Machine(f"device-{i + 1}", needs[min(place, len(needs) - 1)], 2e9 * factor, 1e6 * factor, 1e6 * factor)
        for i, (place, factor) in enumerate(zip(places, factors, strict=True))
    )


def _spread_whole(limits: list[int]) -> tuple[Machine, ...]:
    """As `_spread`, but each can hold the whole model by any algorithm."""
    return tuple(replace(machine, bytes_budget=_AMPLE * limits[-1]) for machine in _spread(limits))


PROFILES: Mapping[str, Callable[[list[int]], tuple[Machine, ...]]] = {
    "mixed": _mixed,
    "even": _even,
    "stragglers": _stragglers,
    "spread": _spread,
    "spread-whole": _spread_whole,
}
"""Name to builder, which is given ascending memory budgets."""
