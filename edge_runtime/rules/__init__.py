"""Rules: ways of training locally. A rule is numpy over the arrays that an engine shares; it knows no engine.

A rule is one module in this folder with the three things that `Rule` names, and one line in `RULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from edge_runtime.engines import Engine
from edge_runtime.engines.arrays import Floats, Labels
from wire.errors import Unsupported
from wire.messages import Recipe

RULES: dict[str, str] = {"sgd": "edge_runtime.rules.sgd", "still": "edge_runtime.rules.still"}
"""Name to module."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a rule is given.

    Attributes:
        recipe: How to train.
        engine: The loaded model.
        x: Training inputs ``(n, *input_shape)``, float32.
        y: Labels ``(n,)``, int64.
        round: Number of the round; with the recipe's seed the root of all randomness.
        micro_batch: Samples that may go through the model at once.
        tell: Called after every step with the fraction that is done and the step's loss.
    """

    recipe: Recipe
    engine: Engine
    x: Floats
    y: Labels
    round: int
    micro_batch: int
    tell: Callable[[float, float], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """What a rule hands back; the weights themselves are in the engine.

    Attributes:
        losses: Mean training loss of each epoch.
        steps: Updates that were made.
    """

    losses: tuple[float, ...]
    steps: int


class Rule(Protocol):
    """One way of training locally."""

    @property
    def NEEDS_ENGINE(self) -> bool:  # noqa: N802 - a module's constant
        """False for a rule that reads no weight (`still`); `train` is then never called."""

    def copies(self, recipe: Recipe) -> int:
        """Count the weight-sized float32 copies that the rule holds beside the engine's weights and gradients."""

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
