"""What a device could train of a model, before anybody asks it: each width and density, as it would fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

from edge_runtime.paces import Paces, kind
from wire import memory, prices
from wire.effort import effort
from wire.errors import ConfigError
from wire.masked import Masked, maskable
from wire.messages import Recipe
from wire.passes import passes
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure, digest, parameter_count, tensor_shapes


@dataclass(frozen=True, slots=True)
class Manner:
    """One way to train one part.

    Attributes:
        engine: What does it.
        micro_batch: Samples that go through it at once.
        cuts: Where it is cut into segments that run again; empty for none.
        again: The share of the forward pass's work that is done twice for that.
        bytes_peak: Expected peak above the worker's base.
        bytes_bound: The same with its margin.
        fits: Whether that is within the budget.
        exact: Whether it gives the gradient of the whole batch.
        seconds: As in `Candidate`.
    """

    engine: str
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
        engine: What does it.
        micro_batch: Samples that go through it at once.
        cuts: Where it is cut into segments that run again in the backward pass; empty for none.
        bytes_peak: Expected peak above the worker's base.
        bytes_bound: The same with its margin; this is held against the budget.
        fits: Whether it does.
        kept: Whether the gradients of all layers must be held at once; otherwise each is used up within the backward pass.
        seconds: Predicted for a step, as `wire.effort` counts them, times what the engine was measured at here; None for
            masked parts, which devices time themselves.
        manners: Every way to do it, in the order in which they are preferred; the first that fits is the one above. Where
            none does, it is the one that takes the least.
    """

    width: float
    density: float
    weights: int
    engine: str
    micro_batch: int
    cuts: Cuts
    bytes_peak: int
    bytes_bound: int
    fits: bool
    kept: bool
    seconds: float | None
    manners: tuple[Manner, ...]

    @property
    def exact(self) -> bool:
        """Whether micro-batches give the gradient of the whole batch. Batch norms see the micro-batch alone."""
        named = self.engine, self.micro_batch, self.cuts
        return next(way.exact for way in self.manners if (way.engine, way.micro_batch, way.cuts) == named)


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for an order, and what is known of this device's time.

    Attributes:
        budgets: Engine to bytes above its worker's base, 0 for no limit; the best first. One that lacks an op is not priced.
        paces: What orders have taken here.
    """

    budgets: Mapping[str, int]
    paces: Paces


def candidates(
    spec: ModelSpec, recipe: Recipe, room: Room, widths: Sequence[float], densities: Sequence[float]
) -> list[Candidate]:
    """Price every width of the dense model, then every density of the whole one.

    Args:
        spec: The model.
        recipe: How it would be trained.
        room: On which engines, and with how much memory.
        widths: Fractions of the prunable channels, above 0 and at most 1.
        densities: Fractions of the weights that can be masked, above 0 and below 1.

    Returns:
        Widths from the widest on, then densities from the densest on. Cost: some tens of milliseconds for each.

    Raises:
        ConfigError: A fraction is impossible.
        SpecError: The model cannot be run.
        Unsupported: No engine here has all its ops.
    """
    room = Room({engine: room.budgets[engine] for engine in prices.having(spec, room.budgets)}, room.paces)
    for fraction in (*widths, *densities):
        if not 0.0 < fraction <= 1.0:
            raise ConfigError(
                f"{fraction:g} is no fraction of a model: write numbers above 0 and at most 1, such as 0.2"
            )
    cut = any(group.prunable for group in spec.groups)
    found = []
    for width in sorted(set(widths) | {1.0}, reverse=True) if cut else (1.0,):
        structure = memory.uniform(spec, width) if width < 1.0 else Structure()
        found.append(_priced(spec, structure, recipe, room, (width, 1.0, None)))
    shapes = tensor_shapes(spec, Structure())
    sizes = {name: prod(shapes[name]) for name in maskable(spec)}
    for density in sorted(set(densities) - {1.0}, reverse=True) if sizes else ():
        masked = Masked({name: ceil(density * size) for name, size in sizes.items()})
        found.append(_priced(spec, Structure(), recipe, room, (1.0, density, masked)))
    return found


def chosen(found: Sequence[Candidate], *, masked: bool) -> Candidate | None:
    """Give what an algorithm of widths, or one of masks, would be answered with: the largest that fits, if any does."""
    return next((one for one in found if one.fits and (one.density < 1.0) == masked), None)


def _priced(
    spec: ModelSpec, structure: Structure, recipe: Recipe, room: Room, part: tuple[float, float, Masked | None]
) -> Candidate:
    width, density, masked = part
    weights = parameter_count(spec, structure)
    if masked is not None:
        shapes = tensor_shapes(spec, structure)
        weights -= sum(prod(shapes[name]) - kept for name, kept in masked.kept.items())
    what = kind(digest(spec), density)
    found = (
        way for engine in room.budgets for way in _manners(spec, structure, (recipe, masked), (engine, what), room)
    )
    manners = tuple(way for _, way in sorted(found, key=lambda each: each[0]))
    best = next((one for one in manners if one.fits), None) or min(manners, key=lambda one: one.bytes_bound)
    return Candidate(
        width=width,
        density=density,
        weights=weights,
        engine=best.engine,
        micro_batch=best.micro_batch,
        cuts=best.cuts,
        bytes_peak=best.bytes_peak,
        bytes_bound=best.bytes_bound,
        fits=best.fits,
        kept=memory.holds_gradients(recipe, best.micro_batch),
        seconds=best.seconds,
        manners=manners,
    )


def _manners(
    spec: ModelSpec,
    structure: Structure,
    how: tuple[Recipe, Masked | None],
    on: tuple[str, str],
    room: Room,
) -> Iterator[tuple[tuple[bool, bool, float, float], Manner]]:
    """Give the ways on one engine, each with what it is sorted by: as `edge_runtime.choice` chooses among engines.

    Exact ways come first, then those on engines that were not tried yet, the best first, then the fastest.
    """
    (recipe, masked), (engine, what) = how, on
    took, ratio, budget = effort(spec, structure), room.paces.ratio(engine, what), room.budgets[engine]
    place = float(list(room.budgets).index(engine))
    for way in passes(spec, structure, recipe, masked=masked is not None):
        price = prices.training(engine)(spec, structure, recipe, way.micro_batch, masked=masked, cuts=way.cuts)
        seconds = way.seconds * (ratio or 1.0)
        rank = not way.exact, ratio is not None, place if ratio is None else seconds, seconds
        yield (
            rank,
            Manner(
                engine=engine,
                micro_batch=way.micro_batch,
                cuts=way.cuts,
                again=sum(took.forward[: way.cuts[-1] + 1]) / sum(took.forward) if way.cuts else 0.0,
                bytes_peak=price.peak,
                bytes_bound=price.bound,
                fits=not budget or price.bound <= budget,
                exact=way.exact,
                seconds=seconds if masked is None else None,
            ),
        )


def recipe_of(batch: int, momentum: float, clip: float, *, adam: bool) -> Recipe:
    """Give the recipe to price; the rule is plain SGD, and what others hold beside it is not counted.

    Raises:
        ConfigError: A number is impossible.
    """
    if not 1 <= batch <= 65536 or not 0.0 <= momentum <= 1.0 or not clip >= 0.0:
        raise ConfigError("--batch is from 1 to 65536, --momentum from 0 to 1, --clip 0 or more")
    return dataclasses.replace(Recipe(), batch=batch, momentum=momentum, clip=clip, knobs={"adam": 1.0} if adam else {})
