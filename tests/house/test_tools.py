"""The linter, the formatter and the type checker agree with the code, and the package is put together as it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib

import pytest

from tests.house.walk import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.mark.parametrize(
    "words", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["ruff", "format", "mypy"]
)
def test_tool(words: list[str]) -> None:
    found = subprocess.run(
        [sys.executable, "-m", *words], check=False, cwd=ROOT, capture_output=True, text=True, timeout=115
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_dependency_has_its_reason_written_down() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = [
        *PROJECT["dependencies"],
        *(d for name in ("torch", "coordinator", "plot", "images") for d in extras[name]),
    ]
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in wanted}
    notes = {path.stem for path in (ROOT / "docs" / "decisions").glob("*.md")}
    assert names - notes == set()


def test_the_pins_cover_every_direct_dependency() -> None:
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {re.split(r"[=; ]", line)[0] for line in pins if line and not line.startswith("#")}
    lines = [*PROJECT["dependencies"], *(d for extra in PROJECT["optional-dependencies"].values() for d in extra)]
    wanted = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in lines} - {"nestling"}
    assert wanted - pinned == set()


@pytest.mark.parametrize("name", [".ci/run", "check", "demo"])
def test_scripts_can_be_run(name: str) -> None:
    path = ROOT / name
    assert os.access(path, os.X_OK)
    subprocess.run(["sh", "-n", str(path)], check=True, timeout=10)
