"""Dense or sparse, and in which layout: what is faster is found by timing the real shape on this device, and remembered.

A way is a name: ``dense``, or one of the layouts that a `Kit` knows. What each way took is kept as a `Timing`, which also
tells the planner and PruneFL what a layer costs here. Timings outlive the process where there is a file for them; a file
that is missing, broken or from another machine costs nothing but the timing.

Candidates meet in pairs, alternating, and never more than two at a time are in memory. Nothing here knows an engine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.kernels import Stretch
from edge_runtime.kernels import compile as source
from wire.errors import BudgetExceeded, DeviceError, SpecError

Trial = Callable[[], object]
"""One training step of a layer or a model."""

DENSE = "dense"
SECONDS = 0.2
"""What the timing of one layer may take, softly: what has begun is ended, and every way that has a chance runs twice. Once
it is over, the ways that are left are not tried, but at least `LEAST` are."""

LEAST = 3
HOPELESS = 4.0
"""A way whose first run takes so many times the best's is not run again."""

TIE = 1.08
"""A layout that takes at most so many times the fastest's seconds is taken if it comes earlier: timing hardly tells finer, and
the earlier ways of a kit have the smaller indices, a byte less per kept weight of a matrix."""

ROUNDS = 7
ENTRIES = 512
BYTES_FILE = 1 << 20
FORMAT = 1
_CPU = Path("/proc/cpuinfo")
_CPU_KEYS = ("model name", "Hardware", "Model", "CPU part")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Layer:
    """A masked layer, as far as its speed goes.

    Attributes:
        op: ``linear`` or ``conv2d``.
        shape: Of the dense weight.
        input_shape: Of one sample.
        details: Stride and padding of a convolution.
        kept: Weights that are kept.
        batch: Samples per step.
        input_gradient: Whether the layer before needs a gradient; the first of a model has none before it.
    """

    op: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    details: tuple[int, ...]
    kept: int
    batch: int
    input_gradient: bool = True

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.kept / max(1, math.prod(self.shape))

    @property
    def key(self) -> str:
        """Name all layers whose speeds are taken to be the same: density to a fifth, batch to a panel."""
        parts = [_times(self.shape), _times(self.input_shape), _times(self.details)]
        place = "inner" if self.input_gradient else "first"
        return " ".join([self.op, place, *parts, f"d{_bucket(self.density)}", f"b{_round(self.batch)}"])


@dataclass(frozen=True, slots=True)
class Timing:
    """What one training step of a layer takes on this device: forward, both gradients and the update.

    Attributes:
        layer: The layer that was timed; others with its key take the same.
        seconds: By way.
        threads: Cores that were used.
    """

    layer: Layer
    seconds: Mapping[str, float]
    threads: int = 1

    @property
    def sparse(self) -> str:
        """The fastest layout, or the first of those that are as good as that: it takes less memory. Empty: there is none."""
        ways = {way: seconds for way, seconds in self.seconds.items() if way != DENSE}
        limit = TIE * min(ways.values(), default=0.0)
        return next((way for way, seconds in ways.items() if seconds <= limit), "")

    @property
    def gain(self) -> float:
        """Seconds per step that dense is faster than the fastest layout; negative where sparse wins."""
        if DENSE not in self.seconds:
            return -math.inf
        return self.seconds.get(self.sparse, math.inf) - self.seconds[DENSE]


