"""A whole run in one process: virtual devices on a virtual clock, and everything else real.

The rounds are `coordinator.round.step`, the arithmetic is `coordinator.advance.advance`, the training is
`edge_runtime.worker.perform` - the very functions of a run over MQTT. Only time, the network and the devices' fates are made
up, from the seed; so a run can be repeated to the byte, and without weather its model is the one that real devices with the
same shares would train.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import journal
from coordinator.advance import Head, Outcome, Task, advance, load_state, stored
from coordinator.algorithm import DeviceView, Draft
from coordinator.algorithms import wanted_by
from coordinator.answers import check_update
from coordinator.round import Arm, Arrived, Deadline, Issued, Lost, Refused, Round, Send, Settle, open_round, step, word
from coordinator.select import choose
from coordinator.shells import structures_of
from coordinator.show import RunView
from coordinator.simulate import fleet, report, weather
from coordinator.simulate.world import Config, World, build, token
from coordinator.weights import read
from edge_runtime.data import Dataset
from edge_runtime.shrink import Room, as_granted
from edge_runtime.worker import perform
from wire.errors import ConfigError, NestlingError
from wire.job import Done, Failed, Job
from wire.maskfile import WHOLE, Held, read_masks
from wire.messages import BlobRef, Order, Recipe, Refusal, Reply
from wire.spec import ModelSpec, Structure, group_sizes

_BUDGET = 1 << 40


@dataclass(slots=True)
class Log:
    """The run as its journal would tell it, and what the devices keep.

    Attributes:
        view: All records so far, for progress and for the result.
        now: The virtual clock, seconds.
        began: When the open round was issued.
        keeps: Device and rule to the file of the device's own state.
        seconds: Device to the training time of its last answer, and to what its whole turn took.
        held: Device to the digests of the blobs that it had for its last order, and need not be sent again.
        done: Device to what came of its order, while that is on its way up.
        state: Digest of the algorithm's state. One that is there before the run is what the run starts from.
        weights: Digest of weights to start from; empty for chance.
        own: Device to the accuracy of the final model, at its width and on its own test data; filled when all rounds are over.
    """

    view: RunView = field(default_factory=RunView)
    now: float = 0.0
    began: float = 0.0
    keeps: dict[tuple[str, str], Path] = field(default_factory=dict)
    seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    held: dict[str, frozenset[str]] = field(default_factory=dict)
    done: dict[str, Done | Failed] = field(default_factory=dict)
    state: str = ""
    weights: str = ""
    own: dict[str, float] = field(default_factory=dict)

    def write(self, round_number: int, record: journal.Record) -> None:
        """Append one record."""
        self.view.absorb([journal.Entry(self.view.last + 1, self.now, round_number, record)])


def simulate(
    config: Config, progress: Callable[[RunView], None] | None = None, weights: Path | None = None
) -> report.Result:
    """Run it; the result has the shape of DESIGN section 6, and ``seconds_virtual`` is the virtual time.

    Args:
        config: What to run.
        progress: Told after every round.
        weights: File to start from, as safetensors; None for weights by chance.

    Raises:
        NestlingError: The configuration, the data or the model cannot work; the text says what to write.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
        world = build(config, Path(folder))
        log = Log() if weights is None else Log(weights=stored(world.spool, read(weights, world.spec)))
        for _ in play(world, log):
            if progress is not None:
                progress(log.view)
        return report.result(
            log.view,
            world.spec,
            data=config.data,
            partition=config.partition,
            partition_digest=world.digest,
            seconds=time.monotonic() - began,
            final=report.Final(structures_of(load_state(world.spool, log.state, world.spec))[-1], log.own),
        )


_DRAWS = 30
"""How often devices are drawn for a round before it is said that none can hold any part of the model."""


