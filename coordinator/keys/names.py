"""What this machine is called by others: for the broker's certificate and for invitations."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket

from wire.errors import ConfigError

_LABEL = re.compile(r"[0-9A-Za-z](?:[0-9A-Za-z-]{0,61}[0-9A-Za-z])?")


def names_of(host: str, outside: str) -> tuple[str, ...]:
    """List what this machine may be called by a device: it must stand in the broker's certificate.

    Raises:
        ConfigError: A device could not use `outside`, which its invitation is to name.
    """
    if not _usable(outside):
        raise ConfigError(
            f"devices cannot reach this machine as {outside!r}; say how they can, by name or number: --address NAME"
        )
    own = socket.gethostname()
    found = {"localhost", "127.0.0.1", "::1", outside, own, f"{own.partition('.')[0]}.local", host}
    with contextlib.suppress(OSError):
        found |= {str(info[4][0]) for info in socket.getaddrinfo(own, None, proto=socket.IPPROTO_TCP)}
    return tuple(sorted(name for name in found if _usable(name)))


def _usable(name: str) -> bool:
    """Whether it is a number, not of one link alone, or a host name."""
    with contextlib.suppress(ValueError):
        return not getattr(ipaddress.ip_address(name), "scope_id", None)
    return len(name) <= 253 and all(_LABEL.fullmatch(label) for label in name.split("."))


def outward() -> str:
    """Find the address by which the network knows this machine; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
