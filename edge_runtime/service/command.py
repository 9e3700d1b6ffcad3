"""`edge-runtime install` and `uninstall`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from edge_runtime import exits
from edge_runtime.config import load
from edge_runtime.service import files, trial
from edge_runtime.service.placed import Placed, place
from edge_runtime.service.units import AGENT, DOOR, SYSUSERS, survey
from edge_runtime.service.units import files as texts_of
from wire import service

_GROUP = "edge-door"


@dataclass(frozen=True, slots=True)
class _Words:
    """The command line."""

    config: Path
    root: Path
    dry: bool
    as_json: bool


def install(args: argparse.Namespace) -> int:
    """Write, compile, try, start, as far as this machine is the one and lets us; give the exit code.

    Raises:
        ConfigError, DataError: The configuration names what is not there.
        StoreError: A file cannot be written.
    """
    words = _Words(args.config, args.root.absolute(), args.dry_run, args.json)
    placed = place(load(words.config), args.token_file)
    placed = dataclasses.replace(placed, copies=files.kept(words.root, placed.copies))
    site = survey(placed)
    texts = texts_of(placed, site)
    if words.dry:
        return _show(texts, placed, as_json=words.as_json)
    if words.root != Path("/"):
        written = files.write(words.root, texts, placed.copies, placed.secrets, ())
        said = f"not tried, not compiled, not started: {words.root} is not this machine"
        return _tell(words, written, trial.Outcome(tried=False, fine=True, said=said), "")
    written = files.write(words.root, texts, placed.copies, placed.secrets, ())
    files.write(words.root, texts, placed.copies, placed.secrets, files.compile_all())
    outcome = trial.check(placed, site)
    started = (
        _start() if outcome.fine else "not started; put right what failed, then: sudo systemctl start edge-runtime"
    )
    return _tell(words, written, outcome, started)


def _start() -> str:
    """Make the group of the door and start the services, where systemd runs this machine."""
    service.run("systemd-sysusers", SYSUSERS)
    if not service.running():
        return "not started: systemd does not run this machine"
    service.run("systemctl", "daemon-reload")
    problem = service.run("systemctl", "enable", DOOR, AGENT)
    problem = problem or service.run("systemctl", "restart", DOOR, AGENT)  # or an upgrade would wait for the next boot
    return f"not started: {problem}" if problem else "started, and at every boot (journalctl -u edge-runtime -f)"


def uninstall(args: argparse.Namespace) -> int:
    """Stop and remove; give the exit code.

    Raises:
        ConfigError: Nothing is installed.
        StoreError: A file cannot be removed.
    """
    root = args.root.absolute()
    ours = root == Path("/") and not args.dry_run
    there = files.remove(root, dry=True)
    if ours and service.running():
        service.run("systemctl", "disable", "--now", AGENT, DOOR)
        service.run("systemctl", "stop", "edge-trainer@*.service")
    gone = files.remove(root, dry=args.dry_run)
    if ours:
        if service.running():
            service.run("systemctl", "daemon-reload")
        service.run("groupdel", _GROUP)
    if args.json:
        print(json.dumps({"removed": [] if args.dry_run else gone, "there": sorted({*there, *gone})}))
        return exits.OK
    word, compiled = "would remove" if args.dry_run else "removed", sum(path.endswith(".pyc") for path in gone)
    for path in gone:
        if not path.endswith(".pyc"):
            print(f"{word} {path}")
    if compiled:
        print(f"{word} {compiled} compiled files")
    return exits.OK


def _show(texts: dict[str, str], placed: Placed, *, as_json: bool) -> int:
    copies = {path: str(source) for path, source in placed.copies.items()}
    if as_json:
        print(json.dumps({"files": texts, "copies": copies}))
        return exits.OK
    for path, text in texts.items():
        print(f"--- {path}\n{text}")
    for path, source in copies.items():
        print(f"--- {path}: a copy of {source}")
    return exits.OK


def _tell(words: _Words, written: list[str], outcome: trial.Outcome, started: str) -> int:
    if words.as_json:
        tried = {"tried": outcome.tried, "fine": outcome.fine, "said": outcome.said.splitlines()}
        print(json.dumps({"root": str(words.root), "written": written, "trial": tried, "started": started}))
        return exits.OK if outcome.fine else exits.UNFIT
    for path in written:
        print(f"wrote {words.root / path.lstrip('/')}")
    print("tried as the services' user:" if outcome.tried else outcome.said)
    if outcome.tried:
        print("\n".join(f"  {line}" for line in outcome.said.splitlines()))
        print(trial.not_tried())
    if started:
        print(started)
    return exits.OK if outcome.fine else exits.UNFIT
