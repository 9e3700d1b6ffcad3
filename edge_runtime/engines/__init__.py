"""Engines: what runs a model forward and backward. A rule sees numpy arrays and never learns which engine made them.

An engine is one module in this folder with a function ``create(threads, timings)`` that gives a maker of `Engine`, and
one line in `ENGINES`. This module itself loads neither numpy nor an engine, so that the agent may ask what there is.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from wire.errors import DeviceError, Unsupported
from wire.prices import having

if TYPE_CHECKING:
    from edge_runtime.engines.arrays import Arrays, Floats, Labels
    from edge_runtime.kernels import Watch
    from edge_runtime.kernels.choose import Timing
    from wire.masks import AnyMask
    from wire.messages import Loss
    from wire.segments import Cuts
    from wire.spec import ModelSpec, Structure

ENGINES: dict[str, tuple[str, str]] = {
    "native": ("edge_runtime.engines.native", "numpy"),
    "torch": ("edge_runtime.engines.torch", "torch"),
}
"""Name to the module that holds it and the package that it needs, the best first: torch takes 210 MiB and seconds to load."""


@dataclass(frozen=True, slots=True)
class Update:
    """How weights move along a gradient; the closed list that an engine may fuse into its backward pass.

    With gradient ``g`` and weight ``w``: ``g += decay * w + pull * (w - anchor)``; ``v = momentum * v + g`` (``v = g``
    without momentum); ``w -= rate * v``. It is the plain SGD of torch, without dampening or Nesterov.

    Attributes:
        rate: Learning rate.
        momentum: 0 for none; otherwise `velocity` is needed.
        decay: L2 weight decay.
        pull: Strength of the proximal term; 0 for none, otherwise `anchor` is needed.
        velocity: The rule's own momentum arrays, by tensor name; they are written.
        anchor: Weights that `pull` draws towards, by tensor name.
    """

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    pull: float = 0.0
    velocity: Mapping[str, Floats] | None = None
    anchor: Mapping[str, Floats] | None = None


def _always(_: frozenset[str]) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Choice:
    """How masked weights are to be held; what this does not say is found out by timing on this device.

    Attributes:
        batch: Samples per training step that is timed.
        ways: Tensor name to ``dense``, ``sparse`` (the kit's first layout) or the name of a layout. The empty name
            stands for all that are not named. What is named is not timed: timing may choose otherwise the next time, and
            another way rounds otherwise. Who wants the same bits again names all, as `Engine.ways` says them.
        allows: Whether memory allows that these tensors are all dense. What is named is not asked for, but counts along.
    """

    batch: int = 20
    ways: Mapping[str, str] = field(default_factory=dict)
    allows: Callable[[frozenset[str]], bool] = _always


class Engine(Protocol):
    """One loaded model."""

    @property
    def name(self) -> str:
        """As in `ENGINES`."""

    @property
    def spec(self) -> ModelSpec:
        """The model that is loaded; SpecError when there is none yet."""

    @property
    def structure(self) -> Structure:
        """Which part of the model is loaded."""

    @property
    def params(self) -> Arrays:
        """Weights by tensor name, float32; writing to them changes the model.

        A masked weight that is held sparse is one line of its kept values, in an order that only the engine knows (see
        `read`); one that is held dense has its shape, and zeros where the mask has none.
        """

    @property
    def grads(self) -> Arrays:
        """Gradients by tensor name; a backward pass adds to them. Made when first asked for.

        Running statistics of norms have none (`wire.spec.statistics`): a training pass of the widest width moves them.
        """

    @property
    def logits(self) -> Floats:
        """Output of the latest `forward_backward`, ``(n, classes)``."""

    @property
    def ways(self) -> Mapping[str, str]:
        """How each masked tensor is held: ``dense``, or the name of its layout."""

    def timings(self) -> tuple[Timing, ...]:
        """Give what masked layers were found to take per step on this device, by layer, density, batch and way."""

    def load(
        self,
        spec: ModelSpec,
        structure: Structure,
        arrays: Mapping[str, Floats] | None = None,
        masks: Mapping[str, AnyMask] | None = None,
        choice: Choice | None = None,
    ) -> None:
        """Take a model and a copy of its weights; without any, the caller writes them into `params`.

        Args:
            spec: The model.
            structure: The part of it.
            arrays: By tensor name. A masked weight is given in its shape (what is not kept is not read), or as its kept
                values in C order.
            masks: By name of weights of linear layers and convolutions: what is kept. The others stay as they are, and
                only what is kept is trained. What is made of them is used again where the next ones are the very same bits.
            choice: How masked weights are held. With masks, the same inputs give the same bits again only if it names the
                way of each (`Choice.ways`, as `ways` says them), with the same build of the kernels.

        Raises:
            SpecError: The model cannot be run, or a weight or mask has another shape than the structure says.
            BudgetExceeded: A masked weight has no layout here, and `choice` does not allow that it is dense.

        Cost: with masks whose speed is not known yet, about 0.2 s per layer and twice that for the model.
        """

    def read(self, name: str) -> Floats:
        """Give a copy of a tensor's values in C order: ``(kept,)`` of a masked one, else all. It is what travels."""

    def write(self, name: str, values: Floats) -> None:
        """Set a tensor's values; undoes `read`.

        Raises:
            SpecError: There are not as many.
        """

    def bytes_of_weights(self, update: Update | None = None) -> int:
        """Count what weights take: values, where they stand, gradients if there are any, and what `update` holds."""

    def seed(self, *numbers: int) -> None:
        """Say where the randomness of training passes begins: the same numbers, and as many passes since, drop the same."""

    def recompute(self, cuts: Cuts) -> None:
        """Cut training passes into segments that keep their input alone and run again in the backward pass; none by default.

        Losses, gradients and running statistics are the same to the bit. It holds until another model is loaded, for narrower
        widths that are made from then on too.

        Args:
            cuts: Places of nodes (`wire.segments.places`); the time of what lies before the last is spent twice.

        Raises:
            SpecError: The model cannot be cut there, or has masks.
        """

    def observe(self, x: Floats, share: float) -> None:
        """Norm inputs ``(n, *input_shape)`` by their own statistics, and move the running ones towards these by `share`.

        Nothing is dropped, and no gradient is made.
        """

    def forward(self, x: Floats) -> Floats:
        """Give the logits ``(n, classes)`` of inputs ``(n, *input_shape)``; norms use their running statistics."""

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
        """Add ``scale`` times the gradient of the mean loss to `grads`, or apply `update` and keep none.

        Args:
            x: Inputs ``(n, *input_shape)``.
            y: Labels, int64 ``(n,)``; or distributions over the classes, float32 ``(n, classes)``.
            scale: Weight of this call; micro-batches of n out of N samples with scale n / N add up to the full batch, but for
                batch norms: these take every micro-batch for a batch of its own, and their running statistics move with each.
            update: Move the weights at once. `grads` is left as it was found.
            watch: Shown what passes through every masked layer, the last first, for the gradient of weights that are not
                there (`edge_runtime.kernels.importance`).
            loss: As in `wire.messages.Recipe`.

        Returns:
            The mean loss, not scaled.
        """

    def narrow(self, structure: Structure, own: Mapping[str, Floats] | None = None) -> Engine:
        """Give a narrower width of this model: its weights are views of these, its gradients add into these.

        In its arrays an axis with several runs of its channels (`wire.spec.Axis.outer`) stands as two: ``(outer, rest)``. Its
        training passes norm by their own batches and leave running statistics alone.

        Args:
            structure: The width.
            own: Running statistics, weights and biases of norms that it has of its own, by tensor name and in its compact
                shapes; they are copied, and their gradients are its own too. Statistics that are not its own are views of
                this engine's, which are right for this engine's width alone.

        Raises:
            SpecError: It is no prefix of what is loaded, or masks are; or what is its own is not a norm's, of its shape.
        """

    def evaluate(self, x: Floats, y: Labels, batch: int = 64) -> tuple[float, int]:
        """Give the summed cross-entropy and the number of right answers, `batch` samples at a time. No gradients."""


Make = Callable[[], Engine]


def available() -> tuple[str, ...]:
    """Name the engines whose package is installed, best first. Nothing is loaded. Cost: a few stat calls."""
    return tuple(name for name, (_, package) in ENGINES.items() if importlib.util.find_spec(package) is not None)


def suited(spec: ModelSpec) -> str:
    """Name the best engine that is installed and has all ops of a model.

    Raises:
        Unsupported: There is none; the text names the ops that each lacks.
    """
    return having(spec, available() or ENGINES)[0]


def open_engine(name: str, threads: int = 1, timings: Path | None = None) -> Make:
    """Load an engine's package and give a function that makes empty engines.

    Args:
        name: One of `ENGINES`; empty for the best that is available.
        threads: Cores that it may use; with 1, the same inputs give the same bits again. With masks they do only if the ways
            to hold them are pinned (`Choice.ways`, as `Engine.ways` says them): timing may choose others the next time.
        timings: File for what was found out about this device's speed; None to keep it in this process only.

    Raises:
        Unsupported: There is no such engine.
        DeviceError: Its package is not installed or does not load here; the text says what to do.
    """
    if not name:
        name = next(iter(available()), next(iter(ENGINES)))
    if name not in ENGINES:
        raise Unsupported(f"engine {name!r}; known here: {', '.join(ENGINES)}")
    module_name, package = ENGINES[name]
    if package == "torch":
        _spare_dynamo()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise DeviceError(f"engine {name!r} does not load: {error}; install it with: pip install {package}") from None
    return cast("Make", module.create(threads, timings))


def _spare_dynamo() -> None:
    """Stand in for torch's compiler, which decorators would pull in: 72 MB and a second that nothing here needs."""
    if "torch" in sys.modules or "torch._dynamo" in sys.modules:
        return
    stub = types.ModuleType("torch._dynamo")
    stub.__dict__.update(
        disable=lambda fn=None, *_, **__: fn, is_compiling=lambda: False, graph_break=lambda *_, **__: None
    )
    sys.modules["torch._dynamo"] = stub
