"""What a sparse tensor costs on the wire, in bytes and in time, beside the encodings of the papers and a plain gather.

``python -m tests bench codec --json``. Masks are random unless the case says otherwise; 6.6 million weights (PruneFL's
Conv-2) in one thread. Times are medians of paired runs in this process, turn by turn: ours, numpy's boolean gather of the
same data, and zstandard at level 3 over the dense array. Memory is the kernel's high-water mark above input and output.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from tests.bench import Row, machine, outcome
from wire import coding, forms, gaps, masks, zstd
from wire.outline import outline_of
from wire.tensor import Coding, open_blob, write_blob

_WEIGHTS = 6_600_000
_SHAPE = (2560, 2578)
_DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 0.9, 1.0)
_ROUNDS = 9


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    for density in _DENSITIES:
        rows += _bytes(density)
    rows += _small()
    rows += _patterns()
    rows += _levels()
    for density in (0.01, 0.1, 0.5):
        rows += _times(density)
    rows += _memory()
    rows += _forms()
    rows += _rounds()
    return outcome("codec", rows, machine())


def _mask(density: float, shape: tuple[int, ...] = _SHAPE, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random(shape) < density


def _spent(mask: np.ndarray[Any, Any]) -> int:
    """Give the bytes of a mask's own parts."""
    coded = coding.code_masked(np.zeros(mask.shape, np.float32), mask, form="", known="", base=None, pack=True)
    return coding.cost(coded) - forms.size("", coded.kept, 4)


