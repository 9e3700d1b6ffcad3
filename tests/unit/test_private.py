"""Files that nobody else may read: whole or not at all, and nothing is left beside them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wire import private
from wire.errors import StoreError


def test_a_file_takes_the_place_of_another_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "secret"
    private.replace(path, b"old")
    private.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(path.parent.iterdir()) == [path]


def test_what_root_writes_in_a_services_folder_is_the_services(tmp_path: Path) -> None:
    """`sudo coordinator enroll` in the folder of a running service must not take its own files away from it."""
    wanted = 64998 if os.geteuid() == 0 else os.geteuid()
    os.chown(tmp_path, wanted, -1)
    private.replace(tmp_path / "secret", b"x")
    status = (tmp_path / "secret").stat()
    assert (status.st_uid, status.st_mode & 0o777) == (wanted, 0o600)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_disk_that_refuses_leaves_the_old_one_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "secret"
    private.replace(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(StoreError, match=r"secret: No space left"):
        private.replace(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_no_way_in(tmp_path: Path) -> None:
    """A link in the place of the new file, by somebody who guessed its name, is not followed."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    fresh = tmp_path / f"secret.{os.getpid()}.new"
    fresh.symlink_to(victim)
    private.replace(tmp_path / "secret", b"x")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "secret").is_symlink()
    assert not fresh.exists()
