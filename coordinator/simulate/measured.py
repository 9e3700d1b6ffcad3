"""Make a fleet's file of this machine's own kernels, from what the bench of whole training steps measured.

    python -m tests bench step --json step.json
    python -m coordinator.simulate.measured step.json > coordinator/simulate/profiles/this-machine.json

Dense is the faster of the two dense candidates, torch.nn and the engine without masks. A model that the bench does not know
goes by operations per second: the median over the models of what their dense steps reach. Memory and link are a Pi 4's.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.simulate.fleet import Kind, Measured, Point, Profile, kinds
from wire import zoo
from wire.schema import to_plain
from wire.spec import Structure
from wire.work import per_sample

BATCH = 20
"""Samples of a step in that bench."""
_DENSE, _MASKED = "step, dense, ", "step, density "


def profile(results: Sequence[dict[str, Any]]) -> Profile:
    """Read results in the bench shape; of a model that stands in several, the last one counts."""
    seconds: dict[str, dict[str, float]] = {}
    for result in results:
        for row in result["rows"]:
            if row["measure"].startswith("step, "):
                seconds.setdefault(row["case"], {})[row["measure"]] = row["value"] / 1e3
    measured = {model: _measured(found) for model, found in seconds.items()}
    speeds = [BATCH * per_sample(zoo.by_name(m), Structure()) / found.dense for m, found in measured.items()]
    (pi,) = kinds("pi4")
    kind = Kind(pi.bytes_budget, round(statistics.median(speeds)), pi.bandwidth_down, pi.bandwidth_up, {}, measured)
    where = results[-1]["machine"]
    about = (
        f"One thread of {where['cpu']}, {where['system']}, as `tests bench step` measured our kernels at batch {BATCH};"
        " memory and link of a Raspberry Pi 4. Made by `python -m coordinator.simulate.measured`."
    )
    return Profile(about, (kind,))


def _measured(found: dict[str, float]) -> Measured:
    dense = min(took for name, took in found.items() if name.startswith(_DENSE))
    points = sorted((float(n.removeprefix(_MASKED)), took) for n, took in found.items() if n.startswith(_MASKED))
    return Measured(round(dense, 7), BATCH, tuple(Point(share, round(took, 7)) for share, took in points))


if __name__ == "__main__":
    read = [json.loads(Path(word).read_text("utf-8")) for word in sys.argv[1:]]
    print(json.dumps(to_plain(profile(read)), indent=1))
