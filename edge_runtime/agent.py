"""The device's agent: one owner thread between a broker and a worker. It loads neither numpy nor torch.

The loop asks the link for the next event (the worker's frames come through the same queue), folds it into the session, and
performs the effects. Timers, the heartbeat and systemd's watchdog are served from the same loop, so that a stuck agent looks stuck.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

from edge_runtime import __version__
from edge_runtime import session as table
from edge_runtime.config import Config, amount
from edge_runtime.desk import Desk, Finished
from edge_runtime.engines import available
from edge_runtime.fetch import Fetcher
from edge_runtime.keep import Keep
from edge_runtime.memory import plan as planning
from edge_runtime.memory import probe
from edge_runtime.session import Session
from wire import codec, link, topics
from wire.child import Ended, Said
from wire.chunks import Push, read_piece
from wire.errors import DataError, NestlingError, PeerError
from wire.job import Done, Job, Ready
from wire.link import Address, Will
from wire.link.mqtt import MqttLink
from wire.messages import Ack, Beat, Cancel, Caps, Lead, Order, Presence, Refusal, Reply
from wire.spec import decode
from wire.spool import Spool

log = logging.getLogger("edge_runtime")

SECONDS_SILENCE = 5.0
_SECONDS_IDLE = 3600.0
_SESSION_SECONDS = 86_400


class Stop:
    """Posted by a signal: leave on purpose."""


class Agent:
    """One life of one device."""

    def __init__(self, config: Config) -> None:
        """Prepare; nothing is opened before `run`.

        Raises:
            ConfigError: The broker's address or files cannot be used.
            StoreError: The state folder cannot be written.
        """
        root = Path(config.state.dir)
        self._config = config
        self._spool = Spool(root / "spool", amount(config.state.bytes_spool, "state.bytes_spool"))
        self._keep = Keep(root / "keep")
        self._session = Session(config.device, secrets.token_hex(8))
        self._life = _Life(next_seq(root), config)
        gone = Presence(config.device, "lost", self._session.boot, self._life.seq)
        will = Will(topics.presence(config.federation, config.device), codec.encode(gone), retain=True)
        self._link = MqttLink(
            address(config), client_id(config), session_seconds=_SESSION_SECONDS, keepalive=30, will=will
        )
        self._desk = Desk(config, self._link.post)
        self._fetcher = Fetcher(self._link, self._spool, config.federation, config.device)
        self._upload: tuple[Reply, Push, Path] | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            DataError: The device's data cannot be loaded; it would be so again after a restart.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        self._tidy()
        federation, device = self._config.federation, self._config.device
        self._link.subscribe([topics.down(federation, device, "+"), topics.lead(federation)])
        self._desk.start(time.monotonic())
        self._link.start()
        try:
            while not self._life.leaving:
                event = self._link.next(max(0.0, min(self._due() - time.monotonic(), _SECONDS_IDLE)))
                if event is not None:
                    self._take(event)
                self._tick(time.monotonic())
        finally:
            self._desk.stop()
            self._fetcher.stop()
            bye = Presence(device, "bye", self._session.boot, self._life.seq)
            self._link.stop((topics.presence(federation, device), codec.encode(bye), True))

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
            case link.Up():
                self._announce()
            case link.Down():
                log.warning("no broker: %s", event.why)
            case Said() | Ended():
                self._worker(event)
            case Stop():
                self._life.leaving = True
            case _:
                pass

    def _message(self, message: link.Message) -> None:
        place = topics.parse(message.topic)
        if place.room == "b":
            self._piece(place, message.payload)
        elif place.room == "m" and message.payload:
            lead = codec.decode(message.payload, Lead)
            self._life.led(lead)
            self._happen(table.Led(lead))
        elif place.room == "d" and place.kind == "order":
            self._happen(table.Ordered(codec.decode(message.payload, Order)))
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
            self._life.ready = told
            if self._config.worker.mode == "spawn" and self._session.phase == "idle":
                self._desk.stop()
            self._announce()
        elif isinstance(told, Finished):
            self._finished(told)
        elif isinstance(event, Ended) and self._desk.problem and self._life.ready is None:
            raise DataError(self._desk.problem)

    def _finished(self, told: Finished) -> None:
        order, result = told.job.order, told.result
        if not isinstance(result, Done):
            granted = told.job.bytes_budget
            needed = max(result.bytes_needed, result.bytes_peak)
            self._happen(table.Failed(order.id, result.reason, result.detail, needed, granted))
            return
        if result.keep:
            self._keep.stage(self._config.federation, order.recipe.rule, order.id, Path(result.keep))
        self._happen(
            table.Worked(
                Reply(
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
            )
        )

    # --- effects -------------------------------------------------------------------------------------------------

    def _happen(self, event: table.Event) -> None:
        self._session, effects = table.step(self._session, event)
        for effect in effects:
            try:
                self._perform(effect)
            except NestlingError as error:
                order = self._session.order
                log.warning("%s: %s", type(error).__name__, error)
                if order is not None:
                    self._happen(table.Failed(order.id, "data", str(error)))
                return

    def _perform(self, effect: table.Effect) -> None:
        now = time.monotonic()
        match effect:
            case table.Fetch(order=order):
                if self._fetcher.begin(order, now):
                    self._happen(table.Fetched(order.id))
            case table.Work(order=order):
                self._work(order, now)
            case table.Offer(reply=reply):
                self._offer(reply, now)
            case table.Push(have=have):
                self._push(have, now)
            case table.Refuse(refusal=refusal):
                log.warning("refusing order %s: %s: %s", refusal.order, refusal.reason, refusal.detail)
                self._say("refusal", refusal)
                self._life.silence = now + SECONDS_SILENCE
            case table.Promote(order=order):
                self._keep.promote(self._config.federation, order.recipe.rule, order.id)
            case table.Forget(order=order_id):
                self._forget(order_id)

    def _work(self, order: Order, now: float) -> None:
        spec = decode(self._spool.path(order.spec.digest).read_bytes())
        budget = probe.budget(self._config.bytes_budget, self._config.bytes_reserve)
        fits = planning.plan(order, spec, budget)
        if isinstance(fits, planning.Refused):
            self._happen(table.Failed(order.id, "memory", fits.detail, fits.bytes_needed, fits.bytes_free))
            return
        held = self._keep.current(self._config.federation, order.recipe.rule)
        job = Job(
            order=order,
            spec=str(self._spool.path(order.spec.digest)),
            shells=tuple(str(self._spool.path(ref.digest)) for ref in order.shells),
            out=str(self._out),
            keep=str(held or ""),
            bytes_budget=budget,
            micro_batch=fits.micro_batch,
            threads=self._config.worker.threads,
        )
        self._desk.give(job, now)

    def _offer(self, reply: Reply, now: float) -> None:
        self._life.silence = now + SECONDS_SILENCE
        self._say("reply", reply)
        if reply.update is not None:
            path = self._out / f"{reply.order}.update"
            self._upload = (reply, Push(reply.update.pieces), path)
            self._send_pieces()

    def _push(self, have: bytes, now: float) -> None:
        if self._upload is not None:
            self._life.silence = now + SECONDS_SILENCE
            self._upload[1].acked(have)
            self._send_pieces()

    def _send_pieces(self) -> None:
        assert self._upload is not None
        reply, push, path = self._upload
        assert reply.update is not None
        for index in push.to_send():
            topic = topics.up_piece(self._config.federation, self._config.device, reply.order, index)
            self._link.publish(topic, read_piece(path, reply.update, index))

    def _forget(self, order_id: str) -> None:
        self._desk.drop()
        self._fetcher.stop()
        self._upload = None
        self._life.silence = float("inf")
        self._keep.drop(order_id)
        for path in self._out.glob(f"{order_id}.*"):
            path.unlink(missing_ok=True)

    # --- time ----------------------------------------------------------------------------------------------------

    def _due(self) -> float:
        return min(self._fetcher.due, self._desk.due, self._life.silence, self._life.beat, self._life.watchdog)

    def _tick(self, now: float) -> None:
        if now >= self._fetcher.due:
            self._fetcher.late(now)
        told = self._desk.tick(now)
        if told is not None:
            self._finished(told)
        if now >= self._life.silence:
            self._life.silence = now + SECONDS_SILENCE
            self._happen(table.Silence())
        if now >= self._life.beat:
            self._life.beat = now + self._life.keepalive / 2
            self._beat()
        if now >= self._life.watchdog:
            self._life.watchdog = now + self._life.seconds_watchdog
            notify("WATCHDOG=1")

    def _beat(self) -> None:
        order, progress = self._session.order, self._desk.progress
        beat = Beat(
            boot=self._session.boot,
            seq=self._life.seq,
            order="" if order is None else order.id,
            done=progress.done if self._session.phase == "working" else 0.0,
            bytes_peak=progress.bytes_peak if self._session.phase == "working" else 0,
        )
        topic = topics.up(self._config.federation, self._config.device, "beat")
        self._link.publish(topic, codec.encode(beat), qos=0)

    def _announce(self) -> None:
        """Tell that this device is here, as soon as it knows what it brings."""
        if self._life.ready is None:
            return
        caps = self._life.caps(probe.budget(self._config.bytes_budget, self._config.bytes_reserve))
        presence = Presence(self._config.device, "online", self._session.boot, self._life.seq, caps)
        topic = topics.presence(self._config.federation, self._config.device)
        self._link.publish(topic, codec.encode(presence), retain=True)
        self._life.beat = time.monotonic()
        notify("READY=1")

    def _say(self, kind: str, message: Reply | Refusal) -> None:
        self._link.publish(topics.up(self._config.federation, self._config.device, kind), codec.encode(message))

    def _signalled(self, number: int, _: FrameType | None) -> None:
        log.info("signal %d: leaving", number)
        self._link.post(Stop())

    @property
    def _out(self) -> Path:
        return Path(self._config.state.dir) / "out"

    def _tidy(self) -> None:
        """Drop what an earlier life left: its order is given again, and what is cached in the spool stays."""
        self._keep.drop()
        self._out.mkdir(parents=True, exist_ok=True)
        for path in self._out.iterdir():
            path.unlink(missing_ok=True)


class _Life:
    """What one life of the agent knows and when it wants to be woken.

    Attributes:
        seq: Number of this life.
        ready: What the worker said about the data.
        leaving: Asked to stop.
        keepalive: The coordinator's.
        silence: When an unanswered offer is made again.
        beat: When the next sign of life is due.
        watchdog: When systemd's watchdog is to be fed.
        seconds_watchdog: How often.
    """

    def __init__(self, seq: int, config: Config) -> None:
        self.seq = seq
        self.ready: Ready | None = None
        self.leaving = False
        self.keepalive = 20.0
        self.silence = float("inf")
        self.beat = float("inf")
        self.seconds_watchdog = int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6
        self.watchdog = time.monotonic() if self.seconds_watchdog else float("inf")
        self._config = config

    def led(self, lead: Lead) -> None:
        """Take over a coordinator's keepalive."""
        self.keepalive = lead.keepalive
        self.beat = min(self.beat, time.monotonic() + self.keepalive / 2) if self.ready else self.beat

    def caps(self, bytes_budget: int) -> Caps:
        """Say what this device brings."""
        assert self.ready is not None
        return Caps(
            runtime=__version__,
            engines=available(),
            bytes_budget=bytes_budget,
            threads=self._config.worker.threads,
            samples=self.ready.samples,
            classes=self.ready.classes,
            input_shape=self.ready.input_shape,
        )


def next_seq(root: Path) -> int:
    """Count this life: one more than the last one, durable before anybody hears of it."""
    path = root / "lives"
    known = 0
    with contextlib.suppress(OSError, ValueError):
        known = int(path.read_text("ascii"))
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="ascii") as file:
        file.write(str(known + 1))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return known + 1


def address(config: Config) -> Address:
    """Read where the broker is; with a password and no name, the device's own name is the user name.

    Raises:
        ConfigError: It cannot be used.
    """
    broker = config.broker
    username = broker.username or (config.device if broker.password_file else "")
    return Address.parse(
        broker.url,
        username=username,
        password_file=broker.password_file,
        ca=broker.ca,
        cert=broker.cert,
        key=broker.key,
    )


def client_id(config: Config) -> str:
    """Name this device at the broker; a second agent of the same name throws the first one out."""
    return f"{config.federation}-{config.device}"


def notify(word: str) -> None:
    """Tell systemd, if it listens."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.sendto(word.encode(), "\0" + where[1:] if where.startswith("@") else where)
