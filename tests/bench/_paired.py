"""Times of candidates that take turns in one process, so that whatever else the machine does, it does to all of them."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping

Call = Callable[[], object]
Times = Mapping[str, list[float]]

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def keep_memory() -> None:
    """Let the C library keep what is freed: a dense gradient of 26 MB would else be mapped and faulted anew each time."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    except (AttributeError, OSError):
        return  # another C library


def take_turns(
    calls: Mapping[str, Call], rounds: int, least: float, clock: Callable[[], float] = time.thread_time
) -> Times:
    """Time every candidate once per round.

    Args:
        calls: Name to what is called. Each is called twice before anything is written down.
        rounds: How often each has its turn.
        least: Seconds that a turn lasts at least; short calls are repeated within it.
        clock: Thread CPU time, unless candidates have threads of their own.

    Returns:
        Name to seconds per call, one entry per round.
    """
    repeats, times = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        begin = clock()
        call()
        repeats[name] = max(1, min(5000, math.ceil(least / max(clock() - begin, 1e-7))))
    for _ in range(rounds):
        for name, call in calls.items():
            count = repeats[name]
            begin = clock()
            for _ in range(count):
                call()
            times[name].append((clock() - begin) / count)
    return times


def faster(times: Times, name: str, other: str) -> float:
    """Give how many times faster `name` is than `other`: the median over rounds of the ratio within a round."""
    return statistics.median(b / a for a, b in zip(times[name], times[other], strict=True))
