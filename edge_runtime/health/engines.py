"""Questions about the engines: the native one trains a tiny model, and torch is looked at where it may be used."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

from edge_runtime.config import Config
from edge_runtime.health import software
from edge_runtime.health.finding import Finding, Machine

_SECONDS = 180.0
_TRIED = """
import json
import numpy
from edge_runtime.kernels import library
from edge_runtime.warm import warm
warm("native", 1)
found = library.open_library()
print(json.dumps({"numpy": numpy.__version__, "core": found.isa if found is not None else ""}))
"""


def native(config: Config, where: Machine) -> Finding | None:
    """Have a child train with the native engine, where that may be used."""
    if config.worker.engine == "torch":
        return None
    try:
        done = subprocess.run(
            [where.python, "-c", _TRIED],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        advice = "storage may be slow the first time: check again; python -m compileall writes what an import waits for"
        return Finding(
            "engine", fine=False, found=f"the native engine did not train within {_SECONDS:g} s", advice=advice
        )
    try:
        said = json.loads((done.stdout.splitlines() or [""])[-1]) if done.returncode == 0 else {}
        version, core = str(said["numpy"]), str(said["core"])
    except (ValueError, LookupError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        get = "pkg install python-numpy" if where.android else "pip install --force-reinstall numpy"
        found = f"the native engine ended with {done.returncode}: {last[:200]}"
        return Finding("engine", fine=False, found=found, advice=f"if numpy is broken: {get}")
    with_core = f"the compiled core for {core}" if core else "no compiled core"
    return Finding("engine", fine=True, found=f"native: numpy {version} and {with_core} train forward and back")


def torch(config: Config, where: Machine) -> Finding | None:
    """Look at torch, where it may be used; it may be missing or broken where the native engine does without."""
    if config.worker.engine == "native":
        return None
    found = software.engine(config, where)
    if config.worker.engine == "torch":
        return found
    if found.fine:
        return replace(found, what="torch")
    if found.found == software.MISSING:
        said = "not installed: the native engine trains; torch is for models with an op that it lacks"
        return Finding("torch", fine=True, found=said)
    said = f"{found.found}; the native engine trains without it, after one try in each life of the agent"
    return Finding("torch", fine=True, found=said, advice=f'write engine = "native" under [worker], or {found.advice}')
