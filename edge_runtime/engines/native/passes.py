"""A plan made ready to run: every turn of every node with its arrays, so that a pass makes none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from edge_runtime.engines.native.arena import Arena
from edge_runtime.engines.native.at import Array, At
from edge_runtime.engines.native.registry import OPS
from edge_runtime.engines.native.sink import Weights
from edge_runtime.engines.phase import Phase
from edge_runtime.kernels import Stretch
from wire.native.plan import Plan, Seen, Turn


@dataclass(slots=True)
class _Ready:
    """One turn.

    Attributes:
        run: Does it.
        at: What it is given.
        again: Whether running statistics stand still in it.
        adds: A gradient, and one reader's share of it that is added when the turn is over.
        compact: A compact copy that is made before it, and the weight that stands apart.
    """

    run: Callable[[], None]
    at: At
    again: bool = False
    adds: list[tuple[Array, Array]] = field(default_factory=list)
    compact: list[tuple[Array, Array]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the turns of an engine share.

    Attributes:
        weights: Where weights are, and where their gradients go.
        phase: What ops read of the engine.
        stretches: By the name of the last node.
        places: Of the model's nodes, by name: what dropout draws follows from it.
    """

    weights: Weights
    phase: Phase
    stretches: Mapping[str, Stretch]
    places: Mapping[str, int]


class Pass:
    """One batch size, one way through a model."""

    def __init__(self, plan: Plan, arena: Arena, shared: Shared) -> None:
        """See every array of the plan in an arena that holds it; it must not grow while this is in use."""
        self._plan, self._shared, self._see = plan, shared, arena.see
        self._outside: list[tuple[At, int, tuple[int, ...]]] = []
        self._output, self._direct = self._seen(plan.output), plan.output[0].outside
        self.gradient = self._seen(plan.gradient) if plan.gradient is not None else None
        """Where the loss's gradient to the logits is to be written before `backward`; None where nothing is trained."""
        turns = [self._ready(turn) for turn in plan.turns]
        first = next((i for i, turn in enumerate(plan.turns) if turn.backward), len(turns))
        self._there, self._back = turns[:first], turns[first:]
        del self._see  # the arena holds its passes: were this held too, only a search for circles would free them

    def forward(self, x: Array) -> Array:
        """Give the logits, which the next pass overwrites.

        Args:
            x: Inputs of the plan's batch size, contiguous and of the arena's type; read until the backward pass is over.
        """
        for at, j, shape in self._outside:
            at.x[j] = x.reshape(shape)
        self._through(self._there)
        if not self._back:
            self._let_go()
        return x.reshape(self._plan.output[1]) if self._direct else self._output

    def backward(self) -> None:
        """Hand all gradients of weights to where they go."""
        self._shared.weights.begin()
        self._through(self._back)
        self._shared.weights.end()
        self._let_go()

    def _let_go(self) -> None:
        """Hold the inputs no longer: they may be a part of all data, and keep all of it."""
        for at, j, _ in self._outside:
            at.x[j] = np.empty(0, np.float32)

    def _through(self, turns: Sequence[_Ready]) -> None:
        phase = self._shared.phase
        with np.errstate(all="ignore"):  # what is no number is found where weights are looked at
            for turn in turns:
                for copy, apart in turn.compact:
                    np.copyto(copy.reshape(apart.shape), apart)
                if turn.again:
                    follows, phase.follows = phase.follows, 0.0
                    try:
                        turn.run()
                    finally:
                        phase.follows = follows
                else:
                    turn.run()
                for into, share in turn.adds:
                    np.add(into, share, out=into)

    def _seen(self, seen: Seen) -> Array:
        return self._see(seen) if not seen[0].outside else np.empty(0, np.float32)

    def _ready(self, turn: Turn) -> _Ready:
        node, weights = self._plan.nodes[turn.at], self._shared.weights
        at = At(node, self._shared.places[node.name], self._shared.phase)
        at.shapes = [(self._plan.asked.batch, *self._plan.shapes[name]) for name in node.inputs]
        at.x = [self._seen(seen) for seen in turn.x]
        self._outside += [(at, j, seen[1]) for j, seen in enumerate(turn.x) if seen[0].outside]
        if turn.y is not None:
            at.y = self._seen(turn.y)
        at.saved = {name: self._seen(seen) for name, seen in turn.saved.items()}
        at.scratch = {name: self._seen(seen) for name, seen in turn.scratch.items()}
        at.dy = self._seen(turn.dy) if turn.dy is not None else at.dy
        at.dx = [None if seen is None else self._seen(seen) for seen in turn.dx]
        adds = [(self._seen(into), share) for j, into in turn.adds.items() if (share := at.dx[j]) is not None]
        if node.op == "stretch":
            return _Ready(self._stretch(turn, at), at, adds=adds)
        ready = _Ready(_nothing, at, again=turn.again, adds=adds)
        if turn.view:
            return ready
        params = {role: weights.params[name] for role, name in node.params.items()}
        for role, seen in turn.compact.items():
            if params[role].flags.c_contiguous:  # the whole of a wider one, seen with its runs apart
                params[role] = params[role].reshape(seen[1])
            else:
                copy = self._seen(seen)
                ready.compact.append((copy, params[role]))
                params[role] = copy
        at.params, at.sink = params, weights.sink(node)
        op = OPS[node.op]
        ready.run = partial(op.forward, at) if not turn.backward else partial(_backward, weights, op.backward, at)
        return ready

    def _stretch(self, turn: Turn, at: At) -> Callable[[], None]:
        stretch, wires = self._shared.stretches[at.node.name], self._shared.weights.wires
        trains = self._plan.asked.backward

        def forward() -> None:
            y = stretch.forward(at.x[0], train=trains, out=at.y)
            if y is not at.y:
                at.y[...] = y

        def backward() -> None:
            update = wires.update[0] if wires.update else None
            watch = wires.watch[0] if wires.watch else None
            into = at.dx[0]
            dx = stretch.backward(
                at.dy,
                grads=None if update is not None else wires.grads,
                update=update,
                input_gradient=into is not None,
                watch=watch,
                into=into,
            )
            if into is not None and dx is not None and dx is not into:
                into[...] = dx

        return backward if turn.backward else forward


def _nothing() -> None:
    """A look at another array does nothing."""


def _backward(weights: Weights, run: Callable[[At], None], at: At) -> None:
    weight = at.node.params.get("weight", "")
    if weight in weights.masks and weights.wires.watch:
        weights.wires.watch[0](weight, at.x[0], at.dy)
    run(at)
