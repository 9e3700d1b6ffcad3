"""The worker: one order in, one answer out.

`perform` is a plain function, and simulation calls it in its own process. Around it stands a thin process that takes
jobs at its door (`edge_runtime.door`) and writes frames to its standard output. It is the only road from an agent to an
engine: its memory truly goes back to the system when it ends, and its crash is an event to the agent, not the end of
it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from edge_runtime import calibrate, exits, personal, rules
from edge_runtime.apart import Apart
from edge_runtime.data import Dataset, Source, load
from edge_runtime.door import Pipe, Reception, entrance, say
from edge_runtime.engines import Engine, suited
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import finite
from edge_runtime.holding import load as load_masked
from edge_runtime.holding import price
from edge_runtime.inputs import part_of, read_spec
from edge_runtime.memory import plan as planning
from edge_runtime.memory.guard import Gauge, offer_to_oom_killer, rest, settle_allocator, starved, wall
from edge_runtime.memory.limit import Limit
from edge_runtime.outgoing import Outgoing, values_of
from edge_runtime.received import Received
from edge_runtime.rules import still
from edge_runtime.scoring import score
from edge_runtime.shrink import Room, Squeezed, as_granted
from edge_runtime.tuning import Tuning, passes
from edge_runtime.warm import warm
from wire.child import die_with_parent
from wire.errors import (
    BudgetExceeded,
    DataError,
    DeviceError,
    NestlingError,
    NonFinite,
    PeerError,
    SpecError,
    StoreError,
    Unsupported,
)
from wire.job import Done, Failed, Job, Progress, Ready
from wire.maskfile import Held, read_masks
from wire.memory import Prediction
from wire.messages import Reason, Usage
from wire.norms import APART
from wire.schema import from_plain
from wire.spec import ModelSpec, Structure, tensor_shapes
from wire.tensor import Coding, write_blob

Report = Callable[[Progress], None]
SECONDS_BETWEEN_REPORTS = 0.2
UNKNOWN = Prediction(0, 0)


@dataclass(frozen=True, slots=True)
class Process:
    """What an order knows of the process that it is done in; nothing in simulation, where one is many devices.

    Attributes:
        gauge: Measures it and puts up the memory wall; without it the reported peak is the predicted one.
        timings: File for what is found out about this device's speed; None to keep it in this process only.
    """

    gauge: Gauge | None = None
    timings: Path | None = None


NO_PROCESS = Process()


def perform(
    job: Job,
    data: Dataset,
    report: Report | None = None,
    *,
    engine: str = "",
    process: Process = NO_PROCESS,
    pinned: bool = False,
    room: Room = as_granted,
) -> Done | Failed:
    """Do one order. The same job over the same data gives the same bytes again on one thread.

    Args:
        job: The order and its files. Results are written into the folder ``job.out`` as ``<order id>.update`` and
            ``<order id>.keep``. A micro-batch of 0 is chosen here, to fit ``job.bytes_budget``; another is taken as it is.
        data: The device's data.
        report: Told of progress at most every 0.2 s.
        engine: Which engine, where the job does not say it; empty for the best that is installed and has all ops.
        process: What is known of the process that this is done in.
        pinned: Choose how masked weights are held by their density alone, not by timing, so that the same job over the same
            data gives the same bytes with masks too.
        room: Looked at between batches: what the order may take by then.
    """
    job = job if job.engine else replace(job, engine=engine)
    work = _Work(job, data, process, report, _throttled(report, process.gauge), pinned, room)
    try:
        if job.order.verb == "train":
            return _train(work)
        if job.order.verb == "evaluate":
            return _evaluate(work)
        if job.order.verb == "calibrate":
            return _calibrate(work)
        return work.failed("unsupported", f"this worker cannot {job.order.verb}")
    except BudgetExceeded as error:
        return work.failed("memory", str(error))
    except MemoryError as error:
        return work.failed("oom", f"out of memory: {error}")
    except RuntimeError as error:
        if starved(error):
            return work.failed("oom", f"out of memory: {error}")
        raise
    except NonFinite as error:
        return work.failed("nonfinite", str(error))
    except (DataError, StoreError, PeerError, SpecError, DeviceError) as error:
        reason: Reason = "data" if isinstance(error, (DataError, StoreError)) else "unsupported"
        if isinstance(error, PeerError) and not isinstance(error, Unsupported):
            reason = "data"
        return work.failed(reason, str(error))
    finally:
        if process.gauge is not None:
            wall(0)
            rest()  # the agent looks what is left


@dataclass(slots=True)
class _Work:
    """What one order needs at every turn."""

    job: Job
    data: Dataset
    process: Process
    report: Report | None
    tell: Callable[[float, float], None]
    pinned: bool
    room: Room
    started: float = 0.0
    bytes_budget: int = 0
    predicted: Prediction = UNKNOWN
    micro_batch: int = 0

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.bytes_budget = self.job.bytes_budget
        if self.process.gauge is not None:
            self.process.gauge.rested()

    @property
    def bytes_peak(self) -> int:
        return self.process.gauge.peak() if self.process.gauge is not None else self.predicted.peak

    def failed(self, reason: Reason, detail: str) -> Failed:
        return Failed(reason, detail[:2000], self.predicted.bound, self.bytes_peak)

    def usage(self, engine: str) -> Usage:
        base = self.process.gauge.bytes_base if self.process.gauge is not None else 0
        seconds = time.monotonic() - self.started
        return Usage(base, self.bytes_peak, self.bytes_budget, seconds, self.micro_batch, engine)

    def open(self) -> Engine:
        """Make an empty engine; only then is the base taken, since the first use of a library costs memory of its own."""
        make = warm(self.job.engine, self.job.threads, self.process.timings)
        self.settle(self.job.engine)
        engine = make()
        if self.report is not None:
            # Loading an engine may take a minute on a small device; the agent hears that it is over.
            self.report(Progress(0.0, None, 0))
        return engine

    def settle(self, engine: str) -> None:
        """Begin to measure and put up the wall."""
        if self.process.gauge is not None:
            self.process.gauge.begin(engine)
            self.process.gauge.enclose(self.job.bytes_budget)

    def squeezed(self, engine: Engine, received: Received) -> Squeezed:
        """Keep an order that is about to be trained within what it may take."""
        dense = frozenset(name for name, way in engine.ways.items() if way == "dense")

        def bound(structure: Structure, micro_batch: int) -> int:
            """Predict, and remember: the last that is asked for is what the order will take, or would have to."""
            self.predicted = price(self.job, engine.spec, structure, micro_batch, dense)
            return self.predicted.bound

        def settle(room: int, micro_batch: int) -> None:
            self.bytes_budget, self.micro_batch = room, micro_batch
            if self.process.gauge is not None:  # what is measured from here on is of the width that the answer names
                self.process.gauge.begin(engine.name)
                self.process.gauge.enclose(room)

        granted = (self.bytes_budget, self.predicted.bound, self.micro_batch)
        return Squeezed(engine, self.room, bound, settle, granted, own=received.norms)


def _train(work: _Work) -> Done:
    order, out = work.job.order, Path(work.job.out)
    spec, structure = read_spec(work.job.spec), order.structures[0]
    rule = rules.find(order.recipe.rule)
    update, keep = out / f"{order.id}.update", out / f"{order.id}.keep"
    if not rule.NEEDS_ENGINE:
        work.settle("")
        held = read_masks(work.job.masks, spec, structure)
        shapes = tensor_shapes(spec, structure) | {name: (kept,) for name, kept in structure.kept.items()}
        moves = {name: still.update(order.recipe, order.round, shape) for name, shape in shapes.items()}
        ref = write_blob(update, "update", moves, coding=Coding(form=order.recipe.form, outline=held.outline))
        return Done(structure, str(update), ref, "", "", len(work.data.train[0]), {}, work.usage(""))
    x, y = part_of(spec, work.data, "train")
    micro_batch = _micro_batch(work, spec)
    outgoing, received, metrics, name = _trained(work, (spec, structure), rule, (x, y), micro_batch)
    ref, keep_ref = outgoing.write(work.job.keep, received, update, keep)
    usage = work.usage(name)
    return Done(outgoing.structure, str(update), ref, str(keep), keep_ref.digest, len(x), metrics, usage)


def _trained(
    work: _Work,
    model: tuple[ModelSpec, Structure],
    rule: rules.Rule,
    train: tuple[Floats, Labels],
    micro_batch: int,
) -> tuple[Outgoing, Received, dict[str, float], str]:
    """Give what was trained, metrics (of a model tuned later, when it is) and the engine's name; copies are freed."""
    order, recipe, (spec, structure) = work.job.order, work.job.order.recipe, model
    engine, received, held = _loaded(work, spec, structure, micro_batch)
    if not finite(engine.params):
        raise NonFinite("a weight that was received is no number")
    metrics: dict[str, float] = {}
    test = part_of(spec, work.data, "test") if len(work.data.test[0]) else None
    if test is not None:
        metrics["accuracy.before"], metrics["loss.before"] = score(engine, test, micro_batch)
    own = personal.own(work.job.keep, order.run, spec, structure)
    engine.seed(recipe.seed, order.round)
    squeeze = work.squeezed(engine, received)
    apart = Apart(received.norms) if recipe.knobs.get(APART) else Apart()
    tunes = passes(recipe, spec, masked=bool(held.masks))
    task = rules.Task(recipe, engine, *train, order.round, micro_batch, work.tell, held.masks, own, squeeze, apart)
    trained = rule.train(task)
    if squeeze.at is not None:
        structure, metrics["squeezed"] = engine.structure, squeeze.at
        received = Received(spec, structure, work.job.shells, held)
    tuned = Tuning(task, received, test, metrics).own if tunes and trained.update is None else None
    if test is not None and tuned is None:
        metrics["accuracy.after"], metrics["loss.after"] = score(engine, test, work.micro_batch)
    if trained.losses:
        metrics["loss"], metrics["loss.first"] = trained.losses[-1], trained.losses[0]
    metrics |= trained.metrics
    values = values_of(engine, held.masks)
    more = (recipe.form, apart.moves(spec), tuned, work.data.labels)
    outgoing = Outgoing(order.run, spec, structure, held, values, trained, *more)
    return outgoing, received, metrics, engine.name


