"""The worker as a service manager starts it: for each connection to its socket, as a user of its own.

It reads the device's configuration itself, and the data; what else it needs comes through the door (`edge_runtime.door`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_runtime import exits
from edge_runtime.config import Config, load
from edge_runtime.desk import TIMINGS
from edge_runtime.door import say
from edge_runtime.spawn import command, surroundings
from wire.errors import ConfigError
from wire.job import Failed
from wire.schema import to_plain


def main(words: Sequence[str] | None = None) -> int:
    """Run the process; give the worker's exit code, or that of a wrong configuration, which the agent hears as well."""
    parser = argparse.ArgumentParser("edge_runtime.trainer", description="A worker on standard input and output.")
    parser.add_argument("--config", type=Path, required=True, help="the device's TOML file")
    path: Path = parser.parse_args(words).config
    try:
        config = load(path)
    except ConfigError as error:
        print(f"edge-trainer: {error}", file=sys.stderr)
        with os.fdopen(os.dup(1), "wb", buffering=0) as answers:
            say(answers, Failed("unsupported", str(error)[:2000], 0, 0))
        return exits.CONFIG
    os.environ.update(surroundings(config.worker.threads))
    from edge_runtime import worker  # it loads numpy, which reads what was just set

    return worker.main(arguments(config, os.environ.get("CACHE_DIRECTORY", "")))


def arguments(config: Config, cache: str) -> list[str]:
    """Give the worker's command line.

    Args:
        config: The device's.
        cache: Folder for what is found out about this device's speed; empty to find it out each time.
    """
    worker = config.worker
    _, *words = command(
        json.dumps(to_plain(config.data)),
        engine=worker.engine,
        threads=worker.threads,
        preload=worker.mode == "warm",
        timings=str(Path(cache) / TIMINGS) if cache else "",
        limit=config.memory.file,
        reserve=config.bytes_reserve,
    )
    return words


if __name__ == "__main__":
    sys.exit(main())
