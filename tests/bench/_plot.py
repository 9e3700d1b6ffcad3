"""Draw what `tests.bench.kernels` found: ``python -m tests.bench._plot FROM.json TO.png``.

Made for docs/results/ by

    python -m tests bench kernels --json docs/results/kernels.json
    python -m tests.bench._plot docs/results/kernels.json docs/results/kernels.png
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib as mpl

Curves = Mapping[str, Mapping[float, float]]
_CASE = re.compile(r"(?P<layer>(linear|conv) .*), density (?P<density>[0-9.]+)(?P<limit>, both AVX2)?$")
_LIMITS = {"": "each with all its instructions", ", both AVX2": "both kept to AVX2"}


def curves(rows: Sequence[Mapping[str, Any]], limit: str) -> Curves:
    """Give speed over dense by layer and density, layout copies included."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows:
        case = _CASE.match(row["case"])
        if case and row["measure"] == "times dense, whole" and (case["limit"] or "") == limit:
            found[case["layer"]][float(case["density"])] = row["value"]
    return found


def peers(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Give how many times faster ours is, by peer, over layers and densities."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        named = re.match(r"times (?P<peer>.*), (chain|whole)$", row["measure"])
        if named and named["peer"] != "dense" and _CASE.match(row["case"]):
            found[named["peer"]].append(row["value"])
    return found


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw three panels: against dense, against dense with AVX2 only, against peers."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    found = {limit: curves(rows, limit) for limit in _LIMITS if curves(rows, limit)}
    others = peers(rows)
    count = len(found) + bool(others)
    figure, ((*panels,),) = plt.subplots(1, count, figsize=(5.2 * count, 4.6), squeeze=False)
    for panel, (limit, lines) in zip(panels, found.items(), strict=False):
        for layer, line in lines.items():
            panel.plot(list(line), list(line.values()), "o-" if layer.startswith("conv") else "s--", ms=3, label=layer)
        panel.axhline(1.0, color="black", lw=0.8)
        panel.set(xscale="log", yscale="log", xlabel="density", title=f"times dense PyTorch, {_LIMITS[limit]}")
        panel.set_yticks([0.5, 1, 2, 4, 7, 10, 20, 40], [".5", "1", "2", "4", "7", "10", "20", "40"])
        panel.set_xticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], [".01", ".02", ".05", ".1", ".2", ".5", "1"])
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    if others:
        names = sorted(others, key=lambda name: geometric_mean(others[name]))
        for place, name in enumerate(names):
            panels[-1].plot(others[name], [place] * len(others[name]), "o", alpha=0.4, ms=5)
            panels[-1].plot([geometric_mean(others[name])], [place], "k|", ms=18, mew=2)
        panels[-1].axvline(1.0, color="black", lw=0.8)
        panels[-1].set(xscale="log", title="times other sparse training", ylim=(-0.5, len(names) - 0.5))
        panels[-1].set_yticks(range(len(names)), names)
        panels[-1].set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
        panels[-1].grid(alpha=0.3, axis="x")
    cpu = result["machine"]["cpu"]
    figure.suptitle(f"One training step of a layer: forward, both gradients. Batch 20, one thread. {cpu}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))
