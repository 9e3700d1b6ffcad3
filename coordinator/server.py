"""The coordinator's shell: one owner thread that takes events, folds them, makes the result durable, then speaks.

One turn of the loop takes what has come, steps the round for each event, and ends in `_flush`: files, then one journal
transaction, then messages. So what anybody was told is on disk, and a crash at any line is repeated from the journal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from coordinator import events as ev
from coordinator.advance import Outcome, Task
from coordinator.answers import check_update, problem_of
from coordinator.config import Config
from coordinator.evaluate import Evaluator, Measured
from coordinator.events import Arrived, Born, Lost, Refused
from coordinator.fleet import Fleet
from coordinator.journal import Abandoned, Cleared, Closed, Evaluated, Finished, Planned, Published
from coordinator.mail import Mail
from coordinator.round import Round, counted, departed, interrupted, open_round, step, word
from coordinator.standing import Standing, absorb
from coordinator.steps import Step, Steps, Store, held_for, order_id, orders_of
from coordinator.turn import Pace, Turn
from wire import codec, link, topics
from wire.child import Ended, Said
from wire.errors import NonFinite, PeerError
from wire.job import Failed
from wire.messages import Ack, Beat, Need, Presence, Reason, Refusal, Reply

log = logging.getLogger("coordinator")

_TURN_EVENTS = 256
_TICK = 0.25
_RETRY = 5.0
_SWEEP_BYTES = 256 << 20
_SWEEP_ROUNDS = 50


class Server:
    """One run from its standing to its end."""

    def __init__(
        self,
        config: Config,
        store: Store,
        standing: Standing,
        mail: Mail,
        evaluator: Evaluator | None,
        *,
        say: Callable[[str], None] = log.info,
    ) -> None:
        """Take up a run where its journal left it; nothing is sent before `run`."""
        self._config = config
        self._store = store
        self._mail = mail
        self._evaluator = evaluator
        self._say = say
        self._standing = standing
        self._fleet = Fleet(scales=standing.scales)
        self._round: Round | None = standing.round
        self._turn = Turn()
        self._steps = Steps(config, store, mail.link.post)
        self._pace = Pace()

    def run(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Lead the run until its rounds are done (True) or `stop` says so (False)."""
        self._mail.start()
        self._resume()
        while not stop():
            event = self._mail.next(self._turn.look(time.monotonic(), _TICK))
            taken = 0
            while event is not None:
                self._take(event)
                taken += 1
                event = self._mail.next(0.0) if taken < _TURN_EVENTS else None
            self._tick()
            self._flush()
            if self._finished():
                self._end()
                return True
        self._flush(at_once=True)
        self._stop()
        return False

    # --- events in -----------------------------------------------------------------------------------------------

    def _take(self, event: Any) -> None:
        match event:
            case link.Message():
                try:
                    self._message(event)
                except PeerError as error:
                    log.warning("dropped a message on %s: %s", event.topic[:120], error)
                finally:
                    self._mail.link.done(event)
            case link.Published() | link.Denied():
                self._mail.answered(event, time.monotonic())
            case link.Up():
                self._fleet = self._fleet.excused(time.monotonic())
                self._mail.up(event.session_present)
            case link.Down():
                log.warning("no broker: %s", event.why)
                self._mail.down()
            case Said() | Ended() if event.child == "local" and self._evaluator is not None:
                self._measured(self._evaluator.take(event))
            case Said() | Ended():
                self._outcome(self._steps.take(event))

    def _message(self, message: link.Message) -> None:
        place = topics.parse(message.topic)
        now = time.monotonic()
        if place.room == "s" and message.payload:
            presence = codec.decode(message.payload, Presence)
            if presence.device == place.device:
                self._fleet, told = self._fleet.present(presence, now)
                self._announce(presence, told)
            return
        if place.room != "u":
            return
        self._fleet = self._fleet.heard(place.device, now)
        if place.index >= 0:
            self._mail.uploads.piece(place.kind, place.device, place.index, message.payload, now)
        elif place.kind == "beat":
            self._fleet, born = self._fleet.beat(place.device, codec.decode(message.payload, Beat), now)
            if born is not None:
                self._happen(born)
        elif place.kind == "reply":
            self._offered(place.device, codec.decode(message.payload, Reply))
        elif place.kind == "refusal":
            self._refused(place.device, codec.decode(message.payload, Refusal))
        elif place.kind == "need":
            self._needed(place.device, codec.decode(message.payload, Need))

    def _needed(self, device: str, need: Need) -> None:
        """Publish once more what an open order needs; whose order is over is told so instead."""
        said = "unwanted" if self._round is None else word(self._round, device, need.order)
        if said == "more":
            self._mail.publisher.renew(need.blob)
        else:
            self._turn.sends.append((device, Ack(need.order, said)))

    def _announce(self, presence: Presence, told: Born | Lost | None) -> None:
        if told is None:
            return
        if isinstance(told, Lost):
            self._say(f"device {presence.device} is {presence.state}")
        else:
            self._pace.retry = 0.0
        self._happen(told)

    def _offered(self, device: str, reply: Reply) -> None:
        if self._round is None or reply.device != device:
            return
        said = word(self._round, device, reply.order)
        if said != "more":
            self._turn.sends.append((device, Ack(reply.order, said)))
            return
        problem = problem_of(reply, self._standing.orders.get(device), self._store.spec)
        if problem:
            self._happen(ev.unusable(reply, "unsupported", problem))
        elif self._mail.uploads.offer(reply, time.monotonic()):
            self._arrived(reply)
        else:
            self._steps.ready()

    def _arrived(self, reply: Reply) -> bool:
        assert reply.update is not None
        try:
            held = held_for(self._store, self._standing.orders.get(reply.device), reply.structure)
            check_update(self._store.spool.path(reply.update.digest), self._store.spec, reply.structure, held)
        except PeerError as error:
            reason: Reason = "nonfinite" if isinstance(error, NonFinite) else "unsupported"
            self._happen(ev.unusable(reply, reason, str(error)))
            return False
        self._turn.updates.append(reply.update.digest)
        order = self._standing.orders.get(reply.device)
        if order is not None:
            seconds = 0.0 if interrupted(self._round, reply.device) else self._pace.turn(time.monotonic())
            self._fleet = self._fleet.absorb(reply.device, reply.usage, order.bytes_peak, seconds)
        self._happen(Arrived(reply.device, reply.order, reply))
        return True

    def _refused(self, device: str, refusal: Refusal) -> None:
        if refusal.device == device:
            self._say(f"device {device} refuses: {refusal.reason}: {refusal.detail}")
            self._happen(Refused(device, refusal.order, refusal))

    def _measured(self, result: Measured | Failed | None) -> None:
        if isinstance(result, Measured):
            self._turn.rows.append(Evaluated(result.round, result.metrics))
            shown = " ".join(f"{v:.3f}" for k, v in sorted(result.metrics.items()) if k.startswith("accuracy."))
            self._say(f"round {result.round}: accuracy by width, narrowest first: {shown}")
        elif result is not None:
            self._say(f"evaluation failed: {result.reason}: {result.detail}")

    # --- the round -----------------------------------------------------------------------------------------------

    def _happen(self, event: ev.Event) -> None:
        if self._round is None:
            return
        before = self._round
        self._round, effects = step(before, event)
        if self._round is not before and not isinstance(event, (ev.Issued, ev.Resumed)):
            self._turn.rows.append(event)
            if isinstance(event, Refused):
                self._fleet = self._fleet.starved(event.refusal, self._standing.orders.get(event.device))
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Arm(at=at):
                self._pace.deadline = at
            case ev.Send(device=device):
                self._turn.sends.append((device, self._standing.orders[device]))
            case ev.Settle(device=device, order=order):
                self._turn.sends.append((device, Ack(order, "committed")))
            case ev.Unwanted(device=device, order=order):
                self._mail.uploads.drop(order)
                self._turn.sends.append((device, Ack(order, "unwanted")))
            case ev.Close():
                self._advance(closing=True)
            case ev.Abandon(why=why):
                assert self._round is not None
                wait = self._pace.abandoned(time.monotonic(), self._round)
                self._turn.rows.append(Abandoned(self._round.number, why))
                why += f"; the next one in {wait:.0f} s" if wait and self._round.number < self._config.rounds else ""
                self._say(f"round {self._round.number} abandoned: {why}")

    def _tick(self) -> None:
        now = time.monotonic()
        if self._mail.is_up:
            self._fleet, lost = self._fleet.expire(now, self._config.round.keepalive)
            for silent in lost:
                self._say(f"device {silent.device} has fallen silent")
                self._happen(silent)
        for gone in departed(self._round, self._mail.hears):
            self._happen(gone)
        if self._round is not None and now >= self._pace.deadline:
            self._pace.deadline = float("inf")
            self._happen(ev.Deadline(now))
        if self._pace.clearing and not self._mail.publisher.busy:
            live = {ref.digest for ref in self._mail.publisher.live}
            self._turn.rows.append(Cleared(tuple(r.digest for r in self._pace.clearing if r.digest not in live)))
            self._pace.clearing = ()
        if self._may_plan(now) and len(self._fleet.online()) >= self._config.round.devices:
            self._advance(closing=False)

    def _may_plan(self, now: float) -> bool:
        standing, turn = self._standing, self._turn
        busy = self._steps.busy or turn.following is not None or turn.rows
        return standing.settled and not busy and standing.done < self._config.rounds and now >= self._pace.retry

    def _advance(self, *, closing: bool) -> None:
        self._outcome(self._steps.begin(self._standing, self._round, self._fleet, closing=closing))

    def _outcome(self, done: Step | None) -> None:
        if done is None:
            return
        task, outcome = done
        turn, store = self._turn, self._store
        turn.files += [outcome.state, *(ref.digest for ref in outcome.blobs)]
        if task.closing:
            self._pace.vain = 0
            turn.rows.append(self._closed(task, outcome))
            if self._evaluator is not None:
                token = order_id(self._run, task.round - 1, "local")
                self._evaluator.measure(task.round - 1, token, self._run, store.spec_ref, outcome)
        if not task.devices:
            return
        orders = orders_of(self._config, store, self._run, done)
        if not orders:
            self._say(f"round {task.round}: no device can take part in it; looking again in {_RETRY:.0f} s")
            self._pace.retry = time.monotonic() + _RETRY
            return
        blobs = {ref.digest: ref for order in orders for ref in order.blobs}
        new = tuple(ref for digest, ref in blobs.items() if digest not in self._standing.live)
        quorum, seconds = self._config.round.quorum or None, self._config.round.seconds
        turn.rows += [Published(new), Planned(task.round, outcome.state, orders, quorum, seconds)]
        seats = {order.device: order.id for order in orders}
        turn.following = open_round(task.round, self._run, seats, quorum=quorum, seconds=seconds, earlier=self._round)

    def _closed(self, task: Task, outcome: Outcome) -> Closed:
        pace, wire = self._pace, self._mail.link
        return Closed(
            round=task.round - 1,
            state=outcome.state,
            devices=tuple(reply.device for reply in task.replies),
            seconds=max(0.0, time.monotonic() - pace.issued),
            bytes_up=max(0, wire.bytes_received - pace.bytes_up),
            bytes_down=max(0, wire.bytes_sent - pace.bytes_down),
            facts=outcome.facts,
        )

    @property
    def _run(self) -> str:
        assert self._standing.started is not None
        return self._standing.started.run

    # --- out: files, rows, messages ------------------------------------------------------------------------------

    def _flush(self, *, at_once: bool = False) -> None:
        # Only what came just now is deleted, and when nobody else's answer is the same bytes: a device may name any blob.
        bad = {r.update.digest for r in self._mail.uploads.complete() if r.update is not None and not self._arrived(r)}
        for digest in bad - counted(self._round, self._standing.done) - {*self._turn.updates}:
            self._store.spool.drop(digest)
        for reply, have in self._mail.uploads.due(time.monotonic()):
            self._turn.sends.append((reply.device, Ack(reply.order, "more", have)))
        if self._turn.wait(time.monotonic()) and not at_once:
            return
        turn, self._turn = self._turn, Turn()
        if turn.rows:
            self._pace.bytes_old += turn.make_durable(self._store.spool)
            self._store.journal.append(turn.rows)
            for row in turn.rows:
                self._standing = absorb(self._standing, row)
        for device, message in turn.sends:
            self._mail.send(device, message)
        if turn.following is not None:
            self._issue(turn.following)
        elif any(isinstance(row, Closed) for row in turn.rows):
            self._clear(set())
        if any(isinstance(row, Closed) for row in turn.rows):
            self._tidy()

    def _issue(self, following: Round) -> None:
        self._round = following
        wanted = {ref.digest: ref for order in self._standing.orders.values() for ref in order.blobs}
        pace, wire = self._pace, self._mail.link
        pace.issued, pace.bytes_up, pace.bytes_down = time.monotonic(), wire.bytes_received, wire.bytes_sent
        self._clear(set(wanted))
        self._mail.publisher.want(wanted.values())
        shown = ", ".join(f"{o.device} width {o.structures[0].called}" for o in self._standing.orders.values())
        self._say(f"round {following.number} of {self._config.rounds}: {shown}")
        self._happen(ev.Issued(pace.issued))
        self._flush()

    def _clear(self, wanted: set[str]) -> None:
        gone = tuple(ref for ref in self._standing.live.values() if ref.digest not in wanted)
        self._mail.publisher.clear(gone)
        self._pace.clearing += gone

    def _tidy(self) -> None:
        """Delete blobs that nobody needs any more: not after every round, because deleting files is slow on some disks."""
        self._pace.rounds_old += 1
        if self._pace.bytes_old < _SWEEP_BYTES and self._pace.rounds_old < _SWEEP_ROUNDS:
            return
        self._pace.bytes_old = self._pace.rounds_old = 0
        keep = {self._standing.state, *self._store.lasting, *self._standing.live}
        if self._evaluator is not None:
            keep |= self._evaluator.needs()
        self._store.spool.sweep(keep)

    # --- beginning and end ---------------------------------------------------------------------------------------

    def _resume(self) -> None:
        standing = self._standing
        arrived = counted(self._round, standing.done)
        keep = {standing.state, *self._store.lasting, *standing.live, *arrived}
        self._store.spool.sweep(keep, partial=standing.settled)  # devices go on with what they have begun to send
        if self._evaluator is not None:
            self._evaluator.start()
        if self._round is None or standing.settled:
            return
        self._say(
            f"going on with round {self._round.number}: {self._round.arrived} of {len(self._round.seats)} are here"
        )
        self._mail.publisher.want(ref for order in standing.orders.values() for ref in order.blobs)
        self._pace.issued = self._pace.resumed = time.monotonic()
        self._happen(ev.Resumed(self._pace.issued))

    def _finished(self) -> bool:
        waiting = self._evaluator is not None and not self._evaluator.idle
        done = self._standing.settled and self._standing.done >= self._config.rounds and not self._turn.rows
        return done and not waiting and not self._steps.busy

    def _stop(self) -> None:
        self._steps.stop()
        if self._evaluator is not None:
            self._evaluator.stop()
        self._mail.stop()

    def _end(self) -> None:
        self._turn.rows.append(Finished("all rounds are done"))
        self._clear(set())
        self._flush()
        until = time.monotonic() + 2.0
        while self._mail.publisher.busy and time.monotonic() < until:
            event = self._mail.link.next(0.1)
            if isinstance(event, link.Published):
                self._mail.publisher.sent(event.id)
        self._stop()