def play(world: World, log: Log) -> Iterator[int]:
    """Run all rounds; yields the number of each when it is over.

    Raises:
        ConfigError: No device can hold any part of the model.
    """
    config = world.config
    about: dict[str, str | int | float | bool] = {"algo": config.algo, "model": config.model, "seed": config.seed}
    log.write(0, journal.RunStarted(world.run, about={**about, "rounds": config.rounds, "simulated": True}))
    outcome = _advanced(world, log, Outcome(state=log.state), 1, None)
    current: Round | None = None
    for number in range(1, config.rounds + 1):
        orders = {draft.device: _order(world, draft, outcome, number) for draft in outcome.drafts}
        if not orders:
            raise ConfigError(f"no device of fleet {config.fleet!r} can hold any part of model {config.model!r}")
        quorum = config.terms.quorum or None
        log.write(number, journal.Planned(number, outcome.state, tuple(orders.values()), quorum, config.terms.seconds))
        ids = {device: order.id for device, order in orders.items()}
        current = open_round(number, world.run, ids, quorum=quorum, seconds=config.terms.seconds, earlier=current)
        log.began = log.now
        down = sum(fleet.bytes_down(order, log.held.get(order.device, ())) for order in orders.values())
        current = _fought(world, log, current, orders)
        outcome = _advanced(world, log, outcome, number + 1, current)
        log.state = outcome.state
        if current.phase == "closed":
            devices = tuple(reply.device for reply in current.replies)
            up = sum(reply.update.size for reply in current.replies if reply.update is not None)
            took, facts = log.now - log.began, outcome.facts
            log.write(number, journal.Closed(number, outcome.state, devices, took, up, down, facts))
            if number % config.terms.evaluate_every == 0 or number == config.rounds:
                log.write(number, journal.Evaluated(number, _measured(world, outcome, number)))
        else:
            log.write(number, journal.Abandoned(number, "quorum was not reached"))
        world.spool.sweep({world.spec_ref.digest, outcome.state, *(ref.digest for ref in outcome.blobs)})
        yield number
    log.own = _owned(world, log.view, outcome)
    log.write(config.rounds, journal.Finished())


@dataclass(frozen=True, slots=True)
class _Trained:
    """A device has trained, or its memory has shrunk, by the virtual clock.

    Only now is the work really done, if it is still wanted.
    """

    device: str
    order: str


@dataclass(frozen=True, slots=True)
class _Sent:
    """A device's answer is up."""

    device: str
    order: str


def _fought(world: World, log: Log, current: Round, orders: Mapping[str, Order]) -> Round:
    """Play one round to its end on the virtual clock."""
    ties = itertools.count()
    agenda: list[tuple[float, int, _Trained | _Sent | Deadline | Lost]] = []
    made: dict[str, Path] = {}
    event: Issued | Arrived | Refused | Deadline | Lost = Issued(log.now)
    while True:
        before = current
        current, effects = step(current, event)
        if current is not before and isinstance(event, (Arrived, Refused, Lost)):
            log.write(current.number, event)
        for effect in effects:
            if isinstance(effect, Arm):
                heapq.heappush(agenda, (effect.at, next(ties), Deadline(effect.at)))
            elif isinstance(effect, Send):
                at, what = _foreseen(world, log, orders[effect.device])
                heapq.heappush(agenda, (at, next(ties), what))
            elif isinstance(effect, Settle) and effect.device in made:
                order = orders[effect.device]
                log.keeps[effect.device, order.recipe.rule] = made.pop(effect.device)
        if current.over:
            return current
        log.now, _, due = heapq.heappop(agenda)
        while isinstance(due, _Trained | _Sent) and word(current, due.device, due.order) != "more":
            log.now, _, due = heapq.heappop(agenda)
        while isinstance(due, _Trained):
            heapq.heappush(agenda, (_worked(world, log, orders[due.device]), next(ties), _Sent(due.device, due.order)))
            log.now, _, due = heapq.heappop(agenda)
        event = _answered(world, log, orders[due.device], made) if isinstance(due, _Sent) else due


def _foreseen(world: World, log: Log, order: Order) -> tuple[float, _Trained | Lost]:
    """Say when a device will have trained, or be lost."""
    machine = world.clients[order.device].machine
    fate = weather.fate(world.weather, world.config.seed, order.round, order.device)
    down = machine.seconds_down(fleet.bytes_down(order, log.held.get(order.device, ())))
    log.held[order.device] = frozenset(ref.digest for ref in order.blobs)
    before, work = machine.seconds_order + down, _seconds_of_work(world, order)
    if fate.lost_at is not None:
        return log.now + fate.lost_at * fate.factor * (before + work), Lost(order.device, order.round)
    known = 1.0 if fate.squeezed_at is None else fate.squeezed_at  # of the rest `_worked` says how long it takes
    return log.now + fate.factor * (before + known * work), _Trained(order.device, order.id)


