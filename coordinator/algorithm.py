"""What an algorithm is: three pure functions over plain state (DESIGN decision 1).

``init(spec, weights, params) -> State``, ``plan(state, round_number, devices, rng) -> (State, drafts)`` and
``close(state, answers) -> State``. An algorithm never sends, waits, logs, or reads a clock or a file. Whoever calls it adds
ids, blobs and deadlines to its drafts, and hands it only answers that were checked: of this round, of the structure's
shapes, finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from coordinator.fitting import Means
from coordinator.fleet import Device
from wire.messages import Recipe, Usage, Verb
from wire.schema import Amount, Limit, Name, Natural
from wire.spec import ModelSpec, Structure

Floats = NDArray[np.float32]
Arrays = Mapping[str, Floats]
Levels = Mapping[str, NDArray[np.uint8]]
Masks = Mapping[str, NDArray[np.bool_]]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class State:
    """All that an algorithm remembers; one round's state and answers give the next round's state and nothing else does.

    Attributes:
        spec: The model. It never changes, so that a saved state may leave it out.
        round: Number of the round that was planned last; 0 before the first.
        weights: The global model by tensor name, in canonical order.
        levels: Group name to the narrowest capacity that still has each channel, in canonical order; empty when the model
            is never cut.
        widths: Group name to the channel counts of all widths, ascending; empty when the model is never cut.
        scalars: Plain nested maps, lists, strings and numbers.
        arrays: Whatever else is an array.
        masks: What is kept of which weights, by tensor name, in the tensor's whole shape; empty when every weight is kept.
            What devices are sent and what is measured are the kept weights alone; what `weights` holds elsewhere is the
            algorithm's own business. With widths there are `mask_levels` instead.
        mask_levels: Nested masks, for devices of several sizes, instead of `masks`: tensor name to the narrowest capacity that
            keeps each weight, in the tensor's shape, and 255 for a weight that none keeps. Capacity k keeps the levels up to
            k; empty when there are no such masks (see `coordinator.blocks.masks.masks_at`). With widths there are as many
            sizes as these, and no weight's level is below those of its channels.
        norms: By capacity what its width has of its own: running statistics (`coordinator.blocks.norms`), weights and biases
            of norms (`coordinator.blocks.affines`); by tensor name, whole and in canonical order; empty when all widths read
            those in `weights`.
        form: How the values of masked weights travel down, one of `wire.forms.FORMS`; what that loses is lost to the devices
            of one round, and never to `weights`.
    """

    spec: ModelSpec
    round: int
    weights: Arrays
    levels: Levels = field(default_factory=dict)
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scalars: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    masks: Masks = field(default_factory=dict)
    form: str = ""
    mask_levels: Levels = field(default_factory=dict)
    norms: Mapping[int, Arrays] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeviceView:
    """What an algorithm may know of a device.

    Attributes:
        name: Its name.
        bytes_budget: Memory that an order may take there, above the worker's base.
        samples: Training samples that it holds.
        memory_scale: Measured over predicted memory, at least 1.
        seconds: Training time of its last answer; 0 when it never answered. Measured, so what depends on it cannot be
            repeated to the bit.
        seconds_turn: From the issue of that order to the answer's arrival: both transfers and the work. Measured likewise. 0
            when that is not known: it never answered, or the coordinator was started anew in between.
        engines: Engines that it may train on, the best first; empty for torch.
        drawn: Whether it was selected for this round. One that was not is asked only by an algorithm that wants it.
    """

    name: Name
    bytes_budget: Natural
    samples: Natural = 0
    memory_scale: Amount = 1.0
    seconds: Amount = 0.0
    seconds_turn: Amount = 0.0
    engines: Annotated[tuple[Name, ...], Limit(0, 8)] = ()
    drawn: bool = True

    @property
    def means(self) -> Means:
        """What decides which part of a model it holds."""
        return Means(self.bytes_budget, self.memory_scale, self.engines)

    @staticmethod
    def of(device: Device, *, drawn: bool = True) -> DeviceView:
        """Take a view of a device of the fleet."""
        return DeviceView(
            name=device.name,
            bytes_budget=0 if device.caps is None else device.caps.bytes_budget,
            samples=0 if device.caps is None else device.caps.samples,
            memory_scale=device.memory_scale,
            seconds=0.0 if device.usage is None else device.usage.seconds,
            seconds_turn=device.seconds_turn,
            engines=() if device.caps is None else device.caps.engines,
            drawn=drawn,
        )


@dataclass(frozen=True, slots=True)
class Draft:
    """The half of an order that the algorithm decides.

    Attributes:
        device: Who is asked.
        verb: What to do.
        structure: Which part of the model; an order to calibrate is about all narrower widths as well.
        recipe: How to train; its seed is already this round's and this device's.
        bytes_peak: What the device's memory must hold above base, margin included.
    """

    device: Name
    verb: Verb
    structure: Structure
    recipe: Recipe
    bytes_peak: Natural = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One device's answer to its order of the round that is being closed.

    Attributes:
        device: Who answers.
        samples: Training samples behind the update.
        structure: What was trained; may be narrower than asked.
        metrics: As in `wire.messages.Reply`.
        usage: As in `wire.messages.Reply`.
        update: Trained minus received weights: compact, in wire order; read-only, and valid until the next answer is taken.
            Zero where a tensor was not sent; a tensor that was not sent at all is left out.
        sent: What was sent of each tensor that was not sent whole: the structure's masks, or what the rule chose.
        extras: What the rule tells beside the update (importance, saliency), by name of the tensor that it is about:
            positions in C order, ascending, and the values there.
        norms: What an order to calibrate has observed, as ``CAPACITY/TENSOR``: compact, of that capacity, in wire order.
        seconds_turn: From the order's issue to this answer's arrival, as in `DeviceView`; 0 where that is not known.
    """

    device: str
    samples: int
    structure: Structure
    metrics: Mapping[str, float]
    usage: Usage
    update: Arrays
    sent: Masks = field(default_factory=dict)
    extras: Mapping[str, tuple[Places, Floats]] = field(default_factory=dict)
    norms: Arrays = field(default_factory=dict)
    seconds_turn: float = 0.0


