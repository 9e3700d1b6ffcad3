"""One whole training step of a model through the torch engine with masks, beside dense and weights times masks.

``python -m tests bench step --json``, about five minutes. Batch 20, one thread, thread CPU time, all candidates of a model
in turns, medians of paired ratios. Masks are random and uniform, a mask for every linear layer and convolution; which of
them the engine holds sparse is its chooser's business, asked before the clock runs. Dense is the faster of two: torch.nn with
torch.optim.SGD as one would write it, and the same engine without masks, whose update is fused as ours is. The first step
of each density is compared with that of weights times masks in torch.

Memory: by the engine's own account, per weight of the dense model, and as the kernel's high-water mark of a fresh process
that has loaded torch and trained LeNet-300-100 for a step, then trains the model for ten.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from tests.bench import Row, machine, outcome
from tests.bench._steps import DENSITIES, MODELS

_TARGETS = {("conv-2", 0.1): 3.0, ("conv-2", 0.05): 4.5, ("conv-2", 0.01): 7.0}
_NEVER_SLOWER = 0.98
_BYTES, _BYTES_MOMENTUM = 1.0, 1.4
_MIB = 1 << 20


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    for model in MODELS:
        found = json.loads(_child(model))
        rows += _speeds(model, found) + _accounts(model, found)
        if model in ("lenet-300-100", "conv-2"):
            rows += _peaks(model, found)
    return outcome("step", rows, machine())


def _child(*words: str) -> str:
    """Run a part of `tests.bench._steps` in a process of its own and give its last line."""
    command = [sys.executable, "-m", "tests.bench._steps", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def _speeds(model: str, found: Mapping[str, Any]) -> list[Row]:
    rows = [Row(model, f"step, {name}", 1e3 * took, "ms", "lower") for name, took in found["seconds"].items()]
    for density, speed in found["dense"].items():
        case = f"{model}, density {density}"
        rows += [
            Row(case, "times dense", speed, "x", "higher", _TARGETS.get((model, float(density)))),
            Row(case, "times weights times masks", found["masked"][density], "x", "higher"),
            Row(case, "layers held sparse", found["sparse"][density], f"of {found['layers']}", "higher"),
        ]
    slowest = min(found["dense"].values())
    return [*rows, Row(f"{model}, any density", "times dense, least", slowest, "x", "higher", _NEVER_SLOWER)]


def _accounts(model: str, found: Mapping[str, Any]) -> list[Row]:
    rows = []
    for density, held in found["held"].items():
        judged = density == "0.1"
        conv2 = judged and model == "conv-2"
        for what, measure, target in (
            ("fused", "as a fused step holds them", _BYTES if judged else None),
            ("whole", "with gradients that stay", _BYTES if conv2 else None),
            ("momentum", "with gradients that stay and momentum", _BYTES_MOMENTUM if conv2 else None),
        ):
            size = held[what] / found["weights"]
            rows.append(
                Row(f"{model}, density {density}", f"bytes per dense weight, {measure}", size, "B", "lower", target)
            )
    return rows


def _peaks(model: str, found: Mapping[str, Any]) -> list[Row]:
    rows = []
    cases = [("plain", "1"), ("masked", "0.1"), ("engine", "1")]
    cases += [("ours", f"{density:g}") for density in DENSITIES if density < 1]
    for kind, density in cases:
        ways = json.dumps(found["ways"].get(density, {}))
        case = {"plain": "dense, torch.nn", "masked": "weights times masks", "engine": "dense, engine"}.get(
            kind, f"density {density}"
        )
        peak = int(_child(model, kind, density, ways)) / _MIB
        rows.append(Row(f"{model}, {case}", "peak above a LeNet step", peak, "MiB", "lower"))
    return rows
