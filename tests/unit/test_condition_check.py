"""The line of `edge-runtime check` about conditions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_runtime import health
from edge_runtime.config import BrokerConfig, ConditionsConfig, Config
from edge_runtime.health.conditions import conditions
from edge_runtime.probes import command as commands
from tests.support import trees
from tests.support.trees import stub, write


def ask(tmp_path, **wanted):
    config = Config("d0", BrokerConfig("mqtt://h"), conditions=ConditionsConfig(**wanted))
    return conditions(config, replace(health.HERE, root=tmp_path))


def test_it_is_asked():
    assert conditions in health.QUESTIONS


def test_without_conditions(tmp_path):
    found = ask(tmp_path)
    assert found.fine
    assert "whenever it is asked" in found.found


def test_each_one_is_named_with_what_it_reads(tmp_path):
    write(tmp_path, {**trees.LAPTOP, "sys/class/power_supply/AC/online": "0"})
    found = ask(tmp_path, charging=True, battery_min=20, celsius_max=90, load_max=0.5)
    assert found.fine, "that it waits now is no fault of the machine"
    assert found.found == (
        "charging: unplugged (fails); battery_min: battery at 71 %, wanted: 20 % or more; "
        "celsius_max: processor at 58 C, wanted: 90 C or less; "
        "load_max: load of others 0.02 per core, wanted: 0.5 or less; pressure 0 %"
    )
    assert found.advice == "it takes no orders until all of them hold"
    assert ask(tmp_path, celsius_max=90).advice == ""


def test_what_cannot_be_read_is_a_fault_with_advice(tmp_path):
    found = ask(tmp_path, celsius_max=90, unthrottled=True)
    assert not found.fine
    assert found.advice == "take celsius_max, unthrottled out of [conditions], or it will never train"


@pytest.mark.parametrize(("script", "fine"), [('echo \'{"plugged": "PLUGGED_AC"}\'', True), ("sleep 30", False)])
def test_a_phones_commands_have_their_time_and_no_more(tmp_path, monkeypatch, script, fine):
    monkeypatch.setattr(commands, "SECONDS_MAX", 0.4)
    for name, value in stub(tmp_path / "bin", "termux-battery-status", script).items():
        monkeypatch.setenv(name, value)
    assert ask(tmp_path, charging=True).fine is fine


def test_a_container_says_where_the_machine_is(tmp_path):
    write(tmp_path / "host", trees.PI_4)
    assert "81 C" in ask(tmp_path / "else", celsius_max=90, root=str(tmp_path / "host")).found
