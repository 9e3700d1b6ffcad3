"""Who may speak at our own broker, as files that mosquitto reads.

Every device is named: what is not in the file may do nothing, so a device that was taken back has no rights even before its
certificate is refused. A running broker reads the files again when it is told to.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.keys import files
from coordinator.keys import register as registers
from coordinator.keys.authority import Authority
from coordinator.keys.passwords import hashed
from coordinator.keys.register import Register
from wire import private
from wire.errors import ConfigError, StoreError
from wire.invitation import USER
from wire.link import Address

BROKER, KEYS = "broker", "keys"
"""Names of the broker's folder and of the keys' folder inside a run's state."""
COORDINATOR = "coordinator"
"""Our own user name at our own broker; no device can have it."""
PASSWORDS, RULES, DOOR = "passwords", "rules", "door"
_SECONDS_RELOAD = 5.0
_SECONDS_STEP = 0.005


def rules(register: Register) -> str:
    """Write the rules for our own broker: one paragraph for each that may speak."""
    root = f"e1/{register.federation}"
    lines = [f"user {COORDINATOR}", f"topic readwrite {root}/#"]
    for invitation in sorted(register.invitations):
        lines += ["", f"user {USER}{invitation}"]
        lines += [f"topic write {root}/k/{invitation}/csr", f"topic read {root}/k/{invitation}/cert"]
    for device in sorted(register.devices):
        lines += [
            "",
            f"user {device}",
            f"topic read {root}/m",
            f"topic read {root}/b/#",
            f"topic read {root}/d/{device}/#",
        ]
        lines += [f"topic write {root}/s/{device}", f"topic write {root}/u/+/{device}/#"]
    return "\n".join(lines) + "\n"


def prepare(state: Path, register: Register, port: int) -> str:
    """Write what the broker needs, with a new password for ourselves; give the way in, which only this machine has.

    Raises:
        StoreError: The folders cannot be written.
    """
    password = secrets.token_urlsafe(18)
    url = f"mqtt://{COORDINATOR}:{password}@127.0.0.1:{port}"
    private.replace(state / BROKER / DOOR, f"{url}\n{hashed(password, secrets.token_bytes(12))}\n".encode("ascii"))
    _write(state, register)
    return url


def change(
    state: Path, step: Callable[[Register | None], Register], authority: Authority | None = None
) -> tuple[Register, bool]:
    """Change the register, and let the broker follow; give the register, and whether a running broker was told.

    Args:
        state: The run's folder.
        step: What to make of the register.
        authority: Given when certificates may have been taken back: a new list of them is written as well.

    Raises:
        StoreError: The folders cannot be read or written, or the broker does not follow.
    """
    told = []

    def follow(found: Register) -> None:
        if authority is not None:
            authority.revoke(tuple(found.revoked), found.lists)
        if (state / BROKER / DOOR).exists():
            told.append(_reload(state, *_write(state, found)))

    return registers.change(state / KEYS, step, follow), any(told)


def way_in(state: Path) -> str:
    """Give the coordinator's own address at its own broker; empty when there is none."""
    path = state / BROKER / DOOR
    return files.read(path).decode("ascii").split("\n")[0] if path.exists() else ""


def _reload(state: Path, user: str, password: str) -> bool:
    """Have a running broker read its files, and wait until it has; False where none runs, or it ends meanwhile.

    mosquitto forgets a signal that comes while it follows the one before. So each is waited for, under the register's lock,
    until a user is known that stands in the new files only.
    """
    folder = state / BROKER
    pid = _running(folder)
    try:
        if not pid:
            return False
        os.kill(pid, signal.SIGHUP)
    except OSError:
        return False
    port, until = Address.parse(way_in(state)).port, time.monotonic() + _SECONDS_RELOAD
    while not _lets_in(port, user, password):
        if _running(folder) != pid:  # it ends with the coordinator, which may have been killed just now
            return False
        if time.monotonic() >= until:
            raise StoreError(f"{folder}: mosquitto (process {pid}) does not read its files; see {folder / 'log'}")
        time.sleep(_SECONDS_STEP)
    return True


def _running(folder: Path) -> int:
    """Give the number of the broker's process; 0 where there is none, or the number is somebody else's by now."""
    try:
        pid = int((folder / "pid").read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return 0
    return pid if os.fsencode(folder.resolve()) in command else 0


def _lets_in(port: int, user: str, password: str) -> bool:
    """Whether the broker's own door opens to somebody (a CONNECT of MQTT 3.1.1, and its answer)."""
    parts = (b"", user.encode(), password.encode())
    body = b"\x00\x04MQTT\x04\xc2\x00\x05" + b"".join(len(part).to_bytes(2, "big") + part for part in parts)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_SECONDS_RELOAD) as door:
            door.sendall(bytes([0x10, len(body)]) + body)
            return door.recv(4)[3:] == b"\x00"
    except OSError:
        return False


def _write(state: Path, register: Register) -> tuple[str, str]:
    """Write rules and passwords; give a user that only these know, and who may do nothing."""
    ours = files.read(state / BROKER / DOOR).decode("ascii").split("\n")[1]
    probe, password = f"probe.{secrets.token_hex(8)}", secrets.token_urlsafe(18)
    entries = [(COORDINATOR, ours), (probe, hashed(password, secrets.token_bytes(12)))]
    entries += [(f"{USER}{name}", one.password) for name, one in sorted(register.invitations.items())]
    private.replace(state / BROKER / RULES, rules(register).encode("ascii"))
    text = "".join(f"{user}:{word}\n" for user, word in entries)
    private.replace(state / BROKER / PASSWORDS, text.encode("ascii"))
    return probe, password


def known(state: Path, register: Register | None) -> Register:
    """Give a run's register.

    Raises:
        ConfigError: There is none: nobody ever opened this run to the network.
    """
    if register is None:
        raise ConfigError(
            f"{state}: no fleet with keys; `coordinator start --listen ADDRESS --state {state}` makes one, and knows the"
            " address that devices need"
        )
    return register
