"""This device's key and certificate: one file, so that they change together, and readable by nobody else.

Above the PEM blocks, where TLS libraries do not look, two lines say by this device's clock when the certificate ends and when
the next one is due: the agent needs to know both, and has nothing that reads certificates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from wire.errors import ConfigError, StoreError

FOLDER, FILE, AUTHORITY = "keys", "device.pem", "ca.pem"
"""Inside the state folder: the keys' folder; in it the key with its certificate, and whom to trust."""
_RENEW, _ENDS = "renew-after", "ends"
_LEFT = 1 / 3
_BYTES_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Identity:
    """What the file says of its certificate.

    Attributes:
        renew: When the next one is due, seconds since 1970.
        ends: When it ends.
    """

    renew: float
    ends: float


def read(path: Path) -> Identity | None:
    """Read when a certificate is to be renewed; None when it is not one that a coordinator renews.

    Raises:
        ConfigError: The file cannot be read.
    """
    found = {}
    try:
        with path.open("rb") as file:
            for line in file.read(_BYTES_MAX).decode("ascii", errors="replace").splitlines():
                name, colon, value = line.partition(": ")
                if line.startswith("-----"):
                    break
                if colon:
                    found[name] = float(value)
    except ValueError:
        return None
    except OSError as error:
        raise ConfigError(f"[broker] cert {path}: {error.strerror}; `edge-runtime enroll TOKEN` makes it") from None
    return Identity(found[_RENEW], found[_ENDS]) if {_RENEW, _ENDS} <= found.keys() else None


def compose(key: bytes, certificate: bytes, seconds: float, now: float) -> bytes:
    """Write the file's content.

    Args:
        key: PEM.
        certificate: PEM.
        seconds: How long the certificate is valid from now on.
        now: Seconds since 1970 by this device's clock.
    """
    head = f"{_RENEW}: {now + seconds * (1 - _LEFT):.3f}\n{_ENDS}: {now + seconds:.3f}\n"
    return head.encode("ascii") + key + certificate


def replace(path: Path, data: bytes) -> None:
    """Put a file in the place of another, durable, mode 0600, in a folder of mode 0700.

    Raises:
        StoreError: It cannot be written.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
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
