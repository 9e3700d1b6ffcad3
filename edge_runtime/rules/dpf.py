"""Dense weights under a mask: the gradient is taken at the masked weights and moves every weight, kept or not.

Lin et al., *Dynamic Model Pruning with Feedback* (DPF), ICLR 2020, equation 2: ``w -= rate * grad f(w * m)``, for all
coordinates. What is masked is so far wrong by ``e = w * m - w``; since ``w`` remembers it, a weight that was masked by
mistake moves until another mask takes it back. Momentum and decay act on the dense weights too.

Forward pass and input gradient are sparse. The gradient of all weights comes from what went into a layer and what came back
out of it, a few rows at a time. A device is sent the kept weights alone, so here the others start from zero and are what
they have *moved*: the step is linear in them, and all that their unknown start would have added is decay. The metric
``dpf.fade`` is what is left of it, so that whoever knows the start adds ``(fade - 1) * start``.

The update that is sent is the movement of all weights. Without masks this is the ordinary rule (see `sgd`), but for the
penalty.

Knobs of the recipe:

* ``dense`` (0 or 1, default 1): with 0, kept weights alone move and are sent: for a round whose dense weights nobody reads.
* ``lambda`` (default 0): strength of a penalty on the kept weights of each linear layer and convolution (FedDIP, Long et
  al., ICDM 2023): ``lambda * sum |w * m|^2``.
* ``norm`` (0 or 1, default 0): with 1 the norms of the layers are not squared, as in FedDIP's public code.

Clipping measures the gradient of the kept weights, and shortens that of the others by the same factor.

Memory: one copy of all weights, a second one for momentum, and another where gradients must wait for clipping or the next
micro-batch; one of the kept weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.engines.update import BLOCK, apply, clear, finite, multiply, norm
from edge_runtime.kernels.importance import Passed, gradient_blocks
from edge_runtime.rules import Extra, Task, Trained, loop
from wire import memory
from wire.errors import NonFinite, SpecError
from wire.masks import unpacked
from wire.messages import Recipe

NEEDS_ENGINE = True


def copies(recipe: Recipe) -> int:
    """The received weights, and what the optimizer remembers; `wire.memory.whole_copies` has the dense ones."""
    return memory.copies(dataclasses.replace(recipe, rule="dpf"))


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`.

    Raises:
        SpecError: A knob makes no sense, or dense weights are to be moved by Adam.
    """
    mover, penalty = loop.Mover(task), _penalty(task)
    if not task.masks or not _knob(task, "dense", 1.0, most=1.0):

        def plain(x: Floats, y: Labels) -> float:
            return mover.step(x, y, whole=penalty)

        return loop.run(task, plain)
    if task.recipe.knobs.get("adam"):
        raise SpecError("rule dpf moves dense weights by plain SGD; knob adam is not known to it")
    dense = _Dense(task, mover.update)

    def step(x: Floats, y: Labels) -> float:
        dense.begin()
        loss = mover.step(x, y, dense.watch, whole=lambda: dense.measure(penalty))
        dense.settle()
        return loss

    trained = loop.run(task, step)
    return dataclasses.replace(trained, update=dense.moved(), metrics={"dpf.fade": dense.fade})


class _Dense:
    """The weights that are not kept, as they have moved since the order began.

    Attributes:
        fade: What is left, after decay, of a weight that no gradient moves.
    """

    __slots__ = ("_factor", "_gathered", "_moves", "_nodes", "_sent", "_speed", "_task", "_update", "fade")

    def __init__(self, task: Task, update: Update) -> None:
        """Nothing has moved; `update` is that of the kept weights, whose momentum is another's."""
        recipe, engine = task.recipe, task.engine
        self._task = task
        self._nodes = {node.params["weight"]: node for node in engine.spec.nodes if "weight" in node.params}
        self._sent = {name: engine.read(name) for name in engine.params}
        self._moves = _zeros(task)
        velocity = _zeros(task) if update.momentum else None
        self._update = dataclasses.replace(update, velocity=velocity)
        self._gathered = _zeros(task) if recipe.clip or task.micro_batch < recipe.batch else {}
        self._factor, self._speed, self.fade = 1.0, 0.0, 1.0

    def begin(self) -> None:
        """Forget the gradient of the step before."""
        self._factor = 1.0
        clear(self._gathered)

    def watch(self, name: str, x: Floats, dy: Floats) -> None:
        """Take the gradient of all weights of a layer: apply it at once, or gather it."""
        for first, block in gradient_blocks(Passed.through(self._nodes[name], (x, dy))):
            rows = slice(first, first + len(block))
            if self._gathered:
                self._gathered[name][rows] += block
            else:
                apply({name: self._moves[name][rows]}, {name: block}, _part(self._update, name, rows))

    def measure(self, penalty: Callable[[], None] | None) -> None:
        """Find out by how much clipping will shorten the gradient, once the penalty is in it."""
        if penalty is not None:
            penalty()
        limit = self._task.recipe.clip
        length = norm(self._task.engine.grads) if limit else 0.0
        if length > limit:
            self._factor = limit / length

    def settle(self) -> None:
        """Apply what was gathered."""
        update = self._update
        if self._gathered:
            multiply(self._gathered, self._factor)
            apply(self._moves, self._gathered, update)
        self._speed = update.momentum * self._speed + update.decay * self.fade
        self.fade -= update.rate * self._speed

    def moved(self) -> dict[str, Extra]:
        """Give the movement of all weights.

        Raises:
            NonFinite: One is no number.
        """
        engine, moves = self._task.engine, dict(self._moves)
        for name, sent in self._sent.items():
            line = np.subtract(engine.read(name), sent, out=sent)
            if name in moves:
                moves[name][unpacked(self._task.masks[name])] = line
            else:
                moves[name] = line.reshape(engine.params[name].shape)
        if not finite(moves):
            raise NonFinite("a weight that is not kept is no number after training")
        return {name: Extra(values) for name, values in moves.items()}


def _zeros(task: Task) -> Arrays:
    return {name: np.zeros(mask.shape, np.float32) for name, mask in task.masks.items()}


def _part(update: Update, name: str, rows: slice) -> Update:
    if update.velocity is None:
        return update
    return dataclasses.replace(update, velocity={name: update.velocity[name][rows]})


def _penalty(task: Task) -> Callable[[], None] | None:
    """Give what adds the penalty's gradient to the engine's; None without a penalty."""
    strength = _knob(task, "lambda", 0.0, most=math.inf)
    squared = not _knob(task, "norm", 0.0, most=1.0)
    if not strength:
        return None
    engine = task.engine
    names = [node.params["weight"] for node in engine.spec.nodes if node.op in ("linear", "conv2d")]

    def add() -> None:
        params, grads = engine.params, engine.grads
        for name in dict.fromkeys(names):
            length = 0.5 if squared else norm({name: params[name]})
            _add(grads[name], params[name], strength / length if length else 0.0)

    return add


def _add(total: Floats, array: Floats, factor: float) -> None:
    """Add a multiple of an array in place, in blocks."""
    flat, other = total.reshape(-1), array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        block = slice(start, start + BLOCK)
        flat[block] += np.float32(factor) * other[block]


def _knob(task: Task, name: str, default: float, most: float) -> float:
    value = task.recipe.knobs.get(name, default)
    if not 0.0 <= value <= most or (most == 1.0 and value not in (0.0, 1.0)) or math.isinf(value):
        wanted = "0 or 1" if most == 1.0 else "a number from 0"
        raise SpecError(f"knob {name} = {value}: write {wanted}")
    return value
