"""Damaged bytes for every reader of bytes from outside: each gives a value or an error that says who is to blame.

  python -m tests fuzz --seconds 300                     all readers in turn, another seed every time
  python -m tests fuzz --seconds 60 --target blob        one of them (several times: several)
  python -m tests fuzz --target order --input FILE       once more what was found

Fails on any other exception, on more than a second for one input, on memory that grows by 64 MiB above where it began, and
on a process that dies. What failed is written to a file in the current folder, and the line that shows it again is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mmap
import os
import resource
import secrets
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tests.support.targets import Target, only, targets

SECONDS_MAX = 1.0
GROWTH_MAX = 64 << 20
ADDRESSES_MAX = 2 << 30
"""More address space than the process had when it began: beyond it an allocation fails instead of the machine."""
SLICE = 0.5
INPUT_MAX = 4 << 20
KEEP_MAX = 300
_HEAD = struct.Struct("<QII")  # inputs so far, target, length of the input in hand


class TooSlow(BaseException):
    """One input took too long. Not an `Exception`, so that no reader takes it for its own."""


@dataclass
class Score:
    """What became of one target.

    Attributes:
        inputs: How many were read.
        refused: How many of them ended in an expected error.
        seconds: Time in the reader and the mutations.
        slowest: Longest time of one input.
        finds: Distinct failures: where they happened, to what happened and with what.
    """

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    finds: dict[str, tuple[str, bytes]] = field(default_factory=dict)


def main(words: list[str]) -> int:
    """Run for a time, or show one input again."""
    parser = argparse.ArgumentParser("python -m tests fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="in all (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="of all damage (default: another one every time)")
    parser.add_argument("--target", action="append", default=[], help="only this one; may be given several times")
    parser.add_argument("--input", type=Path, help="read this file once with one target")
    options = parser.parse_args(words)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        known = targets(Path(folder), Random(seed))
        if unknown := set(options.target) - set(known):
            parser.error(f"no target {min(unknown)!r}; there are {', '.join(known)}")
        chosen = only(known, options.target)
        if options.input:
            return again(chosen, options.input.read_bytes())
        print(f"seed {seed}, {len(chosen)} targets, {options.seconds:g} s", flush=True)
        return guarded(chosen, seed, options.seconds)


def again(chosen: list[Target], data: bytes) -> int:
    """Read one input with its limits and show what happens."""
    code = 0
    with limits():
        for target in chosen:
            score = Score()
            attempt(target, data, score, base=peak())
            for what, _ in score.finds.values():
                print(f"{target.name}: {what}")
                code = 1
            if not score.finds:
                print(f"{target.name}: {'refused' if score.refused else 'read'} in {1000 * score.slowest:.1f} ms")
    return code


def guarded(chosen: list[Target], seed: int, seconds: float) -> int:
    """Fuzz in a child, so that one that hangs in C or dies leaves its input behind."""
    shared = mmap.mmap(-1, _HEAD.size + INPUT_MAX)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 2
        try:
            with limits():
                code = fuzz(chosen, seed, seconds, shared)
            sys.stdout.flush()
        except BaseException:  # whatever it is, the child must not go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)
    last, since, why = -1, time.monotonic(), ""
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            break
        (count, _, _) = _HEAD.unpack_from(shared)
        if count != last:
            last, since = count, time.monotonic()
        elif time.monotonic() - since > 20 * SECONDS_MAX and not why:
            why = "hangs"
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    (_, number, length) = _HEAD.unpack_from(shared)
    kept(chosen[number], why or f"dies of signal {os.WTERMSIG(status)}", shared[_HEAD.size : _HEAD.size + length])
    return 1


def fuzz(chosen: list[Target], seed: int, seconds: float, shared: mmap.mmap) -> int:
    """Go round the targets until the time is over; print a table and the finds."""
    scores = [Score() for _ in chosen]
    pools = [list(target.seeds) for target in chosen]
    base = peak()
    began, turn, count = time.monotonic(), 0, 0
    while (now := time.monotonic()) < began + seconds:
        number = turn % len(chosen)
        target, score, pool = chosen[number], scores[number], pools[number]
        rng = Random(f"{seed} {turn}")
        until = min(now + SLICE, began + seconds)
        while time.monotonic() < until:
            data = damaged(target, pool, rng)
            count += 1
            _HEAD.pack_into(shared, 0, count, number, len(data))
            shared[_HEAD.size : _HEAD.size + len(data)] = data
            read = score.inputs - score.refused
            base = attempt(target, data, score, base)
            if score.inputs - score.refused > read and rng.random() < 0.05 and len(data) < 1 << 16:
                grown(pool, len(target.seeds), data, rng)
        score.seconds += time.monotonic() - now
        turn += 1
        if turn % (4 * len(chosen)) == 0:
            base = max(base, peak())
    return shown(chosen, scores, time.monotonic() - began)


def damaged(target: Target, pool: list[bytes], rng: Random) -> bytes:
    """Make the next input."""
    data, other = rng.choice(pool), rng.choice(pool)
    if target.attacks and rng.random() < 0.1:
        data = rng.choice(target.attacks)
    return target.damage(data, other, rng)[:INPUT_MAX]


def grown(pool: list[bytes], seeds: int, data: bytes, rng: Random) -> None:
    """Keep an input that was read, to be damaged again, in place of an older one when there are many; seeds stay."""
    if len(pool) < seeds + KEEP_MAX:
        pool.append(data)
    else:
        pool[seeds + rng.randrange(KEEP_MAX)] = data


def attempt(target: Target, data: bytes, score: Score, base: int) -> int:
    """Read one input under the watch of clock and memory; gives the memory that the next one is compared with."""
    problem: BaseException | None = None
    began = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS_MAX)
    try:
        target.read(data)
    except target.expected:
        score.refused += 1
    except (Exception, TooSlow) as error:
        problem = error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    took = time.perf_counter() - began
    score.inputs += 1
    score.slowest = max(score.slowest, took)
    if problem is not None:
        where = traceback.extract_tb(problem.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno} {where.name}"
        _note(score, f"{type(problem).__name__} at {place}", str(problem)[:200], data)
    elif took > SECONDS_MAX:
        _note(score, "slow", f"took {took:.1f} s", data)
    more = peak() - base
    if more <= GROWTH_MAX:
        return base
    _note(score, "memory", f"memory grew to {more >> 20} MiB above where it began", data)
    return base + more


def _note(score: Score, place: str, what: str, data: bytes) -> None:
    score.finds.setdefault(place, (f"{place}: {what}", data))


def peak() -> int:
    """Give the most bytes of memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Bound the address space, let the alarm raise `TooSlow`, and let nothing be printed by numpy."""

    def alarm(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {SECONDS_MAX:g} s")

    old_alarm = signal.signal(signal.SIGALRM, alarm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESSES_MAX, hard))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, old_alarm)


def shown(chosen: list[Target], scores: list[Score], seconds: float) -> int:
    """Print what happened; 1 when something was found."""
    print(f"{'target':12s} {'inputs':>9s} {'inputs/s':>9s} {'read':>7s} {'slowest':>10s}  finds")
    for target, score in zip(chosen, scores, strict=True):
        rate, read = score.inputs / (score.seconds or 1), 1 - score.refused / (score.inputs or 1)
        print(
            f"{target.name:12s} {score.inputs:9,d} {rate:9,.0f} {read:7.1%} {1000 * score.slowest:7.1f} ms"
            f"  {len(score.finds)}"
        )
        for what, data in score.finds.values():
            kept(target, what, data)
    finds = sum(len(score.finds) for score in scores)
    total = sum(score.inputs for score in scores)
    print(f"{total:,} inputs in {seconds:.0f} s, peak memory {peak() >> 20} MiB: {finds or 'no'} finds")
    return int(finds > 0)


def kept(target: Target, what: str, data: bytes) -> None:
    """Write an input to the current folder and say how to see it again."""
    path = Path(f"fuzz-{target.name}-{hashlib.sha256(data).hexdigest()[:8]}.bin")
    path.write_bytes(data)
    print(f"  FOUND {target.name}: {what}\n  again: python -m tests fuzz --target {target.name} --input {path}")
