"""The torch engine: every op of the spec, on the CPU, without `torch.optim` (which would cost 72 MB).

Weights are torch leaves that share their memory with numpy arrays. Gradients are allocated once and preset on the
leaves, so that autograd adds into them in place; a narrower width is a set of leaves that are views of the wide ones,
with views of the wide gradients, so that nothing is ever padded. All memory comes from torch's allocator because it is
aligned to 64 bytes: matrix products may round differently at another alignment, and the same order must give the same
bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from edge_runtime.engines import Engine, Make, Update
from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.engines.update import apply
from wire.errors import SpecError
from wire.spec import ModelSpec, Node, Structure, group_sizes, node_shapes, tensor_shapes

Tensor = torch.Tensor
Inputs = list[Tensor]

_KERNELS: dict[str, Callable[[Node, Inputs, Mapping[str, Tensor]], Tensor]] = {
    "linear": lambda _, x, p: F.linear(x[0], p["weight"], p["bias"]),
    "conv2d": lambda node, x, p: F.conv2d(
        x[0], p["weight"], p["bias"], stride=node.attrs["stride"], padding=node.attrs["padding"]
    ),
    "relu": lambda _, x, __: torch.relu(x[0]),
    "tanh": lambda _, x, __: torch.tanh(x[0]),
    "sigmoid": lambda _, x, __: torch.sigmoid(x[0]),
    "max_pool2d": lambda node, x, _: F.max_pool2d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "avg_pool2d": lambda node, x, _: F.avg_pool2d(x[0], node.attrs["kernel"], node.attrs["stride"]),
    "flatten": lambda _, x, __: x[0].flatten(1),
    "add": lambda _, x, __: sum(x[1:], x[0]),
}


@dataclass(frozen=True, slots=True)
class _Step:
    """One node, ready to run: `params` are leaves by role, `frees` the values that nobody reads after it."""

    node: Node
    run: Callable[[Node, Inputs, Mapping[str, Tensor]], Tensor]
    params: Mapping[str, Tensor]
    frees: tuple[str, ...]


def create(threads: int) -> Make:
    """Set torch's one thread count and give a function that makes empty engines."""
    torch.set_num_threads(threads)
    _hear_warning_out()
    return lambda: TorchEngine()  # noqa: PLW0108 - `Make` takes no parent