def _loaded(work: _Work, spec: ModelSpec, structure: Structure, micro_batch: int) -> tuple[Engine, Received, Held]:
    """Give an engine with the order's weights, where they came from, and their masks."""
    engine = work.open()  # first: what masks take is the order's, and no part of the base
    held = read_masks(work.job.masks, spec, structure)
    received = Received(spec, structure, work.job.shells, held)
    if not held.masks:
        engine.load(spec, structure)
        engine.recompute(work.job.cuts)
        received.fill(engine.params)
        return engine, received, held
    left = work.process.gauge.bytes_left if work.process.gauge is not None else 0
    load_masked(engine, (spec, structure), held.masks, work.job, micro_batch, pinned=work.pinned, bytes_left=left)
    for name, values in received.lines():
        engine.write(name, values)
    dense = frozenset(name for name, way in engine.ways.items() if way == "dense")
    if dense:
        work.predicted = price(work.job, spec, structure, micro_batch, dense)
    return engine, received, held


def _evaluate(work: _Work) -> Done:
    order = work.job.order
    spec = read_spec(work.job.spec)
    widest = max(order.structures, key=lambda s: s.capacity)
    test = part_of(spec, work.data, "test")
    batch = _micro_batch(work, spec)
    engine, received, _ = _loaded(work, spec, widest, batch)
    metrics: dict[str, float] = {}
    for done, structure in enumerate(sorted(order.structures, key=lambda s: s.capacity), 1):
        width = engine if structure == widest else engine.narrow(structure, received.norms(structure.capacity))
        accuracy, loss = score(width, test, batch)
        metrics[f"accuracy.{structure.capacity}"], metrics[f"loss.{structure.capacity}"] = accuracy, loss
        work.tell(done / len(order.structures), loss)
    return Done(widest, "", None, "", "", len(test[0]), metrics, work.usage(engine.name))


