"""How much memory an order takes, from the model's data alone: a liveness walk in plain Python.

The coordinator runs it before it offers an order and the agent before it starts a worker, so it needs neither torch nor
numpy. Bytes are counted above the worker's base: a process that has loaded its engine and its data and trained one tiny
step.

The walk gives every array of one training step an interval on a clock. With N nodes, node i runs forward at instant i,
the loss is taken at N, and node i runs backward at 2 N - i. An array lives from the instant that makes it to the last
that reads it; the peak is the instant with the largest sum. Weights, gradients and what the rule holds live throughout.

Masked weights that are held sparse take their kept values and an index, and a chain of such layers runs as one node, whose
buffers live throughout (see `wire.masked`). What a device finds out by timing, which layers are rather held dense, is said
by whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod

from wire.errors import SpecError
from wire.masked import FLOAT, Masked, aligned, contracted, index_bytes
from wire.messages import Recipe
from wire.spec import ModelSpec, Node, Structure, node_shapes, tensor_shapes

INDEX = 8
BLOCK = 16
MARGIN = 1.10
HEAP = 2 << 20
"""What the allocator keeps between its blocks, whatever the model: the mean over measured workers."""

SLACK = 8 << 20
"""The bound is ``MARGIN * peak + SLACK``: no measured peak exceeded it (tests/bench/memory.py prints the figures)."""

_SAVES_INPUT = ("linear", "conv2d", "max_pool2d", "avg_pool2d", "group_norm")
_SAVES_OUTPUT = ("relu", "tanh", "sigmoid")

Interval = tuple[int, int, int]
"""Bytes, the first instant and the last."""

_SCRATCH = {2: 24, 4: 64}
"""Bytes per kept weight of a matrix or a convolution, while its index is made or its values are brought into C order."""

_DENSE_BLOCK = 1 << 19
"""Bytes of a dense masked weight's gradient at a time; its mask takes as many."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What an order takes above base, in bytes.

    Attributes:
        peak: The expected peak.
        bound: The same with its margin; this is what is compared with a budget.
    """

    peak: int
    bound: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How an order fits into a budget.

    Attributes:
        capacity: Index of the width.
        micro_batch: Samples that go through the model at once.
        bytes_peak: Expected peak above base.
        bytes_bound: The same with its margin.
    """

    capacity: int
    micro_batch: int
    bytes_peak: int
    bytes_bound: int


def copies(recipe: Recipe) -> int:
    """Count the weight-sized copies that a recipe's rule holds beside weights and gradients, as each rule declares."""
    return 1 if recipe.momentum and recipe.rule != "still" else 0


def holds_gradients(recipe: Recipe, micro_batch: int) -> bool:
    """Tell whether gradients must outlive their layer's backward pass.

    They need not when nothing but the update reads them: no clipping by global norm, no second width, one micro-batch.
    """
    return bool(recipe.clip or recipe.knobs.get("widths") or micro_batch < recipe.batch)


