"""A private file put in the place of another: as a whole, durable, and never readable by anybody else, not even for a moment.

Keys, registers of keys, passwords: what either side must not lose to a power cut, nor show to another user of its machine.
"""

from __future__ import annotations

import os
from pathlib import Path

from wire.errors import StoreError


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another, mode 0600, in a folder that is made with mode 0700 where there is none.

    It is written beside the old one under this process's own name. Of two processes that write at once one wins, whole. What
    fails leaves the old one as it was and nothing beside it.

    Cost: two fsyncs.

    Raises:
        StoreError: It cannot be written.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh.unlink(missing_ok=True)  # of a process that was killed and had the same number
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _fill(file, data, path.parent)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut brings the old file back
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None


def _fill(number: int, data: bytes, folder: Path) -> None:
    with os.fdopen(number, "wb") as file:
        if os.geteuid() == 0:  # root works in a service's folder, and the service is to read what it wrote
            owner = folder.stat()
            os.fchown(number, owner.st_uid, owner.st_gid)
        file.write(data)
        file.flush()
        os.fsync(number)
