"""`coordinator install` and `uninstall` as commands: what they write, what systemd says of it, and that nothing stays."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import load
from coordinator.service import files
from coordinator.service.placed import CONFIG, CREDENTIALS, DROP_IN, RULES, SETTINGS, SNIPPET, UNIT, place
from coordinator.service.tried import check
from tests.support.mosquitto import Mosquitto
from tests.support.systemd import exposure, verified
from wire import spec, zoo
from wire.errors import ConfigError
from wire.service import UNITS


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as running:
        yield running


def coordinator(*words: object, code: int = 0) -> str:
    argv = [sys.executable, "-m", "coordinator.cli", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def tree(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): oct(path.lstat().st_mode) + (path.read_text() if path.is_file() else "")
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture
def toml(tmp_path: Path, broker: Mosquitto) -> Path:
    """An operator's configuration, with a model, a password and data in a folder that services do not see."""
    (tmp_path / "mine.spec").write_bytes(spec.encode(zoo.by_name("digits-mlp")))
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "test.npz").write_bytes(b"x")
    path = tmp_path / "run.toml"
    path.write_text(
        f'algo = "nestfl"\nmodel = "{tmp_path}/mine.spec"\ndata = "mine={tmp_path}/test.npz"\n'
        f'[broker]\nurl = "{broker.url}"\nusername = "coordinator"\npassword_file = "{tmp_path}/password"\n'
        "[round]\ndevices = 3\n[recipe]\nrate = 0.05\n[params]\nslack = 2\n"
    )
    return path


