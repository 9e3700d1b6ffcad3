"""A link over an MQTT 5 broker: the only module that knows paho.

There is no network thread. The owner's `MqttLink.next` waits on the socket and on the inbox at once and drives paho
from there, so nothing is locked, nothing is handed from thread to thread, and a message costs no context switch. Only
the opening of a connection (names, TCP, TLS may take long) runs in a short-lived thread. Other traps of paho that are
avoided here: it does not set TCP_NODELAY, its back-off has no jitter, and its queue of unsent messages runs into its
own 16-bit numbers.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import select
import socket
import sys
import threading
import time
import types
from collections.abc import Sequence
from typing import Any, Literal

from wire.errors import TooLarge
from wire.link import Address, Denied, Down, Farewell, Link, Message, Published, Up, Will, tls
from wire.link.ledger import Backoff, Inbox, Outbox, Parcel, Receipts, Wishes

if "urllib.request" not in sys.modules:
    # paho imports it to look for proxies, which takes PySocks as well; with http and email behind it, it is 2.5 MB.
    sys.modules["urllib.request"] = types.ModuleType("urllib.request")
    import paho.mqtt.client as paho

    del sys.modules["urllib.request"]
    if "socks" in sys.modules:
        importlib.import_module("urllib.request")
else:
    import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

__all__ = ["PACKET_BYTES", "UNDONE_MAX", "Address", "MqttLink", "Will"]

PACKET_BYTES = 307_200
"""Largest packet that we let a broker send us."""
UNDONE_MAX = 16
"""Most QoS 1 deliveries that are not done."""
_SECONDS_DIAL = 10.0
_SECONDS_STOP = 2.0
_SECONDS_STARVE = 0.05
_SECONDS_HANG_UP = 0.2
_QUICKACK: int = getattr(socket, "TCP_QUICKACK", 0)
_REFUSALS = frozenset({0x84, 0x85, 0x86, 0x87, 0x8A, 0x8C})


class _Dialled:
    """The end of an attempt to open a connection; `problem` is empty when it is open."""

    def __init__(self, problem: str, refused: bool) -> None:
        self.problem = problem
        self.refused = refused


class MqttLink:
    """A `Link` over one broker, for one owner thread."""

    def __init__(
        self, address: Address, client_id: str, *, session_seconds: int, keepalive: float, will: Will | None = None
    ) -> None:
        """Prepare; nothing is opened before `start`.

        Args:
            address: The broker.
            client_id: Our name there; a second link of the same name throws the first one out.
            session_seconds: How long the broker keeps our subscriptions and messages while we are away.
            keepalive: Seconds of silence after which both sides probe; whole seconds, rounded up.
            will: What the broker shall say when we vanish, at once.

        Raises:
            ConfigError: A certificate file cannot be used.
        """
        self.bytes_sent = 0
        self.bytes_received = 0
        self._peer = tls.Peer(address)
        self._inbox = Inbox()
        self._outbox = Outbox()
        self._wishes = Wishes()
        self._receipts = Receipts()
        self._backoff = Backoff()
        self._state: Literal["new", "waiting", "dialling", "greeting", "up", "stopped"] = "new"
        self._told = ""
        self._turned = 0.0
        self._client = self._make_client(client_id, session_seconds, max(1, math.ceil(keepalive)), will)

    def _make_client(self, client_id: str, session_seconds: int, keepalive: int, will: Will | None) -> Any:
        client: Any = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
        )
        client.connect_timeout = _SECONDS_DIAL
        client.max_inflight_messages_set(0)  # ours is the window
        address = self._peer.address
        if address.user:
            client.username_pw_set(address.user, address.password)
        if self._peer.context is not None:
            client.tls_set_context(self._peer.context)
        if will is not None:
            client.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        client.on_socket_open = _no_delay
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        properties = _properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session_seconds
        properties.ReceiveMaximum = UNDONE_MAX
        properties.MaximumPacketSize = PACKET_BYTES
        client.connect_async(address.host, address.port, keepalive, clean_start=False, properties=properties)
        return client

    # --- the owner's side ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to connect; `next` carries it on."""
        if self._state == "new":
            self._dial()

    def post(self, event: object) -> None:
        """See `Link.post`."""
        if self._state != "stopped":
            self._inbox.post(event)

    def next(self, timeout: float) -> object | None:
        """See `Link.next`. A steady stream of events does not keep the network waiting for more than 50 ms."""
        now = time.monotonic()
        until = now + timeout
        events = self._inbox.events
        while True:
            if not events or now - self._turned >= _SECONDS_STARVE:
                self._turn(0.0 if events else max(0.0, until - now))
            if events:
                event = events.popleft()
                if not isinstance(event, _Dialled):
                    return event
                self._dialled(event)
            now = time.monotonic()
            if now >= until and not events:
                return None

    def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, seconds_expiry: int | None = None
    ) -> int:
        """See `Link.publish`.

        Raises:
            TooLarge: The message is beyond `PACKET_BYTES`.
        """
        if len(topic) * 3 + len(payload) + 32 > PACKET_BYTES:
            raise TooLarge(f"a message of {len(payload)} bytes on {topic}; the limit is {PACKET_BYTES}")
        parcel = Parcel(self._outbox.new_id(), topic, payload, retain, seconds_expiry)
        if qos > 0:
            number = self._outbox.add(parcel)
            self._pump()
            return number
        if self._state == "up":
            self._hand_over(parcel, 0)
        return parcel.id

    def subscribe(self, topics: Sequence[str], qos: int = 1) -> None:
        """See `Link.subscribe`."""
        self._wishes.add(topics, qos)
        self._ask()

    def unsubscribe(self, topics: Sequence[str]) -> None:
        """See `Link.unsubscribe`."""
        self._wishes.drop(topics)
        self._ask()

    def renew(self) -> None:
        """Take the certificate from its file as it is now, and connect again with it; the session stays."""
        self._peer.renew()
        if self._state in ("greeting", "up"):
            self._close()
            self._lost("connecting again, with a new certificate")

    def done(self, message: Message) -> None:
        """See `Link.done`."""
        if self._state == "up":
            for number in self._receipts.done(message.token):
                self._client.ack(number, 1)

    def stop(self, farewell: Farewell | None = None) -> None:
        """See `Link.stop`."""
        if self._state == "up" and farewell is not None:
            topic, payload, retain = farewell
            last = self._outbox.hurry(Parcel(self._outbox.new_id(), topic, payload, retain, None))
            until = time.monotonic() + _SECONDS_STOP
            while self._state == "up" and time.monotonic() < until and not _answered(self._inbox, last):
                self._inbox.events.clear()
                self._turn(0.1)
        self._state = "stopped"
        self._close()
        self._inbox.close()

    # --- the network's side ----------------------------------------------------------------------------------------

    def _turn(self, seconds: float) -> None:
        """Wait until something can be done, at most `seconds`, and do it."""
        now = self._turned = time.monotonic()
        poller = select.poll()
        poller.register(self._inbox.reader, select.POLLIN)
        wire = self._client.socket() if self._state in ("greeting", "up") else None
        if wire is not None:
            self._pump()
            pending = getattr(wire, "pending", None)
            seconds = 0.0 if pending and pending() else min(seconds, 1.0)
            poller.register(wire, select.POLLIN | (select.POLLOUT if self._client.want_write() else 0))
        elif self._state == "waiting":
            if now >= self._backoff.at:
                self._dial()
            else:
                seconds = min(seconds, self._backoff.at - now)
        ready = dict(poller.poll(math.ceil(seconds * 1000)))
        if self._inbox.reader.fileno() in ready:
            self._inbox.quiet()
        if wire is None:
            return
        flags = ready.get(wire.fileno(), 0) if wire.fileno() >= 0 else 0
        if flags & ~select.POLLOUT or (pending and pending()):
            self._client.loop_read()
            _ack_now(wire)
        if self._client.want_write():  # also what a callback asked for, which paho does not send by itself
            self._client.loop_write()
        self._client.loop_misc()
        self._pump()
        self._turned = time.monotonic()

    def _dial(self) -> None:
        self._state = "dialling"
        threading.Thread(target=self._open, name="dial", daemon=True).start()

    def _open(self) -> None:
        """Open a connection. While this thread lives, the owner leaves paho alone."""
        problem, refused = "the attempt to connect failed", False
        try:
            self._client.reconnect()
            problem = ""
        except (OSError, ValueError) as error:
            refused = hasattr(error, "verify_code")  # an error of ssl's, which need not be there
            problem = f"{self._peer}: {tls.trouble(error)}"
        finally:
            if self._state == "stopped":
                self._close()
            self._inbox.post(_Dialled(problem, refused))

    def _close(self) -> None:
        """Send DISCONNECT, which takes the last will back, and hang up; each step is waited for 0.2 s at most.

        A connection that is closed with something unread is reset, and a broker that is reset before it has read the
        DISCONNECT speaks the will. So a second handle outlives paho's, and reads to the end.
        """
        wire = self._client.socket()
        rest = None
        with contextlib.suppress(OSError):
            rest = socket.fromfd(wire.fileno(), wire.family, wire.type) if wire is not None else None
        self._client.disconnect()
        wire = self._client.socket()
        if wire is not None:
            poller = select.poll()
            poller.register(wire, select.POLLOUT)
            poller.poll(math.ceil(1000 * _SECONDS_HANG_UP))
            self._client.loop_write()
            wire.close()
        if rest is not None:
            _read_out(rest)

    def _dialled(self, event: _Dialled) -> None:
        if self._state == "dialling":
            self._state = "greeting"
            if event.problem:
                self._lost(event.problem, refused=event.refused)
            elif self._client.socket() is None:
                self._lost(self._peer.doubt())

    def _pump(self) -> None:
        """Hand over what waits, as far as the broker's window goes."""
        while self._state == "up" and (parcel := self._outbox.ready()) is not None:
            if self._outbox.fits(parcel):
                self._hand_over(parcel, 1)
            else:
                problem = f"{len(parcel.payload)} bytes; this broker takes packets of {self._outbox.packet_max}"
                self._inbox.events.append(Published(parcel.id, problem))

    def _hand_over(self, parcel: Parcel, qos: int) -> None:
        properties = None
        if parcel.seconds_expiry is not None:
            properties = _properties(PacketTypes.PUBLISH)
            properties.MessageExpiryInterval = parcel.seconds_expiry
        number = self._client.publish(parcel.topic, parcel.payload, qos, parcel.retain, properties).mid
        self.bytes_sent += len(parcel.topic) + len(parcel.payload)
        if qos:
            self._outbox.flying[number] = parcel.id

    def _ask(self) -> None:
        """Tell the broker what is wanted; leaving goes first."""
        while self._state == "up" and (leave := self._wishes.drops()):
            self._wishes.asked(self._client.unsubscribe(leave)[1], leave)
        while self._state == "up" and (want := self._wishes.adds()):
            self._wishes.asked(self._client.subscribe(want)[1], [topic for topic, _ in want])

    def _lost(self, why: str, *, refused: bool = False) -> None:
        """Take note, once, that there is no connection. paho may say so twice."""
        if self._state in ("greeting", "up"):
            self._state = "waiting"
            self._backoff.fail(time.monotonic())
            if why != self._told:
                self._told = why
                self._inbox.events.append(Down(why, refused))

    # --- what paho calls, always in the owner's thread (a failed CONNECT aside) --------------------------------------

    def _on_connect(self, _client: Any, _userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._lost(f"{self._peer} refused us: {reason.getName()}", refused=reason.value in _REFUSALS)
            return
        self._state = "up"
        self._told = ""
        self._backoff.up(time.monotonic())
        self._receipts.renew()
        self._outbox.greet(getattr(properties, "ReceiveMaximum", None), getattr(properties, "MaximumPacketSize", None))
        self._wishes.renew(flags.session_present)
        self._inbox.events.append(Up(flags.session_present))
        self._ask()

    def _on_disconnect(self, _client: Any, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        name = reason.getName()
        if name in ("Unspecified error", "Normal disconnection"):
            name = "the connection broke"
        self._lost(self._peer.doubt() if self._state == "greeting" else f"lost {self._peer}: {name}")

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        token = self._receipts.take(message.mid) if message.qos else 0
        try:
            event = Message(message.topic, bytes(message.payload), bool(message.retain), token)
        except UnicodeDecodeError:  # no topic of ours; acknowledge it, or it would come for ever
            event = Message("", b"", retained=False, token=token)
        self.bytes_received += len(event.topic) + len(event.payload)
        self._inbox.events.append(event)

    def _on_publish(self, _client: Any, _userdata: Any, number: int, reason: Any, _properties: Any) -> None:
        parcel = self._outbox.flying.pop(number, None)
        if parcel is not None:
            self._inbox.events.append(Published(parcel, reason.getName() if reason.is_failure else ""))

    def _on_subscribe(self, _client: Any, _userdata: Any, number: int, reasons: Any, _properties: Any) -> None:
        for topic, reason in zip(self._wishes.answered(number), reasons, strict=False):
            if reason.is_failure:
                self._inbox.events.append(Denied(topic, reason.getName()))

    def _on_unsubscribe(self, _client: Any, _userdata: Any, number: int, _reasons: Any, _properties: Any) -> None:
        self._wishes.answered(number)


def _properties(packet: int) -> Any:
    make: Any = Properties
    return make(packet)


def _no_delay(_client: Any, _userdata: Any, opened: Any) -> None:
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read_out(rest: socket.socket) -> None:
    with rest, contextlib.suppress(OSError):
        rest.settimeout(_SECONDS_HANG_UP)
        rest.shutdown(socket.SHUT_WR)
        until = time.monotonic() + _SECONDS_HANG_UP
        while rest.recv(65_536) and time.monotonic() < until:
            pass


def _ack_now(opened: Any) -> None:
    """Tell the kernel, after each read, not to wait with its TCP acknowledgement.

    A broker that does not set TCP_NODELAY itself (rumqttd, mosquitto as shipped) sends its next small packet only after
    that, which is 40 ms a time: a no-op round over iotcore takes 44 ms without and 20 ms with it.
    """
    if _QUICKACK and opened.fileno() >= 0:
        opened.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


def _answered(inbox: Inbox, number: int) -> bool:
    return any(isinstance(event, Published) and event.id == number for event in inbox.events)


_: type[Link] = MqttLink
