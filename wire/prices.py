"""What an order takes on each engine: the predictions by the engine's name.

Bytes are counted above the base of a worker that has loaded that engine (`wire.memory`), and bases differ a lot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from wire import memory
from wire.errors import Unsupported
from wire.masked import Masked
from wire.memory import Prediction
from wire.messages import Recipe
from wire.segments import Cuts
from wire.spec import ModelSpec, Structure

TORCH = "torch"
NATIVE = "native"


class Training(Protocol):
    """Predicts a training order."""

    def __call__(
        self,
        spec: ModelSpec,
        structure: Structure,
        recipe: Recipe,
        micro_batch: int = 0,
        *,
        scale: float = 1.0,
        masked: Masked | None = None,
        cuts: Cuts = (),
    ) -> Prediction:
        """As `wire.memory.predict`."""


class Evaluation(Protocol):
    """Predicts an evaluation."""

    def __call__(
        self, spec: ModelSpec, structure: Structure, batch: int, scale: float = 1.0, masked: Masked | None = None
    ) -> Prediction:
        """As `wire.memory.predict_evaluation`."""


def training(engine: str) -> Training:
    """Give what predicts training on an engine; one that is not known is priced as the torch engine, which takes most."""
    if engine == NATIVE:
        from wire.native import memory as native

        return native.predict
    return memory.predict


def evaluation(engine: str) -> Evaluation:
    """Give what predicts evaluations on an engine, as `training` does."""
    if engine == NATIVE:
        from wire.native import memory as native

        return native.predict_evaluation
    return memory.predict_evaluation


def lacks(engine: str, spec: ModelSpec) -> tuple[str, ...]:
    """Name the ops of a model that an engine lacks. Cost: a look at each node."""
    if engine == NATIVE:
        from wire.native.plan import lacks as native

        return native(spec)
    return ()


def having(spec: ModelSpec, engines: Iterable[str]) -> tuple[str, ...]:
    """Leave out the engines that lack an op of a model.

    Raises:
        Unsupported: None is left; the text names the ops that each lacks.
    """
    missing = {engine: lacks(engine, spec) for engine in engines}
    found = tuple(engine for engine, ops in missing.items() if not ops)
    if not found:
        said = "; ".join(f"engine {engine!r} has no {', '.join(ops)}" for engine, ops in missing.items())
        raise Unsupported(f"model {spec.name!r} needs an engine that is not here: {said}")
    return found
