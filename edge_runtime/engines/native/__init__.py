"""The native engine: numpy and the compiled core, no torch and no autograd.

Every op has its backward pass written by hand over arrays that were made beforehand: one arena, laid out by
`wire.native.plan`, so that what a step takes is known to the byte before it runs. What it lacks is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from edge_runtime.engines import Make


def create(threads: int, timings: Path | None = None) -> Make:
    """Give a function that makes empty engines; see `edge_runtime.engines.open_engine`.

    How many threads matrix products use is told to their library by the environment of the process.
    """
    from edge_runtime.engines.native.dense import NATIVE
    from edge_runtime.engines.native.engine import NativeEngine
    from edge_runtime.engines.ways import Tools

    tools = Tools(NATIVE, threads, timings)
    return lambda: NativeEngine(tools)
