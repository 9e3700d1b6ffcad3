"""What a bad link, slow readers and large models cost: bytes, time and memory.

`python -m tests bench link --json`. Cases: 50 MB up and down by the product's own code over a relay at 1.4 MB/s that is
cut three times, beside one PUBLISH of the same size; a broker whose 50 devices ask for pieces and never read them; an
agent that receives 64 MB; a global model that 20 devices of five widths pull.
"""

from __future__ import annotations

import signal
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho

from coordinator import broker as brokers
from coordinator.advance import Task, advance
from tests.bench import Row, machine, outcome
from tests.support.devices import Agent, Script
from tests.support.messages import an_order
from tests.support.mosquitto import Mosquitto, free_port
from tests.support.relay import Relay
from tests.support.transfer import FEDERATION, Head, Tail, drive, link_to, order_for, random_file
from wire import topics, zoo
from wire.chunks import WINDOW_DOWN
from wire.messages import BlobRef, Order, Presence
from wire.spec import Structure, encode, parameter_count

MB = 1_000_000
MIB = 1 << 20
_RATE = 1.4 * MB
_BYTES = 50 * MB
_KEEPALIVE = 10.0
_CUTS = (1.0, 2.0, 3.0)
_SECONDS_PUBLISH = 60.0
_STALLED = 50
_DEVICES = 20
_WIDTHS = 5


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        rows = _transfers(root / "transfer") + _one_publish(root / "publish") + _stalled(root / "stalled")
        rows += _device(root / "device") + _uplink(root / "uplink")
    return outcome("link", rows, machine())


# --- a link that is slow and cut -------------------------------------------------------------------------------------


