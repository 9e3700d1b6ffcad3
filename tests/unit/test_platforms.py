"""What is installed where: on Android everything comes from Termux itself, is pure Python, or is plain C."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.house.walk import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
TERMUX = {
    "numpy": "python-numpy",
    "msgpack": "python-msgpack",
    "torch": "python-torch",
    "cryptography": "python-cryptography",
    "matplotlib": "matplotlib",
    "pillow": "python-pillow",
}
"""What Termux packages, by the name that pip has for it."""
PURE = {"paho-mqtt", "rich", "segno"}
PLAIN_C = {"immutables"}
"""pip compiles it on the phone in seconds: `pkg install clang`."""
PHONE = {
    "sys_platform": "android",
    "platform_system": "Android",
    "platform_machine": "aarch64",
    "python_version": "3.14",
}
BOARD = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64", "python_version": "3.11"}
DOCS = (ROOT / "docs/termux.md").read_text("utf-8")


def wanted(place: dict[str, str], *extras: str) -> set[str]:
    """Name what pip would install."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return {r.name for r in found if r.marker is None or r.marker.evaluate({**place, "extra": ""})}


def test_a_phone_compiles_nothing_for_the_agent() -> None:
    names = wanted(PHONE, "torch", "images", "enroll")
    assert names <= TERMUX.keys() | PURE
    assert names >= {"numpy", "msgpack", "paho-mqtt", "torch"}
    assert not names & {"zstandard", "psutil"}, "the standard library has the one, the other breaks there"


def test_a_phone_can_lead() -> None:
    assert wanted(PHONE, "coordinator", "plot") <= TERMUX.keys() | PURE | PLAIN_C


def test_a_board_gets_what_python_lacks_there() -> None:
    assert wanted(BOARD) >= {"zstandard", "psutil", "numpy", "msgpack", "paho-mqtt"}
    assert "zstandard" not in wanted({**BOARD, "python_version": "3.14"})


def test_what_termux_packages_is_not_pinned_on_a_phone() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if line and line[0] != "#"]
    pins = [Requirement(line) for line in lines]
    applied = {r.name for r in pins if r.marker is None or r.marker.evaluate(PHONE)}
    assert not applied & TERMUX.keys()
    assert "paho-mqtt" in applied


@pytest.mark.parametrize("package", sorted({*TERMUX.values(), "termux-services", "termux-api", "clang", "mosquitto"}))
def test_the_guide_names_every_package(package: str) -> None:
    assert re.search(rf"(?<![\w-]){re.escape(package)}(?![\w-])", DOCS)
