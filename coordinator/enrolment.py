"""Who may speak at our own broker: passwords and access rules, as files that mosquitto reads.

Each device has its own random password and may read only what is for everybody or for itself, and write only in its own
name. The files lie in the broker's folder of a run and are made when they are first needed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import signal
from pathlib import Path

from wire.errors import ConfigError, StoreError
from wire.topics import valid_name

FOLDER = "broker"
"""Name of the broker's folder inside a run's state."""
COORDINATOR = "coordinator"
"""Our own user name at our own broker; no device can have it."""
_PASSWORDS = "passwords"
_RULES = f"""user {COORDINATOR}
topic readwrite e1/#

pattern read e1/+/m
pattern read e1/+/b/#
pattern read e1/+/d/%u/#
pattern write e1/+/s/%u
pattern write e1/+/u/+/%u/#
"""
_ROUNDS = 101  # mosquitto's own count; the passwords have 144 random bits, so there is nothing to slow down


def enroll(state: Path | str, device: str) -> str:
    """Make a password for a device, new or not, and return it.

    Only its hash is kept. A running broker learns it at once.

    Raises:
        ConfigError: The name cannot be used.
        StoreError: The broker's folder cannot be written.
    """
    if valid_name(device, "device") == COORDINATOR:
        raise ConfigError(f"device {device!r}: this name is the coordinator's own; choose another")
    password = secrets.token_urlsafe(18)
    _set(Path(state) / FOLDER, device, password)
    return password


def revoke(state: Path | str, device: str) -> bool:
    """Take a device's password away; a running broker disconnects it. False when it had none.

    Raises:
        StoreError: The broker's folder cannot be written.
    """
    folder = Path(state) / FOLDER
    known = device in enrolled(state)
    if known:
        _set(folder, device, None)
    return known


def enrolled(state: Path | str) -> tuple[str, ...]:
    """Name the devices that have a password."""
    return tuple(name for name in sorted(_read(Path(state) / FOLDER)) if name != COORDINATOR)


def prepare(folder: Path) -> tuple[Path, Path, str]:
    """Write what a closed broker needs; give its password file, its rule file and a new password for ourselves.

    Raises:
        StoreError: `folder` cannot be written.
    """
    password = secrets.token_urlsafe(18)
    _set(folder, COORDINATOR, password)
    _write(folder / "rules", _RULES)
    return folder / _PASSWORDS, folder / "rules", password


def hashed(password: str, salt: bytes) -> str:
    """Hash a password the way that every mosquitto since 2.0 reads: ``$7$`` is PBKDF2 with SHA-512."""
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ROUNDS)
    return f"$7${_ROUNDS}${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"


def verify(password: str, stored: str) -> bool:
    """Whether `password` is the one behind a stored hash."""
    parts = stored.split("$")
    return len(parts) == 5 and hmac.compare_digest(hashed(password, base64.b64decode(parts[3])), stored)


def _set(folder: Path, name: str, password: str | None) -> None:
    entries = _read(folder)
    entries.pop(name, None)
    if password is not None:
        entries[name] = hashed(password, secrets.token_bytes(12))
    _write(folder / _PASSWORDS, "".join(f"{user}:{entries[user]}\n" for user in sorted(entries)))
    _reload(folder)


def _read(folder: Path) -> dict[str, str]:
    try:
        lines = (folder / _PASSWORDS).read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{folder / _PASSWORDS}: {error}") from None
    return {name: rest for name, colon, rest in (line.partition(":") for line in lines) if colon}


def _write(path: Path, text: str) -> None:
    """Replace a file as a whole; nobody else may read it, not even for a moment."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: {error}") from None


def _reload(folder: Path) -> None:
    """Tell a running broker of this folder to read its files again; its number may belong to somebody else by now."""
    try:
        pid = int((folder / "pid").read_text(encoding="ascii"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if os.fsencode(folder.resolve()) in command:
            os.kill(pid, signal.SIGHUP)
    except (OSError, ValueError):
        return
