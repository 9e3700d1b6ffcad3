"""Opening a broker to the network: the keys that it needs, and what of its configuration says who comes in where.

Three doors: one for devices, which show a certificate and are called by the name in it; one for those that have an invitation,
over TLS as well, with a user name that may do nothing but ask for a certificate; one on this machine for the coordinator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coordinator.keys import access, register
from coordinator.keys.access import BROKER, KEYS, PASSWORDS, RULES
from coordinator.keys.authority import CA, CRL, SERVER, Authority
from coordinator.keys.register import Register
from wire import private

_STRANGERS = 64


@dataclass(frozen=True, slots=True)
class Doors:
    """Where a broker listens.

    Attributes:
        bind: Address to bind.
        host: By which devices reach it.
        port: For devices with a certificate.
        port_enrol: For those with an invitation.
        port_local: For the coordinator, on 127.0.0.1.
    """

    bind: str
    host: str
    port: int
    port_enrol: int
    port_local: int


def open_fleet(state: Path, federation: str, doors: Doors, names: Sequence[str]) -> tuple[str, str]:
    """Make keys and files ready; give the coordinator's way in, and the lines of the configuration behind the first listener.

    Raises:
        StoreError: The folders cannot be read or written.
    """
    authority = Authority(state / KEYS)
    authority.serve(names)

    def step(current: Register | None) -> Register:
        fresh = Register(doors.host, doors.port, doors.port_enrol, federation)
        if current is None:
            return fresh
        return replace(current, host=doors.host, port=doors.port, port_enrol=doors.port_enrol, federation=federation)

    ways = []

    def follow(found: Register) -> None:
        authority.revoke(tuple(found.revoked), found.lists)
        ways.append(access.prepare(state, found, doors.port_local))

    register.change(state / KEYS, step, follow)
    return ways[0], _lines(state, doors)


def opened(state: Path, pid: int) -> None:
    """Note that the broker runs, and let it follow what commands may have changed since it read its files.

    Raises:
        StoreError: The folders cannot be read or written.
    """
    private.replace(state / BROKER / "pid", str(pid).encode("ascii"))
    access.change(state, lambda current: access.known(state, current), Authority(state / KEYS))


def _lines(state: Path, doors: Doors) -> str:
    keys, broker = state / KEYS, state / BROKER
    served = f"certfile {keys / SERVER}\nkeyfile {keys / SERVER}\ntls_version tlsv1.2\nuse_username_as_clientid true"
    return f"""{served}
cafile {keys / CA}
crlfile {keys / CRL}
require_certificate true
use_identity_as_username true
listener {doors.port_enrol} {doors.bind}
{served}
max_connections {_STRANGERS}
listener {doors.port_local} 127.0.0.1
allow_anonymous false
password_file {broker / PASSWORDS}
acl_file {broker / RULES}"""
