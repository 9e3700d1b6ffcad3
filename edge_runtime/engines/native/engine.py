"""The engine's door over plans, passes and ops. See `edge_runtime.engines.Engine`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import prod
from typing import Any, cast

import numpy as np

from edge_runtime.engines import Choice, Engine, Update, stored
from edge_runtime.engines.arrays import Arrays, Floats, Labels
from edge_runtime.engines.masks import Held, Wires, bits_of, chains
from edge_runtime.engines.native import losses, straight
from edge_runtime.engines.native.arena import Arena, aligned
from edge_runtime.engines.native.dense import NATIVE
from edge_runtime.engines.native.passes import Pass, Shared
from edge_runtime.engines.native.sink import Weights
from edge_runtime.engines.phase import Phase
from edge_runtime.engines.views import opened, prefix
from edge_runtime.engines.ways import Masked, Tools, agree
from edge_runtime.kernels import Stretch, Watch
from edge_runtime.kernels.choose import DENSE, Timing, Trial
from wire.errors import SpecError, Unsupported
from wire.masks import AnyMask, Bits, unpacked
from wire.messages import Loss
from wire.native.plan import Asked, lacks, plan
from wire.norms import affines
from wire.segments import Cuts, check
from wire.spec import ModelSpec, Structure, node_shapes, statistics, tensor_shapes
from wire.walk import several

PASSES = 16
"""Passes that are kept ready: of each width a whole batch, what is left over at the end of an epoch, and both without a way
back."""


class NativeEngine:
    """See `edge_runtime.engines.Engine`."""

    name = "native"

    def __init__(
        self,
        tools: Tools | None = None,
        dtype: Any = np.float32,
        *,
        parent: NativeEngine | None = None,
        arena: Arena | None = None,
    ) -> None:
        """Make an empty engine.

        Args:
            tools: What the engines of a process share.
            dtype: Of all arrays; tests run in double precision, where masked weights are always held dense.
            parent: Whose gradients a narrower width adds into.
            arena: Whose it works in, too.
        """
        self._tools, self._parent = tools or Tools(NATIVE), parent
        self._arena = arena or Arena(dtype)
        self._spec: ModelSpec | None = None
        self._structure = Structure()
        self._held = Held()
        self._params: Arrays = {}
        self._logits: Floats = np.zeros((0, 0), self._arena.dtype)
        self._weights = Weights({}, {}, Wires())
        self._stretches: dict[tuple[int, int], Stretch] = {}
        self._phase = Phase()

    @property
    def spec(self) -> ModelSpec:
        """The model that is loaded."""
        if self._spec is None:
            raise SpecError("this engine holds no model yet")
        return self._spec

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
        found = self._weights.wires.grads
        if not found:
            spec = self.spec
            still, shapes = statistics(spec), tensor_shapes(spec, self._structure)
            for tensor in spec.tensors:
                name, param = tensor.name, self._params[tensor.name]
                if name in still:
                    continue
                if self._parent is None or not np.may_share_memory(param, self._parent.params[name]):
                    found[name] = self._array(param.shape)
                    found[name].fill(0.0)
                else:
                    wide = self._parent.grads[name]
                    found[name] = wide.reshape(opened(tensor, wide.shape))[prefix(tensor, shapes[name])]
        return found

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
        """See `Engine.load`.

        Raises:
            Unsupported: The model has an op that this engine lacks.
        """
        if missing := lacks(spec):
            raise Unsupported(f"the native engine has no {', '.join(missing)}: install torch for model {spec.name!r}")
        cuts = self._phase.cuts if spec == self._spec and not masks else ()
        kept = bits_of(masks or {})
        self._clear()
        self._phase = Phase(self._phase.source, cuts=cuts)
        self._tools.release(kept)
        layers: Mapping[str, Masked] = {}
        ways: Mapping[str, str] = {}
        if kept:
            layers, ways = self._chosen((spec, structure), kept, choice or Choice())
        self._install(spec, structure, layers, ways)
        if arrays is not None:
            stored.fill(self._params, self._held, (arrays, tensor_shapes(spec, structure), kept))

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
        return stored.count(self._params, self._weights.wires.grads, self._held, update)

    def recompute(self, cuts: Cuts) -> None:
        """See `Engine.recompute`."""
        if cuts and self._held.ways:
            raise SpecError("a model with masks is not cut into segments")
        check(self.spec.nodes, cuts)
        self._phase.cuts = cuts

    def observe(self, x: Floats, share: float) -> None:
        """See `Engine.observe`."""
        phase, before = self._phase, self._phase.follows
        phase.training, phase.drops, phase.follows = True, False, share
        try:
            self._run(x)
        finally:
            phase.training, phase.drops, phase.follows = False, True, before

    def forward(self, x: Floats) -> Floats:
        """See `Engine.forward`."""
        return self._run(x).copy()

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
        wires = self._weights.wires
        if update is None:
            self.grads  # noqa: B018 - makes them
        elif wires.grads:
            raise SpecError("an update was given to an engine whose gradients are in use; do one or the other")
        wires.update[:], wires.watch[:] = (
            [update] if update is not None else [],
            [watch] if watch is not None else [],
        )
        self._phase.training = True
        self._phase.source.calls += 1
        try:
            whole = straight.whole(self.spec, self._stretches)
            if whole is not None and (done := straight.learn(whole, wires, self._taken(x), y, (loss, scale))):
                self._logits, lost = done
                return lost
            ready = self._pass(len(x), backward=True)
            if ready.gradient is None:
                raise SpecError(
                    f"model {self.spec.name!r} has nothing that can be trained: no weight reaches its output"
                )
            self._logits = ready.forward(self._taken(x)).copy()
            lost = losses.settle(self._logits, y, loss, scale, ready.gradient)
            ready.backward()
        finally:
            self._phase.training = False
            wires.update.clear()
            wires.watch.clear()
        return lost

    def narrow(self, structure: Structure, own: Mapping[str, Floats] | None = None) -> Engine:
        """See `Engine.narrow`."""
        spec = self.spec
        if self._held.ways:
            raise SpecError("a model with masks has no narrower widths here")
        shapes, wide = tensor_shapes(spec, structure), tensor_shapes(spec, self._structure)
        still = statistics(spec)
        narrow = NativeEngine(self._tools, parent=self, arena=self._arena)
        narrow._phase = Phase(self._phase.source, follows=0.0, cuts=self._phase.cuts)
        for tensor in spec.tensors:
            name, shape = tensor.name, shapes[tensor.name]
            if any(length > limit for length, limit in zip(shape, wide[name], strict=True)):
                raise SpecError(f"tensor {name!r}: {shape} is no prefix of {wide[name]}")
            param = self._params[name]
            narrow._params[name] = param.reshape(opened(tensor, param.shape))[prefix(tensor, shape)]
        for name, array in (own or {}).items():
            if name not in still | affines(spec) or array.shape != shapes[name]:
                raise SpecError(f"tensor {name!r} of shape {array.shape} is not of a norm of this width")
            narrow._params[name] = self._array(array.shape)
            np.copyto(narrow._params[name], array)
        narrow._wire(spec, structure)
        return narrow

    def evaluate(self, x: Floats, y: Labels, batch: int = 64) -> tuple[float, int]:
        """See `Engine.evaluate`."""
        loss, correct = 0.0, 0
        for start in range(0, len(x), batch):
            output = self._run(x[start : start + batch])
            lost, right = losses.scored(output, y[start : start + batch])
            loss, correct = loss + lost, correct + right
        return loss, correct

    def _run(self, x: Floats) -> Floats:
        return self._pass(len(x), backward=False).forward(self._taken(x))

    def _taken(self, x: Floats) -> Floats:
        """Give the inputs as ops take them; copied only if they come otherwise."""
        if x.shape[1:] != tuple(self.spec.input_shape):
            raise SpecError(
                f"inputs of shape {x.shape[1:]} for model {self.spec.name!r}, which takes {self.spec.input_shape}"
            )
        return np.ascontiguousarray(x, self._arena.dtype)

    def _array(self, shape: tuple[int, ...]) -> Floats:
        return cast("Floats", aligned(prod(shape), self._arena.dtype).reshape(shape))

    def _clear(self) -> None:
        """Let go of the model before, whatever comes."""
        self._spec, self._held, self._params = None, Held(), {}
        self._weights = Weights({}, {}, Wires())
        self._stretches = {}
        self._arena.clear()

    def _chosen(
        self, model: tuple[ModelSpec, Structure], masks: Mapping[str, Bits], choice: Choice
    ) -> tuple[Mapping[str, Masked], Mapping[str, str]]:
        """Decide how masked weights are held."""

        def step(layers: Mapping[str, Masked], ways: Mapping[str, str]) -> Trial:
            """Give a training step that moves nothing, to be timed while all weights are zero."""
            engine = NativeEngine(self._tools)
            engine._install(*model, layers, ways)
            x = np.ones((choice.batch, *model[0].input_shape), np.float32)
            y = np.zeros(choice.batch, np.int64)
            return lambda: engine.forward_backward(x, y, update=Update(0.0))

        if self._arena.dtype != np.float32:
            choice = Choice(choice.batch, {"": DENSE})
        return agree(model, masks, choice, self._tools, step)

    def _install(
        self, spec: ModelSpec, structure: Structure, layers: Mapping[str, Masked], ways: Mapping[str, str]
    ) -> None:
        """Make weights, zero where they are masked; the others are the caller's to write."""
        sparse = {name: way for name, way in ways.items() if way != DENSE}
        self._held = Held(
            ways,
            self._tools.layouts({name: (way, layers[name]) for name, way in sparse.items()}),
            {name: unpacked(layers[name].mask) for name in ways if name not in sparse},
        )
        for name, shape in tensor_shapes(spec, structure).items():
            self._params[name] = self._array((self._held.layouts[name].kept,) if name in sparse else shape)
            if ways:
                self._params[name].fill(0.0)
        self._wire(spec, structure)

    def _wire(self, spec: ModelSpec, structure: Structure) -> None:
        self._spec, self._structure = spec, structure
        runs = frozenset(tensor.name for tensor in spec.tensors if tensor.axes[0].outer > 1)
        self._weights = Weights(self._params, self._held.masks, Wires(), frozenset(several(spec.nodes)), runs)
        if self._held.layouts:
            sparse = Held(self._held.ways, self._held.layouts)
            kits = self._tools.kit, self._tools.backend
            found = chains(spec, node_shapes(spec, structure), kits, sparse, self._params)
            self._stretches = {(chain.first, chain.last): chain.stretch for chain in found}

    def _pass(self, batch: int, *, backward: bool) -> Pass:
        """Give the pass for a batch, made when first asked for."""
        cuts = self._phase.cuts if backward else ()
        key = id(self._weights), batch, backward, cuts
        passes: dict[Hashable, Pass] = self._arena.passes
        if key in passes:
            return passes[key]
        spec = self.spec
        asked = Asked(batch, backward, cuts, views=self._parent is not None)
        found = plan(spec, self._structure, asked, stretches=tuple(self._stretches))
        self._arena.hold(found.length)
        while len(passes) >= PASSES:
            del passes[next(iter(passes))]
        stretches = {spec.nodes[last].name: one for (_, last), one in self._stretches.items()}
        places = {node.name: i for i, node in enumerate(spec.nodes)}
        passes[key] = Pass(found, self._arena, Shared(self._weights, self._phase, stretches, places))
        return passes[key]
