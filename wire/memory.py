"""How much memory an order takes, from the model's data alone: a liveness walk in plain Python.

The coordinator runs it before it offers an order and the agent before it starts a worker, so it needs neither torch nor
numpy. Bytes are counted above the worker's base: a process that has loaded its engine and its data and trained one tiny
step.

`wire.walk` gives every array of one training step the instants between which it lives. Weights, gradients and what the rule
holds live throughout.

Masked weights that are held sparse take their kept values and an index, and a chain of such layers runs as one node, whose
buffers live throughout (see `wire.masked`). What a device finds out by timing, which layers are rather held dense, is said
by whoever asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import ceil, prod

from wire import beside
from wire.errors import SpecError
from wire.heap import heap, holes, lasting
from wire.masked import FLOAT, Masked, aligned, index_bytes
from wire.messages import Recipe
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure, parameter_count, tensor_shapes
from wire.walk import Walk, peak

MARGIN = 1.10
SLACK = 8 << 20
"""The bound is ``MARGIN * peak + SLACK``: no measured peak exceeded it (tests/bench/memory.py prints the figures)."""

_READ, _READ_AT_ONCE = 24, 1 << 16
"""Bytes per place while a mask is read, and of how many places at once (`wire.rice`; of gaps it is fewer)."""

_SORTED = 8
"""Bytes per kept weight while values are brought from C order into the index's, or back: both."""

_MODULES = 1800 << 10
"""What loading the modules for masks takes beside them, once, while the first masks are loaded."""

_MAPPED = 4 << 20
"""Of a file of weights no more than this and one tensor is resident at a time (`edge_runtime.received`)."""

_CODED, _AT_ONCE = 16, 1 << 17
"""Bytes per value while a part of an update is brought into its form (`wire.forms`), and the values of a part."""

_WHOLE: dict[str, int] = {"topk": 3, "lottery": 4, "maml": 2}
"""Rules that hold copies of whole tensors, masked or not, and how many."""

_READS_GRADIENTS = ("score", "grouplasso", "selfprune", "fiarse", "heterofl", "fjord", "maml")
"""Rules that add to gradients, or look at them, before weights move."""

_GRADIENT_KNOBS = ("widths", "lambda", "gradients")
"""Knobs by which any rule says that it does."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an order takes above base, in bytes.

    Attributes:
        peak: The expected peak.
        bound: The same with its margin; this is what is compared with a budget.
    """

    peak: int
    bound: int


def copies(recipe: Recipe) -> int:
    """Count the copies of the trained weights that a rule holds beside weights and gradients, as each rule declares."""
    if recipe.rule in ("still", "score"):
        return 0
    beside = recipe.rule == "dpf" or (recipe.rule == "prox" and bool(recipe.knobs.get("mu")))
    return (2 if recipe.knobs.get("adam") else 1 if recipe.momentum else 0) + beside


def whole_copies(recipe: Recipe, micro_batch: int = 0, *, masked: bool = True) -> int:
    """Count the copies of all weights, kept or not, that a recipe's rule holds, as each rule declares.

    Args:
        recipe: How to train.
        micro_batch: Samples that go through the model at once; 0 for the recipe's batch.
        masked: Whether any weight is masked.
    """
    if recipe.rule == "dpf":
        gathers = bool(recipe.clip or (micro_batch or recipe.batch) < recipe.batch)
        return 1 + bool(recipe.momentum) + gathers if masked and recipe.knobs.get("dense", 1.0) else 0
    if recipe.rule == "importance":
        return 0 if masked and recipe.knobs.get("window") else 1
    if recipe.rule == "score":
        return bool(recipe.knobs.get("synflow")) + bool(recipe.knobs.get("top"))
    if recipe.rule == "selfprune":  # places take more at the end than momentum did, which is gone by then
        return 4 - bool(copies(recipe))
    return _WHOLE.get(recipe.rule, 0) + (recipe.rule == "maml" and bool(recipe.knobs.get("hf")))