class Cuts:
    """Cuts the relay for ever longer when a quarter, a half and three quarters have gone over it."""

    def __init__(self, relay: Relay, count: Callable[[], int]) -> None:
        self._relay = relay
        self._count = count
        self._began = count()
        self._left = [(_BYTES * part // 4, seconds) for part, seconds in enumerate(_CUTS, 1)]

    def check(self) -> None:
        if self._left and self._count() - self._began >= self._left[0][0]:
            self._relay.cut(self._left.pop(0)[1])


@dataclass(frozen=True, slots=True)
class Found:
    """Seconds in all, of the cuts, and without a connection; bytes on the device's leg, both ways."""

    seconds: float
    cut: float
    away: float
    bytes_wire: int


def _transfers(root: Path) -> list[Row]:
    with Mosquitto(root / "broker") as broker, Relay(broker.port, rate=_RATE) as relay:
        head = Head(link_to(broker.port, "head"), root)
        tail = Tail(link_to(relay.port, "tail", keepalive=_KEEPALIVE), root)
        drive([head, tail], lambda: bool(tail.ups and head.mail.is_up))
        ref = random_file(root / "update", _BYTES)
        up = _transfer(
            head,
            tail,
            relay,
            lambda: relay.bytes_up,
            lambda: tail.offer(root / "update", ref, "a" * 16),
            lambda: bool(tail.ended),
        )
        ref = random_file(root / "model", _BYTES, seed=1)
        head.spool.add_file(root / "model", ref.digest)
        head.mail.publisher.want([ref])
        drive([head, tail], lambda: not head.mail.publisher.busy, 60.0)
        order = order_for("d0", ref)
        down = _transfer(
            head, tail, relay, lambda: relay.bytes_down, lambda: tail.fetch(order), lambda: bool(tail.fetched)
        )
        tail.link.stop()
        head.link.stop()
    return [
        *_figures("50 MB up, 3 cuts", up),
        *_figures("50 MB down, 3 cuts", down),
    ]


def _transfer(
    head: Head, tail: Tail, relay: Relay, count: Callable[[], int], begin: Callable[[], None], done: Callable[[], bool]
) -> Found:
    cuts, before, cut_before, away = Cuts(relay, count), relay.bytes_wire, relay.seconds_cut, tail.seconds_away
    begin()

    def over() -> bool:
        cuts.check()
        return done()

    seconds = drive([head, tail], over, 150.0)
    return Found(seconds, relay.seconds_cut - cut_before, tail.seconds_away - away, relay.bytes_wire - before)


def _figures(case: str, found: Found) -> list[Row]:
    return [
        Row(case, "bytes on the wire, both ways", found.bytes_wire / _BYTES, "x the size", "lower", 1.03),
        # The wait until the next attempt after a cut counts against us.
        Row(case, "goodput outside the cuts", _rate(found.seconds - found.cut), "of the link", "higher", 0.9),
        Row(case, "goodput while connected", _rate(found.seconds - found.away), "of the link", "higher", 0.9),
        Row(case, "time, cuts included", found.seconds, "s", "lower"),
        Row(case, "time of the cuts", found.cut, "s", "lower"),
        Row(case, "time without a connection", found.away, "s", "lower"),
    ]


def _rate(seconds: float) -> float:
    return _BYTES / seconds / _RATE


def _one_publish(root: Path) -> list[Row]:
    """The same bytes as one QoS 1 message of plain paho, under the same conditions, for a bounded time."""
    root.mkdir()
    port = free_port()
    (root / "own.conf").write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n")
    program = brokers.find_mosquitto()
    assert program is not None
    process = brokers._start([program, "-c", str(root / "own.conf")], root, signal.SIGTERM, "127.0.0.1", port)
    assert process is not None
    sent: list[int] = []
    try:
        with Relay(port, rate=_RATE) as relay:
            client: Any = paho.Client(paho.CallbackAPIVersion.VERSION2, "one", protocol=paho.MQTTv5)
            client.reconnect_delay_set(1, 1)
            client.on_publish = lambda *_: sent.append(1)
            client.connect("127.0.0.1", relay.port, int(_KEEPALIVE))
            client.loop_start()
            cuts = Cuts(relay, lambda: relay.bytes_up)
            client.publish("big", bytes(_BYTES), 1)
            began = time.monotonic()
            while not sent and time.monotonic() < began + _SECONDS_PUBLISH:
                cuts.check()
                time.sleep(0.02)
            seconds, wire, lives = time.monotonic() - began, relay.bytes_wire, relay.connections
        client.loop_stop()
    finally:
        brokers._end(process)
    case = f"50 MB as one PUBLISH, 3 cuts, {_SECONDS_PUBLISH:g} s"
    return [
        Row(case, "delivered", float(len(sent)), "message", "higher"),
        Row(case, "bytes on the wire", wire / _BYTES, "x the size", "lower"),
        Row(case, "connections, each from byte 0", float(lives), "connections", "lower"),
        Row(case, "given up after", seconds, "s", "lower"),
    ]


# --- memory -----------------------------------------------------------------------------------------------------------


def _stalled(root: Path) -> list[Row]:
    """Fifty devices ask for their first window of an 8 MiB model and never read a byte of it."""
    with Mosquitto(root / "broker") as broker, ExitStack() as devices:
        before = broker.memory()
        head = Head(link_to(broker.port, "head"), root)
        ref = random_file(root / "model", 8 * MIB)
        head.spool.add_file(root / "model", ref.digest)
        drive([head], lambda: head.mail.is_up)
        head.mail.publisher.want([ref])
        drive([head], lambda: not head.mail.publisher.busy, 30.0)
        held = broker.memory()
        for number in range(_STALLED):
            devices.enter_context(closing(_mute(broker.port, f"mute-{number}", ref)))
        _settle(broker)
        peak, kernel = broker.memory(), _unread(broker.port)
        head.link.stop()
    case = f"broker, {_STALLED} stalled devices, 8 MiB model"
    return [
        Row(case, "peak in all", peak / MIB, "MiB", "lower", 25.0 * MB / MIB),
        Row(case, "peak above its start", (peak - before) / MIB, "MiB", "lower"),
        Row(case, "of that, the model itself", (held - before) / MIB, "MiB", "lower"),
        Row(case, "besides, in the kernel's send buffers", kernel / MIB, "MiB", "lower"),
    ]


def _mute(port: int, name: str, ref: BlobRef) -> socket.socket:
    """Connect, subscribe to the first window of a blob, and never read again. Its kernel takes in next to nothing."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect(("127.0.0.1", port))
    properties = b"\x11" + struct.pack(">I", 600) + b"\x21" + struct.pack(">H", 16)
    hello = _text("MQTT") + b"\x05\x02" + struct.pack(">H", 600) + bytes([len(properties)]) + properties + _text(name)
    wire.sendall(_packet(0x10, hello))
    assert wire.recv(2)[0] == 0x20
    filters = [topics.piece(FEDERATION, ref.digest, index) for index in range(WINDOW_DOWN)]
    wire.sendall(_packet(0x82, b"\x00\x01\x00" + b"".join(_text(name) + b"\x01" for name in filters)))
    return wire


def _text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _packet(kind: int, body: bytes) -> bytes:
    length, size = len(body), bytearray()
    while True:
        length, low = divmod(length, 128)
        size.append(low | (128 if length else 0))
        if not length:
            return bytes([kind]) + bytes(size) + body


def _unread(port: int) -> int:
    """Count the bytes that wait in the kernel on the connections of a server's port."""
    found = 0
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        words = line.split()
        if int(words[1].rpartition(":")[2], 16) == port:
            found += int(words[4].partition(":")[0], 16)
    return found


def _settle(broker: Mosquitto) -> None:
    """Wait until the broker's memory has not moved for a second."""
    last, since = 0, time.monotonic()
    while time.monotonic() < since + 1.0:
        now = broker.memory("VmRSS")
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.05)


def _device(root: Path) -> list[Row]:
    """A real agent at rest, and while it receives a shell of 64 MB."""
    with (
        Mosquitto(root / "broker") as broker,
        Script(broker.port, root / "script", keepalive=20.0) as script,
        Agent(root / "agent", broker.port) as agent,
    ):
        script.wait(Presence, where=lambda p: p.state == "online")
        first = script.order(1)
        script.send(first)
        script.wait_update(first.id)
        script.commit(first.id)
        ref = random_file(root / "model", 64 * MB)
        script.publish(root / "model", ref)
        script.turn(2.0)
        order = replace(script.order(2), shells=(ref,))
        script.turn(1.0)
        before = agent.memory("VmRSS")
        Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # the high-water mark begins anew
        script.send(order)
        whole = agent.root / "state/spool" / ref.digest
        began = time.monotonic()
        script.until(whole.exists, 60.0)
        seconds = time.monotonic() - began
        peak = agent.memory("VmHWM")
    return [
        Row("agent, receives 64 MB", "memory more than at rest", (peak - before) / MIB, "MiB", "lower", 2.0),
        Row("agent, receives 64 MB", "resident at rest", before / MIB, "MiB", "lower"),
        Row("agent, receives 64 MB", "rate on loopback", 64 / seconds, "MB/s", "higher"),
    ]


# --- one model for all -------------------------------------------------------------------------------------------------


def _uplink(root: Path) -> list[Row]:
    """Twenty devices of five widths pull what they need; the coordinator sends its model once."""
    with Mosquitto(root / "broker") as broker:
        head = Head(link_to(broker.port, "head"), root)
        spec = zoo.by_name("digits-cnn")
        text = head.spool.add_bytes(encode(spec))
        task = Task(str(head.spool.root), text.digest, "nestfl", {}, {}, 0, "", (), 1, ())
        found = advance(task)
        assert len(found.shell_of) == _WIDTHS
        drive([head], lambda: head.mail.is_up and not head.link.next(0.05))
        before = head.link.bytes_sent
        head.mail.publisher.want(found.shells)
        drive([head], lambda: not head.mail.publisher.busy, 30.0)
        held = 0
        tails = []
        for number in range(_DEVICES):
            shells = found.shells[: found.shell_of[number % _WIDTHS]]
            tails.append(Tail(link_to(broker.port, f"d{number}"), root, f"d{number}"))
            tails[-1].fetch(_order(f"d{number}", text, shells))
            held += sum(ref.size for ref in shells)
        sent = head.link.bytes_sent - before
        head.mail.publisher.want([text])
        drive([head, *tails], lambda: all(tail.fetched for tail in tails), 60.0, wait=0.0)
        again = head.link.bytes_sent - before - sent
        for end in (head, *tails):
            end.link.stop()
    case = f"{_DEVICES} devices on {_WIDTHS} widths"
    weights = 4 * parameter_count(spec, Structure())
    return [
        Row(case, "coordinator sends", sent / weights, "global models", "lower", 1.01),
        Row(case, "after that, the spec and nothing else", again / text.size, "x the spec", "lower", 1.5),
        Row(case, "coordinator sends, of what the devices take", sent / held, "of the sum", "lower"),
        Row(case, "devices take", held / weights, "global models", "lower"),
    ]


def _order(device: str, spec: BlobRef, shells: tuple[BlobRef, ...]) -> Order:
    return replace(an_order(device, 1), spec=spec, shells=shells)
