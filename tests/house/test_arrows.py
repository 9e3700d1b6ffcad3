"""Who may import whom: the arrows of the design as import contracts, and once more at run time."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests.house.walk import ROOT

HEAVY = ("numpy", "torch", "psutil", "cryptography", "click", "sqlite3")


def test_import_contracts_hold() -> None:
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    found = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_contracts_are_the_ones_of_the_design() -> None:
    contracts = {
        c["id"]: c
        for c in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    }
    pure = contracts["pure"]
    assert set(pure["source_modules"]) == {
        "coordinator.algorithms", "coordinator.blocks", "coordinator.round", "coordinator.fleet", "edge_runtime.session"
    }  # fmt: skip
    assert set(pure["forbidden_modules"]) == {
        "paho", "torch", "socket", "threading", "asyncio", "time", "logging", "os", "pathlib", "random"
    }  # fmt: skip
    assert set(HEAVY) <= set(contracts["agent"]["forbidden_modules"])


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edge_runtime.agent", HEAVY),
        ("edge_runtime.cli", HEAVY),
        ("coordinator.cli", ("torch", "edge_runtime.worker")),
        ("coordinator.server", ("torch", "edge_runtime")),
        ("wire.spec", ("numpy", "torch")),
    ],
)
def test_what_is_really_loaded(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(sorted(set({heavy!r}) & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout.strip() == "[]"
