"""HeteroFL's local training: SGD with the logits of absent labels set to 0, and hidden layers scaled to their width.

Diao et al., ICLR 2021, section 3.2 (static batch norm and scaler) and 3.3 (masked cross-entropy).

**Masked cross-entropy.** The logits of labels that no training sample here has are 0 in the loss, not minus infinity: each
still adds ``exp(0) = 1`` to the softmax's sum, but nothing is trained through it. That is exactly what rows of zeros in the
last layer give (weight and bias; nothing passes back through them either), if their own gradient is put to zero before the
step is clipped. The rows are set aside during training and come back at its end, so that they do not move.

**Scaler.** In training each hidden linear layer or convolution gives ``(W x + b) / rate``, which is what weights and biases
divided by the rate give, whatever activation follows; their gradient is divided once more. So both are scaled around a step's
forward and backward pass. It is exact where the rate is a power of two, as the paper's are, and to one rounding of float32 per
step otherwise. A layer is scaled when whatever reads it is an activation, a pool, a flatten, dropout or another such
layer. The others are left out: before a norm a scale changes nothing (up to the norm's epsilon), and behind a sum the paper's
scaler stands after the sum, where no weight has it.

Knobs of the recipe:

* ``mask`` (0 or 1, default 1): whether logits are masked. If so the coordinator is told which labels are here: places in the
  last layer's bias, with ones.
* ``scale`` (above 0, at most 1; default 1): the scaler's rate, which is the width's share of the channels; 1 for none.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import multiply
from edge_runtime.rules import Extra, Task, Trained, loop
from wire.errors import SpecError
from wire.head import head_of
from wire.memory import copies
from wire.spec import ModelSpec

__all__ = ["NEEDS_ENGINE", "copies", "scaled_tensors", "train"]

NEEDS_ENGINE = True

_LAYERS = ("linear", "conv2d", "conv1d")
_THROUGH = frozenset(
    (
        *_LAYERS,
        *("relu", "relu6", "tanh", "sigmoid", "hard_sigmoid", "hard_swish", "gelu", "silu", "flatten", "dropout"),
        *(f"{kind}_pool{side}d" for kind in ("max", "avg", "adaptive_avg") for side in (1, 2)),
    )
)
"""Ops that may read a layer that is scaled."""


def train(task: Task) -> Trained:
    """See `edge_runtime.rules.Rule.train`. The batch order depends on the recipe's seed and the round alone.

    Raises:
        SpecError: A knob makes no sense, weights are masked, or the model has no last layer whose rows are its classes.
    """
    if task.masks:
        raise SpecError("rule heterofl trains widths; it does not train a masked model")
    mask, scale = task.recipe.knobs.get("mask", 1.0), task.recipe.knobs.get("scale", 1.0)
    if mask not in (0.0, 1.0):
        raise SpecError(f"knob mask = {mask}: write 0 or 1")
    if not 0 < scale <= 1:
        raise SpecError(f"knob scale = {scale}: write a number above 0 and at most 1")
    if mask and task.recipe.loss != "cross_entropy":
        raise SpecError(f"knob mask is about cross_entropy, not about {task.recipe.loss}")
    engine = task.engine
    head = tuple(head_of(engine.spec).params[role] for role in ("weight", "bias")) if mask else ()
    present = np.unique(task.y)
    absent = np.setdiff1d(np.arange(engine.spec.classes), present) if mask else np.empty(0, np.int64)
    scaled = scaled_tensors(engine.spec) if scale != 1.0 else ()
    local = _Local(task, loop.Mover(task), head, absent, scaled, scale)
    aside = {name: engine.params[name][absent].copy() for name in head}
    local.blank()
    held = local.mover.held if scale == 1.0 else None  # the rate belongs to the width
    trained = loop.run(task, local.step, held=held)
    for tensor in engine.spec.tensors:
        if tensor.name in aside:
            param = engine.params[tensor.name]
            param[absent] = _narrowed(aside[tensor.name], tensor.axes[-1].outer, param)
    if not mask or not trained.steps:
        return trained
    told = Extra(np.ones(len(present), np.float32), present.astype(np.int64))
    return dataclasses.replace(trained, extras={head[1]: told})


@dataclass(frozen=True, slots=True)
class _Local:
    """What all steps of an order share."""

    task: Task
    mover: loop.Mover
    head: tuple[str, ...]
    absent: Labels
    scaled: tuple[str, ...]
    scale: float

    def step(self, x: Floats, y: Labels) -> float:
        """Make one update from one batch; give its loss."""
        params = self.task.engine.params
        multiply({name: params[name] for name in self.scaled}, 1.0 / self.scale)
        return self.mover.step(x, y, whole=self._back)

    def blank(self) -> None:
        """Set the rows of absent labels to zero, where they stay: nothing has a gradient there, and decay of zero is none."""
        for name in self.head:
            self.task.engine.params[name][self.absent] = 0.0

    def _back(self) -> None:
        """Turn gradients into those of the weights as they are, before they are clipped."""
        params, grads = self.task.engine.params, self.task.engine.grads
        multiply({name: params[name] for name in self.scaled}, self.scale)
        multiply({name: grads[name] for name in self.scaled}, 1.0 / self.scale)
        for name in self.head:
            grads[name][self.absent] = 0.0


def _narrowed(rows: Floats, runs: int, param: Floats) -> Floats:
    """Give the columns of whole rows that `param` has, which may have been cut: a prefix of each run of channels."""
    if rows.shape[1:] == param.shape[1:]:
        return rows
    return rows.reshape(len(rows), runs, -1)[:, :, : param.shape[1] // runs].reshape(len(rows), param.shape[1])


def scaled_tensors(spec: ModelSpec) -> tuple[str, ...]:
    """Name the weights and biases that the scaler divides.

    Raises:
        SpecError: One of them is used by a layer that is not scaled as well.
    """
    readers = {node.name: [other.op for other in spec.nodes if node.name in other.inputs] for node in spec.nodes}
    inside: set[str] = set()
    outside: set[str] = set()
    for node in spec.nodes:
        scaled = node.op in _LAYERS and bool(readers[node.name]) and _THROUGH.issuperset(readers[node.name])
        (inside if scaled else outside).update(node.params.values())
    if shared := inside & outside:
        raise SpecError(f"tensor {min(shared)!r} is used by a layer that is scaled and by one that is not")
    return tuple(tensor.name for tensor in spec.tensors if tensor.name in inside)
