"""One step of a run, from files to files: close a round, plan the next one, encode its weights.

This is the only place that feeds an algorithm. It is a function of its `Task` alone, so the coordinator calls it in its own
process for a small model and in a child (`python -m coordinator.advance`) for a large one, and a restart repeats it with the
same bytes as result. New blobs lie in the spool when it returns; making them durable is the caller's business.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.algorithm import Algorithm, Arrays, DeviceView, Draft, Floats, State, rng_of
from coordinator.algorithms import by_name, wanted_by
from coordinator.answers import Answers
from coordinator.blocks import norms
from coordinator.blocks.initial import initial_weights
from coordinator.config import Config
from coordinator.facts import facts_of
from coordinator.shells import Sized, encode_shells, encode_sizes, held_by, into, sizes_of, write
from coordinator.weights import KIND, started
from wire import tensor
from wire.child import die_with_parent
from wire.errors import Malformed, NestlingError
from wire.job import STEP_BYTES, read_frame, write_frame
from wire.maskfile import write_masks
from wire.messages import BlobRef, Order, Recipe, Reply
from wire.schema import Amount, Name, Natural
from wire.spec import ModelSpec, Structure, decode
from wire.spool import Spool


@dataclass(frozen=True, slots=True)
class Task:
    """What to do.

    Attributes:
        spool: Root of the spool.
        spec: Digest of the model's spec.
        algo: Name of the algorithm.
        params: Its parameters.
        recipe: The operator's changes to its recipe.
        seed: Of the run.
        state: Digest of the state to go on from; empty at the very start.
        replies: Counted replies of the round that is to be closed; none when there is no such round.
        round: Number of the round to plan.
        devices: Whom to plan it for; none to rank and encode the weights only. With an algorithm that has ``wanted`` all that
            are known, those among them that were drawn being marked.
        weights: Digest of what to start from (see `coordinator.weights`); empty for weights by chance.
        turns: Device to the seconds from the issue of the closed round to its reply; who is missing here is not known.
    """

    spool: str
    spec: str
    algo: Name
    params: Mapping[Name, float | str]
    recipe: Mapping[Name, float | str]
    seed: Natural
    state: str
    replies: tuple[Reply, ...]
    round: Natural
    devices: tuple[DeviceView, ...]
    weights: str = ""
    turns: Mapping[Name, Amount] = field(default_factory=dict)

    @property
    def closing(self) -> bool:
        """Whether a round is to be closed: one that closes has a reply."""
        return bool(self.replies)


@dataclass(frozen=True, slots=True)
class Head:
    """What an order says beside its draft and its blobs; see `wire.messages.Order`."""

    id: str
    run: str
    round: int
    spec: BlobRef
    seconds: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        state: Digest of the state after closing and planning.
        drafts: The orders, as far as the algorithm decides them.
        shells: The weights to publish, smallest shell first; empty ones are left out.
        shell_of: For each capacity, how many of `shells` make it up.
        structures: Every width of the model, narrowest first; with masks the one that they make.
        masks: The masks to publish; None when every weight is kept.
        sized: With nested masks, what each capacity is published as, instead of `shells` and `masks`.
        error: Why nothing came of it; empty when all is well.
        note: What the operator should know of it.
        facts: What is to be told of the round that was closed.
    """

    state: str = ""
    drafts: tuple[Draft, ...] = ()
    shells: tuple[BlobRef, ...] = ()
    shell_of: tuple[Natural, ...] = ()
    structures: tuple[Structure, ...] = ()
    masks: BlobRef | None = None
    sized: tuple[Sized, ...] = ()
    error: str = field(default="")
    note: str = ""
    facts: Mapping[Name, float] = field(default_factory=dict)

    @property
    def blobs(self) -> tuple[BlobRef, ...]:
        """All blobs that devices may need of it."""
        if self.sized:
            return tuple(ref for one in self.sized for ref in one.blobs)
        return self.shells if self.masks is None else (self.masks, *self.shells)

    def order(self, draft: Draft, head: Head) -> Order:
        """Complete a draft with ids, blobs and the deadline."""
        capacity = draft.structure.capacity
        masks = self.sized[capacity].masks if self.sized else self.masks
        return Order(
            id=head.id,
            run=head.run,
            round=head.round,
            device=draft.device,
            verb=draft.verb,
            spec=head.spec,
            shells=(self.sized[capacity].shell,) if self.sized else self.shells[: self.shell_of[capacity]],
            structures=(draft.structure,),
            recipe=draft.recipe,
            bytes_peak=draft.bytes_peak,
            seconds=head.seconds,
            masks=masks if draft.structure.masks else None,
        )

    def evaluations(self, head: Head, recipe: Recipe) -> tuple[Order, ...]:
        """Give the orders that measure every width: one for all, or with nested masks one for each size.

        Their metrics have different names, so that all of them together are those of the model.
        """
        drafts = [Draft("local", "evaluate", structure, recipe) for structure in self.structures]
        if self.sized:
            return tuple(self.order(draft, head) for draft in drafts)
        return (dataclasses.replace(self.order(drafts[-1], head), structures=self.structures),)


