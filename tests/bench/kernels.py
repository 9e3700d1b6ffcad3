"""The compiled core layer by layer: against dense, against peers, on two threads, and under its roof.

``python -m tests bench kernels --json``, about five minutes. Batch 20, one thread, thread CPU time, candidates in turns,
medians of paired ratios; forward, both gradients and the bias's. Dense is torch's raw operations with whatever instructions
it likes (addmm and mm into memory that is there, convolution and convolution_backward); ours is the C ABI, in the layout
that a short trial picks, in the two accountings of `tests.bench._layers`: ``chain``, and ``whole``, which pays for bringing
everything from and to torch's layout and is what targets judge. Masks are random and uniform. Every result that is timed is
first compared with dense.

Each part runs in a child process of its own, for instruction sets can be held back at start only: with all of them, with
both sides kept to AVX2, with peers (`tests.bench._peers` says how they are installed; absent ones have no rows), and with
two threads, by the wall and the least of many turns, since others use the machine.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from tests.bench import Row, machine, outcome
from tests.bench._layers import BATCH, LAYERS, Layer
from tests.support import roofline

_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "NESTLING_ISA": "avx2",
}
_MEANS = {0.1: 4.0, 0.05: 7.0, 0.01: 20.0}
_EVEN, _EVEN_AVX2 = 0.4, 0.6
_EACH_AVX2 = 5.0
_SCALES, _LONG = 1.6, 0.5e-3
_JUDGED = "whole"
_LANES = {"avx512": 16, "avx2": 8, "sse2": 4, "neon": 4}

Finding = Mapping[str, Any]


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    full = _child("dense")
    rows = _speeds(full, "") + _means(full) + _evens(full, "", _EVEN) + _roof(full, "")
    if full[0]["isa"] == "avx512":
        narrow = _child("dense", **_AVX2)
        suffix = ", both AVX2"
        rows += _speeds(narrow, suffix, {0.1: _EACH_AVX2}) + _evens(narrow, suffix, _EVEN_AVX2) + _roof(narrow, suffix)
    rows += _threads(_child("threads"))
    rows += _peers(_child("peers"))
    return outcome("kernels", rows, machine() | {"isa": full[0]["isa"]})


def _child(what: str, **env: str) -> list[Finding]:
    """Run a part of `tests.bench._layers` in a process of its own."""
    command = [sys.executable, "-m", "tests.bench._layers", what]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, stdout=subprocess.PIPE, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def _case(finding: Finding, suffix: str) -> str:
    return f"{finding['layer']}, density {finding['density']:g}{suffix}"


def _speeds(found: Iterable[Finding], suffix: str, targets: Mapping[float, float] | None = None) -> list[Row]:
    rows = []
    for one in found:
        for way in ("whole", "chain"):
            target = (targets or {}).get(one["density"]) if way == _JUDGED else None
            rows.append(Row(_case(one, suffix), f"times dense, {way}", one[way], "x", "higher", target))
    return rows


def _means(found: Sequence[Finding]) -> list[Row]:
    rows = []
    for density in sorted({one["density"] for one in found}, reverse=True):
        for way in ("whole", "chain"):
            mean = geometric_mean([one[way] for one in found if one["density"] == density])
            target = _MEANS.get(density) if way == _JUDGED else None
            case = f"nine layers, density {density:g}"
            rows.append(Row(case, f"times dense, {way}, geometric mean", mean, "x", "higher", target))
    return rows


def _evens(found: Sequence[Finding], suffix: str, target: float) -> list[Row]:
    rows = []
    for layer in LAYERS:
        for way in ("whole", "chain"):
            speeds = {one["density"]: one[way] for one in found if one["layer"] == layer.name}
            asked = target if way == _JUDGED else None
            rows.append(Row(f"{layer.name}{suffix}", f"break-even density, {way}", even(speeds), "", "higher", asked))
    return rows


def even(speeds: Mapping[float, float]) -> float:
    """Give the density up to which sparse is no slower, between the densities measured on a line of logarithms.

    1 if it is never slower, 0 if always.
    """
    below = 0.0
    for density in sorted(speeds):
        if speeds[density] < 1.0:
            if not below:
                return 0.0
            fast, slow = math.log(speeds[below]), math.log(speeds[density])
            return below * (density / below) ** (fast / (fast - slow))
        below = density
    return below


def _roof(found: Sequence[Finding], suffix: str) -> list[Row]:
    """Hold the times of ``chain`` against what the machine could do at most."""
    isa = found[0]["isa"]
    roof = roofline.measure("avx2" if isa == "avx2" else "")
    machine_case = f"this machine, {isa}"
    rows = [
        Row(machine_case, "multiply-adds, at most", roof.flops / 1e9, "GFLOP/s", "higher"),
        Row(machine_case, "read from the first cache", roof.bytes_near / 1e9, "GB/s", "higher"),
        Row(machine_case, "read from the second", roof.bytes_middle / 1e9, "GB/s", "higher"),
        Row(machine_case, "read from memory", roof.bytes_far / 1e9, "GB/s", "higher"),
    ]
    by_name = {layer.name: layer for layer in LAYERS}
    for one in found:
        if one["density"] not in (0.3, 0.1, 0.01):
            continue
        arithmetic, memory, loads = _bounds(by_name[one["layer"]], one, roof, _LANES[isa])
        seconds = one["seconds"]["chain"]
        binds = "arithmetic" if arithmetic > memory else "memory"
        case = _case(one, suffix)
        rows += [
            Row(case, f"share of the roofline ({binds})", max(arithmetic, memory) / seconds, "", "higher"),
            Row(case, "share of what its loads allow", max(memory, loads) / seconds, "", "higher"),
        ]
    return rows


def _bounds(layer: Layer, one: Finding, roof: roofline.Roof, lanes: int) -> tuple[float, float, float]:
    """Give the least seconds for the arithmetic, for the bytes that must move, and for the loads of a kept weight.

    Bytes: values and index in both directions, the values' gradient read and written, and every activation and gradient
    once. Loads: a weight that stands alone shares nothing with its neighbour, so that each multiply-add loads a vector; a
    batch of 20 is a panel of 16 and one of 4, and a vector that is not full takes as long as one that is.
    """
    inputs, outputs = layer.into * layer.side**2, layer.out * layer.side**2
    touched = one["kept"] * layer.side**2
    moved = 2 * one["bytes"] + 8 * one["kept"] + 4 * BATCH * (3 * inputs + 2 * outputs)
    vectors = -(-16 // lanes) + -(-(BATCH - 16) // lanes)
    return (
        6 * touched * BATCH / roof.flops,
        moved / roof.bytes_of(one["bytes"] + 4 * one["kept"] + 8 * BATCH * (inputs + outputs)),
        3 * touched * vectors * lanes * 4 / roof.bytes_near,
    )


def _threads(found: Iterable[Finding]) -> list[Row]:
    return [
        Row(
            _case(one, f", {1e3 * one['one']:.2g} ms"),
            "two threads, times one",
            one["one"] / one["two"],
            "x",
            "higher",
            _SCALES if one["one"] >= _LONG else None,
        )
        for one in found
    ]


def _peers(found: Sequence[Finding]) -> list[Row]:
    rows = [Row(_case(one, ""), f"times {one['peer']}, {one['ours']}", one["faster"], "x", "higher") for one in found]
    peers = list(dict.fromkeys(one["peer"] for one in found))
    for peer in peers:
        speeds = [one["faster"] for one in found if one["peer"] == peer]
        mean, least = geometric_mean(speeds), min(speeds)
        asked = {"SparseProp": 3.0, "PruneFL": 10.0}.get(peer)
        case = f"{len(speeds)} layers and densities"
        rows += [
            Row(case, f"times {peer}, geometric mean", mean, "x", "higher", asked),
            Row(case, f"times {peer}, least", least, "x", "higher", 1.0 if "torch" in peer else None),
        ]
    return rows
