"""What a comparison says beside the accuracy of the whole model: that of every width, and what devices get for themselves.

The worst width is the one that does worst, whichever that is: of a run, at its end; of a curve, at each of its points.
Personal accuracies are those of all devices that trained, on test data of their own: of what they trained last, before it was
aggregated, and of the model of their width after the last aggregation. A method whose devices have masks of their own is also
told by these: what the joined model does under them, and what they keep.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coordinator.personal import PERSONAL
from coordinator.show import table

COSTS = ("round", "seconds_virtual", "bytes_up", "bytes_down", "flops")
"""What a run has cost by a point of its curve."""

SHOWN = 8
"""Widths that have a column of their own; of more, only the worst one is shown."""
_WHAT = ("mean", "p10")
_ALWAYS = 2
"""Of `PERSONAL`, the first that have columns in any case; the others have them where a method tells them."""


def accuracy(point: Mapping[str, Any]) -> float | None:
    """Give the accuracy of the whole model."""
    value: float | None = point["accuracy"]
    return value


def worst(point: Mapping[str, Any]) -> float | None:
    """Give the accuracy of the worst width; None where there are no two."""
    widths = _widths(point)
    return min(widths.values()) if len(widths) > 1 else None


def to_target(
    curve: Sequence[Mapping[str, Any]],
    target: float | None,
    measure: Callable[[Mapping[str, Any]], float | None] = accuracy,
) -> dict[str, Any] | None:
    """Give what a run had cost when it was first measured at its target; None when it never was."""
    if target is None:
        return None
    measured = ((point, measure(point)) for point in curve)
    point = next((point for point, value in measured if value is not None and value >= target), None)
    return None if point is None else {name: point[name] for name in COSTS}


def median(values: Sequence[float]) -> float | None:
    """Give the median; None when there is none, or when too few runs got there."""
    middle = statistics.median(values) if values else math.inf
    return None if math.isinf(middle) else middle


def median_cost(reached: Sequence[Mapping[str, Any] | None]) -> dict[str, float | None]:
    """Sum up what runs had cost at their target; one that never got there, or failed, counts as infinitely dear."""
    return {name: median([one[name] if one else math.inf for one in reached]) for name in COSTS}


def extent(values: Sequence[float]) -> dict[str, float | None]:
    """Give median, least and most."""
    return {"median": median(values), "least": min(values, default=None), "most": max(values, default=None)}


def summed_up(runs: Sequence[Mapping[str, Any]], failed: int = 0) -> dict[str, Any]:
    """Sum up the runs of one method: medians over the seeds.

    Args:
        runs: Those that gave a result.
        failed: How many others there are; they never got to their target.

    Returns:
        ``by_width`` (width to median at the end), ``worst`` (as `extent`), ``reached_worst`` and ``to_target_worst`` (as
        their likes for the whole model), ``personal`` (each of `personal.PERSONAL`, mean and 10th percentile over devices, and
        how many these are).
    """
    ends = [_widths(run["accuracy"]) for run in runs]
    common = [width for width in ends[0] if all(width in end for end in ends)] if ends else []
    reached = [run["to_target_worst"] for run in runs] + [None] * failed
    found = [run["personal"] for run in runs if run.get("personal")]
    return {
        "by_width": {width: statistics.median(end[width] for end in ends) for width in common},
        "worst": extent([value for run in runs if (value := worst(run["accuracy"])) is not None]),
        "reached_worst": sum(one is not None for one in reached),
        "to_target_worst": median_cost(reached),
        "personal": {
            when: {
                what: median([n for one in found if (n := one.get(when, {}).get(what)) is not None])
                for what in (*_WHAT, "devices")
            }
            for when in PERSONAL
        },
    }


def text(rows: Sequence[Mapping[str, Any]], number: Callable[..., str]) -> str:
    """Lay it out for people, a line for each method that has widths or personal results; empty when none has.

    Args:
        rows: Of the summary, in their order.
        number: Writes a figure.
    """
    told = [row for row in rows if len(row["by_width"]) > 1 or row["personal"]["before"]["mean"] is not None]
    if not told:
        return ""
    widths = sorted({width for row in told for width in row["by_width"] if len(row["by_width"]) > 1}, key=int)
    shown = widths if len(widths) <= SHOWN else []
    head = [
        "method",
        "density",
        "worst",
        *(f"width {width}" for width in shown),
        "reached",
        "in round",
        "in s",
        "in MB",
    ]
    seen = [w for i, w in enumerate(PERSONAL) if i < _ALWAYS or any(r["personal"][w]["mean"] is not None for r in told)]
    names = {"before": "own before", "after": "own after", "own": "own mask", "density": "own density"}
    head += ["devices"] + [column for when in seen for column in (names[when], "p10")]
    cells = []
    for row in told:
        nested = len(row["by_width"]) > 1
        cost = row["to_target_worst"]
        moved = None if cost["bytes_up"] is None else cost["bytes_up"] + cost["bytes_down"]
        cells.append(
            [
                row["label"],
                "-" if row["density"] is None else f"{row['density']:g}",
                number(row["worst"]["median"], "{:.4f}"),
                *(number(row["by_width"].get(width) if nested else None, "{:.4f}") for width in shown),
                f"{row['reached_worst']}/{row['runs']}" if nested else "-",
                number(cost["round"], "{:.0f}"),
                number(cost["seconds_virtual"]),
                number(moved, "", 1e6),
                number(row["personal"]["before"]["devices"], "{:.0f}"),
                *(number(row["personal"][when][what], "{:.4f}") for when in seen for what in _WHAT),
            ]
        )
    about = (
        "widths from the narrowest on, and when the worst of them reached the target; own: on the own test data of so many"
        " devices;\nown before: what each trained last, before aggregation; own after: the global model of its width"
        " after the last one"
    )
    masks = "; own mask: what came, under a device's own mask, on its training samples" if len(seen) > _ALWAYS else ""
    return f"{table(head, cells)}\n{about}{masks}"


def _widths(point: Mapping[str, Any]) -> Mapping[str, float]:
    found: Mapping[str, float] = point.get("by_width", {})
    return found