def advance(task: Task) -> Outcome:
    """Do one step. Memory: the state, one accumulator of its size and one reply at a time.

    Raises:
        NestlingError: A blob cannot be read or the algorithm refuses its parameters.
    """
    spool = Spool(Path(task.spool))
    spec = decode(spool.path(task.spec).read_bytes())
    algorithm, note, facts = by_name(task.algo), "", dict[str, float]()
    if task.state:
        state = load_state(spool, task.state, spec)
    else:
        weights = started(spool, task.weights) if task.weights else initial_weights(spec, task.seed)
        state = algorithm.init(spec, weights, _together(task.params, task.recipe))
        note = norms.advice(state)
    if task.closing:
        held, sizes = held_by(spec, state), sizes_of(spec, state)
        state, note = _closed(algorithm, state, Answers(spool, spec, task.replies, held, sizes, task.turns))
        facts = facts_of(algorithm, state)
    state, drafts = algorithm.plan(state, task.round, _asked(task, state), rng_of(task.seed, task.round))
    outcome = Outcome(save_state(spool, state).digest, tuple(drafts), note=note, facts=facts)
    if state.mask_levels:
        structures, sized = encode_sizes(spool, spec, state)
        return dataclasses.replace(outcome, structures=structures, sized=sized)
    shells, shell_of, structures = encode_shells(spool, spec, state)
    masks = into(spool, lambda path: write_masks(path, state.masks)) if state.masks else None
    return dataclasses.replace(outcome, shells=shells, shell_of=shell_of, structures=structures, masks=masks)


def rehearse(config: Config, spec: ModelSpec, weights: Arrays) -> None:
    """See that an algorithm takes its parameters with this model: a first round is planned, of no devices. Memory: the state.

    Raises:
        ConfigError: It does not; the text names the parameter.
    """
    algorithm = by_name(config.algo)
    state = algorithm.init(spec, weights, _together(config.params, config.recipe))
    algorithm.plan(state, 1, (), rng_of(config.seed, 1))


def _together(params: Mapping[str, float | str], recipe: Mapping[str, float | str]) -> dict[str, float | str]:
    return {**params, **{f"recipe.{name}": value for name, value in recipe.items()}}


def _asked(task: Task, state: State) -> tuple[DeviceView, ...]:
    """Give the devices that were drawn, and those that the algorithm wants."""
    wanted = wanted_by(task.algo)
    names = wanted(state) if wanted is not None else ()
    return tuple(device for device in task.devices if device.drawn or device.name in names)


