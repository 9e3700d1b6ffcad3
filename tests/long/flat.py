"""Memory stays flat: many rounds of a 26 MB model, and neither the broker nor the coordinator grows.

  python -m tests flat                    100 rounds, some minutes
  python -m tests flat --rounds 30

Fails when the broker's memory after the last round is above that after round 10 by more than 10 % and 8 MiB; the same is asked
of the coordinator. The devices move every weight by a little, so that every round has new weights to publish and old ones to
clear; with `--rule sgd` they train one epoch of 32 samples instead, which takes longer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from coordinator.export import JOURNAL
from coordinator.journal import Closed, Journal
from coordinator.show import table
from tests.support.federation import Federation
from tests.support.mosquitto import proc_memory
from wire import spec as specs
from wire import zoo
from wire.errors import StoreError

MIB = 1 << 20
HIDDEN = (2500, 2500)
"""Units of the model's hidden layers: 6.4 million weights."""
SETTLED = 10
"""The round whose memory the last one is compared with."""


@dataclass(frozen=True)
class Sample:
    """Bytes after a round."""

    round: int
    seconds: float
    broker: int
    coordinator: int
    coordinator_peak: int


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests flat", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="at least 12 (default: 100)")
    parser.add_argument("--rule", choices=("sgd", "still"), default="still", help="of the devices (default: still)")
    parser.add_argument("--devices", type=int, default=2, help="(default: 2)")
    parser.add_argument("--every", type=int, default=10, help="print each so many rounds (default: 10)")
    options = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="flat-") as folder:
        model = Path(folder) / "model.spec"
        model.write_bytes(specs.encode(zoo.mlp("26-mb", (64,), 10, HIDDEN)))
        federation = Federation(
            Path(folder),
            model=str(model),
            devices=options.devices,
            rounds=options.rounds,
            recipe={"rule": "sgd", "epochs": 1.0, "rate": 0.01}
            if options.rule == "sgd"
            else {"rule": "still", "step": 1e-6},
            mode="warm" if options.rule == "sgd" else "auto",
            seconds=120.0,
        )
        with federation:
            federation.start()
            samples = watch(federation)
        code = federation.processes["coordinator"].returncode
        if code != 0 or len(samples) < 2:
            print(f"the coordinator ended with {code}:\n{federation.logs()}", file=sys.stderr)
            return 1
    print(shown(samples, options.every))
    return judged(samples)


def watch(federation: Federation) -> list[Sample]:
    """Take a sample after every round, to the coordinator's end."""
    process, samples, last, began = federation.processes["coordinator"], [], 0, time.monotonic()
    until = time.monotonic() + federation.seconds
    while process.poll() is None and time.monotonic() < until:
        closed, last = closed_after(federation, last)
        if closed:
            try:
                samples.append(sample(federation, closed, time.monotonic() - began))
            except (AssertionError, OSError):  # the coordinator has just ended
                break
            until = time.monotonic() + federation.seconds
        time.sleep(0.05)
    if time.monotonic() >= until:
        federation.kill("coordinator")
    process.wait(federation.seconds)
    return samples


def closed_after(federation: Federation, last: int) -> tuple[int, int]:
    """Read on in the journal; the last round that was closed since, or 0, and how far it was read."""
    closed = 0
    try:
        with Journal(federation.root / "coordinator" / JOURNAL, viewing=True) as journal:
            for entry in journal.replay(last):
                last = entry.seq
                if isinstance(entry.record, Closed):
                    closed = entry.record.round
    except StoreError:  # there is none yet
        pass
    return closed, last


def sample(federation: Federation, closed: int, seconds: float) -> Sample:
    coordinator = federation.processes["coordinator"].pid
    return Sample(
        closed,
        seconds,
        federation.broker.memory("VmRSS"),
        proc_memory(coordinator, "VmRSS"),
        proc_memory(coordinator, "VmHWM"),
    )


def shown(samples: list[Sample], every: int) -> str:
    chosen = [s for s in samples if s.round % every == 0 or s in (samples[0], samples[-1])]
    rows = [
        [str(s.round), f"{s.seconds:.1f}", *(f"{b / MIB:.1f}" for b in (s.broker, s.coordinator, s.coordinator_peak))]
        for s in chosen
    ]
    return table(["round", "seconds", "broker MiB", "coordinator MiB", "its peak MiB"], rows)


def judged(samples: list[Sample]) -> int:
    """Compare the last sample with that of round `SETTLED`, or the latest before it."""
    settled = [s for s in samples if s.round <= SETTLED][-1:] or samples[:1]
    failed = False
    for who in ("broker", "coordinator"):
        before, after = getattr(settled[0], who), getattr(samples[-1], who)
        limit = before * 1.1 + 8 * MIB
        failed |= after > limit
        print(
            f"{who}: {before / MIB:.1f} MiB after round {settled[0].round}, {after / MIB:.1f} MiB after round"
            f" {samples[-1].round}, limit {limit / MIB:.1f} MiB: {'GROWS' if after > limit else 'flat'}"
        )
    return int(failed)
