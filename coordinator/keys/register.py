"""Who belongs to a fleet: devices with their certificates, invitations, and what was taken back; one file.

The functions are pure: a register in, a register out. `change` is the only way to the file: under a lock, because the commands
of an operator and a running coordinator both write it, and durable when it returns.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from coordinator.keys import files
from coordinator.keys.passwords import verify
from wire import private
from wire.errors import ConfigError, Malformed, StoreError
from wire.invitation import Invitation
from wire.schema import Digest, Name, Natural, from_plain, to_plain

FILE = "register.json"
_SECONDS_REMEMBERED = 30 * 86_400
"""How long an invitation that is over can still be told that it is."""
_INVITATIONS_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Held:
    """A certificate that a device may hold.

    Attributes:
        serial: Its number, hex.
        key: SHA-256 of its public key.
        ends: Seconds since 1970.
        pem: Itself, for a device that lost the answer; kept for the latest one only.
    """

    serial: str
    key: Digest
    ends: float
    pem: str = ""


@dataclass(frozen=True, slots=True)
class Invited:
    """An invitation as far as this side keeps it: not the secret, only its hash.

    Attributes:
        device: For whom.
        password: The hash, in the form that mosquitto reads.
        ends: Seconds since 1970.
        key: SHA-256 of the key that used it; empty as long as nobody did.
    """

    device: Name
    password: str
    ends: float
    key: str = ""


@dataclass(frozen=True, slots=True)
class Register:
    """All of it.

    Attributes:
        host: By which devices reach the broker.
        port: For devices with a certificate.
        port_enrol: For those with an invitation.
        federation: As the coordinator calls it.
        devices: Name to certificates that have not ended, latest last; none for a device whose last one has.
        invitations: By id.
        revoked: Serial to its end; one that has ended is forgotten.
        lists: How many lists of revoked certificates there were.
    """

    host: str
    port: Natural
    port_enrol: Natural
    federation: Name
    devices: Mapping[Name, tuple[Held, ...]] = field(default_factory=dict)
    invitations: Mapping[str, Invited] = field(default_factory=dict)
    revoked: Mapping[str, float] = field(default_factory=dict)
    lists: Natural = 0


def load(folder: Path) -> Register | None:
    """Read a folder's register; None when there is none.

    Raises:
        StoreError: It cannot be read, or is not one.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return from_plain(Register, json.loads(files.read(path)), strict=True)
    except (ValueError, Malformed) as error:
        raise StoreError(f"{path}: not a register of devices: {error}") from None


def change(
    folder: Path, step: Callable[[Register | None], Register], then: Callable[[Register], object] = lambda _: None
) -> Register:
    """Replace the register by what `step` makes of it, and do `then` with it; nobody else writes meanwhile.

    Nothing is written without a change.

    Raises:
        StoreError: It cannot be read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        claim = os.open(folder / f"{FILE}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"{folder}: {error.strerror}") from None
    try:
        fcntl.flock(claim, fcntl.LOCK_EX)
        before = load(folder)
        after = step(before)
        if after != before:
            private.replace(folder / FILE, json.dumps(to_plain(after), indent=1, sort_keys=True).encode())
        then(after)
        return after
    finally:
        os.close(claim)


def tidied(register: Register, now: float) -> Register:
    """Forget what has ended: certificates, revocations of them, invitations of a month ago."""
    devices = {name: tuple(held for held in kept if held.ends > now) for name, kept in register.devices.items()}
    revoked = {serial: ends for serial, ends in register.revoked.items() if ends > now}
    known = sorted(register.invitations.items(), key=lambda item: (not _open(item[1], now), -item[1].ends))
    known = known[:_INVITATIONS_MAX]
    invitations = {name: invited for name, invited in known if invited.ends + _SECONDS_REMEMBERED > now}
    return replace(register, devices=devices, revoked=revoked, invitations=invitations)


def invite(register: Register, invitation: Invitation, password: str, now: float) -> Register:
    """Take in a new invitation; an earlier one for the same device that nobody has used is void from now on.

    Raises:
        ConfigError: There are too many that nobody has used yet.
    """
    rest = {k: v for k, v in register.invitations.items() if v.device != invitation.device or v.key}
    if sum(_open(invited, now) for invited in rest.values()) >= _INVITATIONS_MAX:
        raise ConfigError(
            f"{_INVITATIONS_MAX} invitations wait to be used; use some first, or take a device's back: coordinator revoke NAME"
        )
    invited = Invited(invitation.device, password, float(invitation.ends))
    return tidied(replace(register, invitations={**rest, invitation.id: invited}), now)


def _open(invited: Invited, now: float) -> bool:
    return not invited.key and invited.ends > now


def presented(register: Register, invitation: str, secret: str) -> Invited | None:
    """Give the invitation that somebody shows with its secret; None when there is no such one."""
    invited = register.invitations.get(invitation)
    return invited if invited is not None and verify(secret, invited.password) else None


def refused(register: Register, invited: Invited | None, device: str, key: str, now: float) -> str:
    """Say why an invitation is no good for this key; empty when it is (see `wire.messages.Cert.state`)."""
    if invited is None:
        return "unknown"
    if invited.device != device:
        return "name"
    if invited.key:
        return "" if invited.key == key and latest(register, device, key) is not None else "used"
    return "expired" if invited.ends <= now else ""


def latest(register: Register, device: str, key: str) -> Held | None:
    """Give the latest certificate of a device, if it is for this key."""
    held = register.devices.get(device, ())
    return held[-1] if held and held[-1].key == key and held[-1].pem else None


def granted(register: Register, device: str, held: Held, invitation: str = "") -> Register:
    """Take in a new certificate, and with it that an invitation is used: its older ones were of another life."""
    kept = () if invitation else tuple(replace(one, pem="") for one in register.devices.get(device, ()))
    gone = {one.serial: one.ends for one in register.devices.get(device, ())} if invitation else {}
    invitations = dict(register.invitations)
    if invitation:
        invitations[invitation] = replace(invitations[invitation], key=held.key)
    return replace(
        register,
        devices={**register.devices, device: (*kept, held)},
        invitations=invitations,
        revoked={**register.revoked, **gone},
        lists=register.lists + bool(gone),
    )


def revoked(register: Register, device: str) -> Register:
    """Take back all that a device has: certificates, invitations, its place."""
    gone = {held.serial: held.ends for held in register.devices.get(device, ())}
    return replace(
        register,
        devices={name: held for name, held in register.devices.items() if name != device},
        invitations={k: v for k, v in register.invitations.items() if v.device != device},
        revoked={**register.revoked, **gone},
        lists=register.lists + bool(gone),
    )
