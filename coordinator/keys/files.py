"""Secrets on disk: written as a whole, durable, and never readable by anybody else, not even for a moment."""

from __future__ import annotations

import os
from pathlib import Path

from wire.errors import StoreError


def read(path: Path) -> bytes:
    """Give a file's bytes.

    Raises:
        StoreError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another, mode 0600, in a folder of mode 0700.

    Raises:
        StoreError: It cannot be written.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            if os.geteuid() == 0:  # root works in a service's folder, and the service is to read what it wrote
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut brings the old file back
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
