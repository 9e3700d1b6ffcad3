"""Questions about what this device must reach: the broker, and its own data."""

from __future__ import annotations

import time

from edge_runtime.config import Config
from edge_runtime.health.finding import Finding, Machine

_SECONDS_BROKER = 5.0
_SHOWN = 10


def broker(config: Config, _: Machine) -> Finding:
    """Ask the broker to let us in; under another client id, so that a running agent is not thrown out."""
    from edge_runtime.life import address, client_id
    from wire.link import Down, Up
    from wire.link.mqtt import MqttLink

    where = address(config)
    link = MqttLink(where, f"{client_id(config)}:check", session_seconds=0, keepalive=10)
    link.start()
    until = time.monotonic() + _SECONDS_BROKER
    why = f"no answer in {_SECONDS_BROKER:g} s"
    try:
        while time.monotonic() < until:
            event = link.next(0.2)
            if isinstance(event, Up):
                return Finding("broker", fine=True, found=f"{where} speaks MQTT 5 and lets us in")
            if isinstance(event, Down):
                why = event.why
                if event.refused:
                    break
    finally:
        link.stop()
    advice = "is the coordinator (or the broker) running, is [broker] url right, does a firewall stand between?"
    return Finding("broker", fine=False, found=f"{where}: {why}", advice=advice)


def data(config: Config, _: Machine) -> Finding:
    """Load the data as a worker would."""
    from edge_runtime.data import load as load_data

    data = load_data(config.data)
    count = len(data.train[1])
    found = f"{data.name}: {count} to train on, {len(data.test[1])} to test, {data.classes} classes, {data.input_shape}"
    if data.labels:
        shown = ", ".join(data.labels[:_SHOWN]) + (", ..." if len(data.labels) > _SHOWN else "")
        found += f": {shown}" + (" (as found here: with [data] labels all devices count alike)" if data.guessed else "")
    if not count:
        return Finding(
            "data", fine=False, found=found, advice="lower [data] validation and test, or bring more samples"
        )
    return Finding("data", fine=True, found=found)
