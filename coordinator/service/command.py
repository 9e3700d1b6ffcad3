"""`coordinator install` and `uninstall`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coordinator.config import load
from coordinator.service import files
from coordinator.service.placed import SNIPPET, UNIT, Placed, place
from coordinator.service.tried import check
from wire import service

UNFIT = 2
_BROKER = (
    "mosquitto is not restarted: bring the certificates that its new configuration names (docs/broker.md), then\n"
    "  sudo systemctl restart mosquitto"
)


def install(args: argparse.Namespace) -> int:
    """Write, try, start, as far as this machine is the one and lets us; give the exit code.

    Raises:
        ConfigError: The configuration names what is not there, or others have files in the way.
        StoreError: A file cannot be written.
    """
    root: Path = args.root.absolute()
    placed = place(load(args.config, {}), mosquitto=args.mosquitto)
    if args.dry_run:
        return _show(placed, as_json=args.json)
    written = files.write(root, placed)
    if root == Path("/"):
        tried, fine, said = check(placed)
        started = _start() if fine else "not started; put right what failed, then install again"
    else:
        tried, fine, said = False, True, f"not tried, not started: {root} is not this machine"
        started = ""
    if args.json:
        found = {"tried": tried, "fine": fine, "said": said.splitlines()}
        print(json.dumps({"root": str(root), "written": written, "trial": found, "started": started}))
        return 0 if fine else UNFIT
    for path in written:
        print(f"wrote {root / path.lstrip('/')}")
    print("tried as the service's user:\n" + "\n".join(f"  {line}" for line in said.splitlines()) if tried else said)
    for line in (started, _BROKER if SNIPPET in placed.texts else ""):
        if line:
            print(line)
    return 0 if fine else UNFIT


def _start() -> str:
    """Start the service and have it started at every boot, where systemd runs this machine."""
    if not service.running():
        return "not started: systemd does not run this machine"
    service.run("systemctl", "daemon-reload")
    problem = service.run("systemctl", "enable", UNIT) or service.run("systemctl", "restart", UNIT)
    return f"not started: {problem}" if problem else "started, and at every boot (journalctl -u coordinator -f)"


def uninstall(args: argparse.Namespace) -> int:
    """Stop and remove; give the exit code.

    Raises:
        ConfigError: Nothing is installed.
        StoreError: A file cannot be removed.
    """
    root: Path = args.root.absolute()
    there = files.remove(root, dry=True)
    ours = root == Path("/") and not args.dry_run and service.running()
    if ours:
        service.run("systemctl", "disable", "--now", UNIT)
    gone = files.remove(root, dry=args.dry_run)
    if ours:
        service.run("systemctl", "daemon-reload")
    if args.json:
        print(json.dumps({"removed": [] if args.dry_run else gone, "there": sorted({*there, *gone})}))
        return 0
    for path in gone:
        print(f"{'would remove' if args.dry_run else 'removed'} {path}")
    return 0


def _show(placed: Placed, *, as_json: bool) -> int:
    copies = {path: str(source) for path, source in placed.copies.items()}
    if as_json:
        print(json.dumps({"files": dict(placed.texts), "copies": copies}))
        return 0
    for path, text in placed.texts.items():
        print(f"--- {path}\n{text}")
    for path, source in copies.items():
        print(f"--- {path}: a copy of {source}")
    return 0
