"""One training order for each device that can hold it, or for one of these: what the plans of most algorithms end with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from coordinator.algorithm import DeviceView, Draft
from coordinator.fitting import Means, Plan, fit
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure


def drafted(
    spec: ModelSpec, structure: Structure, recipe: Recipe, devices: Sequence[DeviceView], rng: np.random.Generator
) -> tuple[Draft, ...]:
    """Ask every device that can hold it to train the same structure.

    Args:
        spec: The model.
        structure: What is trained.
        recipe: How; each device gets a seed of its own.
        devices: In any order; one that cannot hold the structure even with one sample at a time gets no draft.
        rng: Of the round. It is drawn from once for every device, whether the structure fits there or not.

    Returns:
        In the order of the devices' names.
    """
    drafts = []
    known: dict[Means, Plan | None] = {}  # many devices are alike, and a prediction is not free
    for device in sorted(devices, key=lambda d: d.name):
        seeded = dataclasses.replace(recipe, seed=int(rng.integers(1 << 31)))
        means = device.means
        if means not in known:
            known[means] = fit(spec, (structure,), seeded, means)
        fits = known[means]
        if fits is not None:
            drafts.append(Draft(device.name, "train", structure, seeded, fits.bytes_bound))
    return tuple(drafts)


def ranked_from(devices: Sequence[DeviceView], name: str, *, after: bool) -> list[DeviceView]:
    """Rank devices, those with most samples first, but from the one of this name on, or from the one after it.

    Args:
        devices: In any order.
        name: Whoever has it begins, and those before it come last; if nobody has it, so does the first.
        after: Let it be the very last.
    """
    ranked = sorted(devices, key=lambda d: (-d.samples, d.name))
    names = [device.name for device in ranked]
    first = names.index(name) + after if name in names else 0
    return ranked[first:] + ranked[:first]


def one_of(drafts: Sequence[Draft], round_number: int) -> tuple[Draft, ...]:
    """Ask one device alone: in round 1 the first, and in every round the next, so that none that fails holds up the run.

    Args:
        drafts: In the order of the devices' names.
        round_number: From 1.
    """
    return (drafts[(round_number - 1) % len(drafts)],) if drafts else ()
