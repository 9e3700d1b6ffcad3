"""What a real agent says when it is flooded over a real broker."""

from __future__ import annotations

import json
from pathlib import Path

from edge_runtime.logs import BURST
from tests.support.devices import Agent, Script
from tests.support.mosquitto import Mosquitto
from wire import topics
from wire.messages import Presence

FLOOD = 400


def test_a_flood_costs_a_few_lines_and_every_line_can_be_read(tmp_path: Path) -> None:
    with (
        Mosquitto(tmp_path / "broker") as broker,
        Script(broker.port, tmp_path / "script") as script,
        Agent(tmp_path / "agent", broker.port, tables='[log]\nform = "json"') as agent,
    ):
        script.wait(Presence, where=lambda p: p.state == "online")
        for i in range(FLOOD):
            script.link.publish(topics.down("test", "d0", "order"), b"\xc1\n\x1b[2J" + str(i).encode())
        order = script.order(1)
        script.send(order)
        script.wait_update(order.id, 60)
        lines = [json.loads(line) for line in agent.log.read_text().splitlines()]
    warnings = [line for line in lines if line["level"] == "warning"]
    assert 1 <= len(warnings) <= BURST
    assert all("dropped a message" in line["msg"] for line in warnings)
    assert {line["device"] for line in lines} == {"d0"}
    assert [(line["order"], line["round"]) for line in lines if "order" in line] == [(order.id, 1)]
