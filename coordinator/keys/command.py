"""What `coordinator enroll` and `coordinator revoke` do; they may run beside a coordinator or without one."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from pathlib import Path

from coordinator.keys import access, register
from coordinator.keys.access import COORDINATOR, KEYS
from coordinator.keys.authority import Authority
from coordinator.keys.out import put_out
from coordinator.keys.passwords import hashed
from coordinator.keys.register import Register
from wire import topics
from wire.errors import ConfigError
from wire.invitation import Invitation

_SECRET_BYTES = 16
_MINUTES_MAX = 366 * 24 * 60


def run_enroll(args: argparse.Namespace) -> int:
    """Invite a device, and say what to type there."""
    state: Path = args.state.resolve()
    invitation, known, running = invite(state, args.device, args.minutes * 60)
    token = invitation.encode()
    if args.json:
        about = {
            "device": invitation.device,
            "token": token,
            "ends": invitation.ends,
            "known": known,
            "running": running,
        }
        print(json.dumps({**about, "host": invitation.host, "port": invitation.port}))
        return 0
    print(token)
    if args.qr or sys.stdout.isatty():
        show_code(token)
    ends = time.strftime("%Y-%m-%d %H:%M", time.localtime(invitation.ends))
    lines = [f"For {invitation.device}, once, until {ends}; it is shown only now. On the device:"]
    lines += ["", f"  edge-runtime enroll {token}", ""]
    if known:
        lines.append(f"{invitation.device} has a certificate already: using this takes the old one back.")
    if not running:
        lines.append("The coordinator is not running; the device needs it to: coordinator start --listen ...")
    print("\n".join(lines), file=sys.stderr)
    return 0


def invite(state: Path, device: str, seconds: float) -> tuple[Invitation, bool, bool]:
    """Make an invitation; give it, whether the device has a certificate already, and whether a broker is running.

    A running broker knows it at once.

    Raises:
        ConfigError: The name or the time cannot be, or nobody ever opened this run to the network.
        StoreError: The folders cannot be written.
    """
    name = topics.valid_name(device, "device")
    if name == COORDINATOR or name.endswith(f"-{COORDINATOR}"):
        raise ConfigError(f"device {device!r}: names that end so are the coordinator's own; choose another")
    if not 0 < seconds <= _MINUTES_MAX * 60:
        raise ConfigError(f"--minutes {seconds / 60:g}: more than 0, at most {_MINUTES_MAX} (a year)")
    authority = _authority(state)
    found = access.known(state, register.load(state / KEYS))
    now = time.time()
    invitation = Invitation(
        host=found.host,
        port=found.port,
        port_enrol=found.port_enrol,
        authority=authority.fingerprint,
        federation=found.federation,
        device=name,
        secret=secrets.token_bytes(_SECRET_BYTES),
        ends=int(now + seconds) + 1,
    )
    password = hashed(invitation.password, secrets.token_bytes(12))

    def step(current: Register | None) -> Register:
        return register.invite(access.known(state, current), invitation, password, now)

    _, running = access.change(state, step)
    return invitation, bool(found.devices.get(name)), running


def run_revoke(args: argparse.Namespace) -> int:
    """Take a device back, and say what became of it."""
    state: Path = args.state.resolve()
    held, running = revoke(state, args.device)
    facts = {"device": args.device, "certificates": held, "disconnected": running}
    if args.json:
        print(json.dumps(facts))
        return 0
    what = (
        f"{args.device}: taken back"
        if held
        else f"{args.device}: taken back; it had no certificate that was still valid"
    )
    print(
        f"{what}; "
        + (
            "disconnected, and refused from now on"
            if running
            else "no broker is running; it counts from the next start"
        )
    )
    return 0


def revoke(state: Path, device: str) -> tuple[int, bool]:
    """Take all back that a device has. Give how many certificates that were, and whether a running broker put it out.

    Raises:
        ConfigError: There is no such device.
        StoreError: The folders cannot be read or written.
        BrokerUnreachable: The broker refuses it from now on, but could not be made to disconnect it.
    """
    authority = _authority(state)

    def step(current: Register | None) -> Register:
        found = access.known(state, current)
        invited = any(one.device == device for one in found.invitations.values())
        if device not in found.devices and not invited:
            names = ", ".join(sorted(found.devices)) or "none yet"
            raise ConfigError(f"device {device!r} is not in this fleet; there are: {names}")
        held.extend(found.devices.get(device, ()))
        return register.revoked(found, device)

    held: list[register.Held] = []
    after, running = access.change(state, step, authority)
    if running:
        put_out(access.way_in(state), after.federation, device)
    return len(held), running


def show_code(text: str) -> None:
    """Draw a QR code, two rows of it in a line of text."""
    try:
        import segno
    except ImportError:
        print("(no QR code: pip install segno)", file=sys.stderr)
        return
    segno.make_qr(text, error="l").terminal(out=sys.stdout, compact=True)


def _authority(state: Path) -> Authority:
    """Open the authority of a run that has one: commands make none, because only `start` knows the addresses."""
    access.known(state, register.load(state / KEYS))
    return Authority(state / KEYS)
