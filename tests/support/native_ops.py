"""Drives one op of the native engine through everything that an engine may do to it, beside the torch engine's op in double.

All memory that an op must write, or may not read any more, is full of NaN: an op that leaves a value out, reads an input that
it did not ask to keep, or a weight that a sink has moved, gives NaN.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod

import numpy as np
import torch

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.ops import PHASED, RUN, Run
from edge_runtime.engines.phase import Phase, Source
from wire.native.needs import Dims, Facts, Needs, Say
from wire.ops import OPS, STATISTICS
from wire.spec import Node

ALIGNED = 64
CLOSE = {np.float32: 1e-5, np.float64: 1e-10}
"""Of the largest entry."""

EXACT: Mapping[str, Run] = {"hard_sigmoid": lambda _, x, __: torch.nn.functional.relu6(x[0] + 3) / 6}
"""Torch's own slope of this is a sixth in single precision, in double too."""


@dataclass(frozen=True, slots=True)
class Case:
    """One op, and what it reads.

    Attributes:
        op: Its name.
        shapes: Of its inputs, batch left out.
        attrs: Of its node.
        params: Shapes of its weights by role.
        batch: Samples.
        draw: Gives an input of a whole shape; normal numbers by default.
        strided: Weights are views whose rows lie apart, as those of a narrower `linear`.
        floor: Errors are measured against the largest entry, but never against less than this.
        spare: Bytes that a pass may take for itself.
        scale: Of the weights, a power of two.
    """

    op: str
    shapes: tuple[Dims, ...]
    attrs: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, Dims] = field(default_factory=dict)
    batch: int = 5
    draw: Callable[[np.random.Generator, Dims], Array] | None = None
    strided: bool = False
    floor: float = 1e-3
    spare: int = 8192
    scale: float = 1.0

    @property
    def output(self) -> Dims:
        """Shape of what it gives, batch left out."""
        return OPS[self.op].shape(self.attrs, self.shapes, self.params)

    @property
    def node(self) -> Node:
        """As a model has it."""
        names = tuple(f"x{i}" for i in range(len(self.shapes)))
        return Node("op", self.op, names, {role: f"op.{role}" for role in self.params}, dict(self.attrs))

    def needs(self, say: Say) -> Needs:
        """What it holds, by its family."""
        return say(Facts(self.node, self.batch, self.shapes, self.output, dict(self.params)))


