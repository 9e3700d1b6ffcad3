"""The `edge-runtime` command. An agent's start loads what it needs alone: reading other words takes 0.7 MiB."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from edge_runtime import exits, frugal
from wire.errors import ConfigError, DataError, EnrolmentError, LinkError, NestlingError, StoreError, of_disk

if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (see `exits`)."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["run"]:
        frugal.put_aside()  # before anything that it is about, and for the agent alone
    try:
        match words:
            case ["run", "--config", config] | ["run", "--config", config, "--quiet"] if not config.startswith("-"):
                return run(Path(config), quiet=len(words) > 3)
        from edge_runtime.commands import parse

        args = parse(words)
        command: Callable[[argparse.Namespace], int] = args.command
        return command(args)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except BrokenPipeError:
        return exits.OK
    except NestlingError as error:
        print(f"edge-runtime: {error}", file=sys.stderr)
        return _code(error)
    except OSError as error:
        if not of_disk(error):
            raise
        print(f"edge-runtime: {error}", file=sys.stderr)
        return exits.DISK


def _code(error: NestlingError) -> int:
    for kind, code in (
        (ConfigError, exits.CONFIG),
        (DataError, exits.DATA),
        (LinkError, exits.BROKER),
        (StoreError, exits.DISK),
        (EnrolmentError, exits.ENROLMENT),
    ):
        if isinstance(error, kind):
            return code
    return exits.UNEXPECTED


def run(config: Path, *, quiet: bool) -> int:
    """Take part in the federation until stopped.

    Args:
        config: This device's TOML file.
        quiet: Say on stderr only what goes wrong.
    """
    from edge_runtime import logs
    from edge_runtime.config import load

    loaded = load(config)
    with nullcontext() if loaded.broker.url.startswith("mqtts:") else frugal.without_openssl():
        from edge_runtime.agent import Agent
    logs.begin(loaded.log.form, loaded.device, quiet=quiet)
    Agent(loaded).run()
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
