"""What a device could train of a model, before anybody asks it: each width and density, as it would fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

from wire import memory
from wire.effort import effort
from wire.errors import ConfigError
from wire.masked import Masked, maskable
from wire.messages import Recipe
from wire.passes import passes
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure, parameter_count, tensor_shapes


@dataclass(frozen=True, slots=True)
class Manner:
    """One way to train one part.

    Attributes:
        micro_batch: Samples that go through it at once.
        cuts: Where it is cut into segments that run again; empty for none.
        again: The share of the forward pass's work that is done twice for that.
        bytes_peak: Expected peak above the worker's base.
        bytes_bound: The same with its margin.
        fits: Whether that is within the budget.
        exact: Whether it gives the gradient of the whole batch.
        seconds: As in `Candidate`.
    """

    micro_batch: int
    cuts: Cuts
    again: float
    bytes_peak: int
    bytes_bound: int
    fits: bool
    exact: bool
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One part of a model, and how training it would fit.

    Attributes:
        width: Fraction of the channels of every prunable layer.
        density: Fraction that is kept of the weights that can be masked; 1 for no masks.
        weights: How many it trains.
        micro_batch: Samples that go through it at once.
        cuts: Where it is cut into segments that run again in the backward pass; empty for none.
        bytes_peak: Expected peak above the worker's base.
        bytes_bound: The same with its margin; this is held against the budget.
        fits: Whether it does.
        kept: Whether the gradients of all layers must be held at once; otherwise each is used up within the backward pass.
        exact: Whether micro-batches give the gradient of the whole batch. Batch norms see the micro-batch alone.
        seconds: Predicted for a step, as `wire.effort` counts them; None for masked parts, which devices time themselves.
        manners: Every way to do it, in the order in which they are preferred; the first that fits is the one above. Where
            none does, it is the one that takes the least.
    """

    width: float
    density: float
    weights: int
    micro_batch: int
    cuts: Cuts
    bytes_peak: int
    bytes_bound: int
    fits: bool
    kept: bool
    exact: bool
    seconds: float | None
    manners: tuple[Manner, ...]


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
        Widths from the widest on, then densities from the densest on. Cost: some tens of milliseconds for each.

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
    manners = tuple(_manners(spec, structure, recipe, budget, masked))
    best = next((one for one in manners if one.fits), None) or min(manners, key=lambda one: one.bytes_bound)
    return Candidate(
        width=width,
        density=density,
        weights=weights,
        micro_batch=best.micro_batch,
        cuts=best.cuts,
        bytes_peak=best.bytes_peak,
        bytes_bound=best.bytes_bound,
        fits=best.fits,
        kept=memory.holds_gradients(recipe, best.micro_batch),
        exact=best.exact,
        seconds=best.seconds,
        manners=manners,
    )


def _manners(
    spec: ModelSpec, structure: Structure, recipe: Recipe, budget: int, masked: Masked | None
) -> Iterator[Manner]:
    took = effort(spec, structure)
    for way in passes(spec, structure, recipe, masked=masked is not None):
        price = memory.predict(spec, structure, recipe, way.micro_batch, masked=masked, cuts=way.cuts)
        yield Manner(
            micro_batch=way.micro_batch,
            cuts=way.cuts,
            again=sum(took.forward[: way.cuts[-1] + 1]) / sum(took.forward) if way.cuts else 0.0,
            bytes_peak=price.peak,
            bytes_bound=price.bound,
            fits=not budget or price.bound <= budget,
            exact=way.exact,
            seconds=way.seconds if masked is None else None,
        )


def recipe_of(batch: int, momentum: float, clip: float, *, adam: bool) -> Recipe:
    """Give the recipe to price; the rule is plain SGD, and what others hold beside it is not counted.

    Raises:
        ConfigError: A number is impossible.
    """
    if not 1 <= batch <= 65536 or not 0.0 <= momentum <= 1.0 or not clip >= 0.0:
        raise ConfigError("--batch is from 1 to 65536, --momentum from 0 to 1, --clip 0 or more")
    return dataclasses.replace(Recipe(), batch=batch, momentum=momentum, clip=clip, knobs={"adam": 1.0} if adam else {})
