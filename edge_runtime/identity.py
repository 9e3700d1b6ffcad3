"""This device's key and certificate: one file, so that they change together, and readable by nobody else.

Above the PEM blocks, where TLS libraries do not look, two lines say when the certificate ends and when the next one is due:
the agent needs to know both, and has nothing that reads certificates but TLS, which says so when one comes.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

from wire import private
from wire.errors import ConfigError
from wire.link import Address, tls
from wire.messages import Cert

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


def put(path: Path, key: bytes, cert: Cert, authority: str) -> Identity:
    """Put a key and its certificate in the place of the old ones, after trying them: a broker may have made the answer up.

    Args:
        path: The file.
        key: PEM.
        cert: The answer with its certificate.
        authority: File with who must have signed it.

    Raises:
        ConfigError: They do not belong together, or the authority has not signed this.
        StoreError: They cannot be written.
    """
    fresh = path.with_name("next.pem")
    try:
        private.replace(fresh, key + cert.certificate)
        begins, ends = tls.vouched(Address("", 0, tls=True, ca=authority, cert=str(fresh)))
        if cert.seconds > ends - begins:
            raise ConfigError("the answer tells a longer time than its certificate")
        found = due(cert.seconds, ends, time.time())
        private.replace(path, compose(key, cert.certificate, found))
    finally:
        fresh.unlink(missing_ok=True)
    return found


def due(seconds: float, ends: float, now: float) -> Identity:
    """Say when the next certificate is due: when a third of the time is left, by the certificate or by this device's clock.

    Whichever is first. A clock that was ahead when the certificate came does not put that off beyond the certificate's end,
    and neither does one that stays behind, as of a device without a battery that is often off.

    Args:
        seconds: How long it is valid from now on, as the coordinator tells.
        ends: When it ends, as it says itself.
        now: By this device's clock.
    """
    return Identity(min(ends - seconds * _LEFT, now + seconds * (1 - _LEFT)), ends)


def compose(key: bytes, certificate: bytes, about: Identity) -> bytes:
    """Write the file's content."""
    return f"{_RENEW}: {about.renew}\n{_ENDS}: {about.ends}\n".encode("ascii") + key + certificate
