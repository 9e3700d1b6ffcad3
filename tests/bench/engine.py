"""The native engine beside the torch engine, dense PyTorch and PyTorch with weights times masks: time, memory, start.

``python -m tests bench engine --json``, about ten minutes. Batch 20, one thread, thread CPU time, all candidates of a model in
turns in one process, medians of paired ratios; masks are random and uniform over all layers. Dense is torch.nn with
torch.optim.SGD as one would write it. ``norms`` is a narrow residual network with group norms, all dense.

Memory: the kernel's high-water mark of a fresh process that reads masks and weights from an order's files, without torch, and
trains ten steps. Start: CPU seconds from the beginning of such a process, begun as a worker is, to the end of its first step.
A mask change is timed from masks and values in memory, as an order's files give them, to a model that is ready.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.bench import Row, machine, outcome
from tests.bench._engines import DENSITIES, MODELS
from tests.bench._paired import faster

_SPEEDS = {("conv-2", 0.05): 6.5, ("conv-2", 0.01): 18.0, ("lenet-300-100", 0.05): 7.0}
_PEAKS = {("conv-2", 0.05): 56.0, ("conv-2", 0.01): 45.0}
_BYTES, _BYTES_MOMENTUM = 10.0, 14.0
_START = 0.15
_MIB = 1 << 20


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    for model in MODELS:
        found = _child("speeds", model)
        rows += _speeds(model, found)
        if model != "norms":
            for density in DENSITIES[1:]:
                rows += _orders(model, density, found)
    return outcome("engine", rows, machine())


def _child(*words: str) -> dict[str, Any]:
    """Run a part of `tests.bench._engines` in a process of its own, as installed: with its bytecode kept from run to run.

    What is about the start itself begins as a worker does.
    """
    kept = str(Path(tempfile.gettempdir()) / f"nestling-bytecode-{os.getuid()}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": kept}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "tests.bench._start" if words[0] == "start" else "tests.bench._engines", *words]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _speeds(model: str, found: Mapping[str, Any]) -> list[Row]:
    times, rows = found["times"], []
    for name, took in times.items():
        rows.append(Row(model, f"step, {name}", 1e3 * sorted(took)[len(took) // 2], "ms", "lower"))
    for name in times:
        kind, _, density = name.partition(" ")
        if kind == "native":
            case, asked = f"{model}, density {density}", _SPEEDS.get((model, float(density)))
            rows.append(Row(case, "times dense PyTorch", faster(times, name, "dense"), "x", "higher", asked))
            rows.append(Row(case, "times the torch engine", faster(times, name, f"torch {density}"), "x", "higher"))
            if f"masked {density}" in times:
                rows.append(Row(case, "times masked PyTorch", faster(times, name, f"masked {density}"), "x", "higher"))
    for density, took in found["changes"].items():
        step = sorted(times[f"native {density}"])[len(times[f"native {density}"]) // 2]
        target = 1.0 if (model, density) == ("conv-2", "0.05") else None
        rows.append(Row(f"{model}, density {density}", "a mask change, in steps", took / step, "", "lower", target))
    return rows


def _orders(model: str, density: float, found: Mapping[str, Any]) -> list[Row]:
    case, ways = f"{model}, density {density:g}", found["ways"]
    rows = []
    with tempfile.TemporaryDirectory(prefix="nestling-bench-") as folder:
        _child("write", folder, model, f"{density:g}")
        for kind in ("native", "torch"):
            known = json.dumps(ways[f"{kind} {density:g}"] if kind == "native" else {})
            peak = _child("peak", folder, model, kind, known)
            target = _PEAKS.get((model, density)) if kind == "native" else None
            rows.append(Row(case, f"peak memory, {kind} engine", peak["peak"] / _MIB, "MiB", "lower", target))
            if kind == "native":
                judged = model == "conv-2"
                for what, most, text in (
                    ("fused", _BYTES, "as a fused step holds them"),
                    ("momentum", _BYTES_MOMENTUM, "as a fused step with momentum holds them"),
                    ("whole", None, "with gradients that stay"),
                ):
                    asked = most if judged else None
                    rows.append(Row(case, f"bytes per kept weight, {text}", peak[what], "B", "lower", asked))
        starts = [_child("start", folder, model, kind, "{}")["cpu"] for kind in ("native",) * 3]
        rows.append(Row(case, "start to first step, native", sorted(starts)[1], "CPU s", "lower", _START))
    return rows
