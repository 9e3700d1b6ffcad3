"""Forward passes of the torch engine, and segments of a model that are run again in the backward pass to hold less.

`torch.utils.checkpoint` does the same for any function, and loads torch's compiler for it: 70 MB and a second. Here all
that a segment's ops read is known: dropout draws the same again, since its draws follow from the order, the pass and the
node's place; batch norms norm by the same batch, and their running statistics have moved already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from edge_runtime.engines.ops import Run
from edge_runtime.engines.phase import Phase
from edge_runtime.engines.steps import Step
from wire.segments import spans

Tensor = torch.Tensor


class _Again(torch.autograd.Function):
    """A segment as one function of autograd, which keeps its input alone.

    `spark` is an empty leaf: it asks for a backward pass that weights need where the input needs none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spark: Tensor, steps: Sequence[Step], phase: Phase) -> Tensor:
        del spark
        ctx.save_for_backward(x)
        ctx.steps, ctx.phase = steps, phase
        with torch.enable_grad():
            return through([replace(step, run=_forgetting(step.run)) for step in steps], x)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, None, None, None]:
        phase, follows, kept = ctx.phase, ctx.phase.follows, ctx.saved_tensors[0].detach()
        found: list[Tensor] = []
        phase.follows = 0.0
        try:
            with torch.enable_grad():
                spark = torch.empty(0, requires_grad=ctx.needs_input_grad[0])
                x = cast("Tensor", _Taken.apply(kept, spark, found))  # type: ignore[no-untyped-call] # as is this
                begun = cast("Tensor", _Given.apply(through(ctx.steps, x), dys[0]))  # type: ignore[no-untyped-call] # so is this
        finally:
            phase.follows = follows
        if begun.requires_grad:
            torch.autograd.backward(begun)
        return found.pop() if found else None, None, None, None


class _Taken(torch.autograd.Function):
    """A segment's input as it is, whose gradient is put into a list as it comes.

    A leaf would bring it into the order of its own axes, which may be another than a plain pass hands on: sums behind it would
    round differently.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, spark: Tensor, found: list[Tensor]) -> Tensor:
        del spark
        ctx.found = found
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *dxs: Tensor) -> tuple[None, None, None]:
        ctx.found.append(dxs[0])
        return None, None, None


class _Given(torch.autograd.Function):
    """Nothing, made of a value whose gradient is known: a backward pass from it begins with that gradient.

    A gradient that is handed to `torch.autograd.backward` is looked at by torch's symbolic shapes, which cost 35 MB; and the
    value would have to be held.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.given = dy
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        given, ctx.given = ctx.given, None
        return given, None


def _forgetting(run: Run) -> Run:
    """Run an op as if its gradient were wanted, and drop what it saves: oneDNN's lstm rounds otherwise where none is."""
    return lambda node, x, params: run(node, x, params).detach()


def through(steps: Sequence[Step], x: Tensor) -> Tensor:
    """Run steps, the first of which reads x, and let go of every value behind its last reader."""
    values = {steps[0].node.inputs[0]: x}
    for step in steps:
        inputs = [values[name] for name in step.node.inputs]
        for name in step.frees:
            del values[name]
        values[step.node.name] = step.run(step.node, inputs, step.params)
    return values[steps[-1].node.name]


def forward(steps: Sequence[Step], x: Tensor, phase: Phase) -> Tensor:
    """Give a model's output; where gradients will be wanted, segments are cut as the phase says."""
    start = 0
    if phase.cuts and torch.is_grad_enabled():
        for first, last in spans(phase.cuts):
            segment = steps[first : last + 1]
            trained = any(param.requires_grad for step in segment for param in step.params.values())
            spark = torch.empty(0, requires_grad=trained)
            x = cast("Tensor", _Again.apply(x, spark, segment, phase))  # type: ignore[no-untyped-call] # torch left it untyped
            start = last + 1
    return through(steps[start:], x)