def _seconds_of_work(world: World, order: Order, structure: Structure | None = None) -> float:
    """Give how long an order trains, or would if it were about another structure."""
    client = world.clients[order.device]
    about = order if structure is None else dataclasses.replace(order, structures=(structure,))
    return fleet.seconds_of_work(client.machine, world.spec, about, len(client.data.train[0]))


def _seconds_squeezed(world: World, order: Order, structure: Structure) -> float:
    """Give how long an order trains after memory has shrunk, on the width that was answered about; 0 where it has not."""
    fate = weather.fate(world.weather, world.config.seed, order.round, order.device)
    if fate.squeezed_at is None:
        return 0.0
    return (1.0 - fate.squeezed_at) * _seconds_of_work(world, order, structure)


def _worked(world: World, log: Log, order: Order) -> float:
    """Do an order for real; gives the instant at which the answer is up."""
    client = world.clients[order.device]
    keep = log.keeps.get((order.device, order.recipe.rule))
    out = world.spool.root.parent / "out" / order.device
    for old in out.iterdir() if out.exists() else ():
        if old not in {path for (device, _), path in log.keeps.items() if device == order.device}:
            old.unlink()
    fate = weather.fate(world.weather, world.config.seed, order.round, order.device)
    room = functools.partial(fate.room, order.bytes_peak)
    done = _performed(world, order, (client.data, client.machine.bytes_budget), keep, room)
    size, rest = 0, _seconds_squeezed(world, order, done.structure) if isinstance(done, Done) else 0.0
    if isinstance(done, Done) and done.update_ref is not None:
        size = done.update_ref.size
        try:
            check_update(Path(done.update), world.spec, done.structure, _held(world, order))
        except NestlingError as error:
            done = Failed("nonfinite", str(error), 0, 0)
    log.done[order.device] = done
    return log.now + fate.factor * (rest + client.machine.seconds_up(size))


def _held(world: World, order: Order) -> Held:
    return WHOLE if order.masks is None else read_masks(_path(world, order.masks), world.spec, order.structures[0])


def _path(world: World, ref: BlobRef | None) -> str:
    return "" if ref is None else str(world.spool.path(ref.digest))


def _answered(world: World, log: Log, order: Order, made: dict[str, Path]) -> Arrived | Refused:
    """Give what the coordinator hears."""
    done = log.done.pop(order.device)
    if isinstance(done, Failed):
        refusal = Refusal(order.id, order.device, world.run, done.reason, done.detail, done.bytes_needed)
        return Refused(order.device, order.id, refusal)
    fate = weather.fate(world.weather, world.config.seed, order.round, order.device)
    seconds = (1.0 if fate.squeezed_at is None else fate.squeezed_at) * _seconds_of_work(world, order)
    seconds += _seconds_squeezed(world, order, done.structure)
    log.seconds[order.device] = seconds, log.now - log.began
    if done.keep:
        made[order.device] = Path(done.keep)
    ref = done.update_ref
    reply = Reply(
        order=order.id,
        device=order.device,
        boot=world.run,
        structure=done.structure,
        update=None if ref is None else world.spool.add_file(Path(done.update), ref.digest),
        keep=done.keep_digest,
        samples=done.samples,
        metrics=done.metrics,
        usage=dataclasses.replace(done.usage, seconds=seconds),
    )
    return Arrived(order.device, order.id, reply)


def _performed(
    world: World, order: Order, means: tuple[Dataset, int], keep: Path | None = None, room: Room = as_granted
) -> Done | Failed:
    """Do an order with these data within this budget."""
    data, budget = means
    out = world.spool.root.parent / "out" / order.device
    out.mkdir(parents=True, exist_ok=True)
    job = Job(
        order=order,
        spec=str(world.spool.path(world.spec_ref.digest)),
        shells=tuple(str(world.spool.path(ref.digest)) for ref in order.shells),
        out=str(out),
        keep="" if keep is None else str(keep),
        bytes_budget=budget,
        micro_batch=0,
        threads=1,
        masks=_path(world, order.masks),
    )
    return perform(job, data, engine=world.config.engine, pinned=True, room=room)


