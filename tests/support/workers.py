"""A worker that tests start by its whole command line and hand orders through its door: another Python, another machine."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_runtime.spawn import surroundings
from wire.job import Done, Failed, Job, Progress, Ready, read_frame, write_frame


def orders(
    words: Sequence[str], jobs: Sequence[Job], out: Path, seconds: float, env: Mapping[str, str] | None = None
) -> list[Done]:
    """Start a worker, hand it one order after another, and let it end.

    Args:
        words: Its command line.
        jobs: What it is to do; the results of each go into a folder of its number in `out`.
        out: Where its standard error goes too, as `worker.log`.
        seconds: The longest that all of it may take.
        env: Its environment; default: this process's.

    Raises:
        AssertionError: It fails, takes too long, or does not end as it should; with the end of what it wrote.
    """
    log, said, done = out / "worker.log", [], []
    out.mkdir(parents=True)
    room = {**(os.environ if env is None else env), **surroundings()}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=room, cwd=out
        ) as worker,
    ):
        late = threading.Timer(seconds, worker.kill)
        late.start()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            said.append(read_frame(worker.stdout))
            for number, one in enumerate(jobs) if isinstance(said[0], Ready) else ():
                (out / str(number)).mkdir()
                write_frame(worker.stdin, dataclasses.replace(one, out=str(out / str(number))))
                while isinstance(frame := read_frame(worker.stdout), Progress):
                    pass
                said.append(frame)
                if not isinstance(frame, Done):
                    break
                done.append(frame)
            worker.stdin.close()
            code = worker.wait(60)
        finally:
            late.cancel()
            worker.kill()
    last = said[-1].detail if isinstance(said[-1], Failed) else said[-1]
    ends = f"it ended with {code}: {last}\n{log.read_text(errors='replace')[-2000:]}"
    assert code == 0, ends
    assert len(done) == len(jobs), ends
    return done
