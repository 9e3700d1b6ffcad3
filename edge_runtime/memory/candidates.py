"""What a device could train of a model, before anybody asks it: each width and density, as it would fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from wire import memory
from wire.errors import ConfigError
from wire.masked import Masked, maskable
from wire.messages import Recipe
from wire.spec import ModelSpec, Structure, parameter_count, statistics, tensor_shapes


@dataclass(frozen=True, slots=True)
class Candidate:
    """One part of a model, and how training it would fit.

    Attributes:
        width: Fraction of the channels of every prunable layer.
        density: Fraction that is kept of the weights that can be masked; 1 for no masks.
        weights: How many it trains.
        micro_batch: Samples that go through it at once; as small as it takes to fit, and 1 if it never does.
        bytes_peak: Expected peak above the worker's base.
        bytes_bound: The same with its margin; this is held against the budget.
        fits: Whether it does.
        kept: Whether the gradients of all layers must be held at once; otherwise each is used up within the backward pass.
        exact: Whether micro-batches give the gradient of the whole batch. Batch norms see the micro-batch alone.
    """

    width: float
    density: float
    weights: int
    micro_batch: int
    bytes_peak: int
    bytes_bound: int
    fits: bool
    kept: bool
    exact: bool


def candidates(
    spec: ModelSpec, recipe: Recipe, bytes_budget: int, widths: Sequence[float], densities: Sequence[float]
) -> list[Candidate]:
    """Price every width of the dense model, then every density of the whole one.

    Args:
        spec: The model.
        recipe: How it would be trained.
        bytes_budget: Above the worker's base; 0 for no limit.
        widths: Fractions of the prunable channels, above 0 and at most 1.
        densities: Fractions of the weights that can be masked, above 0 and below 1.

    Returns:
        Widths from the widest on, then densities from the densest on. Cost: some milliseconds for each.

    Raises:
        ConfigError: A fraction is impossible.
        SpecError: The model cannot be run.
    """
    for fraction in (*widths, *densities):
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(
                f"{fraction:g} is no fraction of a model: write numbers above 0 and at most 1, such as 0.2"
            )
    cut = any(group.prunable for group in spec.groups)
    found = []
    for width in sorted(set(widths) | {1.0}, reverse=True) if cut else (1.0,):
        structure = memory.uniform(spec, width) if width < 1.0 else Structure()
        found.append(_priced(spec, structure, recipe, bytes_budget, (width, 1.0, None)))
    shapes = tensor_shapes(spec, Structure())
    sizes = {name: prod(shapes[name]) for name in maskable(spec)}
    for density in sorted(set(densities) - {1.0}, reverse=True) if sizes else ():
        masked = Masked({name: ceil(density * size) for name, size in sizes.items()})
        found.append(_priced(spec, Structure(), recipe, bytes_budget, (1.0, density, masked)))
    return found


def chosen(found: Sequence[Candidate], *, masked: bool) -> Candidate | None:
    """Give what an algorithm of widths, or one of masks, would be answered with: the largest that fits, if any does."""
    return next((one for one in found if one.fits and (one.density < 1.0) == masked), None)


def _priced(
    spec: ModelSpec, structure: Structure, recipe: Recipe, budget: int, part: tuple[float, float, Masked | None]
) -> Candidate:
    width, density, masked = part
    weights = parameter_count(spec, structure)
    if masked is not None:
        shapes = tensor_shapes(spec, structure)
        weights -= sum(prod(shapes[name]) - kept for name, kept in masked.kept.items())
    for size, price in _prices(spec, structure, recipe, masked):
        if not budget or price.bound <= budget or size == 1:
            break
    return Candidate(
        width=width,
        density=density,
        weights=weights,
        micro_batch=size,
        bytes_peak=price.peak,
        bytes_bound=price.bound,
        fits=not budget or price.bound <= budget,
        kept=memory.holds_gradients(recipe, size),
        exact=size == recipe.batch or not statistics(spec),
    )


def _prices(
    spec: ModelSpec, structure: Structure, recipe: Recipe, masked: Masked | None
) -> Iterator[tuple[int, memory.Prediction]]:
    for size in memory.micro_batches(recipe):
        yield size, memory.predict(spec, structure, recipe, size, masked=masked)


def recipe_of(batch: int, momentum: float, clip: float, *, adam: bool) -> Recipe:
    """Give the recipe to price; the rule is plain SGD, and what others hold beside it is not counted.

    Raises:
        ConfigError: A number is impossible.
    """
    if not 1 <= batch <= 65536 or not 0.0 <= momentum <= 1.0 or not clip >= 0.0:
        raise ConfigError("--batch is from 1 to 65536, --momentum from 0 to 1, --clip 0 or more")
    return dataclasses.replace(Recipe(), batch=batch, momentum=momentum, clip=clip, knobs={"adam": 1.0} if adam else {})
