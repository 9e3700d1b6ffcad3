"""The storage of tensors, counted as torch makes and drops it: what the liveness walk is held against.

Models run with the engine's own steps over meta tensors, which have shapes and no memory: the largest takes no more than a
small one. It sees every tensor that any operation gives, in both passes. It does not see what an operation takes inside and
gives back before it returns: a convolution's blocked copies, a matrix product's packed panels, what a recurrent layer's
library keeps for itself, and compiled kernels over masked weights.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edge_runtime.engines import losses
from edge_runtime.engines.again import forward
from edge_runtime.engines.masks import Held, Wires
from edge_runtime.engines.phase import Phase
from edge_runtime.engines.steps import Loaded, build
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure, statistics, tensor_shapes

ALIGN = 64


@dataclass
class Storage:
    """Bytes of what lives, by storage.

    Attributes:
        now: At this instant.
        peak: The most so far.
    """

    now: int = 0
    peak: int = 0
    _live: dict[int, int] = field(default_factory=dict)

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is dropped; what is seen again counts once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = -(-storage.nbytes() // ALIGN) * ALIGN
        self.now += self._live[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage never, such as that of a weight, which views and what is written in place share."""
        self._live[tensor.untyped_storage()._cdata] = 0

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


class Watching(TorchDispatchMode):  # torch offers no other way to be told of every operation
    """Shows a `Storage` all that operations give."""

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self._storage = storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it gives."""
        del types
        given = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(given):
            if isinstance(leaf, torch.Tensor):
                self._storage.see(leaf)
        return given


def peak_of_step(spec: ModelSpec, structure: Structure, batch: int, *, keep: bool = True, cuts: Cuts = ()) -> int:
    """Give the most bytes that tensors of one training step take beside weights and held gradients, by torch's own account.

    The batch counts twice, as it does in the engine: as the rule gathers it, and as the engine copies it.

    Args:
        spec: The model; embedding and dropout, which look at values, cannot be followed.
        structure: The part of it.
        batch: Samples.
        keep: Whether gradients of weights are held, and added to; otherwise each goes as soon as it is whole.
        cuts: Where it is cut into segments that run again.
    """
    still = statistics(spec)
    leaves = {
        name: torch.empty(shape, device="meta").requires_grad_(name not in still)
        for name, shape in tensor_shapes(spec, structure).items()
    }
    for leaf in leaves.values():
        if leaf.requires_grad and keep:
            leaf.grad = torch.empty_like(leaf)
        elif leaf.requires_grad:
            leaf.register_post_accumulate_grad_hook(_drop)
    phase = Phase(training=True, cuts=cuts)
    loaded = Loaded({name: np.zeros(0, np.float32) for name in leaves}, Held(), Wires(), phase, _no_kit)
    steps = build(spec, structure, dict(leaves), loaded)
    storage = Storage()
    for leaf in leaves.values():
        storage.leave_out(leaf)
        if leaf.grad is not None:
            storage.leave_out(leaf.grad)
    with Watching(storage):
        gathered = torch.empty((batch, *spec.input_shape), device="meta")
        output = forward(steps, gathered.clone(), phase)
        target = torch.zeros(batch, dtype=torch.int64, device="meta")
        torch.autograd.backward(losses.value(output, target, "cross_entropy"))
    return storage.peak


def _drop(leaf: torch.Tensor) -> None:
    leaf.grad = None


def _no_kit() -> Any:
    raise AssertionError("nothing is masked here")