def _advanced(world: World, log: Log, outcome: Outcome, number: int, ended: Round | None) -> Outcome:
    """Close the round that has ended, if it is to be closed, and plan the next one."""
    config, replies = world.config, ended.replies if ended is not None and ended.phase == "closed" else ()
    planned = outcome
    for draw in range(_DRAWS):  # of few devices that are drawn, perhaps none can hold what there is
        names = choose(config.terms.select, world.clients, seed=config.seed, round_number=number, draw=draw)
        shown = names if wanted_by(config.algo) is None else sorted(world.clients)
        views = tuple(_view(world, log, name, drawn=name in names) for name in shown)
        planned = advance(
            Task(
                spool=str(world.spool.root),
                spec=world.spec_ref.digest,
                algo=config.algo,
                params=config.params,
                recipe={},
                seed=config.seed,
                state=outcome.state,
                replies=replies,
                round=number,
                devices=views,
                weights=log.weights,
                turns={reply.device: log.seconds[reply.device][1] for reply in replies},
            )
        )
        if planned.drafts or len(names) == len(world.clients):
            break
    return planned


def _view(world: World, log: Log, name: str, *, drawn: bool) -> DeviceView:
    client, (work, turn) = world.clients[name], log.seconds.get(name, (0.0, 0.0))
    samples, engines = len(client.data.train[0]), (world.config.engine,)
    view = DeviceView(name, client.machine.bytes_budget, samples, seconds=work, seconds_turn=turn, engines=engines)
    return dataclasses.replace(view, drawn=drawn)


def _order(world: World, draft: Draft, outcome: Outcome, number: int) -> Order:
    name = token("order", world.run, number, draft.device)
    return outcome.order(draft, Head(name, world.run, number, world.spec_ref, world.config.terms.seconds))


def _measured(world: World, outcome: Outcome, number: int) -> dict[str, float]:
    """Measure every width of the model on the held-out data, as the coordinator's local worker would."""
    head = Head(
        token("order", world.run, number, "local"), world.run, number, world.spec_ref, world.config.terms.seconds
    )
    metrics: dict[str, float] = {}
    for order in outcome.evaluations(head, Recipe(batch=256)):
        done = _performed(world, order, (world.test, _BUDGET))
        if isinstance(done, Failed):
            raise ConfigError(f"the model cannot be measured on {world.config.data}: {done.detail}")
        metrics |= done.metrics
    return metrics


def _owned(world: World, view: RunView, outcome: Outcome) -> dict[str, float]:
    """Measure the model of the last aggregation on every device's own test data, as its worker would: at its last width.

    That is after the run: it takes neither virtual time nor bytes. Devices that never trained, or have no test data, or no
    room even for their width's forward pass, are left out; all are where no round was closed.
    """
    found = {}
    closed = any(one.outcome == "closed" for one in view.rounds.values())
    for name, last in view.trained().items() if closed else ():
        client, number = world.clients[name], world.config.rounds + 1
        structure = _at_width(world.spec, outcome.structures, last.reply.structure)
        if not len(client.data.test[0]):
            continue
        draft = Draft(name, "evaluate", structure, Recipe(batch=256))
        done = _performed(world, _order(world, draft, outcome, number), (client.data, client.machine.bytes_budget))
        if isinstance(done, Done):
            found[name] = done.metrics[f"accuracy.{structure.capacity}"]
    return found


def _at_width(spec: ModelSpec, structures: Sequence[Structure], last: Structure) -> Structure:
    """Find a device's width among the model's; where widths are others by now (FedMP), the widest that is no wider."""
    if structures[0].widths == last.widths:
        return structures[min(last.capacity, len(structures) - 1)]
    most = group_sizes(spec, last)
    fitting = [one for one in structures if all(n <= most[group] for group, n in group_sizes(spec, one).items())]
    return fitting[-1] if fitting else structures[0]
