"""Rules: ways of training locally. A rule is numpy over the arrays that an engine shares; it knows no engine.

A rule is one module in this folder with the three things that `Rule` names, and one line in `RULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from edge_runtime.apart import Apart
from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Arrays, Floats, Labels
from wire.errors import Unsupported
from wire.masks import AnyMask
from wire.messages import Recipe

RULES: dict[str, str] = {
    "importance": "edge_runtime.rules.importance",
    "sgd": "edge_runtime.rules.sgd",
    "still": "edge_runtime.rules.still",
    "dpf": "edge_runtime.rules.dpf",
    "score": "edge_runtime.rules.score",
    "topk": "edge_runtime.rules.topk",
    "grouplasso": "edge_runtime.rules.grouplasso",
    "lottery": "edge_runtime.rules.lottery",
    "heterofl": "edge_runtime.rules.heterofl",
    "fjord": "edge_runtime.rules.fjord",
    "prox": "edge_runtime.rules.prox",
    "maml": "edge_runtime.rules.maml",
    "selfprune": "edge_runtime.rules.selfprune",
    "fiarse": "edge_runtime.rules.fiarse",
}
"""Name to module."""


@dataclass(frozen=True, slots=True)
class Extra:
    """Values about some or all weights of one tensor.

    Attributes:
        values: float32, ``(n,)`` with `places`; without, of the tensor's shape.
        places: Positions in C order, ascending, int64 ``(n,)``; None for all.
    """

    values: Floats
    places: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """What a rule holds of the weights from one step to the next, so that it can be cut to a narrower width with them.

    Attributes:
        arrays: Maps by tensor name of arrays in the weights' shapes (momentum, an anchor); their values are replaced.
        views: Maps of whatever looks into the weights; emptied before a cut.
        apart: What narrower widths have of their own.
    """

    arrays: Sequence[Arrays] = ()
    views: Sequence[dict[int, Engine]] = ()
    apart: Apart = field(default_factory=Apart)


Squeeze = Callable[[float, Held], int]
"""Looks whether the order may still take what it takes; given the fraction that is done, and what the rule holds. Gives the
micro-batch to go on with; 0 for the same."""


def _never(_: float, __: Held) -> int:
    """Let memory be as it is."""
    return 0


@dataclass(slots=True)
class Task:
    """What a rule is given.

    Attributes:
        recipe: How to train.
        engine: The loaded model.
        x: Training inputs ``(n, *input_shape)``, float32.
        y: Labels ``(n,)``, int64.
        round: Number of the round; with the recipe's seed the root of all randomness.
        micro_batch: Samples that may go through the model at once; fewer after a squeeze, so that it is read at each step.
        tell: Called after every step with the fraction that is done and the step's loss.
        masks: What is kept of which weights, in the tensors' shapes; empty when every weight is. The engine has them already.
        own: What this rule kept on this device after its last order that counted (`Trained.own`); empty at first, in another
            run, and when the model has other shapes than then. Of masked tensors it is as the rule left it; masks may have
            changed. The arrays are this order's own: a rule may write to them and hand them back.
        squeeze: Called by the loop between two batches. Where memory has become less, it cuts the engine and what the rule
            holds to a narrower width, in place, or gives a smaller micro-batch (`edge_runtime.shrink`); not for a rule that
            does not say what it holds.
        apart: What narrower widths have of their own; a rule that trains them takes them from here.
    """

    recipe: Recipe
    engine: Engine
    x: Floats
    y: Labels
    round: int
    micro_batch: int
    tell: Callable[[float, float], None]
    masks: Mapping[str, AnyMask] = field(default_factory=dict)
    own: Mapping[str, Floats] = field(default_factory=dict)
    squeeze: Squeeze = _never
    apart: Apart = field(default_factory=Apart)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a rule hands back; the weights themselves are in the engine.

    Attributes:
        losses: Mean training loss of each epoch.
        steps: Batches that were gone through; as many updates, unless the rule makes several of one.
        extras: What the coordinator is told beside the update, by name of the tensor that it is about (see `Extra`).
        metrics: Numbers for the reply, by names of the rule's own choice.
        own: What the rule wants back at its next order here, as whole float32 arrays by any name; kept with the commit.
        update: What is sent instead of trained minus received weights, by tensor name; a tensor that is not named does not
            move. None for the usual. It is emptied as it is written.
    """

    losses: tuple[float, ...]
    steps: int
    extras: Mapping[str, Extra] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    own: Mapping[str, Floats] = field(default_factory=dict)
    update: MutableMapping[str, Extra] | None = None


class Rule(Protocol):
    """One way of training locally."""

    @property
    def NEEDS_ENGINE(self) -> bool:  # noqa: N802 - a module's constant
        """False for a rule that reads no weight (`still`); `train` is then never called."""

    def copies(self, recipe: Recipe) -> int:
        """Count the copies of the trained (of masked tensors: kept) weights that the rule holds beside weights and gradients.

        `wire.memory` has the same table, for a coordinator that knows no rule; a test holds the two together. What a rule
        holds of whole tensors, masked or not, stands there too (`wire.memory.whole_copies`).
        """

    def train(self, task: Task) -> Trained:
        """Train the engine's weights in place.

        Raises:
            NonFinite: The loss or a weight is no number any more.
            SpecError: The recipe's knobs make no sense.
        """


def find(name: str) -> Rule:
    """Load a rule.

    Raises:
        Unsupported: This device has no such rule.
    """
    if name not in RULES:
        raise Unsupported(f"rule {name!r}; known here: {', '.join(RULES)}")
    module: Any = importlib.import_module(RULES[name])
    return cast("Rule", module)
