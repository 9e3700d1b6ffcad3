"""Trying what was installed as the user that it will be, behind walls like the units', where no service manager does that.

A mount namespace hides what the units hide and shows what their drop-ins show. What it is not: the trainer's lack of a network
(the check asks the broker too), system call filters, limits. `not_tried` says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.service.placed import CREDENTIAL, CREDENTIALS, SETTINGS, STATE, Placed
from edge_runtime.service.units import Site, shown
from wire.service import NOBODY_YET, enclosed
from wire.settings import text

_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial went.

    Attributes:
        tried: Whether there was one.
        fine: Whether this device can take part, as far as was seen.
        said: What the check said, or why there was no trial.
    """

    tried: bool
    fine: bool
    said: str


def check(placed: Placed, site: Site) -> Outcome:
    """Run `edge-runtime check` as a service would. Takes as long as the check itself.

    Cost: copies of certificate, key and password in a folder of /run that is gone afterwards.
    """
    missing = [name for name in ("unshare", "setpriv", "mount") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        why = f"{', '.join(missing)} is missing (package util-linux)" if missing else "only root can"
        return Outcome(tried=False, fine=True, said=f"not tried as the services' user: {why}")
    with _room(placed) as config:
        paths = shown(placed, site, data=True)
        groups = (site.group,) if site.group >= 0 else ()
        command = [site.interpreter, "-P", "-m", "edge_runtime.cli", "check", "--json", "--config", str(config)]
        argv = enclosed(command, paths, config.parent, groups=groups)
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": site.search, "TMPDIR": "/tmp"}  # noqa: S108 - its own
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False, cwd="/", env=env)
        except subprocess.TimeoutExpired:
            return Outcome(tried=True, fine=False, said=f"no end within {_SECONDS} s")
    return _judged(done.stdout, done.stderr, invited=f"{SETTINGS}/{CREDENTIAL}" in placed.copies)


def _judged(found: str, said: str, *, invited: bool) -> Outcome:
    """Read what the check found; a device that has only an invitation cannot be known at the broker yet."""
    try:
        rows = [(row["what"], row["fine"], row["found"], row["advice"]) for row in json.loads(found)["findings"]]
    except (ValueError, KeyError, TypeError):
        return Outcome(tried=True, fine=False, said=(found + said).strip())
    if invited:
        later = ("broker", True, "not asked: the first start takes the invitation there", "")
        rows = [later if row[0] == "broker" else row for row in rows]
    lines = []
    for what, fine, text_found, advice in rows:
        lines += [f"{'ok  ' if fine else 'FAIL'} {what}: {text_found}", *([f"     -> {advice}"] if advice else [])]
    return Outcome(tried=True, fine=all(row[1] for row in rows), said="\n".join(lines))


def not_tried() -> str:
    """Say what a trial leaves open."""
    return (
        "not tried here: the units' system call filter, memory limits and watchdog, and the trainer without a network"
    )


@contextlib.contextmanager
def _room(placed: Placed) -> Iterator[Path]:
    """Give a configuration that a user without a name can use: copies of what only the agent's user will be able to read."""
    with tempfile.TemporaryDirectory(prefix="edge-runtime-", dir="/run") as name:
        folder, broker = Path(name), placed.config.broker
        folder.chmod(0o755)
        state = folder / "state"
        for place in (folder / "holds", state):
            place.mkdir(mode=0o700)
        moved = {}
        for key in ("ca", "cert", "key", "password_file"):
            path = getattr(broker, key)
            source = placed.copies.get(path.replace(CREDENTIALS, SETTINGS))
            if source is None:
                moved[key] = ""  # not there yet: the invitation brings it
                continue
            moved[key] = str(state / key)
            Path(moved[key]).touch(0o600)
            Path(moved[key]).write_bytes(source.read_bytes())
        config = dataclasses.replace(
            placed.config,
            broker=dataclasses.replace(broker, **moved),
            worker=dataclasses.replace(placed.config.worker, socket=""),
            state=dataclasses.replace(placed.config.state, dir=str(state)),
        )
        for path in (state, *state.iterdir()):
            os.chown(path, NOBODY_YET, NOBODY_YET)
        file = folder / "device.toml"
        file.write_text(text(config, f"for a trial; {STATE} is {state}"), "utf-8")
        yield file
