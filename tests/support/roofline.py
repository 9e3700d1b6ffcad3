"""The roof over every kernel of this machine: multiply-adds per second, and bytes read per second from each cache."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

_SOURCE = Path(__file__).with_suffix(".c")
_ROUNDS = 7
_SECONDS = 0.02
_NEAR, _MIDDLE, _FAR = 16 << 10, 512 << 10, 192 << 20


@dataclass(frozen=True, slots=True)
class Roof:
    """What one thread can do at most.

    Attributes:
        flops: Floating-point operations per second, a multiply-add being two.
        bytes_near: Bytes read per second from 16 KiB (the first cache).
        bytes_middle: From 512 KiB (the second).
        bytes_far: From 192 MiB (memory).
    """

    flops: float
    bytes_near: float
    bytes_middle: float
    bytes_far: float

    def bytes_of(self, working_set: float) -> float:
        """Give the bytes per second at which a working set of so many bytes can be read."""
        return self.bytes_middle if working_set <= 2 * _MIDDLE else self.bytes_far

    def plain(self) -> dict[str, float]:
        """Give it as plain data."""
        return asdict(self)


def measure(isa: str = "") -> Roof:
    """Build the probe with the machine's own compiler and run it: half a second.

    Args:
        isa: An instruction set to keep to, ``avx2``; the widest that there is if empty.

    Raises:
        CalledProcessError: There is no C compiler.
    """
    flags = ["-mavx2", "-mfma", "-mno-avx512f"] if isa == "avx2" else ["-march=native", "-mprefer-vector-width=512"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "roofline.so"
        command = ["cc", "-O3", "-ffp-contract=fast", *flags, "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
        subprocess.run(command, check=True, capture_output=True)
        probe = ctypes.CDLL(str(library))
    probe.peak.restype = probe.scan.restype = ctypes.c_double
    probe.peak.argtypes = (ctypes.c_long, ctypes.c_void_p)
    probe.scan.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long, ctypes.c_void_p)
    sink, data = np.zeros(16, np.float32), np.ones(_FAR // 4 + 16, np.float32)
    start = data.ctypes.data + -data.ctypes.data % 64
    reads = [
        _best(lambda times, size=size: probe.scan(start, size, times, sink.ctypes.data))
        for size in (_NEAR, _MIDDLE, _FAR)
    ]
    return Roof(_best(lambda times: probe.peak(times, sink.ctypes.data)), *reads)


def _best(work) -> float:
    """Give the highest rate of a few runs of `work(times)`, which gives the amount that it did; on thread time."""
    times = 1
    while True:
        begin = time.thread_time()
        work(times)
        if time.thread_time() - begin >= _SECONDS:
            break
        times *= 2
    rates = []
    for _ in range(_ROUNDS):
        begin = time.thread_time()
        done = work(times)
        rates.append(done / (time.thread_time() - begin))
    return max(rates)
