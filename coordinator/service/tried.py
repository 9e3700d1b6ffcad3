"""Whether a run's configuration works for the user and behind the walls that its service will have.

``python -m coordinator.service.tried --config FILE`` looks, one line for each thing, and starts nothing: `check` runs it as a
user without a name, with what the unit hides hidden.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coordinator import algorithms
from coordinator.advance import rehearse
from coordinator.blocks.initial import initial_weights
from coordinator.config import Config, load
from coordinator.service.placed import CREDENTIALS, SETTINGS, STATE, Placed
from wire import zoo
from wire.errors import NestlingError
from wire.link import Address
from wire.service import NOBODY_YET, enclosed
from wire.settings import text

_SECONDS, _SECONDS_BROKER = 120, 5.0


def check(placed: Placed) -> tuple[bool, bool, str]:
    """Try what was installed: whether it was tried, whether all was well, and what was found."""
    missing = [name for name in ("unshare", "setpriv", "mount") if shutil.which(name) is None]
    if os.geteuid() != 0 or missing:
        why = f"{', '.join(missing)} is missing (package util-linux)" if missing else "only root can"
        return False, True, f"not tried as the service's user: {why}"
    with tempfile.TemporaryDirectory(prefix="coordinator-", dir="/run") as name:
        room = Path(name)
        room.chmod(0o755)
        (room / "holds").mkdir(mode=0o700)
        argv = [sys.executable, "-P", "-m", "coordinator.service.tried", "--config", str(_config(placed, room))]
        search = str(Path(__file__).parents[2])
        env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": search}
        walled = enclosed(argv, placed.shown, room)
        try:
            done = subprocess.run(
                walled, capture_output=True, text=True, timeout=_SECONDS, check=False, cwd="/", env=env
            )
        except subprocess.TimeoutExpired:
            return True, False, f"no end within {_SECONDS} s"
    return True, done.returncode == 0, (done.stdout + done.stderr).strip()


def _config(placed: Placed, room: Path) -> Path:
    """Write the configuration that a trial reads: a password and a key where its user can read them."""
    moved: dict[str, Any] = {}
    for name in ("password_file", "cert", "key"):
        path = getattr(placed.config.broker, name)
        if path.startswith(CREDENTIALS):
            copy = room / name
            copy.touch(0o600)
            copy.write_bytes(placed.copies[path.replace(CREDENTIALS, SETTINGS)].read_bytes())
            os.chown(copy, NOBODY_YET, NOBODY_YET)
            moved[name] = str(copy)
    state = room / "state"
    state.mkdir(mode=0o700)
    os.chown(state, NOBODY_YET, NOBODY_YET)
    broker = dataclasses.replace(placed.config.broker, **moved)
    path = room / "coordinator.toml"
    path.write_text(
        text(dataclasses.replace(placed.config, broker=broker, state=str(state)), f"for a trial of {STATE}")
    )
    return path


def main(words: Sequence[str] | None = None) -> int:
    """Look at everything; give 0 when all is well, 1 when something is not."""
    parser = argparse.ArgumentParser("coordinator.service.tried", description="Looks whether a run could be started.")
    parser.add_argument("--config", type=Path, required=True, help="the run's TOML file")
    path: Path = parser.parse_args(words).config
    fine = True
    try:
        config = load(path, {})
    except NestlingError as error:
        print(f"FAIL configuration: {error}")
        return 1
    for what, look in _LOOKS.items():
        try:
            print(f"ok   {what}: {look(config)}")
        except (NestlingError, OSError) as error:
            fine = False
            print(f"FAIL {what}: {error}")
    return 0 if fine else 1


def _algorithm(config: Config) -> str:
    algorithms.by_name(config.algo)
    return config.algo


def _parameters(config: Config) -> str:
    spec = zoo.load(config.model)
    rehearse(config, spec, initial_weights(spec, config.seed))
    return f"{config.algo} plans a round of {spec.name} by them"


def _model(config: Config) -> str:
    spec = zoo.load(config.model)
    if config.weights:
        from coordinator.weights import read

        read(Path(config.weights), spec)
    return f"{spec.name}{', from given weights' if config.weights else ''}"


def _data(config: Config) -> str:
    name, _, path = config.data.partition("=")
    if path:
        with contextlib.ExitStack() as stack:
            if Path(path).is_file():
                stack.enter_context(Path(path).open("rb"))
            else:
                next(os.scandir(path), None)
    return name or "none"


def _state(config: Config) -> str:
    (Path(config.state) / "try").write_bytes(b"x")
    return "can be written"


def _broker(config: Config) -> str:
    broker = config.broker
    if not broker.url:
        from coordinator.broker import find_mosquitto

        found = find_mosquitto()
        if found is None and broker.listen:
            return _missing()
        return f"one of its own, {found or 'iotcore, for trying out: sudo apt-get install mosquitto'}"
    at = Address.parse(
        broker.url,
        username=broker.username,
        password_file=broker.password_file,
        ca=broker.ca,
        cert=broker.cert,
        key=broker.key,
    )
    with socket.create_connection((at.host, at.port), timeout=_SECONDS_BROKER):
        return f"somebody listens at {at}"


def _missing() -> str:
    raise FileNotFoundError("--listen needs mosquitto: sudo apt-get install mosquitto")


_LOOKS: dict[str, Callable[[Config], str]] = {
    "algorithm": _algorithm,
    "model": _model,
    "parameters": _parameters,
    "data": _data,
    "state": _state,
    "broker": _broker,
}

if __name__ == "__main__":
    sys.exit(main())
