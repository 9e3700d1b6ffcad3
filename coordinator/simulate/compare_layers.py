"""What a comparison says of what devices hold: the density of every masked layer at the end, and the peak of memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

from coordinator.show import MIB, table

SHOWN = 12
"""Layers that have a column of their own; of more, only the least and the most dense one are shown."""

_PREFIX, _SUFFIX = "density.", ".weight"

Run = Mapping[str, Any]


def masked(runs: Sequence[Run]) -> dict[str, float]:
    """Give the density at the end of every tensor that has a mask in any of these runs: the median over those that say it.

    Args:
        runs: Of one method, those that gave a result. A tensor has a mask where a part of it is missing, or where what was
            told of the last round that was measured (`coordinator.facts`) names it.

    Returns:
        By tensor, in the order of the model; empty where nothing is masked.
    """
    found = [run.get("density_by_layer", {}) for run in runs]
    named = {name for run in runs for point in run["curve"][-1:] for name in point.get("facts", {})}
    every = dict.fromkeys(name for one in found for name in one)
    held = {name: statistics.median(one[name] for one in found if name in one) for name in every}
    return {
        name: d for name, d in held.items() if _PREFIX + name in named or any(one.get(name, 1.0) < 1.0 for one in found)
    }


def text(rows: Sequence[Mapping[str, Any]], number: Callable[..., str]) -> str:
    """Lay the densities out for people, a line for each method that has masks; empty when none has.

    Args:
        rows: Of the summary, in their order.
        number: Writes a figure.
    """
    told = [row for row in rows if row["density_by_layer"]]
    layers = list(dict.fromkeys(name for row in told for name in row["density_by_layer"]))
    if not layers:
        return ""
    few = len(layers) <= SHOWN
    head = ["method", "density", *(map(_short, layers) if few else ("least", "in", "median", "most", "in"))]
    cells = []
    for row in told:
        found = row["density_by_layer"]
        figures = [number(found.get(name), "{:.4f}") for name in layers] if few else _ends(found, number)
        cells.append([row["label"], "-" if row["density"] is None else f"{row['density']:g}", *figures])
    more = "" if few else f"; of {len(layers)} layers the least dense, their median and the most dense"
    return f"{table(head, cells)}\ndensity of each layer at the end, medians over the seeds{more}"


def _ends(found: Mapping[str, float], number: Callable[..., str]) -> list[str]:
    least, most = (choose(found, key=found.__getitem__) for choose in (min, max))
    middle = number(statistics.median(found.values()), "{:.4f}")
    return [number(found[least], "{:.4f}"), _short(least), middle, number(found[most], "{:.4f}"), _short(most)]


def _short(name: str) -> str:
    return name.removesuffix(_SUFFIX)


def draw(figure: Any, line: Any, groups: Sequence[Sequence[Run]], colours: Mapping[str, Any]) -> None:
    """Draw the densities by layer and the peaks of memory in place of a line of empty plots.

    Args:
        figure: Where.
        line: The plots.
        groups: Of each method at each density the runs that gave a result.
        colours: By method.
    """
    grid = line[0].get_subplotspec().get_gridspec()
    for axis in line:
        axis.remove()
    held = [(group, found) for group in groups if (found := masked(group))]
    if held:
        _layers(figure.add_subplot(grid[-1, :-1]), held, colours)
    _memory(figure.add_subplot(grid[-1, -1 if held else slice(None)]), groups, colours)


def _layers(axis: Any, held: Sequence[tuple[Sequence[Run], Mapping[str, float]]], colours: Mapping[str, Any]) -> None:
    """Draw a dot for each layer of each method, those of one layer side by side."""
    layers = list(dict.fromkeys(name for _, found in held for name in found))
    for place, (group, found) in enumerate(held):
        aside = 0.7 * ((place + 0.5) / len(held) - 0.5)
        places = [layers.index(name) + aside for name in found]
        axis.plot(places, list(found.values()), ".", color=colours[group[0]["label"]])
    step = ceil(len(layers) / SHOWN)
    axis.set_xticks(range(0, len(layers), step), map(_short, layers[::step]), rotation=20, ha="right", fontsize=8)
    least = min((d for _, found in held for d in found.values() if d > 0.0), default=1.0)
    axis.set(ylabel="density of the layer at the end", yscale="log", ylim=(least / 2, 1.5))
    axis.grid(alpha=0.3)


def _memory(axis: Any, groups: Sequence[Sequence[Run]], colours: Mapping[str, Any]) -> None:
    """Draw a bar for each method at each density: the highest peak of all its runs."""
    peaks = [max((d["bytes_peak"] for run in group for d in run["devices"]), default=0) / MIB for group in groups]
    axis.bar(range(len(groups)), peaks, color=[colours[group[0]["label"]] for group in groups])
    names = ["" if group[0]["density"] is None else f"{group[0]['density']:g}" for group in groups]
    axis.set_xticks(range(len(groups)), names, rotation=60, fontsize=7)
    axis.set(xlabel="each method, at its density", ylabel="predicted peak of memory, MiB")
    axis.grid(alpha=0.3, axis="y")
