"""The torch engine: every op of the spec, on the CPU, without `torch.optim` (which would cost 72 MB).

Weights are torch leaves that share their memory with numpy arrays. Gradients are allocated once and preset on the
leaves, so that autograd adds into them in place; a narrower width is a set of leaves that are views of the wide ones,
with views of the wide gradients, so that nothing is ever padded. All memory comes from torch's allocator because it is
aligned to 64 bytes: matrix products may round differently at another alignment, and the same order must give the same
bits.

Masked layers are stretches (see `edge_runtime.engines.stretches`), whose weights are no leaves. Where nothing else is in a
model, autograd is left out: its bookkeeping would cost small models more than their arithmetic.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from edge_runtime.engines import Choice, Engine, Make, Update, losses, stored
from edge_runtime.engines.again import forward
from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.engines.dense import copied
from edge_runtime.engines.masks import Held, Wires, bits_of
from edge_runtime.engines.phase import Phase
from edge_runtime.engines.steps import Loaded, Step, build, line
from edge_runtime.engines.stretches import TORCH, straight
from edge_runtime.engines.update import apply
from edge_runtime.engines.views import opened, prefix
from edge_runtime.engines.ways import Masked, Tools, agree
from edge_runtime.kernels import Watch
from edge_runtime.kernels.choose import DENSE, Timing, Trial
from wire.errors import SpecError
from wire.masks import AnyMask, Bits, unpacked
from wire.messages import Loss
from wire.norms import affines
from wire.segments import Cuts, check
from wire.spec import ModelSpec, Structure, statistics, tensor_shapes

Tensor = torch.Tensor


def create(threads: int, timings: Path | None = None) -> Make:
    """Set torch's one thread count and give a function that makes empty engines."""
    torch.set_num_threads(threads)
    _hear_warning_out()
    tools = Tools(TORCH, threads, timings)
    return lambda: TorchEngine(tools=tools)


