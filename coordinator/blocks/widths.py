"""What methods of nested widths share when they plan: fractions in words, and the widest width that each device holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from coordinator.algorithm import DeviceView, State
from coordinator.blocks.nesting import whole_of
from coordinator.fitting import Means, Plan, fit
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure

WIDTHS_MAX = 64


def fractions_of(text: str) -> tuple[float, ...]:
    """Read kept fractions such as ``0.25 0.5 1``.

    Raises:
        ConfigError: They do not rise to 1, or there are more than 64.
    """
    try:
        fractions = tuple(float(word) for word in text.split())
    except ValueError:
        fractions = ()
    rising = all(low < high for low, high in pairwise((0.0, *fractions)))
    if not rising or not 1 <= len(fractions) <= WIDTHS_MAX or fractions[-1] != 1.0:
        raise ConfigError(f"parameter fractions = {text!r}: write rising numbers that end with 1, such as '0.25 0.5 1'")
    return fractions


def structures_of(state: State) -> tuple[Structure, ...]:
    """Give a nested state's widths, narrowest first."""
    whole = whole_of(state)
    return tuple(whole.narrowed(capacity) for capacity in range(whole.capacity + 1))


def widest(
    spec: ModelSpec, structures: Sequence[Structure], recipe: Recipe, devices: Sequence[DeviceView]
) -> dict[str, Plan]:
    """Find the widest structure that each device's memory holds.

    Returns:
        By device name; a device that holds none is left out. Cost: one prediction for each kind of device.
    """
    known: dict[Means, Plan | None] = {}
    found = {}
    for device in devices:
        means = device.means
        if means not in known:
            known[means] = fit(spec, structures, recipe, means)
        plan = known[means]
        if plan is not None:
            found[device.name] = plan
    return found
