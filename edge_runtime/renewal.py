"""A device's certificate is replaced before it ends, by the agent itself and with a new key each time.

The agent loads nothing that makes keys: a short process does (`edge_runtime.csr`). Its request goes to the coordinator over
the agent's own link, the answer comes back over it, and the agent connects again with what it got. As long as that has
not worked the old certificate stays, and the same request is sent again, by the agent's next life too: a key that it has
signed the coordinator knows, and with another one it would have the device wait.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import time
from pathlib import Path

from edge_runtime import identity
from edge_runtime.config import Config
from edge_runtime.sealed import Sealed
from wire import codec, topics
from wire.errors import NestlingError, PeerError
from wire.link import Address, Down, Message, Up
from wire.link.mqtt import MqttLink
from wire.messages import Cert, Csr

log = logging.getLogger("edge_runtime")

_SECONDS_LOOK = 3600.0
_SECONDS_CHILD = 0.1
_CHILD_MAX = 120.0
_AGAIN_LEAST, _AGAIN_MOST, _AGAIN_ENDED = 1.0, 3600.0, 60.0
_NEVER = float("inf")


class Renewal:
    """Looks after the certificate of one link, from within its owner's loop."""

    def __init__(self, config: Config, where: Address, link: MqttLink) -> None:
        """Do nothing, ever, for a link without a certificate that a coordinator renews.

        Raises:
            ConfigError: The certificate's file cannot be read.
        """
        self._config = config
        self._where = where
        self._link = link
        self._path = Path(config.broker.cert)
        self._topic = topics.down(config.federation, config.device, "cert")
        self._identity = identity.read(self._path) if config.broker.cert else None
        self._sealed = Sealed(config, link) if self._identity is not None else None
        self._child: subprocess.Popen[bytes] | None = None
        self._until = 0.0
        self._request = self._asked() if self._identity is not None else b""
        self._up = False
        self._due = _NEVER
        if self._identity is not None and self._identity.ends < time.time():
            log.warning(
                "the certificate in %s has ended, by this device's clock; if that is right, ask for another invitation:"
                " coordinator enroll %s",
                self._path,
                config.device,
            )

    def next(self, timeout: float) -> object | None:
        """Give the link's next event, unless it was about the certificate; an order only once its signature is found good."""
        timeout = min(timeout, max(0.0, self._due - time.monotonic()))
        event = self._link.next(timeout if self._sealed is None else self._sealed.wait(timeout))
        if isinstance(event, Message) and event.topic == self._topic:
            self._link.done(event)
            self._answered(event.payload)
            event = None
        elif isinstance(event, Up) and self._identity is not None:
            self._up, self._due = True, time.monotonic()
        elif isinstance(event, Down) and self._identity is not None:
            self._up = False
            self._read_again()
        now = time.monotonic()
        if now >= self._due:
            self._tick(now)
        return event if self._sealed is None else self._sealed.passes(event)

    def _tick(self, now: float) -> None:
        known = self._identity
        if known is None:
            self._due = _NEVER
        elif self._child is not None:
            self._made(self._child, now)
        elif time.time() >= known.renew:
            if not self._up:
                self._due = _NEVER  # until there is somebody to ask
            elif self._request and (self._path.parent / "next.key").exists():  # or no answer would be of any use
                self._ask(now)
            else:
                self._begin(now)
        else:  # the clock may be set meanwhile: look again every hour
            self._due = now + min(_SECONDS_LOOK, known.renew - time.time())

    def _begin(self, now: float) -> None:
        log.info("the certificate is to be renewed")
        argv = [sys.executable, "-m", "edge_runtime.csr", self._config.device, str(self._path.parent)]
        try:
            self._child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        except OSError as error:
            self._later(now, f"no process for a new key: {error.strerror}")
            return
        self._until = now + _CHILD_MAX
        self._due = now + _SECONDS_CHILD

    def _made(self, child: subprocess.Popen[bytes], now: float) -> None:
        """Look whether the new key is there; send its request if so."""
        code = child.poll()
        if code is None and now < self._until:
            self._due = now + _SECONDS_CHILD
            return
        if code is None:
            child.kill()
            code = child.wait()
        self._child = None
        try:
            self._request = (self._path.parent / "next.csr").read_bytes() if code == 0 else b""
        except OSError as error:
            self._later(now, f"the new request: {error.strerror}")
            return
        if code:
            self._later(now, f"the process for a new key ended with {code}")
            return
        self._ask(now)

    def _ask(self, now: float) -> None:
        """Send the request, the same one until it is answered: to a key that it has signed the coordinator says so again."""
        topic = topics.up(self._config.federation, self._config.device, "csr")
        self._link.publish(topic, codec.encode(Csr(self._config.device, self._request)))
        self._later(now, "")

    def _read_again(self) -> None:
        """Show what is in the file now: somebody may have enrolled this device again."""
        try:
            found = identity.read(self._path)
            if found is not None and found != self._identity:
                self._link.renew()
                self._identity = found
        except (NestlingError, OSError) as error:
            log.warning("the certificate in %s: %s", self._path, error)

    def _later(self, now: float, why: str) -> None:
        """Try again after an eighth of the time that is left."""
        known = self._identity
        assert known is not None
        left = known.ends - time.time()
        self._due = now + (min(_AGAIN_MOST, max(_AGAIN_LEAST, left / 8)) if left > 0 else _AGAIN_ENDED)
        if why:
            end = f"it ends in {left / 86_400:.1f} days" if left > 0 else "it has ended"
            log.warning("the certificate is not renewed: %s; %s, and this is tried again", why, end)

    def _answered(self, payload: bytes) -> None:
        now = time.monotonic()
        if self._identity is None:
            return
        try:
            cert = codec.decode(payload, Cert)
        except PeerError as error:  # nobody's answer; the true one may still come
            log.warning("dropped an answer about the certificate: %s", error)
            return
        try:
            if not self._request or cert.request != hashlib.sha256(self._request).hexdigest():
                return
            if cert.state != "granted":
                if cert.state != "early":  # with another key it would be early again
                    self._forget()
                self._later(now, f"{cert.state}: {cert.detail}")
                return
            self._identity = self._adopt(cert)
        except (NestlingError, OSError) as error:
            self._later(now, str(error))
            return
        self._due = now
        log.info("the certificate is renewed, for %.3g days", cert.seconds / 86_400)
        self._link.renew()

    def _adopt(self, cert: Cert) -> identity.Identity:
        """Take over the new key and its certificate; the next one has another key."""
        found = identity.put(self._path, (self._path.parent / "next.key").read_bytes(), cert, self._where.ca)
        self._forget()
        return found

    def _asked(self) -> bytes:
        """Give the request that an earlier life has made and nobody has answered; empty when there is none."""
        folder = self._path.parent
        try:
            return (folder / "next.csr").read_bytes() if (folder / "next.key").exists() else b""
        except OSError:
            return b""

    def _forget(self) -> None:
        """Ask with another key the next time."""
        self._request = b""
        for name in ("next.csr", "next.key"):
            (self._path.parent / name).unlink(missing_ok=True)
