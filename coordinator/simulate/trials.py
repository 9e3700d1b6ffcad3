"""One run of a comparison: what decides it, and the file that its result is kept in.

A finished run is kept under the SHA-256 of everything that its figures follow from: the configuration, the model, the fleet's
file, the versions of numpy and torch, and the source of what runs. So a comparison that was interrupted goes on where it
stood, one that is repeated costs nothing, and a change of the source makes new runs. The samples themselves are not in it.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import coordinator
from coordinator.algorithms import ALGORITHMS
from coordinator.simulate import fleet
from coordinator.simulate.report import Result
from coordinator.simulate.world import Config
from wire import zoo
from wire.spec import digest

_ROOT = Path(coordinator.__file__).parent.parent
_REGISTRY = "coordinator.algorithms"
_DEVICE = ("*.py", "*.cpp", "*.h")


@dataclass(frozen=True, slots=True)
class Trial:
    """One run.

    Attributes:
        label: What the comparison calls it: the algorithm's name, or another one for other parameters.
        density: Fraction of the weights that it shall keep; None for a method that knows none.
        config: All of it.
    """

    label: str
    density: float | None
    config: Config

    @property
    def name(self) -> str:
        """Name it for people."""
        part = "" if self.density is None else f" at density {self.density:g}"
        return f"{self.label}{part}, seed {self.config.seed}"


@dataclass(frozen=True, slots=True)
class Failure:
    """A run that gave no result, and why."""

    why: str


def key(config: Config) -> str:
    """Name a run by all that decides it: SHA-256, hex.

    Raises:
        ConfigError: The model, the fleet or the algorithm is not there.
    """
    said = {
        "config": dataclasses.asdict(config),
        "model": digest(zoo.load(config.model)),
        "fleet": fleet.text_of(config.fleet),
        "versions": _versions(),
        "source": source_digest(config.algo),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=dict).encode()).hexdigest()


class Store:
    """A folder of finished runs."""

    def __init__(self, folder: Path) -> None:
        """Use a folder; it is made when the first run is kept."""
        self.folder = folder

    def path(self, config: Config) -> Path:
        """Say where a run's result is kept."""
        return self.folder / f"{key(config)}.json"

    def read(self, config: Config) -> Result | None:
        """Give the result of a run; None when it is not finished, or its file was damaged."""
        try:
            found: Any = json.loads(self.path(config).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return found["result"] if isinstance(found, dict) and "result" in found else None


def keep(path: Path, config: Config, result: Result) -> None:
    """Write a finished run; a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"config": dataclasses.asdict(config), "result": result}, default=dict), "utf-8")
    part.replace(path)


@cache
def source_digest(algo: str) -> str:
    """Name the source that a run of an algorithm follows from: SHA-256, hex.

    That is all of `wire` and `edge_runtime`, and of `coordinator` what a simulation and this algorithm import, one by way of
    the other; the registry, which only names the algorithms, is left out. So another algorithm's change makes no new runs.
    """
    device = [path for room in ("wire", "edge_runtime") for end in _DEVICE for path in (_ROOT / room).rglob(end)]
    found = hashlib.sha256()
    for path in sorted({*device, *_imported(["coordinator.simulate.run", ALGORITHMS.get(algo, "")])}):
        found.update(f"{path.relative_to(_ROOT)}\n".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _imported(modules: Iterable[str]) -> set[Path]:
    """Follow the imports of modules within `coordinator`."""
    left, files = list(modules), set[Path]()
    while left:
        name = left.pop()
        path = _file(name)
        if path is None or path in files or name == _REGISTRY:
            continue
        files.add(path)
        left += _imports(path)
    return files


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file(module: str) -> Path | None:
    if module.partition(".")[0] != "coordinator":
        return None
    base = _ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


@cache
def _versions() -> str:
    found = []
    for name in ("numpy", "torch"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