class TorchEngine:
    """See `edge_runtime.engines.Engine`."""

    name = "torch"

    def __init__(self, parent: TorchEngine | None = None, tools: Tools | None = None) -> None:
        self._parent = parent  # whose gradients a narrower width adds into
        self._tools = tools or Tools(TORCH)
        self._held = Held()
        self._spec: ModelSpec | None = None
        self._structure = Structure()
        self._leaves: dict[str, Tensor] = {}
        self._params: Arrays = {}
        self._steps: tuple[Step, ...] = ()
        self._logits: Floats = np.zeros((0, 0), np.float32)
        self._wires = Wires()  # hooks and stretches hold it, lest they keep the engine alive
        self._hooked = False
        self._phase = Phase()

    @property
    def spec(self) -> ModelSpec:
        """The model that is loaded."""
        return self._loaded()

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
        if not self._wires.grads:
            spec = self._loaded()
            still, shapes = statistics(spec), tensor_shapes(spec, self._structure)
            for tensor in spec.tensors:
                name, leaf = tensor.name, self._leaves.get(tensor.name)
                if name in still:
                    continue
                if leaf is None:
                    self._wires.grads[name] = torch.zeros(self._params[name].shape).numpy()
                elif self._parent is None or not np.may_share_memory(self._params[name], self._parent.params[name]):
                    leaf.grad = torch.zeros_like(leaf)
                    self._wires.grads[name] = leaf.grad.numpy()
                else:
                    wide = self._parent.grads[name]
                    self._wires.grads[name] = wide.reshape(opened(tensor, wide.shape))[prefix(tensor, shapes[name])]
                    leaf.grad = torch.from_numpy(self._wires.grads[name])
        return self._wires.grads

    @property
    def ways(self) -> Mapping[str, str]:
        """How each masked tensor is held."""
        return self._held.ways

    def timings(self) -> tuple[Timing, ...]:
        """See `Engine.timings`."""
        return self._tools.chooser.timings()

    def load(
        self,
        spec: ModelSpec,
        structure: Structure,
        arrays: Mapping[str, Floats] | None = None,
        masks: Mapping[str, AnyMask] | None = None,
        choice: Choice | None = None,
    ) -> None:
        """See `Engine.load`."""
        self._leaves, self._params, self._wires, self._hooked = {}, {}, Wires(), False
        cuts = self._phase.cuts if spec == self._spec and not masks else ()
        self._phase = Phase(self._phase.source, cuts=cuts)
        self._held, self._spec, self._steps = Held(), None, ()  # the model before is gone, whatever comes
        kept = bits_of(masks or {})
        self._tools.release(kept)
        if kept:
            self._load_masked(spec, structure, kept, choice or Choice())
            if arrays is not None:
                stored.fill(self._params, self._held, (arrays, tensor_shapes(spec, structure), kept))
            return
        still = statistics(spec)
        for name, shape in tensor_shapes(spec, structure).items():
            memory = torch.empty(shape)
            self._params[name] = memory.numpy()
            if arrays is not None:
                if arrays[name].shape != shape:
                    raise SpecError(f"weights of {name!r} have shape {arrays[name].shape}, the structure says {shape}")
                np.copyto(self._params[name], arrays[name])
            # A tensor of its own, so that whoever keeps the array does not keep the leaf and its gradient.
            self._leaves[name] = memory.detach().requires_grad_(name not in still)
        self._build(spec, structure)

    def read(self, name: str) -> Floats:
        """See `Engine.read`."""
        return stored.read(self._params, self._held, name)

    def write(self, name: str, values: Floats) -> None:
        """See `Engine.write`."""
        stored.write(self._params, self._held, name, values)

    def seed(self, *numbers: int) -> None:
        """See `Engine.seed`."""
        self._phase.source.numbers, self._phase.source.calls = numbers, 0

    def bytes_of_weights(self, update: Update | None = None) -> int:
        """See `Engine.bytes_of_weights`."""
        return stored.count(self._params, self._wires.grads, self._held, update)

    def recompute(self, cuts: Cuts) -> None:
        """See `Engine.recompute`."""
        if cuts and self._held.ways:
            raise SpecError("a model with masks is not cut into segments")
        check(self._loaded().nodes, cuts)
        self._phase.cuts = cuts

    def observe(self, x: Floats, share: float) -> None:
        """See `Engine.observe`."""
        phase, before = self._phase, self._phase.follows
        phase.training, phase.drops, phase.follows = True, False, share
        try:
            with torch.no_grad():
                self._run(copied(x))
        finally:
            phase.training, phase.drops, phase.follows = False, True, before

    def forward(self, x: Floats) -> Floats:
        """See `Engine.forward`."""
        with torch.inference_mode():
            logits: Floats = self._run(copied(x)).numpy()
        return logits

    def forward_backward(
        self,
        x: Floats,
        y: Labels | Floats,
        *,
        scale: float = 1.0,
        update: Update | None = None,
        watch: Watch | None = None,
        loss: Loss = "cross_entropy",
    ) -> float:
        """See `Engine.forward_backward`."""
        if update is None:
            self.grads  # noqa: B018 - makes them, so that autograd adds in place
        elif self._wires.grads:
            raise SpecError("an update was given to an engine whose gradients are in use; do one or the other")
        elif not self._hooked:
            self._hook()
        self._wires.update[:], self._wires.watch[:] = (
            [update] if update is not None else [],
            [watch] if watch is not None else [],
        )
        self._phase.training = True
        self._phase.source.calls += 1
        try:
            if self._held.ways and (stretches := line(self._steps)):
                self._logits, seen = straight(stretches, self._wires, x, copied(y), (loss, scale))
                return seen
            output = self._run(copied(x))
            if not output.requires_grad:
                raise SpecError(
                    f"model {self._loaded().name!r} has nothing that can be trained: no weight reaches its output"
                )
            lost = losses.value(output, copied(y), loss)
            torch.autograd.backward(lost * scale if scale != 1.0 else lost)
        finally:
            self._phase.training = False
            self._wires.update.clear()
            self._wires.watch.clear()
        self._logits = output.detach().numpy()
        return lost.item()

    def narrow(self, structure: Structure, own: Mapping[str, Floats] | None = None) -> Engine:
        """See `Engine.narrow`."""
        spec = self._loaded()
        if self._held.ways:
            raise SpecError("a model with masks has no narrower widths here")
        shapes, wide = tensor_shapes(spec, structure), tensor_shapes(spec, self._structure)
        still = statistics(spec)
        narrow = TorchEngine(self, self._tools)
        narrow._phase = Phase(self._phase.source, follows=0.0, cuts=self._phase.cuts)
        for tensor in spec.tensors:
            name, shape = tensor.name, shapes[tensor.name]
            if any(length > limit for length, limit in zip(shape, wide[name], strict=True)):
                raise SpecError(f"tensor {name!r}: {shape} is no prefix of {wide[name]}")
            index, leaf, param = prefix(tensor, shape), self._leaves[name].detach(), self._params[name]
            leaf = leaf.reshape(opened(tensor, leaf.shape))[index]
            narrow._leaves[name] = leaf if name in still else leaf.requires_grad_()
            narrow._params[name] = param.reshape(opened(tensor, param.shape))[index]
        for name, array in (own or {}).items():
            if name not in still | affines(spec) or array.shape != shapes[name]:
                raise SpecError(f"tensor {name!r} of shape {array.shape} is not of a norm of this width")
            memory = torch.empty(array.shape)
            narrow._params[name] = memory.numpy()
            narrow._leaves[name] = memory.detach().requires_grad_(name not in still)
            np.copyto(narrow._params[name], array)
        narrow._build(spec, structure)
        return narrow

    def evaluate(self, x: Floats, y: Labels, batch: int = 64) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        loss, correct = 0.0, 0
        with torch.inference_mode():
            for start in range(0, len(x), batch):
                labels = copied(y[start : start + batch])
                output = self._run(copied(x[start : start + batch]))
                loss += float(F.cross_entropy(output, labels, reduction="sum"))
                correct += int((output.argmax(1) == labels).sum())
        return loss, correct

    def _loaded(self) -> ModelSpec:
        if self._spec is None:
            raise SpecError("this engine holds no model yet")
        return self._spec

    def _load_masked(self, spec: ModelSpec, structure: Structure, masks: Mapping[str, Bits], choice: Choice) -> None:
        """Decide how weights are held and make them, all zero."""

        def step(layers: Mapping[str, Masked], ways: Mapping[str, str]) -> Trial:
            engine = TorchEngine(tools=self._tools)
            engine._install(spec, structure, layers, ways)
            return engine._probe(choice.batch)

        layers, ways = agree((spec, structure), masks, choice, self._tools, step)
        self._install(spec, structure, layers, ways)

    def _install(
        self, spec: ModelSpec, structure: Structure, layers: Mapping[str, Masked], ways: Mapping[str, str]
    ) -> None:
        self._leaves, self._params, self._wires, self._hooked = {}, {}, Wires(), False
        sparse, still = {name: way for name, way in ways.items() if way != DENSE}, statistics(spec)
        self._held = Held(
            ways,
            self._tools.layouts({name: (way, layers[name]) for name, way in sparse.items()}),
            {name: unpacked(layers[name].mask) for name in ways if name not in sparse},
        )
        for name, shape in tensor_shapes(spec, structure).items():
            memory = torch.zeros((self._held.layouts[name].kept,) if name in sparse else shape)
            self._params[name] = memory.numpy()
            if name not in ways:
                self._leaves[name] = memory.detach().requires_grad_(name not in still)
        self._build(spec, structure)

    def _probe(self, batch: int) -> Trial:
        """Give a training step that moves nothing, to be timed while all weights are zero."""
        spec = self._loaded()
        x, y = np.ones((batch, *spec.input_shape), np.float32), np.zeros(batch, np.int64)
        return lambda: self.forward_backward(x, y, update=Update(0.0))

    def _build(self, spec: ModelSpec, structure: Structure) -> None:
        loaded = Loaded(self._params, self._held, self._wires, self._phase, lambda: (self._tools.kit, TORCH))
        self._steps = build(spec, structure, self._leaves, loaded)
        self._spec, self._structure = spec, structure

    def _run(self, x: Tensor) -> Tensor:
        self._loaded()
        return forward(self._steps, x, self._phase)

    def _hook(self) -> None:
        """Move each weight as soon as its gradient is whole, and drop that gradient before the next one is made."""
        current = self._wires.update
        for name, leaf in self._leaves.items():

            def fuse(leaf: Tensor, name: str = name) -> None:
                if current and leaf.grad is not None:
                    apply({name: leaf.detach().numpy()}, {name: leaf.grad.numpy()}, current[0])
                    leaf.grad = None

            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(fuse)  # type: ignore[no-untyped-call] # torch left it untyped
        self._hooked = True


def _hear_warning_out() -> None:
    """Let torch say once, unheard, that a gradient which is a view may be slow: a copy would cost a layer's memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        leaf = torch.ones(2, 2)[:, :1].requires_grad_()
        leaf.grad = torch.zeros(2, 2)[:, :1]
        torch.autograd.backward(leaf.sum())
