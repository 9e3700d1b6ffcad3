"""Plain training that also tells how much every weight matters, kept or not: PruneFL's importance.

Jiang et al., "Model Pruning Enables Efficient Federated Learning on Edge Devices", IEEE TNNLS 2022, section IV: the squared
gradient of the local loss at the masked weights, in the space of all weights, summed over local steps. The weights move as
under the rule `sgd`. A model without masks gives the same from its gradients, for which knob ``gradients`` must be 1.

Knobs of the recipe:

* ``window`` (0 or 1, default 0): with 0 sums go on from order to order, whole, in the device's own state, until the
  coordinator has decided (`since`); with 1 only this order's steps count, and of each layer whichever is smaller is held until
  its end: the sum, or what passed through the layer in those steps, from which the sum follows in blocks of rows. Where all
  of a tensor is told it is the sum.
* ``last`` (whole number, default 0): with window 1, how many of the order's last steps count; 0 for all.
* ``since`` (whole number, default 0): when the coordinator last decided by such sums, in rounds; with window 0, sums that were
  begun for another decision, which a device has that sat one out, count no more.
* ``send`` (0 or 1, default 0): tell the sums. They go on: what was told may not have been enough to decide by.
* ``top.TENSOR`` (whole number, at least 1): tell only so many of the largest of that tensor, and no zeros; without it, all.
* ``samples`` (whole number, default 0): train on the first so many samples; 0 for all.
* ``measure`` (0 or 1, default 0): tell the accuracy on those samples after training.
* ``gradients`` (0 or 1, default 0): hold gradients until they are whole, with masks too.

It is told of the masked tensors, or without masks of those that may be masked.

Metrics: ``theta.TENSOR``, which no weight that was not told exceeds; ``rest``, the sum of all other trained weights, which are
never pruned: biases, norms, layers that cannot be masked (where gradients are not held, the biases of the told layers alone);
``seconds.TENSOR``, of a step in that layer, where this device has timed it; ``accuracy.train``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.engines.update import norm
from edge_runtime.kernels.importance import BLOCK_BYTES, Passed, gradient_blocks, largest_of, row_blocks, whole
from edge_runtime.rules import Extra, Task, Trained, loop
from wire.errors import DataError, NonFinite, SpecError
from wire.masked import maskable
from wire.masks import count
from wire.memory import copies, holds_gradients
from wire.messages import Recipe
from wire.spec import Node, node_shapes, tensor_shapes

__all__ = ["NEEDS_ENGINE", "copies", "train"]

NEEDS_ENGINE = True
_REST = "rest"
_SINCE = "since"
_TOP = "top."


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`.

    Cost: for masked weights one dense weight gradient more per step that counts; memory as the knobs say.
    """
    knobs = _knobs(task.recipe)
    if knobs.samples:
        task = dataclasses.replace(task, x=task.x[: knobs.samples], y=task.y[: knobs.samples])
    if not task.masks and not holds_gradients(task.recipe, task.micro_batch):
        raise SpecError("rule importance without masks: knob gradients must be 1")
    sums, mover = _sums(task, knobs), loop.Mover(task)

    def look() -> None:
        sums.look(task.engine.grads, every=not task.masks)

    def step(x: Floats, y: Labels) -> float:
        sums.batch = len(x)
        seen = mover.step(x, y, watch=sums.see if task.masks else None, whole=look)
        sums.settle()
        return seen

    try:
        trained = loop.run(task, step)
    except DataError as error:
        raise NonFinite(str(error)) from None
    metrics = dict(_timed(task))
    if knobs.measure and len(task.x):
        metrics["accuracy.train"] = task.engine.evaluate(task.x, task.y, task.micro_batch)[1] / len(task.x)
    extras: dict[str, Extra] = {}
    if knobs.send:
        metrics[_REST] = sums.rest
        for name in sums.nodes:
            extras[name], metrics[f"theta.{name}"] = _told(sums, name, knobs.top.get(name))
    own: dict[str, Floats] = {}
    if not knobs.window:
        own = {**sums.z, _REST: np.array([sums.rest], np.float32), _SINCE: np.array([knobs.since], np.float32)}
    return dataclasses.replace(trained, extras=extras, metrics=metrics, own=own)


@dataclass(frozen=True, slots=True)
class _Knobs:
    window: bool
    last: int
    send: bool
    samples: int
    measure: bool
    since: int
    top: Mapping[str, int]


