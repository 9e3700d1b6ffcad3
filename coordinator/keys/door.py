"""The running coordinator's part in keys: it answers requests for certificates, and lets nobody in who was taken back.

It stands between the link and the server: what concerns keys ends here, and what a device says that is not in the register
(a retained birth of one that was taken back, say) is dropped. The register's file is the only thing that it shares with the
operator's commands, so it looks whether that has changed, several times a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.keys import access, register
from coordinator.keys.access import BROKER, KEYS
from coordinator.keys.authority import Authority, fingerprint, request
from coordinator.keys.out import put_out
from coordinator.keys.register import FILE, Register
from wire import codec, topics
from wire.errors import BrokerUnreachable, ConfigError, Malformed, PeerError, StoreError
from wire.invitation import password_of
from wire.link import Link, Message
from wire.messages import Cert, Csr, Presence

log = logging.getLogger("coordinator")

_SECONDS_LOOK = 0.2
_SECONDS_TEND = 60.0
_SECONDS_WARN = 60.0
_WARNED_MAX = 1000
_LOG_BYTES_MAX = 4 << 20
_EARLY = 0.75
_DETAILS = {
    "expired": "the invitation's time is over; ask for another: coordinator enroll {device}",
    "used": "the invitation has been used by another key; if that was not you, say so, and ask for another",
    "unknown": "no such invitation; ask for another: coordinator enroll {device}",
    "name": "it is for a device of another name",
    "early": "the certificate has most of its time left",
}


@dataclass(frozen=True, slots=True)
class Policy:
    """What the door goes by.

    Attributes:
        state: The run's folder.
        names: By which this machine is reached.
        seconds: How long a device's certificate is valid.
    """

    state: Path
    names: tuple[str, ...]
    seconds: float


class Door:
    """One fleet's keys, while its coordinator runs."""

    def __init__(self, policy: Policy, link: Link, *, say: Callable[[str], None] = log.info) -> None:
        """Take up the register.

        Raises:
            StoreError: It, or the authority, cannot be read.
        """
        self._policy = policy
        self._link = link
        self._say = say
        self._authority = Authority(policy.state / KEYS)
        self._stamp = self._stamped()  # before it is read: a change in between is seen as one
        self._register = access.known(policy.state, register.load(policy.state / KEYS))
        self._heard: dict[str, Presence] = {}
        self._news: deque[Message] = deque()
        self._next_look = 0.0
        self._next_tend = time.monotonic() + _SECONDS_TEND
        self._warned: dict[str, float] = {}

    def start(self) -> None:
        """Want what concerns keys; renewals come with all that devices send."""
        self._link.subscribe([topics.enrolment(self._register.federation, "+", "csr")], qos=1)

    def seal(self, order: bytes) -> bytes:
        """Give the bytes of a signed order: what devices with a certificate take, and nothing else."""
        return codec.encode(self._authority.seal(order))

    def knows(self, device: str) -> bool:
        """Whether a device is in the register."""
        return device in self._register.devices

    def passes(self, event: object) -> object | None:
        """Deal with what is the door's business; give what is the server's, or None."""
        self._keep_up(time.monotonic())
        if isinstance(event, Message) and not self._lets(event):
            self._link.done(event)
            event = None
        return self._news.popleft() if event is None and self._news else event

    def _keep_up(self, now: float) -> None:
        """Do what is due. A disk that is full is no reason to keep an event from the server."""
        try:
            if now >= self._next_look:
                self._next_look = now + _SECONDS_LOOK
                self._look()
            if now >= self._next_tend:
                self._next_tend = now + _SECONDS_TEND
                self._tend()
        except (StoreError, BrokerUnreachable, ConfigError) as error:
            if self._worth_telling("keys"):
                log.warning("keys: %s", error)

    # --- devices that were taken back ----------------------------------------------------------------------------

    def _lets(self, message: Message) -> bool:
        """Whether the server is to hear this."""
        try:
            place = topics.parse(message.topic)
            if message.retained and place.room != "s":
                return False  # nobody keeps these but who was here earlier under this name
            if place.room == "k" or (place.room == "u" and place.kind == "csr" and place.index < 0):
                self._asked(place, message.payload)
                return False
            if place.device and not self.knows(place.device):
                return False
            if place.room == "s" and message.payload:
                heard, known = codec.decode(message.payload, Presence), self._heard.get(place.device)
                if heard.device == place.device and (known is None or heard.seq >= known.seq):
                    self._heard[place.device] = heard  # what the server goes by too
        except PeerError as error:
            log.warning("dropped a message on %s: %s", message.topic[:120], error)
            return False
        except (
            StoreError,
            BrokerUnreachable,
            ConfigError,
        ) as error:  # dealt with all the same: who gets no answer asks again
            log.warning("keys: no answer on %s: %s", message.topic[:120], error)
            return False
        return True

    def _look(self) -> None:
        """Follow what an operator's command has done; the broker has heard of it already."""
        stamp = self._stamped()
        if stamp == self._stamp:
            return
        self._follow(access.known(self._policy.state, register.load(self._folder)))
        self._stamp = stamp  # not before: what could not be read is looked at again

    def _follow(self, after: Register) -> None:
        before, self._register = self._register, after
        for name in sorted(before.devices.keys() - self._register.devices.keys()):
            self._say(f"device {name} is taken back")
            topic = topics.presence(self._register.federation, name)
            heard = self._heard.pop(name, None)
            if heard is not None:
                gone = codec.encode(replace(heard, state="lost", caps=None))
                self._news.append(Message(topic, gone, retained=False, token=0))
            self._link.publish(topic, b"", retain=True)

    def _stamped(self) -> tuple[int, int]:
        try:
            found = (self._folder / FILE).stat()
        except OSError as error:
            raise StoreError(f"{self._folder / FILE}: {error.strerror}") from None
        return found.st_mtime_ns, found.st_ino

    @property
    def _folder(self) -> Path:
        return self._policy.state / KEYS

    def _tend(self) -> None:
        """See that the broker's own certificate does not end while it runs, and that strangers do not fill its log."""
        said = self._policy.state / BROKER / "log"
        with contextlib.suppress(OSError):
            if said.stat().st_size > _LOG_BYTES_MAX:
                os.truncate(said, 0)
        if self._authority.serve(self._policy.names):
            self._say("the broker has a new certificate")
            access.change(self._policy.state, lambda current: access.known(self._policy.state, current))

    # --- certificates --------------------------------------------------------------------------------------------

    def _asked(self, place: topics.Place, payload: bytes) -> None:
        federation = self._register.federation
        if place.kind != "csr":
            return
        csr = codec.decode(payload, Csr)
        self._look()  # an invitation may be used within the second in which it was made
        if place.invitation:
            back, device = topics.enrolment(federation, place.invitation, "cert"), csr.device
        else:
            back, device = topics.down(federation, place.device, "cert"), place.device
        if not place.invitation and not self.knows(device):
            return
        try:
            answer = self._answer(place, csr, device)
        except Malformed as error:
            answer = _refusal(csr, "malformed", str(error)[:2000])
        if answer.state != "granted" and self._worth_telling(back):
            log.warning("no certificate for %s: %s: %s", csr.device, answer.state, answer.detail)
        self._link.publish(back, codec.encode(answer))

    def _worth_telling(self, back: str) -> bool:
        """Whether a refusal is logged: one a minute for each that asks."""
        now = time.monotonic()
        if now - self._warned.get(back, -_SECONDS_WARN) < _SECONDS_WARN:
            return False
        if len(self._warned) >= _WARNED_MAX:
            self._warned.clear()
        self._warned[back] = now
        return True

    def _answer(self, place: topics.Place, csr: Csr, device: str) -> Cert:
        asked, public = request(csr.csr)
        key, now = fingerprint(public), time.time()
        if place.invitation:
            invited = register.presented(self._register, place.invitation, password_of(csr.secret))
            why = register.refused(self._register, invited, device, key, now)
        else:
            why = self._too_early(device, key, now)
        if not why and not asked == csr.device == device:
            why = "name"
        if why:
            return _refusal(csr, why, _DETAILS[why].format(device=device))
        held = register.latest(self._register, device, key)
        if held is None:
            held = self._issue(place, csr, device)
        digest = hashlib.sha256(csr.csr).hexdigest()
        return Cert(digest, "granted", held.pem.encode("ascii"), max(0.0, held.ends - time.time()))

    def _too_early(self, device: str, key: str, now: float) -> str:
        held = self._register.devices.get(device, ())
        fresh = bool(held) and held[-1].key != key and held[-1].ends - now > _EARLY * self._policy.seconds
        return "early" if fresh else ""

    def _issue(self, place: topics.Place, csr: Csr, device: str) -> register.Held:
        """Sign, write it down, let the broker know; only then the device hears of it."""
        issued = self._authority.issue(device, request(csr.csr)[1], self._policy.seconds)
        held = register.Held(issued.serial, issued.key, issued.ends, issued.pem.decode("ascii"))

        def step(current: Register | None) -> Register:
            found = access.known(self._policy.state, current)
            if place.invitation and place.invitation not in found.invitations:
                raise Malformed("the invitation was taken back at this very moment", "$.secret")
            if not place.invitation and device not in found.devices:
                raise Malformed("the device was taken back at this very moment", "$.device")
            return register.tidied(register.granted(found, device, held, place.invitation), time.time())

        if place.invitation:  # its place in the rules is new, and what the device had before is taken back
            before = self._register.devices.get(device)
            self._follow(access.change(self._policy.state, step, self._authority)[0])
            if before:  # whoever holds an older key may be connected with it
                put_out(access.way_in(self._policy.state), self._register.federation, device)
        else:
            self._follow(register.change(self._folder, step))
        self._say(f"device {device} has a certificate for {self._policy.seconds / 86_400:.3g} days")
        return held


def _refusal(csr: Csr, state: str, detail: str) -> Cert:
    digest = hashlib.sha256(csr.csr).hexdigest()
    return Cert(digest, state, detail=detail)  # type: ignore[arg-type]  # one of the words of `_DETAILS`