def _calibrate(work: _Work) -> Done:
    order, structure = work.job.order, calibrate.structure_of(work.job.order)
    spec = read_spec(work.job.spec)
    x, _ = part_of(spec, work.data, "train")
    batch = _micro_batch(work, spec)
    engine, received, _ = _loaded(work, spec, structure, batch)
    seeds = order.recipe.seed, order.round
    seen = calibrate.observed(engine, received.norms, x, batch, seeds=seeds, tell=work.tell)
    path = Path(work.job.out) / f"{order.id}.update"
    ref = write_blob(path, "update", seen)
    return Done(structure, str(path), ref, "", "", len(x), {}, work.usage(engine.name))


def _micro_batch(work: _Work, spec: ModelSpec) -> int:
    """Take the agent's choice, or choose, also the engine and where the model is cut.

    Raises:
        BudgetExceeded: Not even one sample at a time fits.
    """
    job = work.job
    engine, budget = job.engine or suited(spec), 0 if job.micro_batch else job.bytes_budget
    fits = planning.plan(job.order, spec, budget, engine=engine)
    if isinstance(fits, planning.Refused):
        work.predicted = Prediction(0, fits.bytes_needed)
        raise BudgetExceeded(fits.detail)
    micro_batch = work.micro_batch = job.micro_batch or fits.micro_batch
    job = work.job = replace(job, cuts=job.cuts if job.micro_batch else fits.cuts, engine=engine)
    widest = max(job.order.structures, key=lambda s: s.capacity)
    work.predicted = price(job, spec, widest, micro_batch)
    return micro_batch


