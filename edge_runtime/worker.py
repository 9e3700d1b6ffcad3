"""The worker: one order in, one answer out.

`perform` is a plain function, and simulation calls it in its own process. Around it stands a thin process that reads
job frames from its standard input and writes frames to its standard output. It is the only road from an agent to an
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
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Literal

import numpy as np

from edge_runtime import personal, rules
from edge_runtime.data import Dataset, Source, load
from edge_runtime.engines import Engine, Make, open_engine
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.engines.update import finite
from edge_runtime.holding import choice, price
from edge_runtime.memory import plan as planning
from edge_runtime.memory.guard import Gauge, offer_to_oom_killer, settle_allocator, wall
from edge_runtime.outgoing import Outgoing
from edge_runtime.received import Received
from edge_runtime.rules import still
from wire import zoo
from wire.child import die_with_parent
from wire.errors import (
    BudgetExceeded,
    DataError,
    DeviceError,
    Malformed,
    NestlingError,
    NonFinite,
    PeerError,
    SpecError,
    Unsupported,
)
from wire.job import Done, Failed, Job, Progress, Ready, read_frame, write_frame
from wire.maskfile import Held, read_masks
from wire.messages import Reason, Recipe, Usage
from wire.schema import from_plain
from wire.spec import ModelSpec, Structure, decode, tensor_shapes
from wire.tensor import Coding, write_blob

Report = Callable[[Progress], None]
SECONDS_BETWEEN_REPORTS = 0.2
WHOLE = Structure()


def perform(
    job: Job,
    data: Dataset,
    report: Report | None = None,
    *,
    engine: str = "",
    gauge: Gauge | None = None,
    pinned: bool = False,
    timings: Path | None = None,
) -> Done | Failed:
    """Do one order. The same job over the same data gives the same bytes again on one thread.

    Args:
        job: The order and its files. Results are written into the folder ``job.out`` as ``<order id>.update`` and
            ``<order id>.keep``. A micro-batch of 0 is chosen here, to fit ``job.bytes_budget``; another is taken as it is.
        data: The device's data.
        report: Told of progress at most every 0.2 s.
        engine: Which engine; empty for the best that is installed.
        gauge: Measures this process and puts up the memory wall; without it the reported peak is the predicted one.
        pinned: Choose how masked weights are held by their density alone, not by timing, so that the same job over the same
            data gives the same bytes with masks too.
        timings: File for what is found out about this device's speed; None to keep it in this process only.
    """
    work = _Work(job, data, engine, gauge, report, _throttled(report, gauge), pinned, timings)
    try:
        if job.order.verb == "train":
            return _train(work)
        if job.order.verb == "evaluate":
            return _evaluate(work)
        return work.failed("unsupported", f"this worker cannot {job.order.verb}")
    except BudgetExceeded as error:
        return work.failed("memory", str(error))
    except MemoryError as error:
        return work.failed("oom", f"out of memory: {error}")
    except RuntimeError as error:
        # torch reports a failed allocation as a RuntimeError and by its text alone.
        if "allocate memory" in str(error):
            return work.failed("oom", str(error))
        raise
    except NonFinite as error:
        return work.failed("nonfinite", str(error))
    except (DataError, PeerError, SpecError, DeviceError) as error:
        reason: Reason = "data" if isinstance(error, DataError) else "unsupported"
        if isinstance(error, PeerError) and not isinstance(error, Unsupported):
            reason = "data"
        return work.failed(reason, str(error))
    finally:
        if gauge is not None:
            wall(0)


@dataclass(slots=True)
class _Work:
    """What one order needs at every turn."""

    job: Job
    data: Dataset
    engine: str
    gauge: Gauge | None
    report: Report | None
    tell: Callable[[float, float], None]
    pinned: bool = False
    timings: Path | None = None
    started: float = 0.0
    bytes_needed: int = 0
    bytes_predicted: int = 0

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    @property
    def bytes_peak(self) -> int:
        return self.gauge.peak() if self.gauge is not None else self.bytes_predicted

    def failed(self, reason: Reason, detail: str) -> Failed:
        return Failed(reason, detail[:2000], self.bytes_needed, self.bytes_peak)

    def usage(self, micro_batch: int, engine: str) -> Usage:
        base = self.gauge.bytes_base if self.gauge is not None else 0
        seconds = time.monotonic() - self.started
        return Usage(base, self.bytes_peak, self.job.bytes_budget, seconds, micro_batch, engine)

    def open(self) -> Engine:
        """Make an empty engine; only then is the base taken, since the first use of a library costs memory of its own."""
        make = _warm(self.engine, self.job.threads, self.timings)
        engine = make()
        self.settle(engine.name)
        if self.report is not None:
            # Loading an engine may take a minute on a small device; the agent hears that it is over.
            self.report(Progress(0.0, None, 0))
        return engine

    def settle(self, engine: str) -> None:
        """Begin to measure and put up the wall."""
        if self.gauge is not None:
            self.gauge.begin(engine)
            wall(self.job.bytes_budget)


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
        return Done(structure, str(update), ref, "", "", len(work.data.train[0]), {}, work.usage(0, ""))
    x, y = _part(spec, work.data, "train")
    micro_batch = _micro_batch(work, spec)
    outgoing, received, metrics, name = _trained(work, (spec, structure), rule, (x, y), micro_batch)
    ref, keep_ref = outgoing.write(work.job.keep, received, update, keep)
    usage = work.usage(micro_batch, name)
    return Done(structure, str(update), ref, str(keep), keep_ref.digest, len(x), metrics, usage)


def _trained(
    work: _Work,
    model: tuple[ModelSpec, Structure],
    rule: rules.Rule,
    train: tuple[Floats, Labels],
    micro_batch: int,
) -> tuple[Outgoing, Received, dict[str, float], str]:
    """Give what was trained, the metrics and the engine's name; gradients and copies are freed on the way out."""
    order, (spec, structure) = work.job.order, model
    engine, received, held = _loaded(work, spec, structure, micro_batch)
    if not finite(engine.params):
        raise NonFinite("a weight that was received is no number")
    metrics: dict[str, float] = {}
    test = _part(spec, work.data, "test") if len(work.data.test[0]) else None
    if test is not None:
        metrics["accuracy.before"], metrics["loss.before"] = _score(engine, test, micro_batch)
    own = personal.own(work.job.keep, spec, structure)
    task = rules.Task(order.recipe, engine, *train, order.round, micro_batch, work.tell, held.masks, own)
    trained = rule.train(task)
    if test is not None:
        metrics["accuracy.after"], metrics["loss.after"] = _score(engine, test, micro_batch)
    if trained.losses:
        metrics["loss"], metrics["loss.first"] = trained.losses[-1], trained.losses[0]
    arrays = engine.params
    if held.masks:
        shapes = tensor_shapes(spec, structure)
        arrays = {name: engine.read(name) for name in arrays}
        arrays = {name: line if name in held.masks else line.reshape(shapes[name]) for name, line in arrays.items()}
    outgoing = Outgoing(spec, structure, held, arrays, trained, order.recipe.form)
    return outgoing, received, {**metrics, **trained.metrics}, engine.name


