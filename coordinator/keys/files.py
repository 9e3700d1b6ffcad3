"""Files of keys, read; `wire.private` writes them."""

from __future__ import annotations

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
