"""`edge-runtime check`: is this machine ready? One finding per question, each with what to do about it.

A question is a function of the configuration and of where to look (`Machine`), in the file of its subject, and a line in
`QUESTIONS`. One that breaks is an answer as well.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_runtime.config import Config, load
from edge_runtime.health import android, engines, machine, reach, software
from edge_runtime.health.conditions import conditions
from edge_runtime.health.finding import HERE, Finding, Machine
from wire.errors import ConfigError, NestlingError

__all__ = ["HERE", "QUESTIONS", "Finding", "Machine", "examine"]

QUESTIONS: tuple[Callable[[Config, Machine], Finding | None], ...] = (
    machine.clock,
    machine.disk,
    machine.memory,
    machine.group,
    machine.pages,
    conditions,
    software.packages,
    software.compression,
    reach.broker,
    reach.data,
    engines.native,
    engines.torch,
    software.kernels,
    android.phantom,
    android.api,
)
"""None as an answer: the question does not arise on this machine."""


def examine(path: Path, where: Machine = HERE) -> list[Finding]:
    """Ask everything; a question that breaks is an answer as well. Takes seconds: the engine is really run."""
    try:
        config = load(path)
    except ConfigError as error:
        return [Finding("configuration", fine=False, found=str(error), advice="mend the file and check again")]
    findings = [Finding("configuration", fine=True, found=str(path))]
    for question in QUESTIONS:
        try:
            found = question(config, where)
        except (NestlingError, OSError, ImportError) as error:
            found = Finding(question.__name__, fine=False, found=str(error))
        if found is not None:
            findings.append(found)
    return findings
