"""The result of a comparison: summed up, as text and as a picture."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coordinator.show import MIB, table
from coordinator.simulate import compare_layers, compare_pairs, compare_widths
from coordinator.simulate.compare_widths import COSTS, accuracy, extent, median, median_cost, to_target, worst
from coordinator.simulate.report import Result, pyplot
from coordinator.simulate.trials import Failure, Trial
from wire.errors import ConfigError

Found = Sequence[tuple[Trial, Result | Failure]]


def target_of(text: str, labels: Sequence[str]) -> tuple[float, str]:
    """Read a target: an accuracy (``0.9``), or a share of what a method reaches (``0.95*fedavg``).

    Returns:
        The number, and the method's label or nothing.

    Raises:
        ConfigError: It is neither.
    """
    match = re.fullmatch(r"(\d*\.?\d+)(?:\*(.+))?", text)
    if match is None or not 0.0 < float(match[1]) <= 1.0 or (match[2] or "") not in ("", *labels):
        raise ConfigError(
            f"--target {text}: write an accuracy such as 0.9, or a share of a method's such as 0.95*fedavg"
        )
    return float(match[1]), match[2] or ""


def summed_up(found: Found, target: str, tried: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Give ``{"runs", "summary", "configurations"}``.

    A run has the shape of `report.result` with ``label``, ``density`` and ``params`` beside it; of its devices only the one
    with the highest peak is in it, of its curve only the rounds that were measured. One that failed has ``error`` instead.
    ``configurations`` is `tried`: how many each method chose from, by label; empty where nothing was chosen.
    """
    share, reference = target_of(target, [trial.label for trial, _ in found])
    targets = _targets(found, share, reference)
    runs = []
    for trial, one in found:
        about = {"label": trial.label, "density": trial.density, "params": dict(trial.config.params)}
        if isinstance(one, Failure):
            runs.append({**about, "algo": trial.config.algo, "seed": trial.config.seed, "error": one.why})
            continue
        seed = trial.config.seed
        wanted = targets.get((seed, trial.density), targets.get((seed, None))) if reference else share
        curve = [point for point in one["curve"] if point["accuracy"] is not None]
        peak = sorted(one["devices"], key=lambda device: device["bytes_peak"])[-1:]
        thin = {**one, "devices": peak, "curve": curve, "target": wanted, "to_target": to_target(curve, wanted)}
        runs.append({**about, **thin, "to_target_worst": to_target(curve, wanted, worst)})
    rows = [_row(group) for group in _groups(runs)]
    compare_pairs.judge(rows, runs)
    return {"runs": runs, "summary": rows, "configurations": dict(tried or {})}


def _targets(found: Found, share: float, reference: str) -> dict[tuple[int, float | None], float]:
    """Give a share of what the method `reference` reaches, by seed and density; None is for runs without a density.

    Such runs are held against its best density, and all runs against a reference that has none itself.
    """
    targets: dict[tuple[int, float | None], float] = {}
    for trial, one in found:
        if trial.label == reference and not isinstance(one, Failure) and one["accuracy"]["full"] is not None:
            reached = share * one["accuracy"]["full"]
            for density in {trial.density, None}:
                place = trial.config.seed, density
                targets[place] = max(reached, targets.get(place, 0.0))
    return targets


def _groups(runs: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["label"], run["density"]), []).append(run)
    return list(groups.values())


