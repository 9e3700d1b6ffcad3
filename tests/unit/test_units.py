"""The units as they stand in the tree: without fault, and as little exposed as they claim to be."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support.systemd import INTERPRETER, exposure, verified

FOLDER = Path(__file__).parents[2] / "systemd"
UNITS = ("edge-runtime.service", "edge-trainer.socket", "edge-trainer@.service", "coordinator.service")
BOUNDS = {"edge-runtime.service": 1.0, "edge-trainer@.service": 0.2, "coordinator.service": 1.0}
"""The law asks for 1.0, 1.0 and 2.0."""


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Copies with an interpreter that is there: `verify` wants to see it."""
    there = shutil.which("true")
    for name in UNITS:
        text = (FOLDER / name).read_text("utf-8")
        (tmp_path / name).write_text(text.replace(INTERPRETER, str(there)), "utf-8")
    return tmp_path


def test_systemd_finds_nothing_wrong(units: Path) -> None:
    assert verified(units / name for name in UNITS) == ""


def test_a_fault_would_be_found(units: Path) -> None:
    unit = units / "edge-runtime.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=60", "WatchdogSec=often"))
    assert "often" in verified([unit])


@pytest.mark.parametrize("name", BOUNDS)
def test_exposure(units: Path, name: str) -> None:
    fine, lacks = exposure(units / name, BOUNDS[name])
    assert fine, lacks


def test_an_open_unit_would_be_found(units: Path) -> None:
    unit = units / "edge-runtime.service"
    unit.write_text(unit.read_text().replace("SystemCallFilter=", "#").replace("CapabilityBoundingSet=", "#"))
    fine, lacks = exposure(unit, 2.0)
    assert not fine
    assert any("SystemCallFilter" in name for name in lacks)


def test_the_trainer_has_no_network_and_no_file_of_the_agents(units: Path) -> None:
    _, lacks = exposure(units / "edge-trainer@.service", 0.2)
    assert not [name for name in lacks if re.search("Network|AddressFamilies|IPAddress|User|Capab|ProtectHome", name)]
    text = (FOLDER / "edge-trainer@.service").read_text("utf-8")
    agent = (FOLDER / "edge-runtime.service").read_text("utf-8")
    assert "InaccessiblePaths=-/var/lib/private/edge-runtime -/var/lib/edge-runtime" in text
    assert "User=edge-trainer" in text
    assert "User=edge-trainer" not in agent.replace("DynamicUser", "")
    assert "StateDirectoryMode=0700" in agent
    assert "LoadCredential" not in text


def test_the_trainer_may_lower_its_own_limits() -> None:
    """The filter takes away @resources; what lowers RLIMIT_DATA is prlimit64, and that is in @default."""
    import subprocess

    def calls(group: str) -> set[str]:
        said = subprocess.run(["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True)
        return {line.strip() for line in said.stdout.splitlines()}

    assert "prlimit64" in calls("@default")
    assert "prlimit64" not in calls("@resources") | calls("@privileged")


def test_what_the_agents_exits_mean_to_systemd() -> None:
    from edge_runtime import exits

    text = (FOLDER / "edge-runtime.service").read_text("utf-8")
    assert f"RestartPreventExitStatus={exits.CONFIG} {exits.DATA}\n" in text