def _closed(algorithm: Algorithm, state: State, answers: Answers) -> tuple[State, str]:
    """Close a round, as one without answers where these would leave a weight that is no number.

    Every update is finite, yet their sum, or what it is added to, may not be: one device is enough. Such a model could be
    neither ranked nor trained, and it would be what a restart goes on from.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        after = algorithm.close(state, answers)
    if all(np.isfinite(array).all() for arrays in (after.weights, *after.norms.values()) for array in arrays.values()):
        return after, ""
    return algorithm.close(
        state, ()
    ), f"round {state.round} would leave a weight that is not finite; its answers are left out"


def save_state(spool: Spool, state: State) -> BlobRef:
    """Write a state as one blob: weights, levels and extra arrays as tensors, the rest in its header."""
    tensors: dict[str, np.ndarray[Any, Any]] = {
        **{f"w/{name}": array for name, array in state.weights.items()},
        **{f"l/{name}": array for name, array in state.levels.items()},
        **{f"x/{name}": array for name, array in state.arrays.items()},
        **{f"m/{name}": np.packbits(mask) for name, mask in state.masks.items()},
        **{f"k/{name}": array for name, array in state.mask_levels.items()},
        **{f"n/{k}/{name}": array for k, arrays in state.norms.items() for name, array in arrays.items()},
    }
    meta = {"round": state.round, "widths": {k: list(v) for k, v in state.widths.items()}, "scalars": state.scalars}
    if state.form:
        meta["form"] = state.form
    return write(spool, "state", tensors, meta)


def load_state(spool: Spool, digest: str, spec: ModelSpec) -> State:
    """Read a state of this model back; its arrays are read-only views of the file."""
    blob = tensor.open_blob(spool.path(digest))
    if blob.kind != "state":
        raise Malformed(f"expected a state, got a {blob.kind!r}")
    parts: dict[str, dict[str, np.ndarray[Any, Any]]] = {"w": {}, "l": {}, "x": {}, "m": {}, "k": {}, "n": {}}
    for name in blob.names:
        room, _, rest = name.partition("/")
        parts[room][rest] = blob.tensor(name)
    widths = {k: tuple(v) for k, v in blob.meta["widths"].items()}
    shapes = {name: array.shape for name, array in parts["w"].items()}
    masks = {
        name: np.unpackbits(bits, count=prod(shapes[name])).view(np.bool_).reshape(shapes[name])
        for name, bits in parts["m"].items()
    }
    return State(
        spec=spec,
        round=blob.meta["round"],
        weights=parts["w"],
        levels=parts["l"],
        widths=widths,
        scalars=blob.meta["scalars"],
        arrays=parts["x"],
        masks=masks,
        form=blob.meta.get("form", ""),
        mask_levels=parts["k"],
        norms=_by_capacity(parts["n"]),
    )


def _by_capacity(named: Mapping[str, Floats]) -> dict[int, dict[str, Floats]]:
    found: dict[int, dict[str, Floats]] = {}
    for name, array in named.items():
        capacity, _, tensor_name = name.partition("/")
        found.setdefault(int(capacity), {})[tensor_name] = array
    return found


def stored(spool: Spool, weights: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Put weights that a run is to start from into the spool; gives the digest for `Task.weights`."""
    return write(spool, KIND, weights, {}).digest


def main(words: Sequence[str]) -> None:
    """Do the one task that stands on stdin and write its outcome to stdout; the algorithm of that name is here by then."""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator decides about it
    for word in words:
        by_name(word)
        rng_of(0, 0)
    task = read_frame(sys.stdin.buffer, (Task,), STEP_BYTES)
    if task is None:  # it was not needed
        return
    try:
        outcome = advance(task) if isinstance(task, Task) else Outcome(error="expected a task")
    except NestlingError as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    # Without a buffer, which would be written at the end; with nobody at the other end nobody waits for it.
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "wb", buffering=0) as coordinator:
        write_frame(coordinator, outcome, STEP_BYTES)


if __name__ == "__main__":
    main(sys.argv[1:])
