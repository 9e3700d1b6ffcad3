"""Wheels for another machine: what they need there, not here, and only what can run there."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.support.wheels import fetch


def wheel(folder: Path, name: str, tag: str, *needs: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as made:
        made.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")
        made.writestr(f"{name}-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        made.writestr(f"{name}-1.0.dist-info/RECORD", "")


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return shelf


def test_needs_are_judged_for_that_machine(shelf: Path, tmp_path: Path) -> None:
    big = "cp311-cp311-manylinux_2_28_aarch64"
    there, here = 'platform_machine == "aarch64"', 'platform_machine == "x86_64"'
    wheel(shelf, "engine", big, f"quick; {there}", f"cuda; {here}", 'docs; extra == "docs"')
    wheel(shelf, "quick", "cp36-abi3-manylinux2014_aarch64", "pure>=1", "engine")
    wheel(shelf, "pure", "py3-none-any")
    fetch(tmp_path / "out", "3.11", ["engine==1.0"], "pure==1.0\n")
    assert sorted(p.name.partition("-")[0] for p in (tmp_path / "out").iterdir()) == ["engine", "pure", "quick"]


@pytest.mark.parametrize("tag", ["cp311-cp311-manylinux_2_28_x86_64", "cp312-cp312-manylinux_2_28_aarch64"])
def test_a_wheel_for_another_machine_or_python_is_none(shelf: Path, tmp_path: Path, tag: str) -> None:
    wheel(shelf, "engine", tag)
    with pytest.raises(AssertionError, match=r"engine==1\.0"):
        fetch(tmp_path / "out", "3.11", ["engine==1.0"], "")
