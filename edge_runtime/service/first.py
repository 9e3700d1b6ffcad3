"""What the agent's unit runs before the agent: with an invitation as a credential, and no certificate yet, take it.

So an image can be made for a device that has never been on a network: `edge-runtime install --token-file FILE`. Nobody who can
read the configuration or the environment of the service sees the invitation.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edge_runtime import exits
from edge_runtime.config import load
from edge_runtime.service.placed import CREDENTIAL
from wire.errors import BrokerUnreachable, ConfigError, NestlingError, StoreError

_BYTES_MAX = 4096
_SECONDS_BETWEEN = 20.0
_SECONDS = 540.0


def main(words: Sequence[str] | None = None) -> int:
    """Give the exit code; 0 also when there is nothing to do. Waits some minutes for a coordinator that is not there."""
    parser = argparse.ArgumentParser("edge_runtime.service.first", description="Takes an invitation if there is one.")
    parser.add_argument("--config", type=Path, required=True, help="the device's TOML file")
    path: Path = parser.parse_args(words).config
    try:
        text = invitation(Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nowhere")) / CREDENTIAL)
        config = load(path)
        if not text or Path(config.broker.cert or "/nowhere").exists():
            return exits.OK
        take(text, path, time.monotonic() + _SECONDS)
    except NestlingError as error:
        print(f"edge-runtime: {error}", file=sys.stderr)
        known = {BrokerUnreachable: exits.BROKER, ConfigError: exits.CONFIG, StoreError: exits.DISK}
        return next((code for kind, code in known.items() if isinstance(error, kind)), exits.ENROLMENT)
    return exits.OK


def invitation(path: Path) -> str:
    """Read the credential; empty where there is none."""
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX).decode("ascii", "replace").strip()
    except OSError:
        return ""


def take(text: str, path: Path, until: float) -> None:
    """Enrol, again and again as long as nobody answers.

    Raises:
        BrokerUnreachable: Nobody has answered until then, on the monotonic clock.
        ConfigError: The invitation is none, or another's.
        EnrolmentError: It does not count (any more).
    """
    from edge_runtime.enrol import Wanted, enroll  # it loads the library that makes keys

    while True:
        try:
            done = enroll(Wanted(text, path))
        except BrokerUnreachable as error:
            if time.monotonic() + _SECONDS_BETWEEN > until:
                raise
            print(f"edge-runtime: {error}", file=sys.stderr, flush=True)
            time.sleep(_SECONDS_BETWEEN)
            continue
        print(f"edge-runtime: enrolled as {done.device}", file=sys.stderr)
        return


if __name__ == "__main__":
    sys.exit(main())
