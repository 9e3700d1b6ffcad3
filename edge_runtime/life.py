"""One life of an agent: its number, what it brings, when it wants to be woken, and what it tells systemd."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import time
from pathlib import Path
from typing import IO

from edge_runtime import __version__
from edge_runtime.config import ConditionsConfig, Config
from edge_runtime.engines import available
from edge_runtime.frugal import give_back
from edge_runtime.guest import Guest
from edge_runtime.memory.watch import Watch
from edge_runtime.paces import Paces
from edge_runtime.renewal import Renewal
from edge_runtime.retry import Tries
from wire.errors import ConfigError, StoreError
from wire.job import Ready
from wire.link import Address, Will
from wire.link.mqtt import MqttLink
from wire.messages import Caps, Lead

NEVER = float("inf")
PACES = "paces.json"
"""File in the state folder for how fast each engine was here."""
_CLIENT_ID_MAX = 128
_SECONDS_SESSION = 86_400
_SECONDS_KEEPALIVE = 30.0
_SECONDS_REST = 1.0


class Life:
    """What one life of the agent knows, and its timers on the monotonic clock.

    Attributes:
        seq: Number of this life.
        ready: What the worker said about the data; None as long as it has not.
        leaving: Asked to stop.
        keepalive: The coordinator's, seconds.
        silence: When an unanswered offer is made again.
        beat: When the next sign of life is due.
        watchdog: When systemd's watchdog is to be fed.
        rest: When what was used lately is given back, since nothing uses it any more.
        guest: Whether the owner's conditions hold.
        renewal: What replaces this device's certificate in time; None before `link`.
        tries: How often the order in hand was tried.
        watch: Sees when the machine runs out of memory.
    """

    def __init__(self, seq: int, guest: Guest | None = None) -> None:
        self.seq = seq
        self.guest = guest or Guest(ConditionsConfig())
        self.renewal: Renewal | None = None
        self.tries = Tries()
        self.watch = Watch(0)
        self.ready: Ready | None = None
        self.leaving = False
        self.keepalive = 20.0
        self.silence = NEVER
        self.beat = NEVER
        self.watchdog = time.monotonic() if self.seconds_watchdog else NEVER
        self.rest = NEVER

    @property
    def seconds_watchdog(self) -> float:
        """How often systemd's watchdog is to be fed; 0 for never."""
        return int(os.environ.get("WATCHDOG_USEC", "0")) / 2e6

    @property
    def due(self) -> float:
        """The earliest of the timers."""
        return min(self.silence, self.beat, self.watchdog, self.rest, self.guest.due, self.tries.due, self.watch.due)

    def link(self, config: Config, will: Will) -> MqttLink:
        """Prepare the agent's link; its certificate is looked after from then on, in `next`. What was measured is read.

        Raises:
            ConfigError: The broker's address or files cannot be used.
        """
        where = address(config)
        made = MqttLink(
            where, client_id(config), session_seconds=_SECONDS_SESSION, keepalive=_SECONDS_KEEPALIVE, will=will
        )
        self.renewal = Renewal(config, where, made)
        self.watch = Watch(config.bytes_reserve)
        self.tries = Tries(Paces(Path(config.state.dir) / PACES))
        return made

    def next(self, link: MqttLink, timeout: float) -> object | None:
        """Give the link's next event that is the agent's business. After a second of rest, first give back what was used."""
        if time.monotonic() >= self.rest:
            self.rest = NEVER
            give_back()
        return link.next(timeout) if self.renewal is None else self.renewal.next(timeout)

    def used(self, now: float) -> None:
        """Rest in a second, unless there is more to do by then: giving back takes a tenth of a round without training."""
        self.rest = now + _SECONDS_REST

    def led(self, lead: Lead) -> None:
        """Take over a coordinator's keepalive."""
        self.keepalive = lead.keepalive
        self.beat = min(self.beat, time.monotonic() + self.keepalive / 2) if self.ready else self.beat

    def learnt(self, ready: Ready) -> bool:
        """Take in a worker's first word; True when it says something new about the data."""
        known, self.ready = self.ready, ready
        return known is None or _about(known) != _about(ready)

    def caps(self, config: Config, bytes_budget: int) -> Caps:
        """Say what this device brings."""
        assert self.ready is not None
        return Caps(
            runtime=__version__,
            engines=(config.worker.engine,) if config.worker.engine else available(),
            bytes_budget=bytes_budget,
            threads=config.worker.threads,
            samples=self.ready.samples,
            classes=self.ready.classes,
            input_shape=self.ready.input_shape,
        )


def _about(ready: Ready) -> tuple[int, int, tuple[int, ...]]:
    return ready.samples, ready.classes, ready.input_shape


def claim(root: Path) -> IO[bytes]:
    """Make the state folder this process's own; the claim ends with the returned file, and with the process.

    Raises:
        ConfigError: Another agent runs over it.
        StoreError: It cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (root / "lock").open("ab")
    except OSError as error:
        raise StoreError(f"{root}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"{root}: another agent runs over this folder; stop it, or give this one a [state] dir of its own"
        ) from None
    except OSError:
        return lock  # a file system without locks: go on as before
    return lock


def next_seq(root: Path, now: float) -> int:
    """Number this life, durable before anybody hears of it.

    It is above all earlier ones, and at least the wall clock's seconds: so that a device whose folder was lost is not
    taken for one of its own former lives, while a clock that is wrong does no harm as long as the folder is there.

    Args:
        root: The state folder.
        now: Wall clock, seconds since 1970.

    Raises:
        StoreError: The folder cannot be written.
    """
    path = root / "lives"
    known = 0
    with contextlib.suppress(OSError, ValueError):
        known = int(path.read_text("ascii"))
    seq = max(known + 1, int(now))
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write(str(seq))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from error
    return seq


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
    """Name this device at the broker; a second agent of the same name throws the first one out.

    Names have no colon, so that no two pairs of them make one. The check of `edge-runtime check` adds six characters, and 128
    are what the strictest of the hosted brokers takes; of a longer one its digest does as well.
    """
    name = f"{config.federation}:{config.device}"
    return name if len(name) <= _CLIENT_ID_MAX - len(":check") else hashlib.sha256(name.encode()).hexdigest()


def notify(word: str) -> None:
    """Tell systemd, if it listens."""
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as door:
        door.sendto(word.encode(), "\0" + where[1:] if where.startswith("@") else where)
