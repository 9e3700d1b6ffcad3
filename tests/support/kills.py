"""Kill -9 at random: the same run twice, once in peace and once under fire, must end with the same bits."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np

from coordinator.show import RunView
from tests.support.federation import MIB, Federation

BUDGETS = (9 * MIB, 11 * MIB, 64 * MIB)


def federation(root: Path, rounds: int, seconds: float) -> Federation:
    """Three devices, NestFL, two of the widths forced narrow by budget; quorum all, one thread."""
    return Federation(
        root,
        algo="nestfl",
        model="digits-mlp",
        devices=3,
        rounds=rounds,
        budgets=BUDGETS,
        samples=60,
        seconds=seconds,
        mode="warm",
        recipe={"epochs": 1},
    )


def peaceful(root: Path, rounds: int) -> dict[str, np.ndarray]:
    """Run without a disturbance and give the final weights."""
    with federation(root, rounds, 120.0) as fleet:
        fleet.start()
        fleet.wait_finished(120.0 + 4.0 * rounds)
        return fleet.weights()


def under_fire(root: Path, rounds: int, kills: int, seed: int) -> tuple[dict[str, np.ndarray], RunView, dict[str, int]]:
    """Kill the coordinator, the broker or a device `kills` times at random instants while the run goes on.

    Returns:
        The final weights, the journal's view, and who was killed how often.
    """
    rng = random.Random(seed)
    hits: dict[str, int] = {}
    with federation(root, rounds, 900.0) as fleet:
        fleet.start()
        fleet.wait(lambda view: len(view.rounds) >= 1, 90.0)
        for number in range(1, kills + 1):
            _wait(fleet, rng.uniform(0.05, 1.2), rounds * number // (kills + 2))
            victim = rng.choice(["coordinator", "coordinator", "broker", *fleet.names])
            if fleet.processes["coordinator"].poll() is not None:
                break
            hits[victim] = hits.get(victim, 0) + 1
            if victim == "broker":
                fleet.broker.kill()
                _pause(rng.uniform(0.0, 0.3))
                fleet.broker.start()
            else:
                fleet.kill(victim)
                _pause(rng.uniform(0.0, 0.3))
                fleet.restart(victim)
        view = fleet.wait_finished(300.0 + 4.0 * rounds)
        return fleet.weights(), view, hits


def differences(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Name the tensors that are not bit-equal."""
    return sorted(n for n in one if n not in other or one[n].tobytes() != other[n].tobytes())


def _wait(fleet: Federation, seconds: float, rounds: int) -> None:
    """Wait so long, or a tenth of it where more rounds have begun: a fast machine is not to end before all kills are done."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < seconds:
        if waited >= seconds / 10 and len(fleet.view().rounds) > rounds:
            return
        _pause(0.02)


def _pause(seconds: float) -> None:
    time.sleep(seconds)
