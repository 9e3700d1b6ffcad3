"""Kill -9 of coordinator, broker and devices at random instants; the final weights must be those of a run in peace."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from tests.support import kills


def main(words: list[str]) -> int:
    """Run both federations and compare."""
    parser = argparse.ArgumentParser("python -m tests kill", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill (default: 200)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds (default: two per kill, so that all land)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants and the victims (default: 0)")
    options = parser.parse_args(words)
    rounds = options.rounds or 2 * options.kills + 5
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        expected = kills.peaceful(Path(folder) / "peace", rounds)
        print(f"in peace: {rounds} rounds in {time.monotonic() - began:.0f} s", flush=True)
        began = time.monotonic()
        found, view, hits = kills.under_fire(Path(folder) / "fire", rounds, options.kills, options.seed)
    total = sum(hits.values())
    closed = sum(r.outcome == "closed" for r in view.rounds.values())
    print(f"under fire: {closed} of {rounds} rounds closed in {time.monotonic() - began:.0f} s, {total} kills: {hits}")
    wrong = kills.differences(expected, found)
    print("final weights: bit-equal" if not wrong else f"final weights DIFFER: {', '.join(wrong)}")
    return 0 if not wrong and closed == rounds and total == options.kills else 1
