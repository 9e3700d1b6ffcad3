"""Workers for measuring that are copies of one that is ready: a fifth of the time that a fresh one takes to be.

A copy has the same memory as its origin but for one thing: the kernel does not copy which pages of files are resident. These
are looked up in the origin once and touched in every copy, before its base is taken. OpenBLAS, which numpy brings, gives its
pages back at a fork: a matrix product brings them in again. `tests.bench.memory` measures a few
orders both ways and prints by how much they differ.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from edge_runtime import worker
from edge_runtime.data import Source, load
from edge_runtime.memory.guard import Gauge, settle_allocator
from edge_runtime.spawn import surroundings
from edge_runtime.warm import warm
from wire.job import Done, Job
from wire.schema import from_plain, to_plain

_POPULATE_READ = 22
"""madvise: bring pages in as reading them would (Linux 5.14)."""

_ENTRY = 8
_PRESENT = 63


class Forked:
    """The origin, that copies itself for every case; use it as a context manager."""

    def __init__(self, engine: str = "torch") -> None:
        self.engine = engine

    def __enter__(self) -> Self:
        words = [sys.executable, "-m", "tests.bench._forked", self.engine]
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **surroundings()}
        )
        self._ask("")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def peaks(self, source: Mapping[str, Any], jobs: Sequence[Job]) -> list[int]:
        """Have a fresh copy do jobs one after the other, each going on from the state before; give their peaks above base."""
        told = self._ask(json.dumps({"source": source, "jobs": [to_plain(job) for job in jobs]}))
        assert "peaks" in told, told
        return [int(peak) for peak in told["peaks"]]

    def _ask(self, text: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return dict(json.loads(self._process.stdout.readline() or '{"died": true}'))


def _perform(asked: dict[str, Any]) -> dict[str, Any]:
    data = load(from_plain(Source, asked["source"], strict=True))
    np.matmul(np.zeros((32, 1024), np.float32), np.zeros((1024, 256), np.float32))
    gauge, peaks, keep = Gauge(), [], ""
    for plain in asked["jobs"]:
        job = dataclasses.replace(from_plain(Job, plain), keep=keep)
        answer = worker.perform(job, data, lambda _: None, engine=sys.argv[1], process=worker.Process(gauge))
        if not isinstance(answer, Done):
            return {"failed": str(answer)}
        peaks.append(answer.usage.bytes_peak)
        keep = answer.keep
    return {"peaks": peaks}


def _copy(asked: dict[str, Any], runs: Sequence[tuple[int, int]]) -> str:
    """Fork, do the jobs in the copy, and give what it writes."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            advise = ctypes.CDLL(None).madvise
            for start, length in runs:
                advise(ctypes.c_void_p(start), ctypes.c_size_t(length), _POPULATE_READ)
            os.write(theirs, json.dumps(_perform(asked)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    return said or '{"died": true}'


def _resident() -> list[tuple[int, int]]:
    """Give the starts and lengths of what is resident of this process's mapped files."""
    page, runs = mmap.PAGESIZE, []
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for line in Path("/proc/self/maps").read_text().splitlines():
            words = line.split(None, 5)
            if len(words) < 6 or not words[5].startswith("/"):
                continue
            start, end = (int(word, 16) for word in words[0].split("-"))
            pages.seek(start // page * _ENTRY)
            entries = memoryview(pages.read((end - start) // page * _ENTRY)).cast("Q")
            for place, entry in enumerate(entries):
                if entry >> _PRESENT:
                    runs.append((start + place * page, page))
    return _joined(runs)


def _joined(runs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, length in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def main() -> None:
    """Be the origin: a line of JSON in, a line out; an empty line asks whether it is ready."""
    settle_allocator()
    warm(sys.argv[1], 1, None)
    runs = _resident()
    for line in sys.stdin:
        print(_copy(json.loads(line), runs) if line.strip() else "{}", flush=True)


if __name__ == "__main__":
    main()
