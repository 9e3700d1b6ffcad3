"""Putting a device out: whoever takes over its name at the broker disconnects it and ends its session."""

from __future__ import annotations

import time

from wire import topics
from wire.errors import BrokerUnreachable
from wire.link import Address, Up
from wire.link.mqtt import MqttLink

_SECONDS = 5.0


def put_out(way_in: str, federation: str, device: str) -> None:
    """Disconnect a device, end its session with all that waits for it, and delete the birth that it left.

    It does not keep the device from coming back: that the broker's files do, which have to be in force before.

    Args:
        way_in: The coordinator's own address at its own broker.
        federation: Whose device.
        device: Its name, which is its client id there.

    Raises:
        BrokerUnreachable: The broker does not answer.
    """
    presence = topics.presence(federation, device)
    link = MqttLink(Address.parse(way_in), device, session_seconds=0, keepalive=10)
    link.start()
    until = time.monotonic() + _SECONDS
    try:
        while not isinstance(link.next(0.1), Up):
            if time.monotonic() > until:
                raise BrokerUnreachable(
                    f"the broker refuses {device} from now on, but does not answer, so it may still be connected"
                )
    finally:
        link.stop((presence, b"", True))