@dataclass(frozen=True, slots=True)
class Values:
    """What goes in, float32 values in float64: inputs, gradient of the output, weights by role."""

    x: tuple[Array, ...]
    dy: Array
    params: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What comes out: output, gradients of inputs and of weights, statistics as they are after the forward pass."""

    y: Array
    dx: tuple[Array | None, ...] = ()
    grads: Mapping[str, Array] = field(default_factory=dict)
    statistics: Mapping[str, Array] = field(default_factory=dict)


@dataclass(slots=True)
class Collected:
    """A sink that keeps gradients, spoils what it was given, and moves weights at once, to NaN."""

    params: Mapping[str, Array]
    grads: dict[str, Array] = field(default_factory=dict)

    def __call__(self, role: str, gradient: Array, first: int = 0) -> None:
        """See `edge_runtime.engines.native.at.Sink`."""
        held, rows = self.params[role], slice(first, first + len(gradient))
        assert gradient.dtype == held.dtype, role
        assert gradient.shape[1:] == held.shape[1:], role
        grad = self.grads.setdefault(role, np.full(held.shape, np.nan, held.dtype))
        assert len(grad[rows]) == len(gradient), role
        assert np.isnan(grad[rows]).all(), f"rows of {role} came twice"
        grad[rows] = gradient
        gradient[...] = np.nan
        held[rows] = np.nan


def memory(shape: Sequence[int], dtype: type, values: Array | float = np.nan) -> Array:
    """Give an array that begins where an arena's arrays do."""
    size = prod(shape)
    raw = np.empty(size * np.dtype(dtype).itemsize + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    found = raw[start : start + size * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    found[...] = values
    return found


def drawn(case: Case, seed: int) -> Values:
    """Draw inputs; variances are positive."""
    rng = np.random.default_rng(seed)

    def normal(shape: Dims) -> Array:
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    x = tuple(
        normal((case.batch, *shape)) if case.draw is None else np.float64(case.draw(rng, (case.batch, *shape)))
        for shape in case.shapes
    )
    params = {role: normal(shape) * case.scale for role, shape in case.params.items()}
    params |= {role: np.abs(found) + 0.125 for role, found in params.items() if role == "variance"}
    return Values(x, normal((case.batch, *case.output)), params)


def by_torch(case: Case, values: Values, phase: Phase, place: int = 3) -> Outcome:
    """Run the torch engine's op in double precision, and autograd behind it if the phase is one of training."""
    x = [torch.from_numpy(found.copy()) for found in values.x]
    params = {role: torch.from_numpy(found.copy()) for role, found in values.params.items()}
    leaves = {role: found for role, found in params.items() if role not in STATISTICS}
    follow = case.op != "embedding"
    for leaf in (*(x if follow else ()), *leaves.values()):
        leaf.requires_grad_()
    run = PHASED[case.op](phase, place) if case.op in PHASED else EXACT.get(case.op, RUN[case.op])
    y = run(case.node, x, params)
    still = {role: found.numpy() for role, found in params.items() if role in STATISTICS}
    if not phase.training:
        return Outcome(y.detach().numpy(), statistics=still)
    torch.autograd.backward(y, torch.from_numpy(values.dy))
    grads = {role: leaf.grad.numpy() for role, leaf in leaves.items()}
    return Outcome(y.detach().numpy(), tuple(leaf.grad.numpy() if follow else None for leaf in x), grads, still)


def prepare(
    case: Case, needs: Needs, values: Values, dtype: type, phase: Phase, *, over: bool = False, saves: bool = True
) -> At:
    """Build an At for the forward pass, as an engine would.

    Args:
        case: The op.
        needs: As its family says.
        values: What goes in.
        dtype: float32 or float64.
        phase: Of the pass.
        over: The output takes the first input's memory.
        saves: Whether a backward pass follows.
    """
    x = [memory(found.shape, dtype, found) for found in values.x]
    y = x[0] if over else memory((case.batch, *case.output), dtype)
    params = {}
    for role, found in values.params.items():
        wide = (*found.shape[:-1], found.shape[-1] + 3) if case.strided and found.ndim > 1 else found.shape
        params[role] = memory(wide, dtype)[..., : found.shape[-1]]
        params[role][...] = found
    saved = {name: memory(shape, dtype) for name, shape in needs.saves.items()} if saves else {}
    scratch = {name: memory(shape, dtype) for name, shape in needs.forward.items()}
    shapes = [array.shape for array in x]
    return At(case.node, 3, phase, params, shapes, x, y.reshape((case.batch, *case.output)), saved, scratch)


def turn(
    at: At, needs: Needs, values: Values, wanted: Sequence[bool], *, over_back: bool = False, over: bool = False
) -> Collected:
    """Make an At that has run forward ready for its backward pass; what need not be there any more is NaN.

    Args:
        at: Changed.
        needs: As its family says.
        values: What goes in.
        wanted: Which inputs' gradients are.
        over_back: The first one's takes the memory of the output's.
        over: The output lies over the first input.

    Returns:
        The sink.
    """
    dtype = at.y.dtype.type
    at.dy = memory(at.y.shape, dtype, values.dy)
    at.dx = [memory(found.shape, dtype) if want else None for found, want in zip(at.x, wanted, strict=True)]
    if over_back:
        at.dx[0] = at.dy
    at.scratch = {name: memory(shape, dtype) for name, shape in needs.backward.items()}
    kept = needs.reads_output and over
    for i, found in enumerate(at.x):
        if not needs.reads_input and not (kept and i == 0):
            found[...] = np.nan
    if not needs.reads_output and not (needs.reads_input and over):
        at.y[...] = np.nan
    sink = Collected(at.params)
    at.sink = sink
    return sink


def close(found: Array, wanted: Array, case: Case, what: str) -> None:
    """Hold an array against one in double precision."""
    most = max(float(np.abs(wanted).max(initial=0.0)), case.floor)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=CLOSE[found.dtype.type] * most, err_msg=f"{case}: {what}")


def _subsets(count: int) -> list[tuple[bool, ...]]:
    if count <= 2:
        return list(product((True, False), repeat=count))
    return [tuple(choose(i) for i in range(count)) for choose in (lambda _: True, lambda i: i == 0, lambda i: i == 1)]


def _forward(case: Case, needs: Needs, op: Op, values: Values, dtype: type, reference: Outcome) -> None:
    """The forward pass: over its input or not, saving or not; whatever else it reads stays as it was."""
    first: Array | None = None
    for over in {False, needs.over}:
        for saves in (True, False):
            at = prepare(case, needs, values, dtype, Phase(Source((5, 7), 2), training=True), over=over, saves=saves)
            op.forward(at)
            close(at.y, reference.y, case, f"output, over {over}, saves {saves}")
            assert at.y.flags.c_contiguous
            for found, before in list(zip(at.x, values.x, strict=True))[over:]:
                np.testing.assert_array_equal(found, before.astype(dtype))
            for role, wanted in reference.statistics.items():
                close(at.params[role], wanted, case, role)
            first = at.y if first is None else first
            np.testing.assert_array_equal(at.y, first, err_msg="not the same bits again")
    at = prepare(case, needs, values, dtype, Phase(), saves=False)
    op.forward(at)
    close(at.y, by_torch(case, values, Phase()).y, case, "output in evaluation")


def _backward(case: Case, needs: Needs, op: Op, values: Values, dtype: type, reference: Outcome) -> None:
    phase = Phase(Source((5, 7), 2), training=True)
    for wanted in _subsets(len(case.shapes)) if case.op != "embedding" else [(False,)]:
        first = None
        for over, over_back in product({False, needs.over}, {False, needs.over_back and wanted[0]}):
            at = prepare(case, needs, values, dtype, phase, over=over)
            op.forward(at)
            sink = turn(at, needs, values, wanted, over_back=over_back, over=over)
            before = [found.copy() for found in (*at.x, at.y)]
            op.backward(at)
            for found, earlier in zip((*at.x, at.y), before, strict=True):
                np.testing.assert_array_equal(found, earlier, err_msg="the backward pass wrote what it reads")
            if not over_back:
                np.testing.assert_array_equal(at.dy, values.dy.astype(dtype), err_msg="the gradient was spoilt")
            for i, (found, want) in enumerate(zip(at.dx, reference.dx, strict=True)):
                if found is not None and want is not None:
                    close(found, want, case, f"gradient of input {i}, wanted {wanted}, over {over}, {over_back}")
            assert sink.grads.keys() == reference.grads.keys()
            for role, want in reference.grads.items():
                close(sink.grads[role], want, case, f"gradient of {role}, wanted {wanted}")
            seen = [found for found in (*at.dx, *sink.grads.values()) if found is not None]
            first = seen if first is None else first
            for one, other in zip(seen, first, strict=True):
                np.testing.assert_array_equal(one, other, err_msg="not the same bits again")


def taken(case: Case, needs: Needs, op: Op, values: Values) -> int:
    """Count the bytes that a forward and a backward pass take for themselves at most, in float32."""
    at = prepare(case, needs, values, np.float32, Phase(Source((5, 7), 2), training=True))
    at.dy = memory(at.y.shape, np.float32, values.dy)
    at.dx = [memory(found.shape, np.float32) if case.op != "embedding" else None for found in at.x]
    forward, backward = at.scratch, {name: memory(shape, np.float32) for name, shape in needs.backward.items()}

    def step() -> None:
        at.scratch = forward
        op.forward(at)
        at.scratch = backward
        op.backward(at)

    buffers = np.setbufsize(16)  # numpy's own, for casts and broadcasts: else up to 8192 values of each operand
    tracemalloc.start()
    try:
        step()  # caches fill
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        step()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
        np.setbufsize(buffers)


def check_op(case: Case, needs: Mapping[str, Say], ops: Mapping[str, Op], seed: int = 0) -> None:
    """Hold an op's forward and backward pass against the torch engine's, in both precisions and every arrangement of memory.

    Args:
        case: The op.
        needs: The family's, by op.
        ops: The family's, by op.
        seed: Of what is drawn.
    """
    found, values = case.needs(needs[case.op]), drawn(case, seed)
    reference = by_torch(case, values, Phase(Source((5, 7), 2), training=True))
    if found.view:
        assert found == Needs(view=True), "nothing runs"
        close(values.x[0].reshape((case.batch, *case.output)), reference.y, case, "view")
        assert reference.dx[0] is not None
        close(values.dy.reshape(values.x[0].shape), reference.dx[0], case, "gradient of a view")
        return
    assert not (found.over and found.reads_input)
    assert not found.over or case.output == case.shapes[0]
    assert not found.over_back or case.output == case.shapes[0]
    op = ops[case.op]
    with np.errstate(all="ignore"):  # as the engine does
        for dtype in (np.float32, np.float64):
            _forward(case, found, op, values, dtype, reference)
            _backward(case, found, op, values, dtype, reference)
        assert taken(case, found, op, values) <= case.spare, f"{case} takes memory of its own"
    smaller = replace(case, batch=max(1, case.batch - 1)).needs(needs[case.op])
    for mine, less in (
        (found.saves, smaller.saves),
        (found.forward, smaller.forward),
        (found.backward, smaller.backward),
    ):
        for name, shape in less.items():
            assert prod(shape) <= prod(mine[name]), f"{name} shrinks when the batch grows"
