"""What devices get for themselves: accuracy on their own test data, before and after aggregation.

Before aggregation that is about the model that a device has trained and keeps, after it about the global model at the
device's width. Every device that ever trained counts once, by its newest answer to an order to train, whoever was asked last
and whatever the last round was about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wire.messages import Order, Reply

PERSONAL = {
    "before": ("accuracy.after",),
    "after": ("accuracy.before",),
    "own": ("accuracy.ticket", "accuracy.own"),
    "density": ("density",),
}
"""What is told of devices' own models, and the metrics that say it. On their own test data: what they trained, before it is
aggregated (a worker's `accuracy.after` is after training), and the global model of their width after an aggregation, which a
device scores as it comes. On its training samples: what came, under a device's own mask, before training. And the share that
mask keeps."""

_IDLE = ("still", "score")
"""Rules of orders with the verb ``train`` by which no weight is trained."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A device's newest answer to an order to train.

    Attributes:
        reply: The answer.
        aggregated: Whether the model that it was sent had come of an aggregation, and not from the start of the run.
    """

    reply: Reply
    aggregated: bool


def trains(order: Order) -> bool:
    """Say whether a device that does this order has trained."""
    return order.verb == "train" and order.recipe.rule not in _IDLE


def summed_up(trained: Mapping[str, Trained], final: Mapping[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """Sum up all devices: each of `PERSONAL`, as `spread`. Memory: by devices.

    Args:
        trained: Device to its newest answer.
        final: Device to the accuracy of the model of the last aggregation, where somebody has measured that: in a simulation.
            None where nobody has: then ``after`` is about the models that came with devices' newest orders, which are
            as old as these, and about the devices alone whose newest order came after an aggregation.

    Returns:
        ``after`` has ``final`` beside the figures: whether it is about the last aggregation.
    """
    told = {what: [one for one in trained.values() if what != "after" or one.aggregated] for what in PERSONAL}
    values = {
        what: [one.reply.metrics[name] for one in told[what] for name in names if name in one.reply.metrics]
        for what, names in PERSONAL.items()
    }
    if final is not None:
        values["after"] = list(final.values())
    found: dict[str, dict[str, Any]] = {what: spread(line) for what, line in values.items()}
    found["after"]["final"] = final is not None
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Give mean and 10th percentile over devices, None without any, and how many these are."""
    if not values:
        return {"mean": None, "p10": None, "devices": 0}
    return {"mean": float(np.mean(values)), "p10": float(np.percentile(values, 10)), "devices": len(values)}


def text(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what `summed_up` gives, as one line with its end; empty where no device has told anything."""
    trained, aggregated, kept = facts["before"], facts["after"], facts["density"]
    parts = []
    if trained["devices"]:
        parts.append(f"{trained['mean']:.3f} as trained, before aggregation ({_devices(trained)})")
    if aggregated["devices"]:
        when = (
            "after the last aggregation"
            if aggregated["final"]
            else "after aggregation, as their newest orders brought it"
        )
        parts.append(f"{aggregated['mean']:.3f} by the global model of their width {when} ({_devices(aggregated)})")
    if kept["devices"]:
        parts.append(f"{_devices(kept)} with {kept['mean']:.3f} of the weights")
    return f"devices' own test data: {'; '.join(parts)}\n" if parts else ""


def _devices(figures: Mapping[str, Any]) -> str:
    return f"{figures['devices']} device{'' if figures['devices'] == 1 else 's'}"
