"""`edge-runtime install` and `uninstall` as commands, and what systemd says of what they have written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.config import load
from edge_runtime.service import trial
from edge_runtime.service.placed import place
from edge_runtime.service.units import survey
from tests.support.mosquitto import Mosquitto
from tests.support.systemd import exposure, verified
from wire.invitation import Invitation


def edge(*words: object, code: int = 0) -> str:
    argv = [sys.executable, "-m", "edge_runtime.cli", *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def toml(tmp_path: Path, broker: Mosquitto) -> Path:
    """A maker's configuration: relative, and with data in a folder that services do not see."""
    data = tmp_path / "pictures.npz"
    np.savez(data, x=np.zeros((40, 64), np.float32), y=np.arange(40) % 10)
    path = tmp_path / "pi.toml"
    path.write_text(
        f'device = "pi"\n[broker]\nurl = "{broker.url}"\n[data]\nsource = "npz"\npath = "{data}"\n'
        '[memory]\nbudget = "64 MiB"\n[state]\ndir = "edge-state"\n'
    )
    return path


def tree(root: Path) -> list[str]:
    return sorted(f"{path.relative_to(root)} {path.lstat().st_mode:o}" for path in root.rglob("*"))


def test_what_is_written_is_without_fault_hardly_exposed_and_goes_again(toml: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    before = tree(root)
    said = json.loads(edge("install", "--config", toml, "--root", root, "--json"))
    assert not said["trial"]["tried"]
    assert "is not this machine" in said["trial"]["said"][0]
    assert all((root / path.lstrip("/")).is_file() for path in said["written"])
    folder = root / "etc/systemd/system"
    units = [path for path in folder.iterdir() if path.is_file()]
    assert len(units) == 3
    assert verified(units) == ""
    assert f"{sys.executable} -P -m edge_runtime.cli run" in (folder / "edge-runtime.service").read_text()
    for name in ("edge-runtime.service", "edge-trainer@.service"):
        drop_in = folder / f"{name}.d/50-this-device.conf"
        assert str(tmp_path) in drop_in.read_text() or name == "edge-runtime.service"
        fine, lacks = exposure(folder / name, 1.0)
        assert fine, (name, lacks)
    placed = load(root / "etc/edge-runtime/device.toml")
    assert (placed.state.dir, placed.worker.socket) == ("/var/lib/edge-runtime", "/run/edge-trainer.sock")
    assert placed.memory.file == "/etc/edge-runtime/budget"
    listed = edge("uninstall", "--root", root, "--dry-run")
    assert listed.count("would remove") == len(listed.splitlines()) > 3
    edge("uninstall", "--root", root)
    assert tree(root) == before
    assert "no service is installed" in edge("uninstall", "--root", root, code=2)


def test_a_dry_run_shows_every_file_and_writes_none(toml: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shown = edge("install", "--config", toml, "--root", root, "--dry-run")
    assert "--- /etc/systemd/system/edge-trainer@.service" in shown
    assert 'budget = "64 MiB"' in shown
    assert not root.exists()
    found = json.loads(edge("install", "--config", toml, "--dry-run", "--json"))
    assert set(found) == {"files", "copies"}


def test_an_invitation_for_a_device_that_was_never_on_a_network(toml: Path, tmp_path: Path) -> None:
    root, token = tmp_path / "root", tmp_path / "token"
    invitation = Invitation("192.168.1.5", 8883, 8884, b"a" * 32, "farm", "barn-pi", b"s" * 32, 2**40)
    token.write_text(invitation.encode() + "\n")
    edge("install", "--config", toml, "--root", root, "--token-file", token)
    secret = root / "etc/edge-runtime/enrolment"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.read_text() == token.read_text()
    found = load(root / "etc/edge-runtime/device.toml")
    assert (found.device, found.federation, found.broker.url) == ("barn-pi", "farm", "mqtts://192.168.1.5:8883")
    assert found.broker.cert == "/var/lib/edge-runtime/keys/device.pem"
    agent = (root / "etc/systemd/system/edge-runtime.service.d/50-this-device.conf").read_text()
    assert "IPAddressAllow=192.168.1.5" in agent
    token.write_text("nestling1-nonsense")
    assert "token" in edge("install", "--config", toml, "--root", root, "--token-file", token, code=2)


def test_the_invitation_is_taken_once_and_by_nobody_without_one(toml: Path, tmp_path: Path) -> None:
    """Before the agent; what enrolment itself does is shown elsewhere."""
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    argv = [sys.executable, "-m", "edge_runtime.service.first", "--config", str(toml)]

    def first(code: int) -> str:
        env = {**os.environ, "CREDENTIALS_DIRECTORY": str(credentials)}
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=env)
        assert done.returncode == code, done.stderr
        return done.stderr

    assert first(0) == "", "no credential"
    (credentials / "enrolment").write_text("\n")
    assert first(0) == "", "the unit's empty one"
    (credentials / "enrolment").write_text("nestling1-nonsense")
    assert "invitation" in first(2)
    (tmp_path / "device.pem").write_text("x")
    toml.write_text(toml.read_text().replace("[data]", f'cert = "{tmp_path / "device.pem"}"\n[data]'))
    assert first(0) == "", "it has its certificate"


def test_it_is_tried_as_a_user_without_a_name_behind_the_walls(toml: Path) -> None:
    placed = place(load(toml))
    outcome = trial.check(placed, survey(placed))
    if os.geteuid() != 0:
        assert not outcome.tried
        assert "only root" in outcome.said
        return
    assert outcome.tried
    assert outcome.fine, outcome.said
    assert "28 to train on" in outcome.said
    Path(placed.config.data.path).chmod(0o600)
    outcome = trial.check(placed, survey(placed))
    assert not outcome.fine
    assert "FAIL data" in outcome.said
    assert "FAIL engine" not in outcome.said