def _throttled(report: Report | None, gauge: Gauge | None) -> Callable[[float, float], None]:
    latest = time.monotonic()

    def tell(done: float, loss: float) -> None:
        nonlocal latest
        now = time.monotonic()
        if report is not None and now - latest >= SECONDS_BETWEEN_REPORTS:
            latest = now
            report(Progress(done, loss, gauge.peak() if gauge is not None else 0))

    return tell


def main(words: Sequence[str] | None = None) -> int:
    """Run the process; give its exit code: 0 at the end of the input, 2 without data, 3 after running out of memory."""
    die_with_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the agent decides what it means
    settle_allocator()
    offer_to_oom_killer()
    parser = argparse.ArgumentParser(
        "edge_runtime.worker", description="Trains one order after another; see wire/job.py."
    )
    parser.add_argument("--data", required=True, help="a Source as JSON")
    parser.add_argument("--engine", default="", help="which engine; default: the best that is installed")
    parser.add_argument("--threads", type=int, default=1, help="cores that training may use")
    parser.add_argument("--timings", type=Path, help="file for what is found out about this device's speed")
    parser.add_argument("--limit", type=Path, help="file with what an order may take, looked at while it runs")
    parser.add_argument("--reserve", type=int, default=0, help="bytes that must stay available; 0: do not look")
    parser.add_argument("--preload", action="store_true", help="load the engine before the first order")
    options = parser.parse_args(words)
    orders, answers = entrance(), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not get between the frames
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        data = load(from_plain(Source, json.loads(options.data), strict=True))
        if options.preload:
            warm(options.engine, options.threads, options.timings)
    except (NestlingError, ValueError) as error:
        say(answers, Failed("data" if isinstance(error, DataError) else "unsupported", str(error)[:2000], 0, 0))
        return exits.WORKER_UNFIT
    gauge = Gauge()
    shape = tuple(data.input_shape)
    say(answers, Ready(options.engine, gauge.bytes_base, len(data.train[0]), data.classes, shape))
    room = Limit(options.limit, options.reserve, gauge)
    process = Process(gauge, options.timings)
    work = functools.partial(perform, data=data, engine=options.engine, process=process, room=room)
    return _serve(orders, answers, work, gauge)


def _serve(orders: Pipe | Reception, answers: IO[bytes], work: Callable[..., Done | Failed], gauge: Gauge) -> int:
    while (job := orders.take()) is not None:
        try:
            answer = work(job, report=lambda progress: say(answers, progress))
        except Exception as error:  # noqa: BLE001 - whatever it is, the agent hears it before this process ends
            traceback.print_exc()
            say(answers, Failed("crash", f"{type(error).__name__}: {error}"[:2000], 0, gauge.peak()))
            return exits.WORKER_CRASHED
        say(answers, answer)
        if isinstance(answer, Failed) and answer.reason == "oom":
            return exits.WORKER_MEMORY  # what is mapped is never given back: the next order gets a fresh process
    return exits.WORKER_OK


if __name__ == "__main__":
    sys.exit(main())