class Chooser:
    """Times ways and remembers what they took.

    Args:
        machine: Names everything that speeds depend on but the layer (see `machine`); with it all keys begin.
        path: Where timings are kept; None for this process only.
        threads: Cores in use. With one, its own time is counted and not what others take from it.
        clock: Seconds; for tests.
    """

    def __init__(
        self, machine: str = "", path: Path | None = None, threads: int = 1, clock: Callable[[], float] | None = None
    ) -> None:
        self._prefix = f"{machine} t{threads} "
        self._path = path
        self._threads = threads
        self._clock = clock or (time.thread_time if threads == 1 else time.perf_counter)
        self._entries = _read(path) if path is not None else {}

    def timing(self, layer: Layer, makers: Mapping[str, Callable[[], Trial]]) -> Timing:
        """Give what each way takes; those that nobody has timed here are timed.

        Args:
            layer: What is timed.
            makers: Way to a function that makes ready and gives the trial, or raises `SpecError` or `DeviceError` where its
                way does not suit: it has no seconds then. Only two trials are held at a time.

        Cost: nothing if known, otherwise about `SECONDS`.
        """
        known = self._found(layer.key, makers, layer)
        return Timing(layer, {way: known[way] for way in makers if way in known}, self._threads)

    def fastest(self, key: str, makers: Mapping[str, Callable[[], Trial]]) -> str:
        """Name the fastest way to do a whole step, of which layers' own times say too little; the first if none can.

        Args:
            key: Names model, densities and batch.
            makers: As in `timing`.
        """
        known = self._found(key, makers, None)
        return min((way for way in makers if way in known), key=known.__getitem__, default=next(iter(makers)))

    def timings(self) -> tuple[Timing, ...]:
        """Give all layers' timings of this machine and thread count, oldest first."""
        found = []
        for key, entry in self._entries.items():
            layer = _layer(entry)
            if key.startswith(self._prefix) and layer is not None:
                found.append(Timing(layer, dict(entry["seconds"]), self._threads))
        return tuple(found)

    def _found(self, key: str, makers: Mapping[str, Callable[[], Trial]], layer: Layer | None) -> dict[str, float]:
        entry = self._entries.get(self._prefix + key, {"seconds": {}, "asked": []})
        known = dict(entry["seconds"])
        # If none of them has seconds they are all asked again: some may only have been left out for the sake of others.
        asked = () if known.keys().isdisjoint(makers) else entry["asked"]
        missing = {way: make for way, make in makers.items() if way not in asked}
        if missing:
            known |= self._tournament(missing)
            known = self._remember(key, known, sorted({*makers, *entry["asked"]}), layer)
        return known

    def _tournament(self, makers: Mapping[str, Callable[[], Trial]]) -> dict[str, float]:
        """Let the best so far meet each other way; a way's seconds are its median against the best of its time."""
        seconds: dict[str, float] = {}
        share = SECONDS / max(1, len(makers) - 1)
        best, champion = "", cast("Trial | None", None)
        begun = self._clock()
        for way, make in makers.items():
            if len(seconds) >= LEAST and self._clock() - begun > SECONDS:
                break
            if (trial := _tried(way, make)) is None:
                continue
            met = _tried(way, partial(self._paired, trial, champion, share)) if champion is not None else None
            if met is not None:
                seconds[best], seconds[way] = min(seconds.get(best, math.inf), met[1]), met[0]
                if met[0] < met[1]:
                    best, champion = way, trial
            elif not champion or not (best in seconds or _tried(best, partial(self._paired, champion, champion, 0.0))):
                best, champion = way, trial  # the first of all may be the one that failed
            del trial
        if champion and best not in seconds and (met := _tried(best, partial(self._paired, champion, champion, share))):
            seconds[best] = met[0]
        return seconds

    def _paired(self, one: Trial, other: Trial, limit: float) -> tuple[float, float]:
        """Run both in turns, warm, and give their medians."""
        begun = self._clock()
        other()
        middle = self._clock()
        one()
        first = self._clock() - middle
        if first > HOPELESS * (middle - begun):
            return first, middle - begun
        took: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for trial, times in ((one, took[0]), (other, took[1])):
                start = self._clock()
                trial()
                times.append(self._clock() - start)
            if self._clock() - begun > limit:
                break
        sorts, count = np.sort(took), len(took[0])  # np.median would load the whole of numpy.ma
        medians = sorts[:, (count - 1) // 2 : count // 2 + 1].mean(axis=1)
        return float(medians[0]), float(medians[1])

    def _remember(
        self, key: str, seconds: Mapping[str, float], asked: list[str], layer: Layer | None
    ) -> dict[str, float]:
        """Keep an entry and give its seconds, as they are kept."""
        rounded = {way: float(f"{took:.4g}") for way, took in seconds.items()}
        entry: dict[str, Any] = {"seconds": rounded, "asked": asked}
        if layer is not None:
            entry["layer"] = {name: getattr(layer, name) for name in Layer.__slots__}
        self._entries.pop(self._prefix + key, None)
        self._entries[self._prefix + key] = entry
        while len(self._entries) > ENTRIES:
            del self._entries[next(iter(self._entries))]
        if self._path is not None:
            self._entries = _write(self._path, self._entries, self._prefix + key)
        return dict(rounded)


def _tried(way: str, do: Callable[[], Any]) -> Any:
    """Give what a function gives, or None where its way does not suit model or device."""
    try:
        return do()
    except (SpecError, DeviceError) as error:
        _LOG.debug("%s: %s", way, error)
        return None


def pick(timings: Mapping[str, Timing], allows: Callable[[frozenset[str]], bool]) -> dict[str, str]:
    """Choose a way for each tensor: the fastest, but dense only as long as memory allows, largest gain first.

    Args:
        timings: By tensor name.
        allows: Whether these tensors may all be dense.

    Raises:
        BudgetExceeded: A tensor has no layout here, and memory does not allow that it is dense.
        SpecError: A tensor can be held in no way at all.
    """
    dense: frozenset[str] = frozenset()
    for name in sorted(timings, key=lambda name: (-timings[name].gain, name)):
        if timings[name].gain > 0 and allows(dense | {name}):
            dense |= {name}
        elif not timings[name].sparse:
            kind = SpecError if allows(dense | {name}) else BudgetExceeded
            raise kind(f"weights {name!r} can be held neither sparse here nor dense in the memory that was granted")
    return {name: DENSE if name in dense else timing.sparse for name, timing in timings.items()}


def trial(stretch: Stretch, input_shape: tuple[int, ...], batch: int, *, input_gradient: bool) -> Trial:
    """Make ready one training step of a stretch, on noise; its weights do not move. Cost: input and output in memory."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *input_shape), np.float32)
    dy = rng.standard_normal(stretch.forward(x, train=False).shape, np.float32)
    still = Update(0.0)

    def run() -> None:
        stretch.forward(x, train=True)
        stretch.backward(dy, grads=None, update=still, input_gradient=input_gradient)

    return run


def machine(kit: str, engine: str) -> str:
    """Name this machine and what computes on it, for keys. The kernels' sources are a part of it: other ones, other times.

    Args:
        kit: Name of the kit, with its instruction set and ABI.
        engine: Name and version of what does the dense work.
    """
    return f"{_cpu()} | {platform.machine()} | {kit} {_sources()} | {engine} |"


@cache
def _sources() -> str:
    with contextlib.suppress(OSError):
        return source.digest()
    return "unread"


def _cpu(path: Path = _CPU) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            said = dict(line.split(":", 1) for line in lines if ":" in line)
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, value in said.items()}
    return " ".join(found[key] for key in _CPU_KEYS if key in found)[:128]


def _bucket(density: float) -> int:
    return round(4 * math.log2(density)) if density > 0 else -99


def _round(batch: int) -> int:
    return -(-batch // 4) * 4 if batch <= 32 else 1 << (batch - 1).bit_length()


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "-"


def _layer(entry: Mapping[str, Any]) -> Layer | None:
    said = entry.get("layer")
    if said is None:
        return None
    shape, input_shape, details = (tuple(said[name]) for name in ("shape", "input_shape", "details"))
    return Layer(said["op"], shape, input_shape, details, said["kept"], said["batch"], said["input_gradient"])


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Read what was kept. Anything that is not as it was written is dropped, with a line in the log."""
    try:
        with path.open("rb") as file:
            data = file.read(BYTES_FILE + 1)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _LOG.warning("timings in %s cannot be read: %s", path, error)
        return {}
    try:
        if len(data) > BYTES_FILE:
            raise ValueError(f"more than {BYTES_FILE} bytes")  # noqa: TRY301 - all ways to be wrong end in one place
        said = json.loads(data)
        if said["format"] != FORMAT:
            return {}
        entries = {str(key): _checked(entry) for key, entry in dict(said["entries"]).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        _LOG.warning("timings in %s are dropped, they are no timings: %s", path, error)
        return {}
    return dict([(key, entry) for key, entry in entries.items() if entry["seconds"]][-ENTRIES:])


def _checked(entry: Any) -> dict[str, Any]:
    """Hold one entry against its form.

    Raises:
        ValueError, KeyError, TypeError, ArithmeticError: It has another.
    """
    seconds = {str(way): float(took) for way, took in dict(entry["seconds"]).items()}
    if not all(took >= 0 and math.isfinite(took) for took in seconds.values()) or len(seconds) > 64:
        raise ValueError(f"seconds {seconds}")
    checked: dict[str, Any] = {"seconds": seconds, "asked": [str(way) for way in list(entry["asked"])]}
    if "layer" in entry:
        said = dict(entry["layer"])
        checked["layer"] = {
            "op": str(said["op"]),
            **{name: [_size(side) for side in said[name]] for name in ("shape", "input_shape", "details")},
            **{name: _size(said[name]) for name in ("kept", "batch")},
            "input_gradient": bool(said["input_gradient"]),
        }
    return checked


def _size(said: Any) -> int:
    if not 0 <= (size := int(said)) < 1 << 53:
        raise ValueError("a size is out of bounds")
    return size


def _write(path: Path, ours: Mapping[str, Any], latest: str) -> dict[str, dict[str, Any]]:
    """Replace the file at once but keep what others wrote meanwhile, and give all. A full disk costs the file only."""
    theirs = _read(path)
    merged = {key: entry for key, entry in ours.items() if key not in theirs} | theirs
    old, new = merged.pop(latest), ours[latest]
    seconds = {**old["seconds"], **new["seconds"]}
    merged[latest] = {**new, "seconds": seconds, "asked": sorted({*old["asked"], *new["asked"]})}
    merged = dict(list(merged.items())[-ENTRIES:])
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        fresh.write_text(json.dumps({"format": FORMAT, "entries": merged}), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        _LOG.warning("timings cannot be kept in %s: %s", path, error)
        with contextlib.suppress(OSError):
            fresh.unlink()
    return merged
