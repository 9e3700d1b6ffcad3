"""A run's result as data (the one shape of `demo` and `simulate`), as text and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

from coordinator import personal
from coordinator.show import MIB, RoundView, RunView, device_rows, table
from coordinator.simulate.flops import flops
from wire.errors import ConfigError
from wire.spec import ModelSpec, Structure, tensor_shapes

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Final:
    """The end of a run, as only a simulation knows it.

    Attributes:
        structure: What is left of the model, which the last round may have changed.
        own: Device to the accuracy of the global model after the last aggregation, at its width and on its own test data.
    """

    structure: Structure
    own: Mapping[str, float] = field(default_factory=dict)


def result(
    view: RunView,
    spec: ModelSpec,
    *,
    data: str,
    partition: str,
    partition_digest: str,
    seconds: float,
    final: Final | None = None,
) -> Result:
    """Sum up a finished run in the shape of DESIGN section 6; what an abandoned round cost is counted with the others.

    Args:
        view: The run.
        spec: The model.
        data: What it learnt from.
        partition: How that was spread.
        partition_digest: Name of just this spreading.
        seconds: That the run really took.
        final: What is left of the model and what devices get of it; by default what the last round was about, and what devices
            said of the models that came to them.

    Operations are those of the orders as they were given: a device that went on with less of the model did fewer.
    """
    rounds = [view.rounds[n] for n in sorted(view.rounds) if view.rounds[n].outcome == "closed"]
    measured = [r for r in rounds if r.metrics]
    last = measured[-1].accuracy() if measured else {}
    curve, costs = _curve(view, spec)
    return {
        "algo": view.about.get("algo"),
        "model": view.about.get("model"),
        "data": data,
        "partition": partition,
        "partition_digest": partition_digest,
        "seed": view.about.get("seed"),
        "rounds": len(rounds),
        "seconds": round(seconds, 3),
        "seconds_virtual": round(costs["seconds_virtual"], 3),
        "accuracy": {
            "full": last[max(last)] if last else None,
            "by_width": {str(k): v for k, v in last.items()},
        },
        "personal": personal.summed_up(view.trained(), None if final is None else final.own),
        "bytes_up": costs["bytes_up"],
        "bytes_down": costs["bytes_down"],
        "flops": costs["flops"],
        "density_by_layer": densities(spec, _last_structure(rounds) if final is None else final.structure),
        "devices": _devices(view, spec),
        "curve": curve,
    }


def _curve(view: RunView, spec: ModelSpec) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Give what was reached and paid by the end of each closed round, and all that was paid; abandoned rounds cost as well.

    Bytes up are those of the updates; of a run over a real link, what that has counted. Bytes down are those of the blobs that
    devices had to fetch: their own links tell nobody.
    """
    curve: list[dict[str, Any]] = []
    costs: dict[str, Any] = {"seconds_virtual": 0.0, "bytes_up": 0, "bytes_down": 0, "flops": 0}
    for _, current in sorted(view.rounds.items()):
        costs["seconds_virtual"] += current.seconds
        costs["bytes_up"] += current.bytes_up if view.about.get("simulated") else current.bytes_heard
        costs["bytes_down"] += current.bytes_down
        costs["flops"] += sum(flops(spec, current.orders[d], r.samples) for d, r in current.replies.items())
        if current.outcome != "closed":
            continue
        accuracy = current.accuracy()
        curve.append(
            {
                "round": current.number,
                "accuracy": accuracy[max(accuracy)] if accuracy else None,
                "by_width": {str(k): v for k, v in accuracy.items()},
                "facts": current.facts,
                **costs,
                "seconds_virtual": round(costs["seconds_virtual"], 4),
            }
        )
    return curve, costs


def densities(spec: ModelSpec, structure: Structure) -> dict[str, float]:
    """Give the fraction of each tensor's weights that masks keep; 1 where there is no mask."""
    sizes = {name: prod(shape) for name, shape in tensor_shapes(spec, structure).items()}
    return {name: structure.kept.get(name, size) / size for name, size in sizes.items()}


