"""How far methods are from each other, seed by seed: with the same seed they have the same devices, data and first weights.

What two methods reach differs from seed to seed by much more than they do from each other, so that medians side by side say
less than the differences of pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coordinator.show import table
from coordinator.simulate.compare_widths import SHOWN

TIED = 0.005
"""Two methods whose accuracies differ by no more are tied."""
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; beyond them the last, which is a little wide."""

Values = Mapping[int, float]
"""What a method reached, by seed."""


def judge(rows: Sequence[dict[str, Any]], runs: Sequence[Mapping[str, Any]]) -> None:
    """Give each row of a summary ``behind_best`` and ``behind_by_width``: how far it is behind the best one of its density.

    Each is as `gap` says, with the ``label`` of the best, which is the one with the highest median. The second is one of these
    for each width: the best is one of several widths; a method with one model, such as a narrower one, is held against each
    with that. A method without a density is compared with those of every density, and these with it.
    """
    for row in rows:
        row["behind_best"], row["behind_by_width"] = None, {}
        if row["accuracy"]["median"] is None:
            continue
        rivals = [
            other
            for other in rows
            if other["density"] in (row["density"], None) and other["accuracy"]["median"] is not None
        ]
        best = max(rivals, key=lambda other: float(other["accuracy"]["median"]))
        row["behind_best"] = _behind(row, best, runs)
        nested = [other for other in rivals if _several(other["by_width"])]
        for width in sorted({width for other in nested for width in other["by_width"]}, key=int):
            ends = {place: other["by_width"][width] for place, other in enumerate(nested) if width in other["by_width"]}
            if not _several(row["by_width"]) or (width in row["by_width"] and len(rivals) > 1):
                best = nested[max(ends, key=lambda place: float(ends[place]))]
                row["behind_by_width"][width] = _behind(row, best, runs, width)


def gap(mine: Values, theirs: Values) -> dict[str, Any] | None:
    """Say how far one method is behind another; None when they have no seed in common.

    Returns:
        ``mean`` of the paired differences, ``half_width`` of its 95 % interval (Student's t; None with a single pair) and
        ``tied``: within half a point, or an interval of three seeds or more that holds 0.
    """
    gaps = [theirs[seed] - mine[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if not gaps:
        return None
    mean, half = statistics.fmean(gaps), _half_width(gaps)
    tied = mean <= TIED or (half is not None and len(gaps) > 2 and mean <= half)
    return {"mean": mean, "half_width": half, "tied": tied}


def text(rows: Sequence[Mapping[str, Any]], number: Callable[..., str]) -> str:
    """Lay out how far methods are behind the best of each width; empty where no method has widths, or too many.

    Args:
        rows: Of the summary, in their order.
        number: Writes a figure.
    """
    told = [row for row in rows if any(row["behind_by_width"].values())]
    widths = sorted({width for row in told for width in row["behind_by_width"]}, key=int)
    if not 0 < len(widths) <= SHOWN:
        return ""
    cells = [
        [
            row["label"],
            "-" if row["density"] is None else f"{row['density']:g}",
            *(_cell(row["label"], row["behind_by_width"].get(width), number) for width in widths),
        ]
        for row in told
    ]
    head = ["method", "density", *(f"width {width}" for width in widths)]
    about = (
        "behind the best of each width, seed by seed: mean of the differences, and half of its 95 % interval, below which"
        " a difference\nsays nothing; what has one model is held against every width with it, and is ahead where there is"
        " a minus"
    )
    return f"{table(head, cells)}\n{about}"


def _cell(label: str, behind: Mapping[str, Any] | None, number: Callable[..., str]) -> str:
    if behind is None:
        return "-"
    if behind["label"] == label:
        return "best"
    mean, half = f"{behind['mean']:.4f}", number(behind["half_width"], "{:.4f}")
    return f"{mean} ±{half}"


def _behind(
    row: Mapping[str, Any], best: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], width: str = ""
) -> dict[str, Any] | None:
    found = gap(_by_seed(row, runs, width), _by_seed(best, runs, width))
    return None if found is None else {"label": best["label"], **found}


def _by_seed(row: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], width: str) -> Values:
    mine = [run for run in runs if (run["label"], run["density"]) == (row["label"], row["density"])]
    return {run["seed"]: value for run in mine if "error" not in run and (value := _end(run, width)) is not None}


def _end(run: Mapping[str, Any], width: str) -> float | None:
    """Give what a run ended with: a width of several, or the one model that it has."""
    widths = run["accuracy"].get("by_width", {})
    value: float | None = widths.get(width) if width and _several(widths) else run["accuracy"]["full"]
    return value


def _several(widths: Mapping[str, float]) -> bool:
    return len(widths) > 1


def _half_width(gaps: Sequence[float]) -> float | None:
    if len(gaps) < 2:
        return None
    quantile = _T95[min(len(gaps) - 2, len(_T95) - 1)]
    return quantile * statistics.stdev(gaps) / math.sqrt(len(gaps))
