"""What a user sees of a run's folder who may read it and no more: SQLite wants to make files beside a journal also then."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator import rows
from coordinator.events import Born
from coordinator.export import JOURNAL
from coordinator.journal import Journal, RunStarted
from tests.support import powerless
from tests.unit.test_export_model import left
from wire.errors import StoreError

COMMANDS = ("status", "devices", "replay", "export")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Give the folder of a run that has ended, which may be read only."""
    folder = tmp_path / "run"
    left(folder, "fedavg")
    assert {path.name for path in folder.iterdir()} == {JOURNAL, f"{JOURNAL}.lock", "spool"}
    _modes(folder, 0o555, 0o444)
    yield folder
    _modes(folder, 0o755, 0o644)


def _modes(folder: Path, folders: int, files: int) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(folders if path.is_dir() else files)
    folder.chmod(folders)


def asked(command: str, folder: Path) -> tuple[int, str]:
    file = [str(folder.parent / "model.safetensors")] if command == "export" else []
    told = powerless.run("coordinator", command, *file, "--state", str(folder))
    assert "Traceback" not in told.stderr
    return told.returncode, told.stdout + told.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_who_may_only_read_reads_a_run_that_has_ended(folder, command):
    before = sorted(folder.rglob("*"))
    code, said = asked(command, folder)
    assert code == 0, said
    assert {"replay": "adds up to: rounds done 1", "export": "16522 weights"}.get(command, "") in said
    assert sorted(folder.rglob("*")) == before


def test_what_may_not_be_read_is_not_called_damaged(folder):
    for mode, path in ((0o000, folder / JOURNAL), (0o000, folder)):
        path.chmod(mode)
        code, said = asked("status", folder)
        path.chmod(0o555)
        assert code == 5
        assert "work as the user whose folder it is" in said, said
        assert "move it away" not in said


def test_what_only_the_neighbour_says_is_not_left_out(folder):
    """After kill -9 the newest rows are in ``-wal``; without ``-shm`` nobody who may not write can read them."""
    folder.chmod(0o755)
    (folder / JOURNAL).chmod(0o644)
    with Journal(folder / JOURNAL) as journal:
        journal.append([Born("new", 1)])
        for path in (folder / JOURNAL, folder / f"{JOURNAL}-wal"):
            shutil.copy(path, folder.parent / path.name)
    for name in (JOURNAL, f"{JOURNAL}-wal"):
        shutil.copy(folder.parent / name, folder / name)
    assert (folder / f"{JOURNAL}-wal").stat().st_size
    _modes(folder, 0o555, 0o444)
    code, said = asked("replay", folder)
    assert code == 5
    assert "work as the user whose folder it is, or on a copy of your own" in said


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a journal that viewers open as those do who may make no files beside it."""
    path = tmp_path / JOURNAL
    with Journal(path) as journal:
        journal.append([RunStarted("ab" * 8)])
    connect = rows._connect

    def refused(path: Path, how: str, viewing: bool) -> object:
        if how == "mode=ro":
            error = sqlite3.OperationalError("attempt to write a readonly database")
            error.sqlite_errorcode = 1544  # SQLITE_READONLY_DIRECTORY
            raise error
        return connect(path, how, viewing)

    monkeypatch.setattr(rows, "_connect", refused)
    return path


def test_a_writer_that_begins_meanwhile_is_told(alone):
    with Journal(alone, viewing=True) as viewer:
        assert viewer.last() == 1
        reading = viewer.replay()
        next(reading)
        with Journal(alone) as journal:
            journal.append([Born("d", 1)])
            for look in (viewer.last, lambda: list(reading), lambda: list(viewer.replay())):
                with pytest.raises(StoreError, match="began to write it meanwhile; ask again"):
                    look()
        with pytest.raises(StoreError, match="ask again"):  # it has ended again: there is no -wal any more
            viewer.last()
    with Journal(alone, viewing=True) as viewer:
        assert viewer.last() == 2
        assert len(list(viewer.replay())) == 2


def test_beside_a_writer_there_is_no_reading_alone(alone):
    with Journal(alone) as journal:
        journal.append([Born("d", 1)])
        with pytest.raises(StoreError, match="readonly database; work as the user"):
            Journal(alone, viewing=True)
