"""What the long comparisons have in common: tables by name, each one `coordinator compare`, run one behind the other."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.cli import main as coordinator


def run(family: str, tables: Mapping[str, Any], words: Sequence[str] | None) -> int:
    """Run the tables that are named, or all; gives the highest exit code.

    Args:
        family: What the tables are of.
        tables: Name to a frozen dataclass with `rounds`, `seeds` and `words`, which gives the arguments.
        words: Of the command line.
    """
    parser = argparse.ArgumentParser(f"python -m tests {family}", description=f"Comparisons of the {family} methods.")
    parser.add_argument("tables", nargs="*", help=f"which: {', '.join(tables)} (default: all)")
    parser.add_argument("--rounds", type=int, help="other rounds than the tables' own, such as 200")
    parser.add_argument("--seeds", help="other seeds than the tables' own, such as 0,1,2")
    parser.add_argument("--jobs", default="2", help="runs at a time (default: 2)")
    parser.add_argument("--keep", default="nestling-compare", help="folder of finished runs")
    parser.add_argument("--out", type=Path, default=Path(f"{family}-results"), help="folder for JSON and plots")
    parser.add_argument("--show", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(words)
    unknown = sorted(set(options.tables) - set(tables))
    if unknown:
        parser.error(f"no table {unknown[0]!r}: there are {', '.join(tables)}")
    code = 0
    for name in options.tables or tables:
        out, table = options.out / f"{family}-{name}", tables[name]
        table = dataclasses.replace(table, rounds=options.rounds or table.rounds, seeds=options.seeds or table.seeds)
        asked = [*table.words(), "--jobs", options.jobs, "--keep", options.keep]
        asked += ["--json", f"{out}.json", "--plot", f"{out}.png"]
        print(f"coordinator {shlex.join(asked)}", flush=True)
        if not options.show:
            options.out.mkdir(parents=True, exist_ok=True)
            code = max(code, coordinator(asked))
    return code


def told(sets: Mapping[str, str | float]) -> list[str]:
    """Give the flags that set parameters: ``METHOD.PARAM`` to value."""
    return [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
