"""Benchmarks: what they have in common is the shape of their result.

A benchmark is a module here with ``run() -> dict``, made by `outcome`. `python -m tests bench NAME` prints it as a table,
``--json`` as one JSON object. A target is part of the row that it judges, and a peer is a row like any other.
"""

from __future__ import annotations

import math
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        case: What was run.
        measure: What was measured.
        value: The figure.
        unit: Its unit.
        better: Which way is good.
        target: What it must reach; None for a figure that is only shown.
    """

    case: str
    measure: str
    value: float
    unit: str
    better: Literal["lower", "higher"]
    target: float | None = None

    @property
    def holds(self) -> bool:
        """Tell whether the target is reached; a figure that is not finite reaches none."""
        if self.target is None:
            return True
        if not math.isfinite(self.value):
            return False
        return self.value <= self.target if self.better == "lower" else self.value >= self.target


def machine() -> dict[str, Any]:
    """Describe this machine in what matters for a figure."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "bytes_memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def outcome(bench: str, rows: list[Row], where: dict[str, Any] | None = None) -> dict[str, Any]:
    """Give the result in the one shape that scripts rely on."""
    return {
        "bench": bench,
        "machine": machine() if where is None else where,
        "rows": [
            {**asdict(row), "value": row.value if math.isfinite(row.value) else None, "holds": row.holds}
            for row in rows
        ],
        "holds": all(row.holds for row in rows),
    }


def table(result: dict[str, Any]) -> str:
    """Lay a result out for reading."""
    lines = [("case", "measure", "value", "target", "")]
    for row in result["rows"]:
        sign = "<=" if row["better"] == "lower" else ">="
        target = "" if row["target"] is None else f"{sign} {row['target']:.4g}"
        value = "none" if row["value"] is None else f"{row['value']:.4g}"
        verdict = "" if row["target"] is None else ("holds" if row["holds"] else "MISSED")
        lines.append((row["case"], row["measure"], f"{value} {row['unit']}", target, verdict))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    where = result["machine"]
    return "\n".join([f"{result['bench']}: {where['cpu']}, {where['cores']} cores, Python {where['python']}", *text])
