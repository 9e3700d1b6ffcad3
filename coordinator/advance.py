"""One step of a run, from files to files: close a round, plan the next one, encode its weights.

This is the only place that feeds an algorithm. It is a function of its `Task` alone, so the coordinator calls it in its own
process for a small model and in a child (`python -m coordinator.advance`) for a large one, and a restart repeats it with the
same bytes as result. New blobs lie in the spool when it returns; making them durable is the caller's business.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.algorithm import Answer, DeviceView, Draft, State, rng_of
from coordinator.algorithms import by_name
from coordinator.blocks.initial import initial_weights
from wire import structure as cutting
from wire import tensor
from wire.child import die_with_parent
from wire.errors import Malformed, NestlingError
from wire.job import read_frame, write_frame
from wire.messages import BlobRef, Reply
from wire.schema import Name, Natural
from wire.spec import ModelSpec, Structure, decode, parameter_count, tensor_shapes
from wire.spool import Spool

_KEPT_OPEN_BYTES = 1 << 20


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
        closing: Whether a round is to be closed.
        replies: Its counted replies.
        round: Number of the round to plan.
        devices: Whom to plan it for; none to rank and encode the weights only.
    """

    spool: str
    spec: str
    algo: Name
    params: Mapping[Name, float | str]
    recipe: Mapping[Name, float | str]
    seed: Natural
    state: str
    closing: bool
    replies: tuple[Reply, ...]
    round: Natural
    devices: tuple[DeviceView, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it.

    Attributes:
        state: Digest of the state after closing and planning.
        drafts: The orders, as far as the algorithm decides them.
        shells: The weights to publish, smallest shell first; empty ones are left out.
        shell_of: For each capacity, how many of `shells` make it up.
        structures: Every width of the model, narrowest first.
        error: Why nothing came of it; empty when all is well.
    """

    state: str = ""
    drafts: tuple[Draft, ...] = ()
    shells: tuple[BlobRef, ...] = ()
    shell_of: tuple[Natural, ...] = ()
    structures: tuple[Structure, ...] = ()
    error: str = field(default="")


def advance(task: Task) -> Outcome:
    """Do one step. Memory: the state, one accumulator of its size and one reply at a time.

    Raises:
        NestlingError: A blob cannot be read or the algorithm refuses its parameters.
    """
    spool = Spool(Path(task.spool))
    spec = decode(spool.path(task.spec).read_bytes())
    algorithm = by_name(task.algo)
    if task.state:
        state = load_state(spool, task.state, spec)
    else:
        weights = initial_weights(spec, task.seed)
        state = algorithm.init(spec, weights, {**task.params, **{f"recipe.{k}": v for k, v in task.recipe.items()}})
    if task.closing:
        state = algorithm.close(state, Answers(spool, spec, task.replies))
    state, drafts = algorithm.plan(state, task.round, task.devices, rng_of(task.seed, task.round))
    shells, shell_of, structures = encode_shells(spool, spec, state)
    return Outcome(save_state(spool, state).digest, tuple(drafts), shells, shell_of, structures)


@dataclass(frozen=True, slots=True)
class Answers:
    """The replies of a round, as often as an algorithm likes, in the order of device names, one large update at a time.

    Small updates stay open from one pass to the next, because opening one costs more than reading it.
    """

    spool: Spool
    spec: ModelSpec
    replies: tuple[Reply, ...]
    _open: dict[str, Mapping[str, np.ndarray[Any, Any]]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Answer]:
        """Yield one `Answer` at a time; its arrays are valid until the next one."""
        for reply in sorted(self.replies, key=lambda r: r.device):
            if reply.update is None:
                continue
            yield Answer(
                device=reply.device,
                samples=reply.samples,
                structure=reply.structure,
                metrics=reply.metrics,
                usage=reply.usage,
                update=self._update(reply.update),
            )

    def _update(self, ref: BlobRef) -> Mapping[str, np.ndarray[Any, Any]]:
        known = self._open.get(ref.digest)
        if known is None:
            most = parameter_count(self.spec, Structure())
            blob = tensor.open_blob(self.spool.path(ref.digest), elements_max=most)
            known = {name: blob.tensor(name) for name in blob.names}  # the views keep the file mapped
            views = all(blob.entry(name).encoding == "dense" and not blob.entry(name).form for name in blob.names)
            if views and ref.size <= _KEPT_OPEN_BYTES:
                self._open[ref.digest] = known
        return known


def check_update(path: Path, spec: ModelSpec, structure: Structure) -> None:
    """Refuse an update before any arithmetic touches it.

    Raises:
        Malformed: It is not an update blob, or a tensor is missing, foreign, or of the wrong shape or type.
        NonFinite: It holds a NaN or an infinity.
    """
    wanted = tensor_shapes(spec, structure)
    with tensor.open_blob(path, elements_max=sum(map(prod, wanted.values()))) as blob:
        if blob.kind != "update" or set(blob.names) != set(wanted):
            raise Malformed(f"expected an update of {len(wanted)} tensors, got {blob.kind!r} of {len(blob.names)}")
        for name, shape in wanted.items():
            entry = blob.entry(name)
            if entry.shape != shape or entry.dtype != "float32":  # before anything of that shape is allocated
                raise Malformed(f"tensor {name!r} is {entry.dtype}{entry.shape}, expected float32{shape}")
            blob.tensor(name)  # a sparse one is decoded once, to be sure that it can be
        blob.require_finite()


def encode_shells(
    spool: Spool, spec: ModelSpec, state: State
) -> tuple[tuple[BlobRef, ...], tuple[int, ...], tuple[Structure, ...]]:
    """Write the state's weights into the spool as nested shells (DESIGN decision 8).

    Returns:
        The blobs, smallest shell first; for each capacity the number of them that it needs; and every width's structure.
    """
    structures = structures_of(state)
    whole = cutting.to_wire(spec, state.weights, state.levels)
    refs: list[BlobRef] = []
    shell_of = []
    for structure in structures:
        shell = cutting.shell(spec, whole, structure)
        if shell:
            meta = {"capacity": structure.capacity, "ranking": structure.ranking}
            refs.append(write(spool, "shell", shell, meta))
        shell_of.append(len(refs))
    return tuple(refs), tuple(shell_of), structures


def structures_of(state: State) -> tuple[Structure, ...]:
    """Give every width of a state, narrowest first; exactly one, the whole model, when nothing is cut."""
    if not state.widths:
        return (Structure(),)
    count = len(next(iter(state.widths.values())))
    ranking = cutting.ranking_digest(state.levels)
    return tuple(Structure(k, state.widths, ranking) for k in range(count))


def save_state(spool: Spool, state: State) -> BlobRef:
    """Write a state as one blob: weights, levels and extra arrays as tensors, the rest in its header."""
    tensors: dict[str, np.ndarray[Any, Any]] = {
        **{f"w/{name}": array for name, array in state.weights.items()},
        **{f"l/{name}": array for name, array in state.levels.items()},
        **{f"x/{name}": array for name, array in state.arrays.items()},
    }
    meta = {"round": state.round, "widths": {k: list(v) for k, v in state.widths.items()}, "scalars": state.scalars}
    return write(spool, "state", tensors, meta)


def load_state(spool: Spool, digest: str, spec: ModelSpec) -> State:
    """Read a state of this model back; its arrays are read-only views of the file."""
    blob = tensor.open_blob(spool.path(digest))
    if blob.kind != "state":
        raise Malformed(f"expected a state, got a {blob.kind!r}")
    parts: dict[str, dict[str, np.ndarray[Any, Any]]] = {"w": {}, "l": {}, "x": {}}
    for name in blob.names:
        room, _, rest = name.partition("/")
        parts[room][rest] = blob.tensor(name)
    widths = {k: tuple(v) for k, v in blob.meta["widths"].items()}
    return State(
        spec=spec,
        round=blob.meta["round"],
        weights=parts["w"],
        levels=parts["l"],
        widths=widths,
        scalars=blob.meta["scalars"],
        arrays=parts["x"],
    )


def write(spool: Spool, kind: str, tensors: Mapping[str, np.ndarray[Any, Any]], meta: Mapping[str, Any]) -> BlobRef:
    """Write one blob into the spool."""
    handle, name = tempfile.mkstemp(dir=spool.root, prefix=".new-")
    os.close(handle)
    return spool.add_file(Path(name), tensor.write_blob(Path(name), kind, tensors, meta=meta).digest)


def main() -> None:
    """Do the one task that stands on stdin and write its outcome to stdout."""
    die_with_parent(os.getppid())
    task = read_frame(sys.stdin.buffer, (Task,))
    try:
        outcome = advance(task) if isinstance(task, Task) else Outcome(error="expected a task")
    except NestlingError as error:
        outcome = Outcome(error=f"{type(error).__name__}: {error}")
    write_frame(sys.stdout.buffer, outcome)


if __name__ == "__main__":
    main()
