"""The device's agent: one owner thread between a broker and a worker. It loads neither numpy nor torch.

The loop asks the link for the next event (the worker's frames come through the same queue), folds it into the session, and
performs the effects. Timers, the heartbeat and systemd's watchdog are served from the same loop, so that a stuck agent looks
stuck.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from edge_runtime import session as table
from edge_runtime.config import Config
from edge_runtime.desk import Desk, Finished
from edge_runtime.fetch import Fetcher
from edge_runtime.frugal import give_back
from edge_runtime.guest import Guest, Move
from edge_runtime.keep import Keep
from edge_runtime.life import Life, address, claim, next_seq, notify
from edge_runtime.memory.limit import grant_of
from edge_runtime.offer import Offers
from edge_runtime.session import Session
from wire import codec, link, topics
from wire.child import Ended, Said
from wire.errors import DataError, NestlingError, PeerError, SpecError, Unsupported
from wire.job import Done, Job, Ready
from wire.link import Will
from wire.messages import Ack, Beat, Cancel, Lead, Order, Presence, Reason, Reply
from wire.spec import ModelSpec, decode
from wire.spool import Spool

log = logging.getLogger("edge_runtime")

SECONDS_SILENCE = 5.0
_SECONDS_IDLE = 3600.0
_MOVES: dict[Move, str] = {
    "still": "standing still",
    "on": "all hold again, going on",
    "away": "no orders until all hold again",
    "back": "all hold, taking orders",
}


class Stop:
    """Posted by a signal: leave on purpose."""


class Agent:
    """One life of one device."""

    def __init__(self, config: Config) -> None:
        """Prepare; nothing is opened before `run`, apart from the state folder.

        Raises:
            ConfigError: The broker's address or files cannot be used, or another agent runs over the same folder.
            StoreError: The state folder cannot be written.
        """
        root = Path(config.state.dir)
        self._config = config
        self._claim = claim(root)
        self._spool = Spool(root / "spool", config.bytes_spool)
        self._keep = Keep(root / "keep")
        self._session = Session(config.device, os.urandom(8).hex())
        self._life = Life(next_seq(root, time.time()), Guest(config.conditions))
        gone = Presence(config.device, "lost", self._session.boot, self._life.seq)
        will = Will(topics.presence(config.federation, config.device), codec.encode(gone), retain=True)
        self._link = self._life.link(config, will)
        self._desk = Desk(config, self._link.post)
        self._fetcher = Fetcher(self._link, self._spool, config.federation, config.device)
        self._spec: tuple[str, ModelSpec | None] = "", None
        self._grant = grant_of(config)
        self._offers = Offers(self._link, root / "out", config.federation)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            DataError: The device's data cannot be loaded; it would be so again after a restart.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self._recall()
        federation, device = self._config.federation, self._config.device
        self._link.subscribe([topics.down(federation, device, "+"), topics.lead(federation)])
        self._heed(time.monotonic())
        self._desk.start(time.monotonic())
        self._link.start()
        try:
            while not self._life.leaving:
                event = self._life.next(self._link, max(0.0, min(self._due() - time.monotonic(), _SECONDS_IDLE)))
                if event is not None:
                    self._take(event)
                self._tick(time.monotonic())
        finally:
            self._desk.stop()
            self._fetcher.stop()
            self._life.guest.close()
            bye = Presence(device, "bye", self._session.boot, self._life.seq)
            self._link.stop((topics.presence(federation, device), codec.encode(bye), True))
            self._claim.close()

    def _recall(self) -> None:
        """Go on where an earlier life was: what was committed counts, what was answered is offered, the rest comes again."""
        run, ended = self._keep.recover(self._config.federation)
        self._session = Session(self._config.device, self._session.boot, run=run, ended=ended)
        found = self._offers.recall(self._config.device, self._session.boot)
        if found is not None and (found[0].run, found[0].round) != (run, ended):
            self._session = self._session.recalled(*found)
            self._life.silence = time.monotonic() + SECONDS_SILENCE
        held = self._session.order.id if self._session.order is not None else ""
        self._keep.tidy(held)
        self._offers.tidy(held)

    # --- events --------------------------------------------------------------------------------------------------

    def _take(self, event: Any) -> None:
        match event:
            case link.Message():
                try:
                    self._message(event)
                except PeerError as error:
                    log.warning("dropped a message on %s: %s", event.topic[:120], error)
                finally:
                    self._link.done(event)
            case Said() | Ended():
                self._worker(event)
            case link.Up():
                log.info("connected to %s as %s", address(self._config), self._config.device)
                self._fetcher.up(time.monotonic())
                self._announce()
            case link.Down():
                log.warning("no broker: %s", event.why)
                self._fetcher.down()
            case link.Denied():
                log.warning("the broker does not let this device hear %s: %s", event.topic, event.why)
            case link.Published():
                self._offers.sent(event.id)
                if event.problem:
                    log.warning("the broker does not carry what this device says: %s", event.problem)
            case Stop():
                self._life.leaving = True

    def _message(self, message: link.Message) -> None:
        place = topics.parse(message.topic)
        if place.room == "b":
            self._piece(place, message.payload)
        elif place.room == "m" and message.payload:
            lead = codec.decode(message.payload, Lead)
            self._life.led(lead)
            self._happen(table.Led(lead))
        elif place.room == "d" and place.kind == "order":
            guest = self._life.guest
            unmet = f"not now: {guest.wanting}" if guest.standing == "away" else ""
            self._happen(table.Ordered(codec.decode(message.payload, Order), unmet))
        elif place.room == "d" and place.kind == "ack":
            self._happen(table.Acked(codec.decode(message.payload, Ack)))
        elif place.room == "d" and place.kind == "cancel":
            self._happen(table.Cancelled(codec.decode(message.payload, Cancel)))

    def _piece(self, place: topics.Place, data: bytes) -> None:
        order = self._session.order
        if order is None or self._session.phase != "fetching":
            return
        try:
            if self._fetcher.piece(place.kind, place.index, data, time.monotonic()):
                self._happen(table.Fetched(order.id))
        except NestlingError as error:
            self._happen(table.Failed(order.id, "data", str(error)))

    def _worker(self, event: Said | Ended) -> None:
        told = self._desk.take(event, time.monotonic())
        if isinstance(told, Ready):
            news = self._life.learnt(told)
            spare = self._config.worker.mode == "spawn" or self._life.guest.standing == "away"
            if spare and self._session.phase not in ("fetching", "working"):
                self._desk.stop()
            if news:
                self._announce()
        elif isinstance(told, Finished):
            self._finished(told)
        elif isinstance(event, Ended) and self._desk.problem and self._life.ready is None:
            raise DataError(self._desk.problem)

    def _finished(self, told: Finished) -> None:
        order, result = told.job.order, told.result
        if not isinstance(result, Done):
            refusing = self._life.tries.failed(told.job, result, time.monotonic(), sent=told.sent)
            if refusing is not None:
                self._happen(refusing)
            return
        self._life.tries.done(told.job, result, told.took)
        reply = Reply(
            order=order.id,
            device=self._config.device,
            boot=self._session.boot,
            structure=result.structure,
            update=result.update_ref,
            keep=result.keep_digest,
            samples=result.samples,
            metrics=result.metrics,
            usage=result.usage,
        )
        try:
            if result.keep:
                self._keep.stage(self._config.federation, order.recipe.rule, order.id, Path(result.keep))
            self._offers.keep(order, reply)
        except NestlingError as error:
            self._happen(table.Failed(order.id, "data", str(error)))
            return
        self._happen(table.Worked(reply))

    # --- effects -------------------------------------------------------------------------------------------------

    def _happen(self, event: table.Event) -> None:
        self._session, effects = table.step(self._session, event)
        order = self._session.order
        for effect in effects:
            try:
                self._perform(effect)
            except NestlingError as error:
                log.warning("%s: %s", type(error).__name__, error)
                if order is not None and not isinstance(effect, (table.Promote, table.Forget)):
                    self._happen(table.Failed(order.id, _blame(error), str(error)))
                    return

    def _perform(self, effect: table.Effect) -> None:
        now = time.monotonic()
        match effect:
            case table.Fetch(order=order):
                named = {"fields": {"order": order.id, "round": order.round}}
                log.info("round %d: %s, width %s", order.round, order.verb, order.structures[-1].called, extra=named)
                self._life.guest.took(order, now)
                if self._fetcher.begin(order, now):
                    self._happen(table.Fetched(order.id))
            case table.Work(order=order):
                self._work(order, now)
            case table.Hold():
                self._life.guest.broke(now, self._desk.progress.done)
                self._desk.drop()
                self._fetcher.stop()
            case table.Offer() | table.Push() if self._life.guest.quiet:
                self._life.silence = now + SECONDS_SILENCE  # by then the network may be free, whatever else fails
            case table.Offer(reply=reply):
                self._life.silence = now + SECONDS_SILENCE
                self._offers.offer(reply)
            case table.Push(have=have):
                self._life.silence = now + SECONDS_SILENCE
                self._offers.more(have)
            case table.Refuse(refusal=refusal):
                named = {"fields": {"order": refusal.order, "reason": refusal.reason}}
                log.warning("refusing order %s: %s: %s", refusal.order, refusal.reason, refusal.detail, extra=named)
                self._life.silence = now + SECONDS_SILENCE
                topic = topics.up(self._config.federation, self._config.device, "refusal")
                self._link.publish(topic, codec.encode(refusal))
                self._fetcher.stop()
            case table.Promote(order=order):
                log.info("round %d: the answer counts", order.round)
                self._keep.promote(self._config.federation, order)
            case table.Forget(order=order_id):
                self._desk.drop()
                self._fetcher.stop()
                self._offers.drop(order_id)
                self._keep.drop()
                self._life.silence = float("inf")
                self._life.used(now)
                if self._life.ready is None:  # who was to say what this device brings may have gone with the order
                    self._desk.start(now)

    def _work(self, order: Order, now: float) -> None:
        path = self._spool.path(order.spec.digest)
        known, spec = self._spec
        if spec is None or known != order.spec.digest:
            spec = decode(path.read_bytes())
            self._spec = order.spec.digest, spec
        fits = self._life.tries.fit(order, spec, self._desk.means(self._grant))
        if isinstance(fits, table.Failed):
            self._happen(fits)
            return
        held = self._keep.current(self._config.federation, order.recipe.rule)
        job = Job(
            order=fits.order,
            spec=str(path),
            shells=tuple(str(self._spool.path(ref.digest)) for ref in order.shells),
            out=str(self._offers.out),
            keep=str(held or ""),
            bytes_budget=fits.means.bytes_budget,
            micro_batch=fits.micro_batch,
            cuts=fits.cuts,
            engine=fits.means.engine,
            threads=self._config.worker.threads,
            masks="" if order.masks is None else str(self._spool.path(order.masks.digest)),
        )
        self._desk.give(job, now, fits.bytes_bound)
        self._life.guest.began(now)
        self._life.used(now)
        if self._life.guest.standing == "still":
            self._desk.still()

    # --- time ----------------------------------------------------------------------------------------------------

    def _due(self) -> float:
        return min(self._fetcher.due, self._desk.due, self._life.due)

    def _tick(self, now: float) -> None:
        life = self._life
        self._heed(now)
        if now >= self._fetcher.due:
            self._fetcher.late(now)
        if now >= life.tries.due:
            self._happen(life.tries.again())
        told = self._desk.tick(now, life.watch.tick(now, busy=self._desk.busy))
        if told is not None:
            self._finished(told)
        if now >= life.silence:
            life.silence = now + SECONDS_SILENCE
            self._happen(table.Silence())
        if now >= life.beat:
            life.beat = now + life.keepalive / 2
            self._beat()
        if now >= life.watchdog:
            life.watchdog = now + life.seconds_watchdog
            notify("WATCHDOG=1")

    def _heed(self, now: float) -> None:
        """Keep to the owner's conditions."""
        guest, working = self._life.guest, self._session.phase == "working"
        threads = self._config.worker.threads if working and guest.standing == "present" else 0
        move = guest.tick(now, threads, self._desk.progress.done)
        if move is not None:
            self._moved(move, now)
        order = self._session.order
        if order is not None and self._session.phase == "waiting" and now >= guest.hopeless:
            self._happen(table.Failed(order.id, "busy", f"given back, no time is left to wait: {guest.wanting}"))

    def _moved(self, move: Move, now: float) -> None:
        why = self._life.guest.why
        log.info("conditions: %s%s", _MOVES[move], f": {why}" if why else "", extra={"fields": {"move": move}})
        match move:
            case "still":
                self._desk.still()
            case "on":
                self._desk.go_on(now)
            case "away":
                self._happen(table.Unmet())
                if self._life.ready is not None:
                    self._desk.stop()
                self._announce()
            case "back":
                self._announce()
                if self._config.worker.mode == "warm":
                    self._desk.start(now)
                self._happen(table.Met())
                self._happen(table.Silence())

    def _beat(self) -> None:
        if self._life.guest.standing == "away":
            return  # a beat would say that it is here
        if self._grant.changed():
            self._announce()  # the next order is to fit
        order, progress = self._session.order, self._desk.progress
        working = self._session.phase == "working"
        beat = Beat(
            boot=self._session.boot,
            seq=self._life.seq,
            order="" if order is None else order.id,
            done=progress.done if working else 0.0,
            bytes_peak=progress.bytes_peak if working else 0,
        )
        topic = topics.up(self._config.federation, self._config.device, "beat")
        self._link.publish(topic, codec.encode(beat), qos=0)

    def _announce(self) -> None:
        """Tell that this device is here, as soon as it knows what it brings."""
        if self._life.ready is None:
            return
        away = self._life.guest.standing == "away"
        granted = self._desk.means(self._grant)[0].bytes_budget  # above the best engine's base; 0: nothing bounds it
        caps = None if away else self._life.caps(self._config, granted)
        state: Literal["online", "bye"] = "bye" if away else "online"
        presence = Presence(self._config.device, state, self._session.boot, self._life.seq, caps)
        topic = topics.presence(self._config.federation, self._config.device)
        self._link.publish(topic, codec.encode(presence), retain=True)
        self._life.beat = time.monotonic()
        notify("READY=1")
        give_back()

    def _signalled(self, number: int, _: FrameType | None) -> None:
        log.info("signal %d: leaving", number)
        self._link.post(Stop())


def _blame(error: NestlingError) -> Reason:
    return "unsupported" if isinstance(error, (SpecError, Unsupported)) else "data"
