"""The server's way to `advance`: what to ask of it, where it runs, and what its outcome means for the journal."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.advance import Head, Outcome, Task, advance
from coordinator.algorithm import DeviceView
from coordinator.algorithms import wanted_by
from coordinator.config import Config
from coordinator.fleet import Fleet
from coordinator.journal import Journal
from coordinator.round import Round
from coordinator.select import choose
from coordinator.standing import Standing
from wire.child import Child, Ended, Said
from wire.errors import ConfigError, StoreError, WorkerLost
from wire.job import STEP_BYTES
from wire.maskfile import WHOLE, Held, read_masks
from wire.messages import BlobRef, Order
from wire.spec import ModelSpec, Structure, parameter_count
from wire.spool import Spool

log = logging.getLogger("coordinator")

_INLINE_BYTES = 4 << 20

Step = tuple[Task, Outcome]


@dataclass(slots=True)
class Store:
    """What is on this machine's disk for one run.

    Attributes:
        spool: Blobs by digest.
        journal: What happened.
        spec: The model.
        spec_ref: The model's blob.
        weights: Digest of the weights that the run starts from; empty for chance.
    """

    spool: Spool
    journal: Journal
    spec: ModelSpec
    spec_ref: BlobRef
    weights: str = ""

    @property
    def lasting(self) -> frozenset[str]:
        """What the spool keeps as long as the run lasts."""
        return frozenset({self.spec_ref.digest, self.weights})


class Steps:
    """Runs one step at a time: here when little is to be moved, else in a child, so that the owner thread stays awake.

    A child takes longer to import what it works with than to work, so where the step before needed one it is started while
    answers are under way (`ready`). It does one step and ends; nobody waits for that.
    """

    def __init__(self, config: Config, store: Store, post: Callable[[Said | Ended], None]) -> None:
        """`post` takes the child's events."""
        self._config = config
        self._store = store
        self._post = post
        self._child: Child | None = None
        self._spare: Child | None = None  # has been given nothing yet
        self._large = self._is_large(0)  # what the step before was
        self._task: Task | None = None
        self._vain = (0, 0)  # a round, and how often nobody who was drawn for it could take part

    @property
    def busy(self) -> bool:
        """Whether a child is at work."""
        return self._child is not None

    def ready(self) -> None:
        """Have a child ready, if the step before needed one. Where none can be started now, `begin` tries again."""
        if self._large and self._spare is None and self._child is None:
            try:
                self._spare = self._started()
            except OSError as error:
                log.warning("no process for the end of the round yet: %s", error)

    def begin(self, standing: Standing, current: Round | None, fleet: Fleet, *, closing: bool) -> Step | None:
        """Close the current round, or not, and plan the next one; None when a child does it and `take` will tell.

        Raises:
            NestlingError: As `advance` does.
        """
        task = self._task_of(standing, current, fleet, closing=closing)
        self._large = self._is_large(sum(reply.update.size for reply in task.replies if reply.update is not None))
        if not self._large:
            self._dismiss()
            return self._ended(task, advance(task))
        self._task = task
        self._child, self._spare = self._spare or self._started(), None
        try:
            self._child.send(task)
        except WorkerLost:  # it died while it waited
            self._child.let_go()
            self._child = self._started()
            self._child.send(task)
        return None

    def take(self, event: Said | Ended) -> Step | None:
        """Take in the child's word.

        Raises:
            ConfigError: The algorithm refuses its parameters.
            StoreError: It could not do its task.
        """
        if self._spare is not None and event.pid == self._spare.pid:  # it has died with nothing to do
            self._dismiss()
        if self._child is None or self._task is None or event.pid != self._child.pid:
            return None
        task = self._task
        self._child.let_go()
        self._child = self._task = None
        outcome = event.frame if isinstance(event, Said) else None
        if not isinstance(outcome, Outcome):
            raise StoreError(f"closing or planning round {task.round} ended without a result: {event}")
        if outcome.error:
            kind, _, said = outcome.error.partition(": ")
            if kind == ConfigError.__name__:
                raise ConfigError(said)
            raise StoreError(f"closing or planning round {task.round} failed: {outcome.error}")
        return self._ended(task, outcome)

    def stop(self) -> None:
        """End the children, if there are any."""
        for child in (self._child, self._spare):
            if child is not None:
                child.close()
        self._child = self._spare = self._task = None

    def _is_large(self, bytes_updates: int) -> bool:
        return 4 * parameter_count(self._store.spec, Structure()) + bytes_updates > _INLINE_BYTES

    def _started(self) -> Child:
        argv = ["coordinator.advance", self._config.algo]
        return Child("advance", argv, self._post, also=(Outcome,), limit=STEP_BYTES)

    def _dismiss(self) -> None:
        if self._spare is not None:
            self._spare.let_go()
        self._spare = None

    def _task_of(self, standing: Standing, current: Round | None, fleet: Fleet, *, closing: bool) -> Task:
        config = self._config
        number = (current.number if closing and current is not None else standing.done) + 1
        here = fleet.online()
        enough = len(here) >= config.round.devices and number <= config.rounds
        draw = self._vain[1] if self._vain[0] == number else 0
        names = choose(config.round.select, [d.name for d in here], seed=config.seed, round_number=number, draw=draw)
        replies = current.replies if closing and current is not None else ()
        known = (fleet.devices.get(reply.device) for reply in replies)
        return Task(
            spool=str(self._store.spool.root),
            spec=self._store.spec_ref.digest,
            algo=config.algo,
            params=config.params,
            recipe=config.recipe,
            seed=config.seed,
            state=standing.state,
            replies=replies,
            round=number,
            devices=_views(fleet, set(names), config.algo) if enough and names else (),
            weights=self._store.weights,
            turns={device.name: device.seconds_turn for device in known if device is not None},
        )

    def _ended(self, task: Task, outcome: Outcome) -> Step:
        if outcome.note:
            log.warning("%s", outcome.note)
        if task.devices and not outcome.drafts:  # others may hold a part of the model
            self._vain = (task.round, self._vain[1] + 1 if self._vain[0] == task.round else 1)
        return task, outcome


def _views(fleet: Fleet, drawn: set[str], algo: str) -> tuple[DeviceView, ...]:
    """Give the devices that were drawn, and where the algorithm may want others all that ever said what they bring."""
    if wanted_by(algo) is None:
        return tuple(DeviceView.of(device) for device in fleet.online() if device.name in drawn)
    known = sorted((d for d in fleet.devices.values() if d.caps is not None), key=lambda d: d.name)
    return tuple(DeviceView.of(device, drawn=device.name in drawn) for device in known)


def orders_of(config: Config, store: Store, run: str, step: Step) -> tuple[Order, ...]:
    """Complete an outcome's drafts: ids, blobs and the deadline."""
    task, outcome = step
    number, seconds = task.round, config.round.seconds
    return tuple(
        outcome.order(draft, Head(order_id(run, number, draft.device), run, number, store.spec_ref, seconds))
        for draft in outcome.drafts
    )


def held_for(store: Store, order: Order | None, structure: Structure) -> Held:
    """Give the masks that an answer to an order is written against.

    Raises:
        PeerError: The answer is about masks that the order did not have.
    """
    if order is None or order.masks is None or not structure.masks:
        return WHOLE
    return read_masks(str(store.spool.path(order.masks.digest)), store.spec, structure)


def order_id(run: str, number: int, device: str) -> str:
    """Name an order: the same run, round and device always give the same id."""
    return hashlib.blake2b(f"{run}/{number}/{device}".encode(), digest_size=8).hexdigest()
