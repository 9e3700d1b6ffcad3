"""What `coordinator enroll` prints and `edge-runtime enroll` reads: where to go, whom to trust, and a secret for one use."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass, field

import msgpack

from wire import topics
from wire.errors import ConfigError, Malformed
from wire.schema import unpack

PREFIX = "nestling1-"
USER = "enroll."
"""What the user name of an invitation at the broker begins with; no device's name has a dot."""
_TEXT_MAX = 512
_HOST = re.compile(r"[0-9A-Za-z.:%-]{1,253}")
_TYPES = (str, int, int, bytes, str, str, bytes, int)


@dataclass(frozen=True, slots=True)
class Invitation:
    """One device's way in.

    Attributes:
        host: Name or number by which the device reaches the broker.
        port: Where it speaks with its certificate.
        port_enrol: Where it asks for one.
        authority: SHA-256 of the authority's certificate.
        federation: As the coordinator calls it.
        device: Its name to be.
        secret: For one use.
        ends: Seconds since 1970.
    """

    host: str
    port: int
    port_enrol: int
    authority: bytes
    federation: str
    device: str
    secret: bytes = field(repr=False)
    ends: int

    @property
    def id(self) -> str:
        """Name the invitation without telling its secret."""
        return hashlib.sha256(b"invitation" + self.secret).hexdigest()[:16]

    @property
    def user(self) -> str:
        """The user name at the broker."""
        return USER + self.id

    @property
    def password(self) -> str:
        """The password at the broker."""
        return password_of(self.secret)

    def encode(self) -> str:
        """Give the text."""
        parts = [self.host, self.port, self.port_enrol, self.authority, self.federation, self.device, self.secret]
        body: bytes = msgpack.packb([*parts, self.ends])
        return PREFIX + _encoded(body + hashlib.sha256(body).digest()[:4])


def decode(text: str) -> Invitation:
    """Read an invitation, whatever white space a terminal has put into it.

    Raises:
        Malformed: It is none, or not whole.
    """
    text = "".join(text.split())
    if not text.startswith(PREFIX) or len(text) > _TEXT_MAX:
        raise Malformed(f"no invitation: it begins with {PREFIX} and has at most {_TEXT_MAX} characters")
    try:
        data = base64.b64decode(text[len(PREFIX) :] + "=" * (-(len(text) - len(PREFIX)) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise Malformed("no invitation: characters that cannot be in it") from None
    body = data[:-4]
    if hashlib.sha256(body).digest()[:4] != data[-4:]:
        raise Malformed("not the whole invitation, or a mistyped one: copy it again")
    parts = unpack(body, _TEXT_MAX)
    if not isinstance(parts, list) or tuple(type(part) for part in parts) != _TYPES:
        raise Malformed("an invitation of another form: is one of the two programs older?")
    found = Invitation(*parts)
    try:
        topics.valid_name(found.federation, "federation")
        topics.valid_name(found.device, "device")
    except ConfigError as error:
        raise Malformed(str(error)) from None
    ports = 1 <= found.port <= 65_535 and 1 <= found.port_enrol <= 65_535
    sizes = len(found.authority) == 32 and 16 <= len(found.secret) <= 64 and 0 <= found.ends < 2**53
    if not (ports and sizes and _HOST.fullmatch(found.host)):
        raise Malformed("an invitation with values that cannot be")
    return found


def password_of(secret: bytes) -> str:
    """Give a secret the way that it is a password at the broker."""
    return _encoded(secret)


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")
