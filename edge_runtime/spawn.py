"""How to start a worker: its command line and its surroundings. Light enough for the agent."""

from __future__ import annotations

from wire.child import surroundings

__all__ = ["command", "surroundings"]


def command(
    source: str,
    *,
    engine: str = "",
    threads: int = 1,
    preload: bool = False,
    timings: str = "",
    limit: str = "",
    reserve: int = 0,
) -> list[str]:
    """Give what follows ``python -m``.

    Args:
        source: The device's data, a `Source` as JSON.
        engine: Which engine; empty for the best that is installed.
        threads: Cores that training may use.
        preload: Load the engine before the first order (a worker that is kept warm) rather than with it.
        timings: File for what workers find out about this device's speed; empty to find it out each time.
        limit: The operator's file with what an order may take (`edge_runtime.memory.limit`); empty for none.
        reserve: Bytes that must stay available to the rest of the machine; 0 to let orders run on as they were granted.
    """
    words = ["edge_runtime.worker_process", "--data", source, "--threads", str(threads)]
    if engine:
        words += ["--engine", engine]
    if timings:
        words += ["--timings", timings]
    if limit:
        words += ["--limit", limit]
    if reserve:
        words += ["--reserve", str(reserve)]
    return [*words, "--preload"] if preload else words
