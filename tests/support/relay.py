"""A bad network between a client and a server: a TCP relay that is slow, late, lossy, cut, reset or silent at will.

The rate is a token bucket for each direction, which all connections share as they would share a cable. Bytes are counted
once they are on that cable, so what a cut throws away was counted. The relay lives in one thread of its own; every
method may be called from any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, Self

_CHUNK = 8_192
_BURST = 32_768
_AHEAD = 512  # chunks that may be late at once: 4 MiB, more than any rate and delay in use here
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close becomes a reset
_SECONDS_CALL = 10.0
_SECONDS_AGAIN = 0.2


class Bucket:
    """Tokens that come back at a rate; without a rate there is always one."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Wait until `count` bytes may pass."""
        if self.rate is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - _BURST / self.rate) + count / self.rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


@dataclass(eq=False)
class Pair:
    """One connection and its two sockets. `moving` is cleared for a connection that is half open."""

    near: socket.socket
    far: socket.socket
    moving: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def end(self, *, reset: bool) -> None:
        for task in self.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for end in (self.near, self.far):
            if reset:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            # The loop forgets a cancelled read by the number of its file, which must not be somebody else's by then.
            asyncio.get_running_loop().call_soon(end.close)


class Relay:
    """Forwards 127.0.0.1:`port` to another port here. Clients are the near side: up is from them, down is to them."""

    def __init__(
        self, port_far: int, *, rate: float | None = None, delay: float = 0.0, loss: float = 0.0, seed: int = 0
    ) -> None:
        """Prepare; `rate` is in bytes per second for each direction, `delay` in seconds one way, `loss` of 8 KiB chunks.

        What is lost goes over the cable once more after TCP's shortest time-out, and all behind it waits: that is what a
        lost segment looks like to those who use TCP.
        """
        self.port = 0
        self.port_far = port_far
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self.seconds_cut = 0.0
        self.delay = delay
        self.lost = 0
        self._loss, self._dice = loss, random.Random(seed)
        self._up, self._down = Bucket(rate), Bucket(rate)
        self._pairs: set[Pair] = set()
        self._cut: asyncio.TimerHandle | None = None
        self._server: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    @property
    def bytes_wire(self) -> int:
        """Bytes that went over the cable, both ways."""
        return self.bytes_up + self.bytes_down

    @property
    def is_cut(self) -> bool:
        return self._server is None

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_SECONDS_CALL)
        self._loop.close()

    def cut(self, seconds: float) -> None:
        """Drop every connection at once and refuse new ones for a while."""
        self._call(self._cut_off(seconds))

    def reset(self) -> None:
        """Drop every connection; a new one is taken at once."""
        self._call(self._drop())

    def half_open(self) -> None:
        """Forward nothing more on the connections that there are, and say nothing of it. New ones work."""
        self._call(self._silence())

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._loop.run_forever()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(_SECONDS_CALL)

    async def _listen(self) -> None:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", self.port))
        server.listen(128)
        server.setblocking(False)
        self.port = server.getsockname()[1]
        self._server = server
        self._accepting = self._loop.create_task(self._accept(server))

    async def _deafen(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
        if self._server is not None:
            self._server.close()
        self._server = self._accepting = None

    async def _close(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
        await self._deafen()
        tasks = [task for pair in self._pairs for task in pair.tasks]
        await self._drop()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _drop(self) -> None:
        for pair in self._pairs:
            pair.end(reset=True)
        self._pairs.clear()

    async def _silence(self) -> None:
        for pair in self._pairs:
            pair.moving.clear()

    async def _cut_off(self, seconds: float) -> None:
        await self._deafen()
        await self._drop()
        self.seconds_cut += seconds
        self._cut = self._loop.call_later(seconds, lambda: self._loop.create_task(self._listen()))

    async def _accept(self, server: socket.socket) -> None:
        while True:
            near, _ = await self._loop.sock_accept(server)
            near.setblocking(False)
            far = socket.socket()
            far.setblocking(False)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await self._loop.sock_connect(far, ("127.0.0.1", self.port_far))
            except OSError:  # the server is not there: to the client, neither are we
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                near.close()
                far.close()
                continue
            self.connections += 1
            pair = Pair(near, far)
            pair.moving.set()
            self._pairs.add(pair)
            pair.tasks += [
                self._loop.create_task(self._forward(pair, near, far, self._up, up=True)),
                self._loop.create_task(self._forward(pair, far, near, self._down, up=False)),
            ]

    async def _forward(
        self, pair: Pair, source: socket.socket, sink: socket.socket, bucket: Bucket, *, up: bool
    ) -> None:
        late: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_AHEAD)
        writer = self._loop.create_task(self._deliver(pair, sink, late)) if self.delay else None
        if writer is not None:
            pair.tasks.append(writer)
        try:
            while data := await self._loop.sock_recv(source, _CHUNK):
                await pair.moving.wait()
                await self._pass(bucket, len(data), up=up)
                while self._dice.random() < self._loss:
                    self.lost += 1
                    await asyncio.sleep(_SECONDS_AGAIN)
                    await self._pass(bucket, len(data), up=up)
                await pair.moving.wait()
                if writer is None:
                    await self._loop.sock_sendall(sink, data)
                else:
                    await late.put((time.monotonic() + self.delay, data))
            await late.join()
            await pair.moving.wait()
        except OSError:
            pass
        finally:
            self._pairs.discard(pair)
            pair.end(reset=False)

    async def _pass(self, bucket: Bucket, count: int, *, up: bool) -> None:
        await bucket.take(count)
        if up:
            self.bytes_up += count
        else:
            self.bytes_down += count

    async def _deliver(self, pair: Pair, sink: socket.socket, late: asyncio.Queue[tuple[float, bytes]]) -> None:
        with contextlib.suppress(OSError):
            while True:
                at, data = await late.get()
                await asyncio.sleep(max(0.0, at - time.monotonic()))
                await pair.moving.wait()
                await self._loop.sock_sendall(sink, data)
                late.task_done()