def _loaded(work: _Work, spec: ModelSpec, structure: Structure, micro_batch: int) -> tuple[Engine, Received, Held]:
    """Give an engine with the order's weights, where they came from, and their masks."""
    held = read_masks(work.job.masks, spec, structure)
    received = Received(spec, structure, work.job.shells, held)
    engine = work.open()
    if not held.masks:
        engine.load(spec, structure)
        received.fill(engine.params)
        return engine, received, held
    engine.load(spec, structure, None, held.masks, choice(work.job, spec, structure, micro_batch, pinned=work.pinned))
    for name, values in received.lines():
        engine.write(name, values)
    dense = frozenset(name for name, way in engine.ways.items() if way == "dense")
    if dense:
        work.bytes_predicted = price(work.job, spec, structure, micro_batch, dense).peak
    return engine, received, held


def _evaluate(work: _Work) -> Done:
    order = work.job.order
    spec = read_spec(work.job.spec)
    widest = max(order.structures, key=lambda s: s.capacity)
    test = _part(spec, work.data, "test")
    batch = _micro_batch(work, spec)
    engine, _, _ = _loaded(work, spec, widest, batch)
    metrics: dict[str, float] = {}
    for done, structure in enumerate(sorted(order.structures, key=lambda s: s.capacity), 1):
        width = engine if structure == widest else engine.narrow(structure)
        accuracy, loss = _score(width, test, batch)
        metrics[f"accuracy.{structure.capacity}"], metrics[f"loss.{structure.capacity}"] = accuracy, loss
        work.tell(done / len(order.structures), loss)
    return Done(widest, "", None, "", "", len(test[0]), metrics, work.usage(batch, engine.name))


def read_spec(path: str) -> ModelSpec:
    """Read and check a model file; one that has not changed is not read again.

    Raises:
        PeerError, SpecError: It is no model that can be run.
    """
    status = Path(path).stat()
    return _decoded(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4)
def _decoded(path: str, changed: int, size: int) -> ModelSpec:
    del changed, size  # they tell one content of the path from another
    return decode(Path(path).read_bytes())