def density(spec: ModelSpec, structure: Structure) -> float:
    """Give the fraction of all masked tensors' weights, within a width, that is kept; 1 when no tensor has a mask."""
    shapes = tensor_shapes(spec, structure)
    whole = sum(prod(shapes[name]) for name in structure.kept)
    return sum(structure.kept.values()) / whole if whole else 1.0


def _last_structure(rounds: Sequence[RoundView]) -> Structure:
    """Give what the last round was about; its widest width when devices trained several."""
    asked = [order.structures[0] for order in rounds[-1].orders.values()] if rounds else []
    return max(asked, key=lambda structure: structure.capacity, default=Structure())


def _devices(view: RunView, spec: ModelSpec) -> list[dict[str, str | int | float]]:
    """Sum up every device: its density is that of its order's masks, or of a mask of its own that it tells of.

    In a simulation nobody's memory is measured: the peak is the one that was predicted.
    """
    rows = device_rows(view)
    last = {name: order.structures[0] for r in view.rounds.values() for name, order in r.orders.items()}
    for row in rows:
        row["density"] = round(float(row["density"]) * density(spec, last[str(row["name"])]), 6)
        if view.about.get("simulated"):
            row["bytes_peak"] = row["bytes_predicted"]
    return rows


def text(facts: Result) -> str:
    """Lay a result out for people."""
    rows = [
        [
            str(d["name"]),
            str(d["part"]) if d["answered"] else "-",
            f"{d['bytes_budget'] / MIB:.1f}",
            f"{d['bytes_predicted'] / MIB:.1f}",
            f"{d['bytes_peak'] / MIB:.1f}",
            "-" if not d["answered"] else "yes" if d["bytes_peak"] <= d["bytes_budget"] else "NO",
            str(d["micro_batch"]),
            str(d["samples"]),
            f"{d['seconds']:.1f}",
        ]
        for d in facts["devices"]
    ]
    head = ["device", "width", "budget MiB", "predicted", "peak MiB", "within", "micro-batch", "samples", "seconds"]
    by_width = "  ".join(f"width {k}: {v:.4f}" for k, v in facts["accuracy"]["by_width"].items())
    full = facts["accuracy"]["full"]
    return (
        f"\n{facts['algo']} on {facts['data']} ({facts['partition']}), {facts['rounds']} rounds, {facts['seconds']:.1f} s\n"
        f"{table(head, rows)}\n"
        f"test accuracy: {by_width}\nfull width: {'-' if full is None else f'{full:.4f}'}\n"
        f"{personal.text(facts['personal'])}"
        f"down {facts['bytes_down'] / MIB:.1f} MiB, up {facts['bytes_up'] / MIB:.1f} MiB, {facts['flops'] / 1e9:.1f} GFLOP\n"
    )


def pyplot() -> Any:
    """Give what draws, without a screen.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install 'nestling[plot]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def drawable(path: Path) -> None:
    """See that a plot can be drawn as such a file: an empty one is, into memory.

    Raises:
        ConfigError: matplotlib is not installed, or draws no such files; the text says which it does.
    """
    plt = pyplot()
    figure = plt.figure()
    try:
        figure.savefig(BytesIO(), format=path.suffix[1:] or None)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"--plot {path}: {error}; a name that ends in .png will do") from error
    finally:
        plt.close(figure)


def plot(facts: Mapping[str, Any], path: Path) -> Path:
    """Draw accuracy by round for every width.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points = [entry for entry in facts["curve"] if entry["by_width"]]
    for width in points[-1]["by_width"] if points else ():
        xs = [p["round"] for p in points if width in p["by_width"]]
        axes.plot(
            xs, [p["by_width"][width] for p in points if width in p["by_width"]], marker=".", label=f"width {width}"
        )
    axes.set(xlabel="round", ylabel="global test accuracy", ylim=(0, 1), title=f"{facts['algo']} on {facts['data']}")
    axes.grid(alpha=0.3)
    if points:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
