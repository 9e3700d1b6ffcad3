"""Algorithms by name: one file each, and one line here. None is imported before it is asked for."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

from coordinator.algorithm import Algorithm, State
from wire.errors import ConfigError

ALGORITHMS: dict[str, str] = {
    "dpf": "coordinator.algorithms.dpf",
    "fedavg": "coordinator.algorithms.fedavg",
    "feddip": "coordinator.algorithms.feddip",
    "nestfl": "coordinator.algorithms.nestfl",
    "prunefl": "coordinator.algorithms.prunefl",
    "online": "coordinator.algorithms.online",
    "prunetrain": "coordinator.algorithms.prunetrain",
    "lotteryfl": "coordinator.algorithms.lotteryfl",
    "snip": "coordinator.algorithms.snip",
    "synflow": "coordinator.algorithms.synflow",
    "iterative": "coordinator.algorithms.iterative",
    "fixed": "coordinator.algorithms.fixed",
    "taper": "coordinator.algorithms.taper",
    "heterofl": "coordinator.algorithms.heterofl",
    "fjord": "coordinator.algorithms.fjord",
    "fedmp": "coordinator.algorithms.fedmp",
    "flexcom": "coordinator.algorithms.flexcom",
    "hermes": "coordinator.algorithms.hermes",
    "fedprox": "coordinator.algorithms.fedprox",
    "perfedavg": "coordinator.algorithms.perfedavg",
    "fiarse": "coordinator.algorithms.fiarse",
    "fledge": "coordinator.algorithms.fledge",
    "fedrolex": "coordinator.algorithms.fedrolex",
}
"""Name to module."""


def by_name(name: str) -> Algorithm:
    """Load an algorithm.

    Raises:
        ConfigError: There is none of that name.
    """
    return cast("Algorithm", _module(name))


def wanted_by(name: str) -> Callable[[State], tuple[str, ...]] | None:
    """Give an algorithm's ``wanted`` (see `coordinator.algorithm.Algorithm`); None for most, who ask whoever was drawn."""
    return getattr(_module(name), "wanted", None)


def describe() -> dict[str, dict[str, Any]]:
    """Say of every algorithm what it is.

    Returns:
        Name to ``summary`` (one line), ``text`` (what its module says about it) and ``params`` (name to default).
    """
    return {name: _facts(_module(name)) for name in ALGORITHMS}


def _module(name: str) -> Any:
    if name not in ALGORITHMS:
        raise ConfigError(f"algorithm {name!r}: there are {', '.join(ALGORITHMS)}")
    return importlib.import_module(ALGORITHMS[name])


def _facts(module: Any) -> dict[str, Any]:
    summary, _, text = (inspect.getdoc(module) or "").partition("\n")
    return {"summary": summary, "text": text.strip(), "params": dict(module.PARAMS), **dataclasses.asdict(module.ABOUT)}
