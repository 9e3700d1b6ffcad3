"""Made-up running statistics of two widths, as a state has them and as devices say them."""

from __future__ import annotations

import numpy as np

from coordinator.algorithm import Answer, State
from coordinator.blocks.nesting import whole_of
from tests.support.models import random_arrays
from tests.support.sequences import normed
from wire.messages import Usage
from wire.spec import Structure
from wire.structure import cut, to_wire

SPEC = normed()
STILL = {"n.mean", "n.variance"}
AMPLE = 1 << 40


def floats(*values):
    return np.array(values, np.float32)


def begun(levels=(0, 1, 0, 1)):
    """A model of four channels in two widths; the narrow one has channels 0 and 2."""
    found = {"a": np.array(levels, np.uint8)}
    weights = random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}
    return State(SPEC, 2, weights, found, {"a": (2, 4)}, {"params": {"calibrate": 2.0}})


def saw(state, device, samples, *sets):
    """An answer that has seen, from the narrowest width on, a mean and a variance for each channel in wire order."""
    said = {
        f"{k}/n.{role}": floats(*seen)
        for k, pair in enumerate(sets)
        for role, seen in zip(("mean", "variance"), pair, strict=True)
    }
    return Answer(device, samples, whole_of(state).narrowed(len(sets) - 1), {}, Usage(), {}, norms=said)


def cut_of(state, capacity):
    """Give a width's set by way of its canonical form."""
    wire = to_wire(SPEC, {**state.weights, **state.norms[capacity]}, state.levels)
    return cut(SPEC, wire, whole_of(state).narrowed(capacity))
