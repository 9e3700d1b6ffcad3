"""A journal's SQLite file: who writes it, how it is opened, whose it is, and what SQLite's errors ask for.

A file in WAL mode has neighbours, ``-wal`` and ``-shm``, which SQLite makes also for who only reads it. A viewer who may make
none, of a run that has ended, reads the file alone, and sees by its `mark` that nobody begins to write it meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

from wire.errors import StoreError

_APPLICATION = 0x6E73746C
_VERSION = 1
DISK = "free some space or look at the disk"
_OWNER = "work as the user whose folder it is, or on a copy of your own"
_ADVICE: Mapping[int, str] = {
    sqlite3.SQLITE_PERM: _OWNER,
    sqlite3.SQLITE_READONLY: _OWNER,
    sqlite3.SQLITE_CANTOPEN: _OWNER,
    sqlite3.SQLITE_IOERR: DISK,
    sqlite3.SQLITE_FULL: DISK,
    sqlite3.SQLITE_BUSY: "another process holds it; try again",
}
"""What to do about SQLite's errors that are none of the file itself."""
_SCHEMA = """
CREATE TABLE record (
  seq INTEGER PRIMARY KEY, seconds_wall REAL NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL, body BLOB NOT NULL
)
"""


def opened(path: Path, viewing: bool) -> tuple[sqlite3.Connection, int, tuple[int, ...] | None]:
    """Open the file, or create it when it is not there and `viewing` is false.

    Returns:
        The file; the round that was planned last; and of one that is read alone its `mark`.

    Raises:
        StoreError: It is missing (viewing), foreign, damaged, of a newer version, or not for this user.
    """
    if viewing and not _is_file(path):
        raise StoreError(f"{path}: there is no journal; has a coordinator been started with this folder?")
    try:
        try:
            return *_connect(path, "mode=ro" if viewing else "mode=rwc", viewing), None
        except sqlite3.OperationalError as error:
            alone = mark(path) if viewing and _advice(error) == _OWNER else None
            if alone is None:
                raise
            return *_connect(path, "mode=ro&immutable=1", viewing), alone
    except sqlite3.Error as error:
        raise unreadable(path, error) from error


def lock(path: Path) -> int:
    """Hold a neighbour file for as long as the process lives; the kernel lets go of it after kill -9."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"{path}: cannot write here: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise StoreError(
            f"{path}: another coordinator is writing this journal; stop it or use another folder"
        ) from error
    return lock


def unlock(lock: int) -> None:
    """Let another writer in."""
    if lock >= 0:
        os.close(lock)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}; {_OWNER}") from error


def mark(path: Path) -> tuple[int, ...] | None:
    """Tell one state of a file from another; None while there is more in its ``-wal``."""
    try:
        if path.with_name(path.name + "-wal").stat().st_size:
            return None
    except FileNotFoundError:
        pass
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _connect(path: Path, how: str, viewing: bool) -> tuple[sqlite3.Connection, int]:
    address = f"file:{quote(str(path.absolute()))}?{how}"
    rows = sqlite3.connect(address, uri=True, isolation_level=None, timeout=5.0)
    try:
        return rows, _prepare(rows, path, viewing)
    except (sqlite3.Error, StoreError):
        rows.close()
        raise


def _prepare(rows: sqlite3.Connection, path: Path, viewing: bool) -> int:
    """Check whose file it is, lay out a new one, and give the number of the round that was planned last."""
    application = rows.execute("PRAGMA application_id").fetchone()[0]
    version = rows.execute("PRAGMA user_version").fetchone()[0]
    empty = rows.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if application == 0 and version == 0 and empty and not viewing:
        rows.execute("PRAGMA journal_mode=WAL")
        marks = f"PRAGMA application_id={_APPLICATION}; PRAGMA user_version={_VERSION}"
        rows.executescript(f"BEGIN IMMEDIATE; {_SCHEMA}; {marks}; COMMIT")
    else:
        _recognise(path, application, version)
    if not viewing:
        rows.execute("PRAGMA synchronous=FULL")
    found = rows.execute("SELECT round FROM record WHERE kind = 'planned' ORDER BY seq DESC LIMIT 1").fetchone()
    return 0 if found is None else int(found[0])


def _recognise(path: Path, application: int, version: int) -> None:
    if application != _APPLICATION:
        raise StoreError(f"{path}: this is not a journal of ours; move it away or use another folder")
    if version > _VERSION:
        raise StoreError(f"{path}: written by a newer version ({version}); this one reads up to {_VERSION}")


def _advice(error: Exception) -> str:
    """Say what to do; where nothing is known, the file is damaged."""
    damaged = "move it away together with its -wal file to start anew, or bring back a copy"
    return _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, damaged)


def unreadable(path: Path, error: Exception, where: str = "") -> StoreError:
    """Say what cannot be read and what to do about it."""
    return StoreError(f"{path}: cannot be read: {where}{error}; {_advice(error)}")