def holds_gradients(recipe: Recipe, micro_batch: int) -> bool:
    """Tell whether gradients must outlive their layer's backward pass.

    They need not when nothing but the update reads them: no clipping by global norm, no second width, no penalty (knob
    ``lambda``), nothing that wants to see them whole (knob ``gradients``), one micro-batch.
    """
    adds = any(recipe.knobs.get(name) for name in _GRADIENT_KNOBS) or recipe.rule in _READS_GRADIENTS
    return bool(recipe.clip or adds or micro_batch < recipe.batch or recipe.knobs.get("adam"))


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
    """Predict the peak of a training order.

    Args:
        spec: The model.
        structure: The part that is trained.
        recipe: How; its rule's copies are counted.
        micro_batch: Samples that go through the model at once; 0 for the recipe's batch.
        scale: Measured over predicted peak of earlier orders on that device.
        masked: How masked weights are held; None for what the structure keeps, held sparse.
        cuts: Where the model is cut into segments that run again in the backward pass; not with masks.

    Raises:
        SpecError: The model cannot be run, or not be cut there.

    Cost: O(nodes + tensors); well under a millisecond for the zoo's models.
    """
    batch = micro_batch or recipe.batch
    masked = masked or masked_of(structure)
    walk = Walk(spec, structure, batch, backward=True, masked=masked, cuts=cuts)
    around = holes(walk)
    # the small arrays of indices fall among what the order before has left
    sparse = masked is not None and bool(masked.kept)
    takes = Pass(peak(walk), around, lasting(walk), around * sparse, _MODULES * sparse)
    return with_pass(spec, structure, recipe, (batch, masked), takes, scale=scale)


@dataclass(frozen=True, slots=True)
class Pass:
    """What an engine takes for its passes, in bytes, beside weights and gradients and what the rule holds.

    Attributes:
        peak: Arrays that live at the same time, at most.
        beside: What else there is until training is over.
        lasting: What stays until the order is done.
        loading: What lies in the way while masked weights are loaded.
        modules: What loading the modules for masks takes before, once.
    """

    peak: int
    beside: int
    lasting: int = 0
    loading: int = 0
    modules: int = 0