def _knobs(recipe: Recipe) -> _Knobs:
    knobs = recipe.knobs
    names = ["window", "last", "send", "samples", "measure", "gradients", "since"]
    tops = [name for name in knobs if name.startswith(_TOP)]
    for name in [*names, *tops]:
        value = knobs.get(name, 0.0)
        least, most = (1, math.inf) if name in tops else (0, math.inf if name in ("last", "samples", "since") else 1)
        if value != int(value) or not least <= value <= most:
            raise SpecError(f"knob {name} = {value}: write a whole number" + (", 0 or 1" if most == 1 else ""))
    numbers = [int(knobs.get(name, 0.0)) for name in names]
    top = {name.removeprefix(_TOP): int(knobs[name]) for name in tops}
    return _Knobs(bool(numbers[0]), numbers[1], bool(numbers[2]), numbers[3], bool(numbers[4]), numbers[6], top)


def _sums(task: Task, knobs: _Knobs) -> _Sums:
    """Go on where the last order ended."""
    spec = task.engine.spec
    layers = [node for node in spec.nodes if node.op in ("linear", "conv2d")]
    shapes = tensor_shapes(spec, task.engine.structure)
    names = task.masks or maskable(spec)
    nodes = {node.params["weight"]: node for node in layers if node.params["weight"] in names}
    steps = loop.count_steps(task)
    first = max(0, steps - knobs.last) if knobs.window and knobs.last else 0
    held = holds_gradients(task.recipe, task.micro_batch)
    sums = _Sums(nodes, {name: shapes[name] for name in nodes}, first, held)
    if knobs.window:
        samples = (steps - first) * min(task.recipe.batch, len(task.x))
        values = node_shapes(spec, task.engine.structure)
        for name, node in nodes.items() if task.masks else ():
            size = math.prod(shapes[name])
            told = knobs.send and knobs.top.get(name, size) >= size
            if told or samples * (math.prod(values[node.inputs[0]]) + math.prod(values[node.name])) > size:
                sums.z[name] = np.zeros(shapes[name], np.float32)
        return sums
    own = task.own if _SINCE in task.own and int(task.own[_SINCE][0]) == knobs.since else {}
    for name, shape in sums.shapes.items():
        found = own.get(name)
        sums.z[name] = np.zeros(shape, np.float32) if found is None or found.shape != shape else found
    sums.rest = float(own[_REST][0]) if _REST in own else 0.0
    return sums


