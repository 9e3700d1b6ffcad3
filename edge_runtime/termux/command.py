"""`edge-runtime termux install` and `remove`: what they take, and what they say. Light: every command's parser loads it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import exits
from wire.errors import ConfigError

if TYPE_CHECKING:
    from edge_runtime.termux.services import Service

ABOUT = "run on a phone under Termux, from when it is switched on"
EXAMPLES = """\
examples:
  pkg install termux-services termux-api            then open a new session
  edge-runtime termux install --config phone.toml   the agent as a service; again after a change of what it runs
  edge-runtime termux install --coordinator '--algo nestfl --data digits --listen 0.0.0.0'
  sv status nestling-agent                          also: sv down, sv up
  edge-runtime termux remove                        the agent's service; --coordinator for the other one
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "action", choices=("install", "remove"), help="write and start a service, or stop and delete it"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="this device's TOML file (of install)")
    parser.add_argument(
        "--coordinator",
        nargs="?",
        const="",
        metavar="WORDS",
        help="not the agent but `coordinator start WORDS`, as one word",
    )
    parser.add_argument("--no-wake-lock", action="store_true", help="let the processor sleep while it runs")
    parser.add_argument("--prefix", type=Path, metavar="DIR", help="of Termux (default: $PREFIX)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Do it; see `edge_runtime.termux.services`."""
    from edge_runtime.termux import services

    role = "agent" if args.coordinator is None else "coordinator"
    name = services.SERVICES[role]
    if args.action == "remove":
        gone = [str(path) for path in services.remove(role, services.prefix_of(args.prefix))]
        plain = [f"deleted {path}" for path in gone] or [f"there is no service {name}"]
        print(json.dumps({"service": name, "deleted": gone}) if args.json else "\n".join(plain))
        return exits.OK
    service = _service(args)
    prefix = services.prefix_of(args.prefix)
    written = [str(path) for path in services.install(service, prefix)]
    supervised = services.supervised(prefix)
    if args.json:
        print(json.dumps({"service": name, "written": written, "supervised": supervised}))
        return exits.OK
    print("\n".join(f"wrote {path}" for path in written))
    if supervised:
        print(f"{name} starts within five seconds: sv status {name}; tail -f $PREFIX/var/log/sv/{name}/current")
    else:
        print("the service daemon does not run yet: open a new session in Termux, it starts it")
    print("to have it start with the phone: install the app Termux:Boot, open it once")
    print("and let Android spare Termux: settings, apps, Termux, battery, unrestricted (docs/termux.md)")
    return exits.OK


def _service(args: argparse.Namespace) -> Service:
    from edge_runtime.config import load
    from edge_runtime.termux import services

    if args.coordinator is not None:
        if args.config:
            raise ConfigError(
                "--config is the agent's; what the coordinator takes stands in the word behind --coordinator"
            )
        try:
            words = tuple(shlex.split(args.coordinator))
        except ValueError as error:
            raise ConfigError(f"--coordinator {args.coordinator!r}: {error}") from None
        if not words:
            raise ConfigError("what is it to lead? --coordinator '--algo nestfl --data digits --listen 0.0.0.0'")
        folder = Path(os.environ.get("HOME") or ".")
        return services.coordinator(words, folder, wake_lock=not args.no_wake_lock)
    if args.config is None:
        raise ConfigError("which device is it? edge-runtime termux install --config phone.toml")
    load(args.config)
    return services.agent(args.config, wake_lock=not args.no_wake_lock)