class TorchEngine:
    """See `edge_runtime.engines.Engine`."""

    name = "torch"

    def __init__(self, parent: TorchEngine | None = None) -> None:
        self._parent = parent  # whose gradients a narrower width adds into
        self._spec: ModelSpec | None = None
        self._structure = Structure()
        self._leaves: dict[str, Tensor] = {}
        self._params: Arrays = {}
        self._grads: Arrays = {}
        self._steps: tuple[_Step, ...] = ()
        self._logits: Floats = np.zeros((0, 0), np.float32)
        self._update: list[
            Update
        ] = []  # none or one; the hooks hold this list and not the engine, which they would keep alive
        self._hooked = False

    @property
    def structure(self) -> Structure:
        """Which part of the model is loaded."""
        return self._structure

    @property
    def params(self) -> Arrays:
        """Weights by tensor name."""
        return self._params

    @property
    def logits(self) -> Floats:
        """Output of the latest `forward_backward`."""
        return self._logits

    @property
    def grads(self) -> Arrays:
        """Gradients by tensor name; made of zeros when first asked for."""
        if not self._grads:
            for name, leaf in self._leaves.items():
                if self._parent is None:
                    leaf.grad = torch.zeros_like(leaf)
                    self._grads[name] = leaf.grad.numpy()
                else:
                    self._grads[name] = self._parent.grads[name][tuple(slice(length) for length in leaf.shape)]
                    leaf.grad = torch.from_numpy(self._grads[name])
        return self._grads

    def load(self, spec: ModelSpec, structure: Structure, arrays: Mapping[str, Floats] | None = None) -> None:
        """See `Engine.load`."""
        self._leaves, self._params, self._grads, self._hooked = {}, {}, {}, False
        for name, shape in tensor_shapes(spec, structure).items():
            memory = torch.empty(shape)
            self._params[name] = memory.numpy()
            if arrays is not None:
                if arrays[name].shape != shape:
                    raise SpecError(f"weights of {name!r} have shape {arrays[name].shape}, the structure says {shape}")
                np.copyto(self._params[name], arrays[name])
            # A tensor of its own, so that whoever keeps the array does not keep the leaf and its gradient.
            self._leaves[name] = memory.detach().requires_grad_()
        self._build(spec, structure)

    def forward(self, x: Floats) -> Floats:
        """See `Engine.forward`."""
        with torch.inference_mode():
            logits: Floats = self._run(_tensor(x)).numpy()
        return logits

    def forward_backward(
        self, x: Floats, y: Labels | Floats, *, scale: float = 1.0, update: Update | None = None
    ) -> float:
        """See `Engine.forward_backward`."""
        fused = update is not None and not self._grads
        if update is None:
            self.grads  # noqa: B018 - makes them, so that autograd adds in place
        elif not fused:
            raise SpecError("an update was given to an engine whose gradients are in use; do one or the other")
        elif not self._hooked:
            self._hook()
        output = self._run(_tensor(x))
        loss = F.cross_entropy(output, _tensor(y))
        self._update[:] = [update] if update is not None else []
        torch.autograd.backward(loss * scale if scale != 1.0 else loss)
        self._update.clear()
        self._logits = output.detach().numpy()
        return loss.item()

    def narrow(self, structure: Structure) -> Engine:
        """See `Engine.narrow`."""
        spec = self._loaded()
        shapes, wide = tensor_shapes(spec, structure), tensor_shapes(spec, self._structure)
        sizes, wide_sizes = group_sizes(spec, structure), group_sizes(spec, self._structure)
        narrow = TorchEngine(self)
        for tensor in spec.tensors:
            name, shape = tensor.name, shapes[tensor.name]
            for axis, length, limit in zip(tensor.axes, shape, wide[name], strict=True):
                cut = axis.group and sizes[axis.group] != wide_sizes[axis.group]
                if length > limit or (cut and axis.outer > 1):
                    raise SpecError(f"tensor {name!r}: {shape} is no prefix of {wide[name]}")
            index = tuple(slice(length) for length in shape)
            narrow._leaves[name] = self._leaves[name].detach()[index].requires_grad_()
            narrow._params[name] = self._params[name][index]
        narrow._build(spec, structure)
        return narrow

    def evaluate(self, x: Floats, y: Labels, batch: int = 64) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        loss, correct = 0.0, 0
        with torch.inference_mode():
            for start in range(0, len(x), batch):
                labels = _tensor(y[start : start + batch])
                output = self._run(_tensor(x[start : start + batch]))
                loss += float(F.cross_entropy(output, labels, reduction="sum"))
                correct += int((output.argmax(1) == labels).sum())
        return loss, correct

    def _loaded(self) -> ModelSpec:
        if self._spec is None:
            raise SpecError("this engine holds no model yet")
        return self._spec

    def _build(self, spec: ModelSpec, structure: Structure) -> None:
        node_shapes(spec, structure)
        last = {name: i for i, node in enumerate(spec.nodes) for name in node.inputs}
        readers = [name for node in spec.nodes for name in node.inputs]
        made_by = {node.name: node.op for node in spec.nodes}
        steps = []
        for i, node in enumerate(spec.nodes):
            run = _KERNELS[node.op]
            # The backward of linear and conv2d does not read their output, so an only reader may overwrite it.
            source = node.inputs[0]
            if node.op == "relu" and made_by.get(source) in ("linear", "conv2d") and readers.count(source) == 1:
                run = _relu_in_place
            params = {role: self._leaves[name] for role, name in node.params.items()}
            steps.append(_Step(node, run, params, tuple({n for n in node.inputs if last[n] == i})))
        self._spec, self._structure, self._steps = spec, structure, tuple(steps)

    def _run(self, x: Tensor) -> Tensor:
        values = {"input": x}
        for step in self._steps:
            inputs = [values[name] for name in step.node.inputs]
            for name in step.frees:
                del values[name]
            values[step.node.name] = step.run(step.node, inputs, step.params)
        return values[self._steps[-1].node.name]

    def _hook(self) -> None:
        """Move each weight as soon as its gradient is whole, and drop that gradient before the next one is made."""
        current = self._update
        for name, leaf in self._leaves.items():

            def fuse(leaf: Tensor, name: str = name) -> None:
                if current and leaf.grad is not None:
                    apply({name: leaf.detach().numpy()}, {name: leaf.grad.numpy()}, current[0])
                    leaf.grad = None

            leaf.register_post_accumulate_grad_hook(fuse)  # type: ignore[no-untyped-call] # torch left it untyped
        self._hooked = True


def _hear_warning_out() -> None:
    """Let torch say once, unheard, that a gradient which is a view may be slow: a copy would cost a layer's memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaf = torch.ones(2, 2)[:, :1].requires_grad_()
        leaf.grad = torch.zeros(2, 2)[:, :1]
        torch.autograd.backward(leaf.sum())


def _relu_in_place(_: Node, inputs: Inputs, __: Mapping[str, Tensor]) -> Tensor:
    return torch.relu_(inputs[0])


def _tensor(array: Labels | Floats) -> Tensor:
    """Copy a batch into torch's own, aligned memory."""
    tensor = torch.empty(array.shape, dtype=torch.float32 if array.dtype == np.float32 else torch.int64)
    tensor.numpy()[...] = array
    return tensor