def _part(spec: ModelSpec, data: Dataset, name: Literal["train", "test"]) -> tuple[Floats, Labels]:
    """Give one part of the device's data in the shape that the model wants.

    Raises:
        DataError: It is empty, or its samples or classes do not fit the model.
    """
    x, y = data.train if name == "train" else data.test
    if not len(x):
        raise DataError(f"{data.name}: the {name} part is empty")
    if prod(data.input_shape) != prod(spec.input_shape):
        raise DataError(f"{data.name}: a sample is {data.input_shape}, model {spec.name} wants {spec.input_shape}")
    if data.classes > spec.classes:
        raise DataError(f"{data.name} has {data.classes} classes, model {spec.name} tells {spec.classes} apart")
    return x.reshape(len(x), *spec.input_shape), y


def _micro_batch(work: _Work, spec: ModelSpec) -> int:
    """Take the agent's choice, or choose.

    Raises:
        BudgetExceeded: Not even one sample at a time fits.
    """
    job = work.job
    budget = 0 if job.micro_batch else job.bytes_budget
    fits = planning.plan(job.order, spec, budget)
    if isinstance(fits, planning.Refused):
        work.bytes_needed = fits.bytes_needed
        raise BudgetExceeded(fits.detail)
    micro_batch = job.micro_batch or fits.micro_batch
    widest = max(job.order.structures, key=lambda s: s.capacity)
    prediction = price(job, spec, widest, micro_batch)
    work.bytes_predicted, work.bytes_needed = prediction.peak, prediction.bound
    return micro_batch


def _score(engine: Engine, test: tuple[Floats, Labels], batch: int) -> tuple[float, float]:
    """Give accuracy and mean cross-entropy."""
    loss, correct = engine.evaluate(*test, batch)
    return correct / len(test[0]), loss / len(test[0])


def _throttled(report: Report | None, gauge: Gauge | None) -> Callable[[float, float], None]:
    latest = time.monotonic()

    def tell(done: float, loss: float) -> None:
        nonlocal latest
        now = time.monotonic()
        if report is not None and now - latest >= SECONDS_BETWEEN_REPORTS:
            latest = now
            report(Progress(done, loss, gauge.peak() if gauge is not None else 0))

    return tell


@functools.cache
def _warm(name: str, threads: int, timings: Path | None = None) -> Make:
    """Load an engine and train one tiny step: the first use of each kind of layer pages in code and builds kernels."""
    make = open_engine(name, threads, timings)
    spec = zoo.by_name("lenet-5")
    engine = make()
    engine.load(spec, WHOLE, {t: np.zeros(shape, np.float32) for t, shape in tensor_shapes(spec, WHOLE).items()})
    x, y = np.zeros((32, *spec.input_shape), np.float32), np.zeros(32, np.int64)
    engine.evaluate(x, y)
    rules.find("sgd").train(rules.Task(Recipe(clip=1.0), engine, x, y, 0, len(x), lambda *_: None))
    return make


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
    parser.add_argument("--preload", action="store_true", help="load the engine before the first order")
    options = parser.parse_args(words)
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the frames
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    try:
        data = load(from_plain(Source, json.loads(options.data), strict=True))
        if options.preload:
            _warm(options.engine, options.threads, options.timings)
    except (NestlingError, ValueError) as error:
        write_frame(answers, Failed("data" if isinstance(error, DataError) else "unsupported", str(error)[:2000], 0, 0))
        return 2
    gauge = Gauge()
    shape = tuple(data.input_shape)
    write_frame(answers, Ready(options.engine, gauge.bytes_base, len(data.train[0]), data.classes, shape))
    work = functools.partial(perform, data=data, engine=options.engine, gauge=gauge, timings=options.timings)
    return _serve(orders, answers, work, gauge)


def _serve(orders: IO[bytes], answers: IO[bytes], work: Callable[..., Done | Failed], gauge: Gauge) -> int:
    while (job := read_frame(orders)) is not None:
        if not isinstance(job, Job):
            raise Malformed(f"a worker was sent a {type(job).__name__}")
        try:
            answer = work(job, report=lambda progress: write_frame(answers, progress))
        except Exception as error:  # noqa: BLE001 - whatever it is, the agent hears it before this process ends
            traceback.print_exc()
            write_frame(answers, Failed("crash", f"{type(error).__name__}: {error}"[:2000], 0, gauge.peak()))
            return 1
        write_frame(answers, answer)
        if isinstance(answer, Failed) and answer.reason == "oom":
            return 3  # what is mapped by then is never given back; the next order deserves a fresh process
    return 0


if __name__ == "__main__":
    sys.exit(main())
