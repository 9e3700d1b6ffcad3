"""Passwords at our own broker: the coordinator's and those of invitations, hashed the way that mosquitto reads."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

_ROUNDS = (
    101  # mosquitto's own count; every password here has at least 128 random bits, so there is nothing to slow down
)


def hashed(password: str, salt: bytes) -> str:
    """Hash a password the way that every mosquitto since 2.0 reads: ``$7$`` is PBKDF2 with SHA-512."""
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS)
    return f"$7${_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def verify(password: str, stored: str) -> bool:
    """Whether `password` is the one behind a stored hash."""
    parts = stored.split("$")
    try:
        return len(parts) == 5 and hmac.compare_digest(hashed(password, base64.b64decode(parts[3])), stored)
    except binascii.Error:
        return False
