"""How much memory an order takes on the native engine: what it holds throughout, and the length of its arena.

The engine lays its passes out by `wire.native.plan`, and this asks the same plan. What a worker reads and writes beside the
engine is counted as for the torch engine (`wire.memory`).
"""

from __future__ import annotations

import functools
from dataclasses import replace

from wire import memory
from wire.masked import FLOAT, Masked, aligned
from wire.memory import Pass, Prediction
from wire.messages import Recipe
from wire.native.plan import Asked, plan
from wire.segments import Cuts
from wire.spec import ModelSpec, Same, Structure, tensor_shapes
from wire.walk import several

_ORDER, _NODE = 192 << 10, 8 << 10
"""What Python makes for an order and for each node of its model: names, shapes, plans, views, and the gaps among these."""

_MASKS = 512 << 10
"""What the modules for masks and the compiled core take, once."""

_NARROWER = ("widths", "lambda")
"""Knobs by which a rule trains narrower widths of the same weights as well, in the same arena."""


def predict(
    spec: ModelSpec,
    structure: Structure,
    recipe: Recipe,
    micro_batch: int = 0,
    *,
    scale: float = 1.0,
    masked: Masked | None = None,
    cuts: Cuts = (),
) -> Prediction:
    """Predict the peak of a training order; arguments as `wire.memory.predict` has them.

    Raises:
        Unsupported: The model has an op that the native engine lacks.
        SpecError: The model cannot be run, or not be cut there.

    Cost: some ten microseconds per node.
    """
    if recipe.rule == "still":  # no engine is loaded for it
        return memory.predict(spec, structure, recipe, micro_batch, scale=scale, masked=masked)
    batch = micro_batch or recipe.batch
    masked = masked or memory.masked_of(structure)
    takes = arena(spec, structure, Asked(batch, cuts=cuts), masked)
    if any(recipe.knobs.get(name) for name in _NARROWER) and structure.capacity and masked is None:
        narrower = structure.narrowed(structure.capacity - 1)
        takes = max(takes, arena(spec, narrower, Asked(batch, cuts=cuts, views=True)))
    if not memory.holds_gradients(recipe, batch):
        shapes = tensor_shapes(spec, structure)  # what several nodes use moves when all have given their share
        takes += sum(aligned(shapes[name]) for name in several(spec.nodes))
    takes += 2 * aligned((batch, spec.classes))  # the logits, while those of the step before are still there
    passes = Pass(0, takes, _lasting(spec, masked))
    return memory.with_pass(spec, structure, recipe, (batch, masked), passes, scale=scale)


def predict_evaluation(
    spec: ModelSpec, structure: Structure, batch: int, scale: float = 1.0, masked: Masked | None = None
) -> Prediction:
    """Predict the peak of evaluating a structure and its narrower widths, `batch` samples at a time.

    Raises:
        Unsupported: The model has an op that the native engine lacks.
    """
    masked = masked or memory.masked_of(structure)
    takes = arena(spec, structure, Asked(batch, backward=False), masked)
    if structure.capacity and masked is None:
        narrower = structure.narrowed(structure.capacity - 1)
        takes = max(takes, arena(spec, narrower, Asked(batch, backward=False, views=True)))
    takes += aligned((batch, spec.classes))  # what the loss makes
    return memory.evaluated(spec, structure, masked, Pass(takes, _lasting(spec, masked)), scale)


def _lasting(spec: ModelSpec, masked: Masked | None) -> int:
    return _ORDER + _NODE * len(spec.nodes) + _MASKS * (masked is not None)


def arena(spec: ModelSpec, structure: Structure, asked: Asked, masked: Masked | None = None) -> int:
    """Give the bytes in which passes run, with those that stretches of masked layers hold of their own.

    With a way back they are the more of a training pass and of one that measures the model, which comes before it.
    """
    sparse = None if masked is None else frozenset(masked.kept) - frozenset(masked.dense)
    return _arena(Same(spec), structure.capacity, tuple(structure.widths.items()), asked, sparse)


@functools.lru_cache(maxsize=8)
def _arena(
    same: Same,
    capacity: int,
    widths: tuple[tuple[str, tuple[int, ...]], ...],
    asked: Asked,
    sparse: frozenset[str] | None,
) -> int:
    """Remembered: an order asks two or three times, and how many weights are kept makes no difference."""
    structure = Structure(capacity, dict(widths))
    masked = None if sparse is None else Masked(dict.fromkeys(sparse, 0))
    ways = [asked, replace(asked, backward=False, cuts=())] if asked.backward else [asked]
    found = [plan(same.spec, structure, way, masked) for way in ways]
    return max(FLOAT * one.length for one in found) + max(one.panels for one in found)