class Answers(Protocol):
    """A round's answers in the order of device names: may be gone through again and again, with one in memory at a time.

    That is up to who goes through them too: a loop lets go of its answer (``del``) before the next is read.
    """

    def __iter__(self) -> Iterator[Answer]:
        """Start over from the first device."""


@dataclass(frozen=True, slots=True)
class About:
    """Where an algorithm comes from, and what holds it to that.

    Attributes:
        paper: Authors, place and year.
        tier: ``paper``, one of the four that this software implements whole; ``baseline``, what they compare with; ``ours``.
        tests: File of the tests that hold it against its equations.
    """

    paper: str
    tier: Literal["paper", "baseline", "ours"]
    tests: str


class Algorithm(Protocol):
    """The three functions; a module in `coordinator.algorithms` has them and its parameters' defaults in ``PARAMS``.

    It may have two more. ``facts(state) -> Mapping[str, float]``: a few numbers that are worth reading after a round, such as
    how well a fit explains what was measured. They go into the journal with the closed round and into the points of a curve;
    nothing else depends on them (`coordinator.facts`). Densities of masks are told for every algorithm. And
    ``wanted(state) -> tuple[str, ...]``: names of devices that `plan` is to see in any case, drawn or not, and here or not. An
    order to one that is away waits for it, until the round's time is over. The state is the one that `plan` is about to get.
    """

    @property
    def ABOUT(self) -> About:  # noqa: N802 - a module's constant
        """Its paper and its tests."""

    @property
    def PARAMS(self) -> Mapping[str, float | str]:  # noqa: N802 - a module's constant
        """Names of all parameters with their defaults; those of the recipe are called ``recipe.NAME``."""

    def init(self, spec: ModelSpec, weights: Arrays, params: Mapping[str, float | str]) -> State:
        """Make the state before the first round.

        Args:
            spec: The model.
            weights: Initial weights in canonical order.
            params: What the operator changes about ``PARAMS``.

        Raises:
            ConfigError: A parameter is unknown or impossible; the text says what to write.
        """

    def plan(
        self, state: State, round_number: int, devices: tuple[DeviceView, ...], rng: np.random.Generator
    ) -> tuple[State, tuple[Draft, ...]]:
        """Decide who gets what in a round. A device that nothing fits gets no draft; no devices, no drafts.

        Args:
            state: After the last close.
            round_number: From 1.
            devices: Who is here and was selected, and who was wanted as far as such a device is known, by name.
            rng: Of this run's seed and this round.
        """

    def close(self, state: State, answers: Answers | Iterable[Answer]) -> State:
        """Join a round's answers into the model. No answers leave it as it is."""


def rng_of(seed: int, round_number: int) -> np.random.Generator:
    """Give the source of all randomness of one round."""
    return np.random.default_rng([seed, round_number])
