"""A device's configuration file: what may stand in it, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.amounts import amount
from edge_runtime.config import ConditionsConfig, load
from wire.errors import ConfigError

WHOLE = """
device = "kitchen-pi"
federation = "house"
[broker]
url = "mqtts://broker.lan"
username = "kitchen"
password_file = "/etc/edge/password"
ca = "/etc/edge/ca.pem"
[data]
source = "csv"
path = "~/rows.csv"
validation = 0.2
test = 0.3
seed = 4
[memory]
budget = "48 MiB"
reserve = 1000000
[worker]
mode = "spawn"
engine = "torch"
threads = 2
seconds_warm = 5
seconds_stall = 60.5
[state]
dir = "/var/lib/edge"
bytes_spool = "1 GiB"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "pi.toml"
    path.write_text(text)
    return path


def test_every_key(tmp_path: Path) -> None:
    config = load(written(tmp_path, WHOLE))
    assert (config.device, config.federation) == ("kitchen-pi", "house")
    assert config.broker.url == "mqtts://broker.lan"
    assert (config.data.source, config.data.validation, config.data.test, config.data.seed) == ("csv", 0.2, 0.3, 4)
    assert (config.bytes_budget, config.bytes_reserve) == (48 << 20, 1_000_000)
    assert (config.worker.mode, config.worker.threads, config.worker.seconds_warm) == ("spawn", 2, 5.0)
    assert config.state.dir == "/var/lib/edge"


def test_the_least_that_is_needed(tmp_path: Path) -> None:
    config = load(written(tmp_path, 'device = "a"\n[broker]\nurl = "mqtt://h"\n'))
    assert (config.federation, config.data.source, config.worker.mode) == ("home", "digits", "auto")
    assert (config.bytes_budget, config.bytes_reserve) == (0, 64 << 20)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[broker]\nurl = "mqtt://h"\n', "device: this key is missing"),
        ('device = "a"\n', "broker: this key is missing"),
        ('device = "a b"\n[broker]\nurl = "mqtt://h"\n', "a b"),
        ('device = "a.b"\n[broker]\nurl = "mqtt://h"\n', "letters, digits"),
        ('device = "a"\nfederation = "x.y"\n[broker]\nurl = "mqtt://h"\n', "federation 'x.y'"),
        ('device = "a"\n[broker]\nurl = 1883\n', "broker.url: expected str, got int"),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\nport = 1\n', "broker.port: unknown key; known here: "),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\n[memory]\nbudget = "48 MB/s"\n', "memory.budget: '48 MB/s'"),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\n[memory]\nbudget = 1.5\n', "memory.budget"),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\n[worker]\nmode = "hot"\n', "expected one of auto, spawn, warm"),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\n[worker]\nthreads = 0\n', "worker.threads"),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\n[data]\ntest = 1.5\n', "data.test"),
        ('device = "a"\n[broker]\nurl = "mqtt://h"\n[data]\ntest = 0.6\nvalidation = 0.6\n', "more than everything"),
        ('device = "a\n', "not a readable TOML file"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, text))
    assert told in str(caught.value)


def test_a_mistake_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, 'device = "a"\n[broker]\nurl = "mqtt://h"\n[memory]\nbudget = "much"\n')
    with pytest.raises(ConfigError, match=str(path)):
        load(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), ("0", 0), ("7", 7), ("1 KiB", 1024), ("1.5MiB", 3 << 19), (" 2 gb ", 2 * 10**9), ("3 B", 3)],
)
def test_amounts(value: int | str, expected: int) -> None:
    assert amount(value, "k") == expected


@pytest.mark.parametrize("value", ["", "MiB", "-1", "1 MiB 2", "1 TiB", "1e3", -5, "0.5", "0.4 B"])
def test_no_amounts(value: int | str) -> None:
    with pytest.raises(ConfigError, match='write bytes or text such as "48 MiB"'):
        amount(value, "memory.budget")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('hours = ["25-26"]', "conditions.hours: '25-26' is no span of the day; write for example \"22:00-06:00\""),
        ('hours = "22-6"', "conditions.hours: expected a list"),
        ("battery_min = 101", "conditions.battery_min: value 101.0 is above 100"),
        ("charging = 1", "conditions.charging: expected bool, got int"),
        ("celcius_max = 60", "conditions.celcius_max: unknown key; known here: battery_celsius_max"),
    ],
)
def test_wrong_conditions_are_named(tmp_path, text, problem):
    path = written(tmp_path, f'device = "a"\n[broker]\nurl = "mqtt://h"\n[conditions]\n{text}\n')
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert problem in str(caught.value)


def test_nothing_is_demanded_by_default(tmp_path):
    config = load(written(tmp_path, 'device = "a"\n[broker]\nurl = "mqtt://h"\n'))
    assert config.conditions == ConditionsConfig()
    assert config.worker.priority == "idle"
    assert config.log.form == "auto"
