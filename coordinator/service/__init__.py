"""A coordinator's life as a systemd service: its unit, what this machine needs beside it, and the commands for both.

The unit itself is a file, `systemd/` in the source tree, here under `units` because a wheel is installed. This module is
light: every `coordinator` command loads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from coordinator.flags import Commands, subcommand

_INSTALL = """\
  coordinator install --config run.toml --dry-run         show every file that it would write, and write none
  sudo coordinator install --config run.toml              write, try, start
  sudo coordinator install --config run.toml --mosquitto  and set up the mosquitto of this machine for devices
  coordinator install --config run.toml --root pkg        into a folder, for a package or an image; nothing is started
afterwards:
  journalctl -u coordinator -f                            what it does
  sudo coordinator status --state /var/lib/nestling/run   what it has reached
"""
_UNINSTALL = """\
  coordinator uninstall --dry-run                         what there is
  sudo coordinator uninstall                              stop and remove it: the models and the fleet's keys too
"""


def add_service(commands: Commands) -> None:
    """Add `install` and `uninstall`."""
    about = "install this run as a systemd service: unit, configuration, and what its files and broker need"
    install = subcommand(commands, "install", about, _INSTALL)
    install.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's TOML file")
    install.add_argument(
        "--mosquitto",
        action="store_true",
        help="write configuration and access rules for the mosquitto that runs on this machine, too; it is not restarted",
    )
    install.set_defaults(command=_install)
    about = "remove that service with all that it has: unit, configuration, models, journal, the fleet's keys"
    uninstall = subcommand(commands, "uninstall", about, _UNINSTALL)
    uninstall.set_defaults(command=_uninstall)
    for command in (install, uninstall):
        where = "work below this folder and start nothing (default: /)"
        command.add_argument("--root", type=Path, default=Path("/"), metavar="DIR", help=where)
        command.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        command.add_argument("--json", action="store_true", help="print one JSON object")


def _install(args: argparse.Namespace) -> int:
    from coordinator.service.command import install

    return install(args)


def _uninstall(args: argparse.Namespace) -> int:
    from coordinator.service.command import uninstall

    return uninstall(args)