def _row(group: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sum up the runs of one method at one density."""
    good = [run for run in group if "error" not in run]
    accuracies = [run["accuracy"]["full"] for run in good if run["accuracy"]["full"] is not None]
    reached = [run.get("to_target") for run in group]
    peaks = [device["bytes_peak"] for run in good for device in run["devices"]]
    return {
        "label": group[0]["label"],
        "algo": group[0]["algo"],
        "density": group[0]["density"],
        "params": group[0]["params"],
        "runs": len(group),
        "failed": len(group) - len(good),
        "error": next((run["error"] for run in group if "error" in run), ""),
        "accuracy": extent(accuracies),
        **{name: median([run[name] for run in good]) for name in COSTS[1:]},
        "target": median([run["target"] for run in good if run["target"] is not None]),
        "reached": sum(one is not None for one in reached),
        "to_target": median_cost(reached),
        **compare_widths.summed_up(good, failed=len(group) - len(good)),
        "bytes_peak": max(peaks, default=None),
        "density_by_layer": compare_layers.masked(good),
    }


def text(facts: Mapping[str, Any]) -> str:
    """Lay a comparison out for people: a line for each method and density, best accuracy of a density first."""
    head = ["method", "density", "accuracy", "from", "to", "behind", "tied", "virtual s", "down MB", "up MB", "GFLOP"]
    head += ["peak MiB", "target", "reached", "in round", "in s", "in MB", "in GFLOP"]
    rows = sorted(facts["summary"], key=lambda r: (-(r["density"] or 2.0), -(r["accuracy"]["median"] or 0.0)))
    lines = [table(head, [_cells(row) for row in rows])]
    lines += [more for part in (compare_widths, compare_pairs, compare_layers) if (more := part.text(rows, _number))]
    lines += [
        f"{row['label']}: {row['failed']} of {row['runs']} runs FAILED: {_last_line(row)}"
        for row in rows
        if row["error"]
    ]
    tried = facts.get("configurations", {})
    if tried:
        counts = ", ".join(f"{label} {count}" for label, count in tried.items())
        lines.append(f"configurations tried: {'UNEQUAL: ' if len(set(tried.values())) > 1 else ''}{counts}")
    lines.append("peaks of memory are those that the planner predicts; no virtual device's memory is measured")
    return "\n".join(lines)


def _last_line(row: Mapping[str, Any]) -> str:
    return str(row["error"]).strip().splitlines()[-1]


def _cells(row: Mapping[str, Any]) -> list[str]:
    accuracy, behind, cost = row["accuracy"], row["behind_best"], row["to_target"]
    moved = None if cost["bytes_up"] is None else cost["bytes_up"] + cost["bytes_down"]
    return [
        row["label"],
        "-" if row["density"] is None else f"{row['density']:g}",
        *(_number(accuracy[name], "{:.4f}") for name in ("median", "least", "most")),
        "-" if behind is None else f"{behind['mean']:.4f}",
        "-" if behind is None else "yes" if behind["tied"] else "no",
        _number(row["seconds_virtual"]),
        _number(row["bytes_down"], "", 1e6),
        _number(row["bytes_up"], "", 1e6),
        _number(row["flops"], "", 1e9),
        _number(row["bytes_peak"], "", MIB),
        _number(row["target"], "{:.4f}"),
        f"{row['reached']}/{row['runs']}",
        _number(cost["round"], "{:.0f}"),
        _number(cost["seconds_virtual"]),
        _number(moved, "", 1e6),
        _number(cost["flops"], "", 1e9),
    ]


def _number(value: float | None, form: str = "", unit: float = 1.0) -> str:
    """Write a figure; without a form, with three digits at least."""
    if value is None:
        return "-"
    scaled = value / unit
    return form.format(scaled) if form else f"{scaled:.0f}" if scaled >= 100 else f"{scaled:#.3g}"


_AXES: tuple[tuple[str, Callable[[Mapping[str, Any]], float]], ...] = (
    ("virtual time, s", lambda p: float(p["seconds_virtual"])),
    ("bytes, both ways, MB", lambda p: (p["bytes_up"] + p["bytes_down"]) / 1e6),
    ("operations, GFLOP", lambda p: p["flops"] / 1e9),
)


def plot(facts: Mapping[str, Any], path: Path) -> Path:
    """Draw accuracy against virtual time, bytes and operations, a line of plots for each density: medians over the seeds.

    Where there are widths, a line more: the worst width against virtual time and bytes, and every width at the end. The last
    line has the density of every masked layer at the end, where there are any, and the peaks of memory.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = pyplot()
    groups = [good for group in _groups(facts["runs"]) if (good := [run for run in group if "error" not in run])]
    densities = sorted({group[0]["density"] for group in groups if group[0]["density"] is not None}, reverse=True)
    labels = list(dict.fromkeys(group[0]["label"] for group in groups))
    colours = {label: plt.get_cmap("tab20")(place % 20) for place, label in enumerate(labels)}
    nested = [group for group in groups if all(worst(run["accuracy"]) is not None for run in group)]
    rows = densities or [None]
    lines = len(rows) + bool(nested) + 1
    grid = {"figsize": (15, 4 * lines + 0.6), "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(lines, len(_AXES), **grid)
    for line, density in zip(axes, rows, strict=False):
        for axis, (name, cost) in zip(line, _AXES, strict=True):
            for group in groups:
                if group[0]["density"] in (density, None):
                    points = _median_curve(group, cost, accuracy)
                    axis.plot(*points, label=group[0]["label"], color=colours[group[0]["label"]], linewidth=1.2)
            axis.set(xlabel=name, ylabel="test accuracy", xscale="log")
            axis.set_title("" if density is None else f"density {density:g}", fontsize=9)
            axis.grid(alpha=0.3)
    if nested:
        _widths(axes[-2], nested, colours)
    compare_layers.draw(figure, axes[-1], groups, colours)
    figure.legend(*_legend(axes[:-1], labels), loc="outside lower center", ncols=min(len(labels), 7), fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _widths(line: Any, groups: Sequence[Sequence[Mapping[str, Any]]], colours: Mapping[str, Any]) -> None:
    """Draw the worst width against two costs, and all widths at the end."""
    for axis, (name, cost) in zip(line, _AXES[:2], strict=False):
        axis.set(xlabel=name, ylabel="test accuracy of the worst width", xscale="log")
        for group in groups:
            axis.plot(*_median_curve(group, cost, worst), color=colours[group[0]["label"]], linewidth=1.2)
    line[-1].set(xlabel="width, from the narrowest on", ylabel="test accuracy")
    for group in groups:
        ends = compare_widths.summed_up(group)["by_width"]
        line[-1].plot([int(width) for width in ends], ends.values(), color=colours[group[0]["label"]], marker=".")
    for axis in line:
        axis.grid(alpha=0.3)


def _legend(axes: Any, labels: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Name each method once, whichever plot it is in."""
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    known = [label for label in labels if label in lines]
    return [lines[label] for label in known], known


def _median_curve(
    group: Sequence[Mapping[str, Any]],
    cost: Callable[[Mapping[str, Any]], float],
    measure: Callable[[Mapping[str, Any]], float | None],
) -> tuple[list[float], list[float]]:
    """Give cost and accuracy, the medians over the seeds, of every round that all of them measured."""
    curves = [
        {p["round"]: (cost(p), value) for p in run["curve"] if (value := measure(p)) is not None} for run in group
    ]
    rounds = sorted(set.intersection(*(set(curve) for curve in curves)))
    across = [[curve[number] for curve in curves] for number in rounds]
    costs, values = ([statistics.median(pair[place] for pair in pairs) for pairs in across] for place in (0, 1))
    return costs, values