def test_what_is_written_is_without_fault_hardly_exposed_and_goes_again(toml: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    before = tree(root)
    for _ in range(2):  # again, as an upgrade does
        told = json.loads(coordinator("install", "--config", toml, "--root", root, "--mosquitto", "--json"))
    assert not told["trial"]["tried"]
    assert "is not this machine" in told["trial"]["said"][0]
    assert all((root / path.lstrip("/")).is_file() for path in told["written"])
    unit = root / UNITS.lstrip("/") / UNIT
    assert f"ExecStart={sys.executable} -P -m coordinator.cli start --config {CONFIG}" in unit.read_text()
    assert verified([unit]) == ""
    fine, lacks = exposure(unit, 2.0)
    assert fine, lacks
    assert f"BindReadOnlyPaths={tmp_path}/test.npz" in (root / DROP_IN.lstrip("/")).read_text()
    asked, found = load(toml, {}), load(root / CONFIG.lstrip("/"), {})
    assert (found.round, found.recipe, found.params) == (asked.round, asked.recipe, asked.params)
    assert (found.state, found.data) == ("/var/lib/nestling/run", asked.data)
    assert zoo.load(root / found.model.lstrip("/")) == zoo.by_name("digits-mlp")
    assert found.broker.password_file == f"{CREDENTIALS}/broker.password"
    secret = root / "etc/nestling/broker.password"
    assert (secret.read_text(), secret.stat().st_mode & 0o777) == ("secret\n", 0o600)
    assert "pattern read e1/home/d/%u/#" in (root / RULES.lstrip("/")).read_text()
    assert (root / RULES.lstrip("/")).stat().st_mode & 0o777 == 0o600, "mosquitto takes no others'"
    assert f"acl_file {RULES}" in (root / SNIPPET.lstrip("/")).read_text()
    # what systemd and the run leave
    (root / "etc/systemd/system/multi-user.target.wants").mkdir()
    (root / "etc/systemd/system/multi-user.target.wants" / UNIT).symlink_to(f"../{UNIT}")
    (root / "var/lib/private/nestling/run/keys").mkdir(parents=True)
    (root / "var/lib/nestling").symlink_to("private/nestling")
    listed = coordinator("uninstall", "--root", root, "--dry-run")
    assert listed.count("would remove") == len(listed.splitlines()) > 3
    assert secret.exists()
    coordinator("uninstall", "--root", root)
    left = {path: what for path, what in tree(root).items() if path not in ("var", "var/lib", "var/lib/private")}
    assert left == before
    assert "no service is installed" in coordinator("uninstall", "--root", root, code=2)


def test_a_dry_run_shows_every_file_and_writes_none(toml: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shown = coordinator("install", "--config", toml, "--root", root, "--dry-run")
    assert f"--- {UNITS}/{UNIT}" in shown
    assert "a copy of" in shown
    assert not root.exists()
    assert set(json.loads(coordinator("install", "--config", toml, "--dry-run", "--json"))) == {"files", "copies"}


@pytest.mark.parametrize("mine", [f"{UNITS}/{UNIT}", CONFIG, SNIPPET, RULES, f"{SETTINGS}/broker.password"])
def test_what_others_have_is_neither_replaced_nor_removed(toml: Path, tmp_path: Path, mine: str) -> None:
    root = tmp_path / "root"
    theirs = root / mine.lstrip("/")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    before = tree(root)
    placed = place(load(toml, {}), mosquitto=True)
    with pytest.raises(ConfigError, match="move it away"):
        files.write(root, placed)
    with pytest.raises(ConfigError, match="no service"):
        files.remove(root)
    assert tree(root) == before


def test_a_brokers_own_files_stay_where_only_the_coordinator_was_installed(toml: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    theirs = root / SNIPPET.lstrip("/")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    files.write(root, place(load(toml, {})))
    files.remove(root)
    assert theirs.read_text() == "mine"


def test_what_an_operator_keeps_beside_the_settings_stays_and_an_old_password_goes(toml: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    settings = root / SETTINGS.lstrip("/")
    settings.mkdir(parents=True)
    (settings / "run.toml").write_text("the operator's")
    (settings / "model.spec").write_bytes((tmp_path / "mine.spec").read_bytes())
    run = {"model": str(settings / "model.spec")}  # where it would be copied to
    files.write(root, place(load(toml, run)))
    (settings / ".broker.password.new").write_text("of an install that was killed")
    gone = files.remove(root, dry=True)
    assert gone[-1] == str(root / files.NOTE.lstrip("/")), "half an uninstall can be done again"
    assert str(settings / ".broker.password.new") in gone
    files.write(root, place(load(toml, {**run, "broker.password_file": "", "broker.username": ""})))
    assert not (settings / "broker.password").exists()
    files.remove(root)
    assert {path.name for path in settings.iterdir()} == {"run.toml", "model.spec"}


def test_a_password_in_an_address_is_not_written_where_everybody_can_read_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="password_file"):
        placed_with(tmp_path, "mqtt://boss:secret@localhost")
    assert placed_with(tmp_path, "mqtt://boss@localhost").config.broker.url == "mqtt://boss@localhost"


@pytest.mark.parametrize(
    ("url", "username", "user"),
    [("mqtt://boss@h", "", "boss"), ("mqtt://h", "chief", "chief"), ("mqtt://h", "", "coordinator")],
)
def test_the_access_rules_are_for_the_name_that_the_coordinator_has(url: str, username: str, user: str) -> None:
    config = load(None, {"algo": "fedavg", "broker.url": url, "broker.username": username})
    assert f"\nuser {user}\n" in place(config, mosquitto=True).texts[RULES]
    with pytest.raises(ConfigError, match="cannot name"):
        place(load(None, {"algo": "fedavg", "broker.url": "mqtt://h", "broker.username": "a\ntopic #"}), mosquitto=True)


def placed_with(tmp_path: Path, url: str, **broker: str) -> Any:
    said = "".join(f'{name} = "{tmp_path / path}"\n' for name, path in broker.items())
    for path in broker.values():
        (tmp_path / path).write_text(path)
    (tmp_path / "run.toml").write_text(f'algo = "fedavg"\n[broker]\nurl = "{url}"\n{said}')
    return place(load(tmp_path / "run.toml", {}))


def test_a_key_is_a_credential_also_where_it_stands_in_the_certificates_file(tmp_path: Path) -> None:
    apart = placed_with(tmp_path, "mqtts://localhost", ca="ca", cert="cert", key="key")
    assert (apart.config.broker.cert, apart.config.broker.key) == (
        "/etc/nestling/broker.cert",
        f"{CREDENTIALS}/broker.key",
    )
    both = placed_with(tmp_path, "mqtts://localhost", ca="ca", cert="both")
    assert (both.config.broker.cert, both.config.broker.key) == (f"{CREDENTIALS}/broker.key", "")
    for placed in (apart, both):
        assert "LoadCredential=broker.key:/etc/nestling/broker.key" in placed.texts[DROP_IN]
        assert "/etc/nestling/broker.key" in placed.secrets & placed.copies.keys()
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match=r"key.*is not there"):
        place(load(tmp_path / "run.toml", {"broker.key": str(tmp_path / "key")}))


def test_whom_the_service_may_speak_to(tmp_path: Path) -> None:
    texts = {
        url: placed_with(tmp_path, url).texts.get(DROP_IN, "")
        for url in ("mqtt://8.8.8.8", "mqtt://localhost", "mqtt://no-such-host.invalid")
    }
    allowed = {url: "IPAddressAllow=" in text for url, text in texts.items()}
    assert allowed == {"mqtt://8.8.8.8": True, "mqtt://localhost": False, "mqtt://no-such-host.invalid": False}
    with pytest.raises(ConfigError, match="name it"):
        place(load(None, {"algo": "fedavg"}), mosquitto=True)


@pytest.mark.parametrize("fault", ["", "model", "data", "broker"])
def test_a_trial_says_what_its_user_cannot_do(toml: Path, tmp_path: Path, fault: str) -> None:
    """As root it is a user without a name behind the unit's walls; for others there is nothing to try with."""
    url = {"broker.url": "mqtt://127.0.0.1:1"} if fault == "broker" else {}
    placed = place(load(toml, {"model": "digits-cnn", **url}))  # what is installed below /etc is not there in a test
    if fault == "data":
        (tmp_path / "test.npz").chmod(0o600)
    if fault == "model":
        placed = dataclasses.replace(placed, config=dataclasses.replace(placed.config, model="no-such"))
    tried, fine, said = check(placed)
    if os.geteuid() != 0:
        assert (tried, fine) == (False, True)
        return
    failed = [line.split(":")[0].removeprefix("FAIL ") for line in said.splitlines() if line.startswith("FAIL")]
    wanted = {"": [], "model": ["model", "parameters"]}.get(fault, [fault])
    assert (tried, fine, failed) == (True, not fault, wanted), said