@dataclass(slots=True)
class _Sums:
    """Squared gradients, summed over steps.

    Attributes:
        nodes: Layer of each tensor.
        shapes: Of the tensors.
        first: The first step that counts.
        held: Whether gradients are held until they are whole.
        z: Sums that are held whole.
        passed: What passed in the steps that count, of tensors that are not in `z`.
        now: What passed in the current step, of tensors that are not in `part`.
        part: The gradient of the current step so far.
        bias: Likewise of the layer's bias, unless gradients are held.
        rest: The sum over what is told of no tensor.
        batch: Samples of the current step.
        step: Number of the current step, from 0.
    """

    nodes: Mapping[str, Node]
    shapes: Mapping[str, tuple[int, ...]]
    first: int
    held: bool
    z: Arrays = field(default_factory=dict)
    passed: dict[str, list[Passed]] = field(default_factory=dict)
    now: dict[str, list[tuple[Floats, Floats]]] = field(default_factory=dict)
    part: Arrays = field(default_factory=dict)
    bias: dict[str, Any] = field(default_factory=dict)
    rest: float = 0.0
    batch: int = 0
    step: int = 0

    def see(self, name: str, x: Floats, dy: Floats) -> None:
        """Take what passes through a masked layer; see `edge_runtime.kernels.Watch`.

        Of a step in micro-batches a layer is left with what passed, or with the gradient so far, if that is less: what the
        whole batch takes is what micro-batches are there to avoid.
        """
        if self.step < self.first:
            return
        if not self.held:
            self.bias[name] = self.bias.get(name, 0.0) + dy.sum(axis=(0, *range(2, dy.ndim)), dtype=np.float64)
        if len(x) == self.batch:
            self._settle(name, [(x, dy)])
            return
        if self.batch * (x.size + dy.size) <= len(x) * math.prod(self.shapes[name]):
            self.now.setdefault(name, []).append((x.copy(), dy.copy()))
            return
        if name not in self.part:
            self.part[name] = np.zeros(self.shapes[name], np.float32)
        for row, block in gradient_blocks(Passed.through(self.nodes[name], (x, dy))):
            self.part[name][row : row + len(block)] += block

    def look(self, grads: Mapping[str, Floats], *, every: bool) -> None:
        """Take gradients that are whole: all of a model without masks, and otherwise those of what is told of no tensor."""
        if self.step < self.first:
            return
        self.rest += norm({name: gradient for name, gradient in grads.items() if name not in self.nodes}) ** 2
        if not np.isfinite(np.float32(self.rest)):
            raise NonFinite("the squared gradient of what is never pruned is not finite")
        for name in self.nodes if every else ():
            total = self.z.setdefault(name, np.zeros(self.shapes[name], np.float32))
            for row, gradient in enumerate(grads[name]):
                total[row] += gradient * gradient
            if not np.isfinite(total).all():
                raise NonFinite(f"the squared gradient of {name!r} is not finite")

    def settle(self) -> None:
        """End a step."""
        for name, batches in self.now.items():
            self._settle(name, batches)
        for name, gradient in self.part.items():
            with np.errstate(over="ignore"):
                np.square(gradient, out=gradient)
            if not np.isfinite(gradient).all():
                raise NonFinite(f"the squared gradient of {name!r} is not finite")
            self.z[name] += gradient
        self.rest += sum(float(np.square(bias).sum()) for bias in self.bias.values())
        for held in (self.now, self.part, self.bias):
            held.clear()
        self.step += 1

    def _settle(self, name: str, batches: list[tuple[Floats, Floats]]) -> None:
        """Add what passed in a step that is over."""
        passed = Passed.through(self.nodes[name], *batches)
        if name in self.z:
            whole(passed, self.z[name])
            return
        if name not in self.now:  # it is not ours yet
            passed = Passed.through(self.nodes[name], *((x.copy(), dy.copy()) for x, dy in batches))
        self.passed.setdefault(name, []).append(passed)

    def blocks(self, name: str) -> Iterator[tuple[int, Floats]]:
        """Give a tensor's sums in blocks of rows."""
        if name in self.z:
            rows = max(1, BLOCK_BYTES // (4 * math.prod(self.shapes[name][1:])))
            for first in range(0, len(self.z[name]), rows):
                yield first, self.z[name][first : first + rows]
            return
        passed = self.passed.get(name, [])
        each = BLOCK_BYTES // max(1, len(passed))  # they go side by side
        for parts in zip(*(row_blocks(one, each) for one in passed), strict=True):
            first, total = parts[0]
            for _, block in parts[1:]:
                total += block
            yield first, total


def _told(sums: _Sums, name: str, count: int | None) -> tuple[Extra, float]:
    """Give what is told of a tensor, and what the rest of it does not exceed."""
    size = math.prod(sums.shapes[name])
    if count is None or count >= size:
        return Extra(sums.z[name]), 0.0
    places, values = largest_of(sums.blocks(name), count)
    theta = float(values.min()) if len(values) else 0.0
    if not theta:
        places, values = places[values > 0], values[values > 0]
    return Extra(values, places), theta


def _timed(task: Task) -> Iterator[tuple[str, float]]:
    """Give the seconds of a step in each masked layer, where this device timed one like it."""
    engine = task.engine
    shapes, timings = node_shapes(engine.spec, engine.structure), engine.timings() if task.masks else ()
    for node in engine.spec.nodes:
        mask = task.masks.get(node.params.get("weight", ""))
        if mask is None:
            continue
        name, kept = node.params["weight"], count(mask)
        way = engine.ways.get(name, "")
        # Two layers may have weights of one shape, and yet not take the same.
        wanted = (mask.shape, shapes[node.inputs[0]], tuple(value for _, value in sorted(node.attrs.items())))
        found = [(t, (t.layer.shape, t.layer.input_shape, t.layer.details)) for t in timings if way in t.seconds]
        alike = [timing for timing, layer in found if layer == wanted]
        if alike:
            off = [(abs(t.layer.batch - task.micro_batch), abs(t.layer.kept - kept)) for t in alike]
            yield f"seconds.{name}", alike[off.index(min(off))].seconds[way]
