"""What a round costs when nobody trains: ten devices, a 100 kB model, warm workers, a real broker on loopback.

`python -m tests bench round --json`. Cases: mosquitto as it is; mosquitto with every fsync of the coordinator slowed to
30 ms (a shim that is compiled on the spot and preloaded, to stand for an SD card); the iotcore wheel. Besides: how long
it takes until a device that was killed, or frozen, is known to be lost.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import tempfile
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from coordinator.export import JOURNAL
from coordinator.journal import Closed, Journal
from tests.bench import Row, machine, outcome
from tests.support.federation import Federation
from wire import zoo
from wire.spec import Structure, encode, parameter_count

_ROUNDS = 60
_WARM = 10
_DEVICES = 10
_KEEPALIVE = 4.0
_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static int slow(const char *name, int fd) {
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
  usleep(30000);
  return real(fd);
}
int fsync(int fd) { return slow("fsync", fd); }
int fdatasync(int fd) { return slow("fdatasync", fd); }
"""


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = _model(root)
        plain = _rounds(root / "mosquitto", model)
        rows += _figures("mosquitto", plain, 50.0)
        slow = _rounds(root / "slow", model, {"LD_PRELOAD": str(_shim(root))})
        rows += _figures("mosquitto, fsync 30 ms", slow, 150.0)
        rows += _figures("iotcore", _rounds(root / "iotcore", model, broker="iotcore"), None)
        rows += _losses(root / "lost", model)
    return outcome("round", rows, machine())


def _model(root: Path) -> Path:
    spec = zoo.mlp("bench-100k", (1, 8, 8), 10, (96, 180))
    path = root / "model.msgpack"
    path.write_bytes(encode(spec))
    assert 95_000 < 4 * parameter_count(spec, Structure()) < 105_000
    return path


def _shim(root: Path) -> Path:
    source, library = root / "slow.c", root / "slow.so"
    source.write_text(_SHIM)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    return library


def _federation(root: Path, model: Path, broker: str = "mosquitto", rounds: int = _ROUNDS) -> Federation:
    return Federation(
        root,
        model=str(model),
        devices=_DEVICES,
        rounds=rounds,
        recipe={"rule": "still", "step": 1e-6},
        keepalive=_KEEPALIVE,
        mode="auto",
        broker_kind=broker,
    )


def _rounds(root: Path, model: Path, env: dict[str, str] | None = None, broker: str = "mosquitto") -> list[float]:
    """Give the milliseconds from each close to the next, the first ones left out."""
    with _federation(root, model, broker) as fleet:
        for name in fleet.names:
            fleet.start_device(name)
        fleet.env = env or {}
        fleet.start_coordinator()
        fleet.wait_finished(120.0)
        with Journal(root / "coordinator" / JOURNAL, viewing=True) as journal:
            ends = [e.seconds_wall for e in journal.replay() if isinstance(e.record, Closed)]
    return [1000.0 * (b - a) for a, b in pairwise(ends)][_WARM:]


def _figures(case: str, times: list[float], target: float | None) -> list[Row]:
    ordered = sorted(times)
    return [
        Row(case, "round, median", statistics.median(times), "ms", "lower", target),
        Row(case, "round, 95th percentile", ordered[int(0.95 * len(ordered))], "ms", "lower", None),
    ]


def _losses(root: Path, model: Path) -> list[Row]:
    rows = []
    with _federation(root, model, rounds=100_000) as fleet:
        fleet.start()
        fleet.wait(lambda view: len(view.rounds) > 3)
        for case, name, number, target in (
            ("killed", "device-0", signal.SIGKILL, 1.0),
            ("frozen", "device-1", signal.SIGSTOP, 1.5 * _KEEPALIVE + 1.0),
        ):
            began = time.time()
            fleet.processes[name].send_signal(number)
            seconds = _known(root, name, began) - began
            rows.append(
                Row(f"device {case}, keepalive {_KEEPALIVE:g} s", "known as lost after", seconds, "s", "lower", target)
            )
            fleet.processes[name].send_signal(signal.SIGKILL)
            fleet.processes[name].wait()
            fleet.restart(name)
            after = max(fleet.view().rounds)
            fleet.wait(lambda view, after=after: max(view.rounds) > after + 3)
    return rows


def _known(root: Path, name: str, began: float) -> float:
    """Give the wall time at which the coordinator said that a device is lost, from its log."""
    until = time.monotonic() + 30.0
    while time.monotonic() < until:
        for line in (root / "coordinator.log").read_text("utf-8").splitlines():
            clock, _, text = line.partition(" ")
            if text in (f"device {name} is lost", f"device {name} has fallen silent"):
                today = datetime.fromtimestamp(began).astimezone().date()
                said = datetime.fromisoformat(f"{today} {clock}").timestamp()
                if said >= began - 0.002:
                    return said
        time.sleep(0.02)
    raise AssertionError(f"{name} was never known to be lost")
