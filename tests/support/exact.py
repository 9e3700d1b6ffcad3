"""Models in torch's own autograd in double precision: what every engine is held against.

Nothing of an engine is used but torch's functions by op, each of which is held against torch's modules elsewhere
(`tests/unit/test_ops_torch.py`): no masks but products, no fused updates, no shared memory, no segments.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from edge_runtime.engines import losses
from edge_runtime.engines.ops import PHASED, RUN
from edge_runtime.engines.phase import Phase
from edge_runtime.engines.views import opened, prefix
from wire.spec import nodes_within, statistics, tensor_shapes

NEAR = 1e-5
"""How far float32 may be from it, relative to a tensor's largest entry (see `apart`)."""

NEAR_IN_DOUBLE = 1e-10


RUN_EXACTLY = {**RUN, "hard_sigmoid": lambda _, x, __: F.relu6(x[0] + 3) / 6}
"""Torch's own hard sigmoid multiplies by a sixth in float32, in double precision too."""


class Exact:
    """One model, with as much of an engine's door as comparing needs.

    Attributes:
        params: Leaves by tensor name, of the whole width; what a mask does not keep is zero.
        logits: Of the latest training pass.
    """

    def __init__(self, spec, structure, arrays, masks=None, kind=torch.float64):
        self.spec, self.structure, self.masks, self.kind = spec, structure, masks or {}, kind
        self._still = statistics(spec)
        self.params = {}
        for name, array in arrays.items():
            kept = np.asarray(array) * self.masks.get(name, np.float32(1))
            self.params[name] = torch.tensor(kept, dtype=kind).requires_grad_(name not in self._still)
        self._velocity, self._phase, self.logits = {}, Phase(), None

    def seed(self, *numbers):
        self._phase.source.numbers, self._phase.source.calls = numbers, 0

    def forward(self, x, structure=None):
        with torch.no_grad():
            return self._run(x, structure or self.structure).numpy()

    def forward_backward(self, x, y, *, scale=1.0, loss="cross_entropy", structure=None):
        """Add to the gradients; of a narrower width, into the wide ones, while its norms leave statistics alone."""
        follows = self._phase.follows
        self._phase.training, self._phase.follows = True, follows if structure is None else 0.0
        self._phase.source.calls += 1
        try:
            output = self._run(x, structure or self.structure)
        finally:
            self._phase.training, self._phase.follows = False, follows
        target = torch.from_numpy(np.asarray(y))
        value = losses.value(output, target.to(self.kind) if target.is_floating_point() else target, loss)
        (value * scale).backward()
        self.logits = output.detach().numpy()
        return value.item()

    def grads(self):
        """Give gradients by name, as numbers of what is kept in C order where there is a mask."""
        return {name: self._kept(name, _grad(leaf)) for name, leaf in self.params.items() if name not in self._still}

    def read(self, name):
        return self._kept(name, self.params[name].detach()).ravel()

    def move(self, update):
        """Move what is kept by plain SGD along the gradients, and begin these anew."""
        with torch.no_grad():
            for name, leaf in self.params.items():
                if name in self._still:
                    continue
                along = _grad(leaf) + update.decay * leaf
                if update.pull:
                    along += update.pull * (leaf - torch.tensor(np.asarray(update.anchor[name]), dtype=self.kind))
                along += update.momentum * self._velocity.get(name, 0.0)
                if name in self.masks:
                    along *= torch.from_numpy(self.masks[name])
                self._velocity[name] = along
                leaf.sub_(along, alpha=update.rate)
                leaf.grad = None

    def _kept(self, name, tensor):
        array = tensor.numpy().copy()
        return array[self.masks[name]] if name in self.masks else array

    def _run(self, x, structure):
        shapes = tensor_shapes(self.spec, structure)
        weights = {tensor.name: self._cut(tensor, shapes[tensor.name]) for tensor in self.spec.tensors}
        values = {"input": torch.tensor(np.asarray(x), dtype=self.kind)}
        for place, node in enumerate(nodes_within(self.spec, structure)):
            run = PHASED[node.op](self._phase, place) if node.op in PHASED else RUN_EXACTLY[node.op]
            inputs = [values[name] for name in node.inputs]
            values[node.name] = run(node, inputs, {role: weights[name] for role, name in node.params.items()})
        return values[self.spec.nodes[-1].name]

    def _cut(self, tensor, shape):
        leaf = self.params[tensor.name]
        if leaf.shape == shape:
            return leaf
        return leaf.reshape(opened(tensor, leaf.shape))[prefix(tensor, shape)].reshape(shape).contiguous()


def _grad(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def apart(found, exact):
    """Give the largest relative distance of what was found from what is exact, by name, and the name.

    It is relative to a tensor's largest entry; but for gradients and weights (names begin so) to a hundredth of the largest
    of them all, where a tensor has none that large. A bias before a norm has no gradient but what rounding leaves.
    """
    assert found.keys() == exact.keys()
    floors: dict[str, float] = defaultdict(float)
    for name, array in exact.items():
        if name.startswith(("grad ", "weight ")):
            kind = name.split()[0]
            floors[kind] = max(floors[kind], 0.01 * _largest(array))
    worst = (0.0, "")
    for name, array in exact.items():
        other = np.asarray(found[name], np.float64)
        assert np.shape(array) == other.shape, (name, other.shape, np.shape(array))
        gap, scale = _largest(array - other), max(_largest(array), floors[name.split()[0]])
        if not gap <= 0.0:
            worst = max(worst, (gap / scale if scale and math.isfinite(gap) else math.inf, name))
    return worst


def _largest(array):
    return float(np.abs(array).max(initial=0.0))