def _bytes(density: float) -> list[Row]:
    mask = _mask(density)
    kept = int(mask.sum())
    case = f"random, density {density:g}"
    bound = coding.entropy(kept / mask.size) * mask.size / 8
    spent = _spent(mask)
    rows = []
    if density < 1:
        target = 1.05 if density <= 0.5 else None
        rows.append(Row(case, "mask bytes / entropy", spent / bound, "", "lower", target))
        rows.append(Row(case, "mask bytes / bitmap", spent / (-(-mask.size // 8)), "", "lower", 1.0))
        rows.append(
            Row(case, "mask bytes / value-index", spent / masks.index_bytes(mask.shape, kept), "", "lower", 1.0)
        )
    papers = min(coding.plain_cost(e, mask.shape, kept, 4) for e in ("dense", "bitmap", "index"))
    ours = min(spent + 4 * kept, 4 * mask.size)
    rows.append(Row(case, "all bytes / the papers' best", ours / papers, "", "lower", 1.0))
    rows.append(Row(case, "all bytes / dense", ours / (4 * mask.size), "", "lower", None))
    return rows


def _small() -> list[Row]:
    rows = []
    for density in (0.01, 0.05, 0.2, 0.5):
        mask = _mask(density, (256, 256))
        bound = coding.entropy(mask.mean()) * mask.size / 8
        rows.append(
            Row(f"65,536 weights, density {density:g}", "mask bytes / entropy", _spent(mask) / bound, "", "lower", 1.05)
        )
    return rows


def _patterns() -> list[Row]:
    rng = np.random.default_rng(3)
    rows_kept = np.zeros(_SHAPE, np.bool_)
    rows_kept[rng.choice(_SHAPE[0], _SHAPE[0] // 10, replace=False)] = True
    columns = np.zeros(_SHAPE, np.bool_)
    columns[:, rng.choice(_SHAPE[1], _SHAPE[1] // 10, replace=False)] = True
    clusters = rng.random(_SHAPE) < np.where(rng.random((_SHAPE[0], 1)) < 0.2, 0.46, 0.01)
    found = []
    for name, mask in (("whole rows", rows_kept), ("whole columns", columns), ("clustered rows", clusters)):
        bound = coding.entropy(mask.mean()) * mask.size / 8
        found.append(Row(f"{name}, density 0.1", "mask bytes / random bound", _spent(mask) / bound, "", "lower", 1.0))
    return found


def _levels() -> list[Row]:
    """Why level 1: against the others, on the gaps and bits that are packed."""
    found = []
    for name, data in (
        ("gaps at 0.1", gaps.to_gaps(np.ravel(_mask(0.1)))[0]),
        ("bits at 0.3", masks.packed(_mask(0.3)).line.tobytes()),
    ):
        ours = len(zstd.pack(data))
        for level in (3, 9):
            packer = zstandard.ZstdCompressor(level=level)
            other = len(packer.compress(data))
            slower = _ratio(lambda p=packer, d=data: p.compress(d), lambda d=data: zstd.pack(d))
            found.append(Row(f"packing {name}", f"bytes, level {level} / level 1", other / ours, "", "higher", None))
            found.append(Row(f"packing {name}", f"time, level {level} / level 1", slower, "", "higher", None))
    return found


def _ratio(one: Callable[[], object], other: Callable[[], object]) -> float:
    """Give the ratio of two medians, the runs taken in turn."""
    return _seconds(one, other)[0] / _seconds(one, other)[1]


def _seconds(*what: Callable[[], object]) -> list[float]:
    """Give the median of each, the runs taken in turn after one that does not count."""
    times: list[list[float]] = [[] for _ in what]
    for turn in range(_ROUNDS + 1):
        for call, found in zip(what, times, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                found.append(time.perf_counter() - began)
    return [statistics.median(found) for found in times]


def _times(density: float) -> list[Row]:
    mask, rng = _mask(density), np.random.default_rng(2)
    array = rng.standard_normal(_SHAPE).astype(np.float32)
    dense = np.where(mask, array, 0)
    case = f"{_WEIGHTS / 1e6:.1f} M weights, density {density:g}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blob"
        write_blob(path, "update", {"w": array}, masks={"w": mask})

        def encode() -> object:
            return coding.code_masked(array, mask, form="", known="", base=None, pack=True)

        def decode() -> object:
            with open_blob(path) as blob:
                return blob.sparse("w")

        packer = zstandard.ZstdCompressor(level=3)
        encoding, decoding, gather = _seconds(encode, decode, lambda: array[mask])
        slow = _seconds(lambda: packer.compress(dense))[0] if density == 0.1 else 0.0
    wanted = (15.0, 10.0) if density == 0.1 else (None, None)
    rows = [
        Row(case, "encode", 1000 * encoding, "ms", "lower", wanted[0]),
        Row(case, "decode to (indices, values)", 1000 * decoding, "ms", "lower", wanted[1]),
        Row(case, "encode / boolean gather", encoding / gather, "", "lower", None),
        Row(case, "decode / boolean gather", decoding / gather, "", "lower", None),
    ]
    if slow:
        rows.append(Row(case, "encode / zstd -3 of the dense array", encoding / slow, "", "lower", None))
    return rows


_PROBE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from wire.tensor import open_blob, write_blob
def clear(): Path("/proc/self/clear_refs").write_text("5")
def field(name): return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(name))
shape, density = (2560, 2578), float(sys.argv[2])
rng = np.random.default_rng(1)
mask = rng.random(shape) < density
array = rng.standard_normal(shape, dtype=np.float32)
small = np.ones((8, 8), np.float32)
write_blob(Path(sys.argv[1]), "update", {"w": small}, masks={"w": small > 0})
with open_blob(Path(sys.argv[1])) as blob: blob.sparse("w")
clear(); before = field("VmRSS")
size = write_blob(Path(sys.argv[1]), "update", {"w": array}, masks={"w": mask}).size
writing = field("VmHWM") - before - size
del array, mask
clear(); before = field("VmRSS")
with open_blob(Path(sys.argv[1])) as blob: where, values = blob.sparse("w")
reading = field("VmHWM") - before - where.nbytes - values.nbytes
print(json.dumps([writing, reading, size]))
"""


def _memory() -> list[Row]:
    rows = []
    for density in (0.1, 0.5):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", _PROBE, str(Path(folder) / "blob"), str(density)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        writing, reading, size = json.loads(done.stdout)
        case = f"{_WEIGHTS / 1e6:.1f} M weights, density {density:g}, blob of {size / 1e6:.1f} MB"
        rows.append(Row(case, "peak above input and output, writing", writing / 2**20, "MiB", "lower", None))
        rows.append(Row(case, "peak above input and output, reading", reading / 2**20, "MiB", "lower", None))
    return rows


def _forms() -> list[Row]:
    """What other forms of the values save, and what shuffled bytes under zstandard would."""
    values = np.random.default_rng(5).standard_normal(1 << 20).astype(np.float32)
    rows = []
    for form in forms.FORMS[1:]:
        said = forms.written(values, form)
        error = float(np.abs(forms.lost(values, form)).max() / np.abs(values).max())
        rows.append(Row(f"values as {form}", "bytes / float32", said.nbytes / values.nbytes, "", "lower", None))
        rows.append(Row(f"values as {form}", "largest error / largest value", error, "", "lower", None))
    shuffled = np.ascontiguousarray(values.view(np.uint8).reshape(-1, 4).T)
    packer = zstandard.ZstdCompressor(level=1)
    for case, data in (("float32 under zstd (not used)", values), ("the same, bytes shuffled (not used)", shuffled)):
        rows.append(Row(case, "bytes / float32", len(packer.compress(data)) / values.nbytes, "", "lower", None))
        slower = _ratio(lambda d=data: packer.compress(d), values.copy)
        rows.append(Row(case, "time / copy", slower, "", "lower", None))
    return rows


def _rounds() -> list[Row]:
    """What one tensor's share of a header costs when masks are known, and what a changed mask costs."""
    rng = np.random.default_rng(6)
    shapes = {"1.weight": (300, 784), "1.bias": (300,), "2.weight": (100, 300), "2.bias": (100,)}
    shapes |= {"3.weight": (10, 100), "3.bias": (10,)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    kept = {name: rng.random(shape) < 0.1 for name, shape in shapes.items() if len(shape) > 1}
    values = 4 * sum(int(kept[n].sum()) if n in kept else a.size for n, a in arrays.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "blob"
        known = write_blob(path, "update", arrays, masks=kept, coding=Coding(outline=outline_of(arrays, kept))).size
        old = _mask(0.1)
        new = old.copy()
        new.flat[rng.choice(new.size, new.size // 100, replace=False)] ^= True
        array = np.ones(_SHAPE, np.float32)
        whole = write_blob(path, "update", {"w": array}, masks={"w": new}).size - 4 * int(new.sum())
        delta = write_blob(path, "update", {"w": array}, masks={"w": new}, coding=Coding(bases={"w": old})).size
    changed = (delta - 4 * int(new.sum())) / whole
    return [
        Row(
            "LeNet-300-100, masks known", "bytes beside the values, per tensor", (known - values) / 6, "", "lower", 64.0
        ),
        Row("1 % of a mask at 0.1 changed", "bytes of the change / of the mask", changed, "", "lower", 1.0),
    ]
