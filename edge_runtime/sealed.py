"""An enrolled device takes orders that its coordinator has signed, and no others; nothing of one is read before that is sure.

The agent loads nothing that knows signatures: each order waits for a short process (`edge_runtime.seal`).
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace

from edge_runtime import exits
from edge_runtime.config import Config
from wire import codec, topics
from wire.errors import PeerError
from wire.link import Link, Message
from wire.messages import MESSAGE_BYTES, Signed

log = logging.getLogger("edge_runtime")

_WAITING_MAX = 4
_SECONDS_LOOK = 0.05
_SECONDS_MAX = 120.0
_REST_LEAST, _REST_MOST = 0.1, 60.0
_TRIES_MAX = 6


class Sealed:
    """Stands between a link and the agent."""

    def __init__(self, config: Config, link: Link) -> None:
        """Prepare; the configuration's authority is whose signature counts."""
        self._link = link
        self._authority = config.broker.ca
        self._signed = topics.down(config.federation, config.device, "signed")
        self._order = topics.down(config.federation, config.device, "order")
        self._waiting: deque[Message] = deque(maxlen=_WAITING_MAX)  # of more, the older ones: they come again
        self._checked: Message | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._until = 0.0
        self._tries = 0
        self._rest = 0.0  # after an order that was not good, ever longer, so that a flood of them costs little
        self._next = 0.0

    def wait(self, timeout: float) -> float:
        """Say how long the owner may wait for the link."""
        if self._child is not None:
            return min(timeout, _SECONDS_LOOK)
        return min(timeout, max(0.0, self._next - time.monotonic())) if self._waiting else timeout

    def passes(self, event: object | None) -> object | None:
        """Give what the agent is to see: everything but orders, and those once they are found good."""
        if isinstance(event, Message) and event.topic in (self._signed, self._order):
            self._link.done(event)
            if event.topic == self._signed and len(event.payload) <= MESSAGE_BYTES:
                self._waiting.append(event)
            else:
                log.warning(
                    "an order is refused: it is not signed (or too long), and this device takes signed ones only"
                )
            event = None
        return self._good() if event is None else event

    def _good(self) -> Message | None:
        """Look after the process that checks; give an order that it has found good."""
        child, message = self._child, self._checked
        if child is None or message is None:
            if self._waiting and time.monotonic() >= self._next:
                self._begin(self._waiting.popleft())
            return None
        code = child.poll()
        if code is None and time.monotonic() < self._until:
            return None
        if code is None:
            child.kill()
            code = child.wait()
        self._child = self._checked = None
        if code:
            self._bad(
                message, f"the process that checks its signature ended with {code}", final=code == exits.ENROLMENT
            )
            return None
        self._tries, self._rest = 0, 0.0
        try:
            return replace(message, topic=self._order, payload=codec.decode(message.payload, Signed).body, token=0)
        except PeerError as error:
            log.warning("an order is refused: %s", error)
            return None

    def _bad(self, message: Message, why: str, *, final: bool) -> None:
        """Rest before the next check. Nobody has judged an order whose check itself did not work: that one is tried again."""
        self._rest = min(_REST_MOST, max(_REST_LEAST, 2 * self._rest))
        self._next = time.monotonic() + self._rest
        self._tries += 1
        if final or self._tries >= _TRIES_MAX or len(self._waiting) == _WAITING_MAX:
            self._tries = 0
            log.warning("an order is refused: %s", why)
        else:
            log.warning("an order is checked again: %s", why)
            self._waiting.appendleft(message)

    def _begin(self, message: Message) -> None:
        argv = [sys.executable, "-m", "edge_runtime.seal", self._authority]
        try:
            child = subprocess.Popen(argv, stdin=subprocess.PIPE)
        except OSError as error:
            self._bad(message, f"no process to check its signature: {error.strerror}", final=False)
            return
        assert child.stdin is not None
        with contextlib.suppress(OSError):  # it has ended already: its exit code tells
            child.stdin.write(message.payload)  # at most as much as a pipe holds, so this does not wait
        with contextlib.suppress(OSError):
            child.stdin.close()
        self._child, self._checked = child, message
        self._until = time.monotonic() + _SECONDS_MAX
