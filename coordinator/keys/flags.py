"""`coordinator enroll`, `revoke` and `acl`: an operator's commands about who belongs to the fleet."""

from __future__ import annotations

import argparse
from pathlib import Path

from coordinator.flags import Commands, subcommand
from coordinator.keys import require_cryptography
from coordinator.keys.patterns import KINDS, patterns
from wire import topics


def add_keys(commands: Commands) -> None:
    """Add the three."""
    enroll = subcommand(
        commands,
        "enroll",
        "invite one device to a fleet that was started with --listen: a one-time token for `edge-runtime enroll`",
        "  coordinator enroll kitchen-pi\n  coordinator enroll kitchen-pi --minutes 5 --qr\n"
        "  coordinator enroll kitchen-pi --state /var/lib/nestling --json",
    )
    enroll.add_argument("device", help="name of the device: letters, digits, '-' and '_'")
    enroll.add_argument("--minutes", type=float, default=60.0, help="how long the token may be used (default: 60)")
    enroll.add_argument("--qr", action="store_true", help="show it as a QR code, also where the output is no terminal")
    enroll.set_defaults(command=_enroll)
    revoke = subcommand(
        commands,
        "revoke",
        "take a device's certificate and rights back, disconnect it, and let it in no more",
        "  coordinator revoke kitchen-pi\n  coordinator enroll kitchen-pi     # if it is to come back, with a new key",
    )
    revoke.add_argument("device", help="name of the device")
    revoke.set_defaults(command=_revoke)
    acl = subcommand(
        commands,
        "acl",
        "the access rules for a broker of your own (the one of --listen has its rules already)",
        "  coordinator acl --kind mosquitto > rules\n  coordinator acl --kind emqx --federation home > acl.conf",
    )
    acl.add_argument("--kind", required=True, choices=KINDS, help="which broker")
    acl.add_argument("--federation", default="home", help="as at `coordinator start` (default: home)")
    acl.add_argument("--user", default="coordinator", help="user name of the coordinator (default: coordinator)")
    acl.set_defaults(command=_acl)
    for command in (enroll, revoke):
        command.add_argument(
            "--state",
            type=Path,
            default=Path("coordinator-state"),
            metavar="DIR",
            help="the run's folder (default: coordinator-state)",
        )
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _enroll(args: argparse.Namespace) -> int:
    require_cryptography()
    from coordinator.keys.command import run_enroll

    return run_enroll(args)


def _revoke(args: argparse.Namespace) -> int:
    require_cryptography()
    from coordinator.keys.command import run_revoke

    return run_revoke(args)


def _acl(args: argparse.Namespace) -> int:
    print(patterns(args.kind, topics.valid_name(args.federation, "federation"), args.user), end="")
    return 0