def with_pass(
    spec: ModelSpec,
    structure: Structure,
    recipe: Recipe,
    manner: tuple[int, Masked | None],
    takes: Pass,
    *,
    scale: float = 1.0,
) -> Prediction:
    """Predict the peak of a training order on an engine whose passes take so much.

    Args:
        spec: The model.
        structure: The part that is trained.
        recipe: How.
        manner: Samples that go through the model at once, and how masked weights are held.
        takes: The engine's.
        scale: As in `predict`.
    """
    batch, masked = manner
    sizes = _weights(spec, structure, masked)
    weights = sizes.held
    if recipe.rule == "still":
        return bounded(weights + (weights // 2 if recipe.form else 0), scale)
    gradients = sizes.trained if holds_gradients(recipe, batch) else 0
    bytes_held = whole_copies(recipe, batch, masked=masked is not None) * FLOAT * parameter_count(spec, structure)
    bytes_held += beside.passed(spec, structure, recipe, batch) + beside.aside(spec, structure, recipe)
    bytes_held += beside.apart(spec, structure, recipe, copies(recipe)) + beside.taught(spec, structure, recipe)
    step = weights + gradients + copies(recipe) * sizes.trained + takes.peak
    # trained weights, with masks copies of them in C order, and update; beside them what was received, in its mapped file
    found, placed, told = beside.told(spec, structure, recipe)
    coded = 2 * sizes.trained + _CODED * min(sizes.largest // FLOAT, _AT_ONCE)
    writing = (
        weights
        + told
        + max((coded if recipe.form else sizes.lines + sizes.largest) + placed, sizes.lines + sizes.scratch)
    )
    writing += gradients if recipe.knobs.get("personal") else 0  # what was trained goes on afterwards
    most = max(
        step + takes.beside,
        writing,
        weights + gradients + found + told + takes.beside,
        max(sizes.loading, takes.modules) + takes.loading,
    )
    return bounded(bytes_held + sizes.masks + takes.lasting + most, scale)


def predict_evaluation(
    spec: ModelSpec, structure: Structure, batch: int, scale: float = 1.0, masked: Masked | None = None
) -> Prediction:
    """Predict the peak of evaluating a structure and its narrower widths, `batch` samples at a time."""
    masked = masked or masked_of(structure)
    walk = Walk(spec, structure, batch, backward=False, masked=masked)
    return evaluated(
        spec, structure, masked, Pass(peak(walk), heap(walk), modules=_MODULES * (masked is not None)), scale
    )


def evaluated(
    spec: ModelSpec, structure: Structure, masked: Masked | None, takes: Pass, scale: float = 1.0
) -> Prediction:
    """Predict the peak of an evaluation on an engine whose passes take so much."""
    sizes = _weights(spec, structure, masked)
    most = max(sizes.held + max(sizes.largest, takes.peak), sizes.loading, takes.modules)
    return bounded(takes.beside + sizes.masks + most, scale)


def micro_batches(recipe: Recipe) -> list[int]:
    """Give the micro-batches worth trying, largest first: the batch, half of it, and so on down to 1."""
    sizes = [recipe.batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def uniform(spec: ModelSpec, kept: float) -> Structure:
    """Keep the same fraction of every prunable group, rounded up: a structure for estimates, without a ranking."""
    return Structure(0, {g.name: (max(1, ceil(kept * g.size)),) for g in spec.groups if g.prunable})


def masked_of(structure: Structure) -> Masked | None:
    """Say how masked weights are held when nothing else is known: all that the structure keeps, sparse."""
    return Masked(structure.kept) if structure.kept else None


def bounded(peak: int, scale: float) -> Prediction:
    """Put the margin on an expected peak."""
    return Prediction(peak, int(MARGIN * scale * peak) + SLACK)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of all weights.

    Attributes:
        held: With what says where they stand.
        trained: The values alone; a gradient or a copy takes as many.
        lines: Copies of what is trained in C order, to be sent; only where there are masks.
        largest: The most of them that is read from a file at a time.
        masks: All masks, a bit per weight.
        scratch: What bringing one tensor's values into C order takes beside them, at most.
        loading: The most that there is beside the masks until the weights are in their places. At first it is the masks of
            the order before and what was made of them.
    """

    held: int
    trained: int
    lines: int
    largest: int
    masks: int
    scratch: int
    loading: int


def _weights(spec: ModelSpec, structure: Structure, masked: Masked | None) -> _Sizes:
    kept = masked.kept if masked is not None else {}
    shapes = tensor_shapes(spec, structure)
    for name, count in kept.items():
        if name not in shapes or len(shapes[name]) not in (2, 4) or count > prod(shapes[name]):
            raise SpecError(f"model {spec.name!r} has no tensor {name!r} of which {count} weights could be kept")
    sparse = set(kept).difference(masked.dense if masked is not None else ())
    values = {name: aligned((kept[name],) if name in sparse else shape) for name, shape in shapes.items()}
    whole = {name: prod(shapes[name]) for name in kept}
    indices = (index_bytes(shapes[name], kept[name]) if name in sparse else whole[name] for name in kept)
    index, trained, bits = sum(indices), sum(values.values()), sum(-(-size // 8) for size in whole.values())
    scratch = max(((_SORTED - FLOAT) * kept[name] for name in sparse), default=0)
    read = _read_alone(values.values()) if kept else max(map(_resident, _shells(spec, structure)))
    reading = max((_reading(whole[name], kept[name]) for name in kept), default=0)
    loading, filled = index + bits + reading if kept else trained + read, 0
    for name, size in values.items():
        loading = max(loading, index + filled + _SORTED * kept[name] if name in sparse else 0)
        filled += size
    lines = sum(aligned((kept[name],) if name in kept else shape) for name, shape in shapes.items()) if kept else 0
    return _Sizes(trained + index, trained, lines, read, bits, scratch, loading)


def _shells(spec: ModelSpec, structure: Structure) -> list[list[int]]:
    """Give the bytes of each tensor in each file of dense weights: the narrowest width, and what every wider one adds."""
    found, inner = [], dict.fromkeys((tensor.name for tensor in spec.tensors), 0)
    for capacity in range(structure.capacity + 1):
        shapes = tensor_shapes(spec, structure.narrowed(capacity))
        outer = {name: FLOAT * prod(shape) for name, shape in shapes.items()}
        found.append([size - inner[name] for name, size in outer.items()])
        inner = outer
    return found


def _reading(size: int, kept: int) -> int:
    """Bound what reading a mask takes beside its bits: its code as it came, taken apart and looked at, and places."""
    return 3 * min(kept + size // 255, size // 5) + _READ * min(kept, _READ_AT_ONCE)


def _resident(sizes: Iterable[int]) -> int:
    """Give the most of a mapped file that is resident while tensors of these sizes are read one after the other."""
    most = touched = 0
    for size in sizes:
        touched = size if touched >= _MAPPED else touched + size
        most = max(most, touched)
    return most


def _read_alone(sizes: Collection[int]) -> int:
    """Give the same of a masked model's file of values: a large one is opened again for every tensor."""
    return sum(sizes) if sum(sizes) <= _MAPPED else max(sizes)