def predict(
    spec: ModelSpec,
    structure: Structure,
    recipe: Recipe,
    micro_batch: int = 0,
    *,
    bytes_held: int = 0,
    scale: float = 1.0,
    masked: Masked | None = None,
) -> Prediction:
    """Predict the peak of a training order.

    Args:
        spec: The model.
        structure: The part that is trained.
        recipe: How; its rule's copies are counted.
        micro_batch: Samples that go through the model at once; 0 for the recipe's batch.
        bytes_held: What else is held throughout.
        scale: Measured over predicted peak of earlier orders on that device.
        masked: What is kept of which weights; None for all of all.

    Raises:
        SpecError: The model cannot be run.

    Cost: O(nodes + tensors); well under a millisecond for the zoo's models.
    """
    batch = micro_batch or recipe.batch
    sizes = _weights(spec, structure, masked)
    weights = sizes.held
    if recipe.rule == "still":
        return _bounded(bytes_held + weights + (weights // 2 if recipe.form else 0), scale)
    gradients = sizes.trained if holds_gradients(recipe, batch) else 0
    peak = _peak(_Walk(spec, structure, batch, backward=True, masked=masked))
    step = weights + gradients + copies(recipe) * sizes.trained + peak
    # trained weights and update; beside them what an earlier one lost, in its mapped file, or the new one's bytes
    writing = weights + (2 * sizes.trained if recipe.form else sizes.largest) + sizes.scratch
    return _bounded(bytes_held + HEAP + max(step, writing, weights + sizes.masks + sizes.scratch), scale)


def predict_evaluation(
    spec: ModelSpec, structure: Structure, batch: int, scale: float = 1.0, masked: Masked | None = None
) -> Prediction:
    """Predict the peak of evaluating a structure and its narrower widths, `batch` samples at a time."""
    sizes = _weights(spec, structure, masked)
    peak = _peak(_Walk(spec, structure, batch, backward=False, masked=masked))
    return _bounded(HEAP + sizes.held + max(sizes.largest, peak, sizes.masks + sizes.scratch), scale)


def fit(
    spec: ModelSpec, structures: Sequence[Structure], recipe: Recipe, bytes_budget: int, scale: float = 1.0
) -> Plan | None:
    """Find the widest structure that a budget holds, then the largest micro-batch for it.

    Args:
        spec: The model.
        structures: Candidates; the one of highest capacity that fits wins.
        recipe: How to train; micro-batches tried are its batch, half of it, and so on down to 1.
        bytes_budget: Memory above base.
        scale: As in `predict`.

    Returns:
        None when not even the narrowest fits with one sample at a time.
    """
    for structure in sorted(structures, key=lambda s: s.capacity, reverse=True):
        for micro_batch in micro_batches(recipe):
            found = predict(spec, structure, recipe, micro_batch, scale=scale)
            if found.bound <= bytes_budget:
                return Plan(structure.capacity, micro_batch, found.peak, found.bound)
    return None


def micro_batches(recipe: Recipe) -> list[int]:
    """Give the micro-batches worth trying, largest first: the batch, half of it, and so on down to 1."""
    sizes = [recipe.batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def uniform(spec: ModelSpec, kept: float) -> Structure:
    """Keep the same fraction of every prunable group, rounded up: a structure for estimates, without a ranking."""
    return Structure(0, {g.name: (max(1, ceil(kept * g.size)),) for g in spec.groups if g.prunable})


def _bounded(peak: int, scale: float) -> Prediction:
    return Prediction(peak, int(MARGIN * scale * peak) + SLACK)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of all weights.

    Attributes:
        held: With what says where they stand.
        trained: The values alone; a gradient or a copy takes as many.
        largest: The largest tensor's values.
        masks: All masks as they come, a byte per weight.
        scratch: What making one index takes, at most.
    """

    held: int
    trained: int
    largest: int
    masks: int
    scratch: int


def _weights(spec: ModelSpec, structure: Structure, masked: Masked | None) -> _Sizes:
    kept = masked.kept if masked is not None else {}
    shapes = tensor_shapes(spec, structure)
    unknown = sorted(set(kept) - set(shapes))
    if unknown:
        raise SpecError(f"model {spec.name!r} has no tensor {unknown[0]!r} that could be masked")
    sparse = set(kept).difference(masked.dense if masked is not None else ())
    values = {name: aligned((kept[name],) if name in sparse else shape) for name, shape in shapes.items()}
    masks = {name: prod(shapes[name]) for name in kept}
    index = sum(index_bytes(shapes[name], kept[name]) if name in sparse else masks[name] for name in kept)
    scratch = max((_SCRATCH[len(shapes[name])] * kept[name] for name in sparse), default=0)
    trained = sum(values.values())
    return _Sizes(trained + index, trained, max(values.values()), sum(masks.values()), scratch)


class _Walk:
    """The sizes and homes of all arrays of one pass.

    Attributes:
        nodes: The model's steps; a stretch is one, of op ``stretch``.
        end: The last instant.
        size: Value name to bytes for the whole batch.
        blocked: The same in a convolution's own layout.
        tensors: Tensor name to bytes.
        home: Value name to the value whose memory it shares.
        panels: Stretch name to bytes of its values and of their gradients.
        dense: Weights that are masked and dense.
    """

    def __init__(
        self, spec: ModelSpec, structure: Structure, batch: int, *, backward: bool, masked: Masked | None = None
    ) -> None:
        shapes = node_shapes(spec, structure)
        self.panels: dict[str, tuple[int, int]] = {}
        self.dense = frozenset(masked.dense) if masked is not None else frozenset()
        self.nodes: Sequence[Node] = spec.nodes
        if masked is not None:
            self.nodes = contracted(spec.nodes, set(masked.kept) - self.dense, self.panels, (shapes, batch))
        self.backward = backward
        self.end = 2 * len(self.nodes) if backward else len(self.nodes)
        self.size = {name: aligned((batch, *shape)) for name, shape in shapes.items()}
        self.blocked = {name: aligned((batch, _blocked(name, shape[0]), *shape[1:])) for name, shape in shapes.items()}
        self.tensors = {name: aligned(shape) for name, shape in tensor_shapes(spec, structure).items()}
        self.home = _homes(self.nodes)

    def back(self, i: int) -> int:
        """Give the instant at which node i runs backward, or forward if nothing does."""
        return 2 * len(self.nodes) - i if self.backward else i


def _peak(walk: _Walk) -> int:
    change = [0] * (walk.end + 2)
    for intervals in (_activations(walk), _temporaries(walk), _gradients(walk)):
        for size, birth, last in intervals:
            change[birth] += size
            change[last + 1] -= size
    return max(accumulate(change))


def _homes(nodes: Sequence[Node]) -> dict[str, str]:
    """Name the value whose memory each one lives in: a flatten is a view, a relu may overwrite what only it reads."""
    readers = [name for node in nodes for name in node.inputs]
    made_by = {node.name: node.op for node in nodes}
    home = {"input": "input"}
    for node in nodes:
        source = node.inputs[0]
        in_place = node.op == "relu" and made_by.get(source) in ("linear", "conv2d") and readers.count(source) == 1
        home[node.name] = home[source] if node.op == "flatten" or in_place else node.name
    return home


def _activations(walk: _Walk) -> Iterator[Interval]:
    """Values live to their last reader, forward or (if its backward pass reads them again) backward."""
    # The batch twice: as the rule gathered it, and the engine's aligned copy.
    yield 2 * walk.size["input"], 0, walk.end
    last = {"input": walk.end}
    for i, node in enumerate(walk.nodes):
        for name in node.inputs:
            reads = walk.back(i) if node.op in _SAVES_INPUT else i
            last[walk.home[name]] = max(last.get(walk.home[name], 0), reads)
        output = walk.back(i) if node.op in _SAVES_OUTPUT else i
        last[walk.home[node.name]] = max(last.get(walk.home[node.name], 0), output)
        if node.op == "max_pool2d":
            yield walk.size[node.name] * INDEX // FLOAT, i, walk.back(i)
        if node.op == "stretch":
            values, gradients = walk.panels[node.name]
            yield values + gradients * walk.backward, 0, walk.end
    for i, node in enumerate(walk.nodes):
        if walk.home[node.name] == node.name:
            yield walk.size[node.name], i, last[node.name]


def _temporaries(walk: _Walk) -> Iterator[Interval]:
    """What an op needs only while it runs: a layer's new gradient before it is added, a convolution's own copies."""
    for i, node in enumerate(walk.nodes):
        if node.op in ("linear", "conv2d"):
            weights = sum(walk.tensors[name] for name in node.params.values())
            blocked = walk.blocked[node.inputs[0]] + walk.blocked[node.name]
            workspace = weights + blocked if node.op == "conv2d" else 0
            if node.params["weight"] in walk.dense:
                weights = 2 * weights if node.op == "conv2d" else min(2 * weights, 2 * _DENSE_BLOCK)
            yield workspace, i, i
            if walk.backward:
                yield workspace + weights, walk.back(i), walk.back(i)


def _gradients(walk: _Walk) -> Iterator[Interval]:
    """Gradients of activations live from their last reader's backward instant to their own maker's."""
    if not walk.backward:
        return
    trained = {"input": False}
    born = {walk.nodes[-1].name: len(walk.nodes)}
    for i, node in enumerate(walk.nodes):
        trained[node.name] = bool(node.params) or node.op == "stretch" or any(trained[name] for name in node.inputs)
        for name in node.inputs:
            born[name] = min(born.get(name, walk.end), walk.back(i))
    for i, node in enumerate(walk.nodes):
        # A flatten hands the same memory on, so that its own gradient ends one instant before its input's begins.
        end = walk.back(i) - (node.op == "flatten")
        if trained[node.name]:
            yield walk.size[node.name], min(born.get(node.name, end), end), end


def _blocked(name: str, channels: int) -> int:
    """Round up: convolutions take channels in blocks of 16, except the one or three of a picture."""
    return channels if name == "input" and channels <= 3 else -(-channels // BLOCK) * BLOCK
