"""This device's key and certificate: one file, so that they change together, and readable by nobody else.

Above the PEM blocks, where TLS libraries do not look, two lines say by this device's clock when the certificate ends and when
the next one is due: the agent needs to know both, and has nothing that reads certificates.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

from wire.errors import ConfigError

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

    A file that enrolment has written, by its place or by one of its lines, is never taken for another's: the agent of such a
    one takes orders that nobody has signed.

    Raises:
        ConfigError: The file cannot be read, or enrolment has written it and its head is damaged.
    """
    try:
        with path.open("rb") as file:
            lines = file.read(_BYTES_MAX).decode("ascii", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"[broker] cert {path}: {error.strerror}; `edge-runtime enroll TOKEN` makes it") from None
    found: dict[str, float] = {}
    for line in itertools.takewhile(lambda line: not line.startswith("-----"), lines):
        name, _, value = line.partition(":")
        if name in (_RENEW, _ENDS):
            found[name] = _seconds(value)
    if found.keys() == {_RENEW, _ENDS} and all(map(math.isfinite, found.values())):
        return Identity(found[_RENEW], found[_ENDS])
    if found or (path.name, path.parent.name) == (FILE, FOLDER):
        raise ConfigError(
            f"[broker] cert {path}: damaged, its first lines do not say when the certificate ends; put a copy of it back, or"
            " enrol again: `coordinator enroll NAME` there, then `edge-runtime enroll TOKEN` here"
        )
    return None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


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
