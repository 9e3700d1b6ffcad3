"""A question about the owner's conditions: what each of them reads now."""

from __future__ import annotations

import time
from pathlib import Path

from edge_runtime import probes
from edge_runtime.config import Config
from edge_runtime.health.finding import Finding, Machine
from edge_runtime.probes import machine as looking
from edge_runtime.probes.command import SECONDS_MAX

_WHAT = "conditions"
_WORDS = {
    "holds": "",
    "between": " (as it was before)",
    "fails": " (fails)",
    "unknown": " (fails)",
    "asked": " (fails)",
}


def conditions(config: Config, where: Machine) -> Finding:
    """Look once, and give a phone's commands the time that they have; a condition that cannot be read is a fault."""
    wanted = config.conditions
    if not probes.demanded(wanted):
        return Finding(_WHAT, fine=True, found="none: it trains whenever it is asked (docs/conditions.md)")
    root = Path(wanted.root) if wanted.root != "/" else where.root
    machine, until = looking.Machine(root), time.monotonic() + SECONDS_MAX + 1.0
    try:
        readings = probes.look(machine, wanted)
        while time.monotonic() < until and any(found.verdict == "asked" for found in readings.values()):
            time.sleep(0.1)
            readings = probes.look(machine, wanted)
    finally:
        machine.close()
    found = "; ".join(f"{name}: {said.found}{_WORDS[said.verdict]}" for name, said in readings.items())
    unknown = [name for name, said in readings.items() if said.verdict in ("unknown", "asked")]
    if unknown:
        advice = f"take {', '.join(unknown)} out of [conditions], or it will never train"
        return Finding(_WHAT, fine=False, found=found, advice=advice)
    failing = any(said.verdict == "fails" for said in readings.values())
    return Finding(_WHAT, fine=True, found=found, advice="it takes no orders until all of them hold" if failing else "")
