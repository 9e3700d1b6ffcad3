"""A real federation on loopback: mosquitto, `coordinator start` and `edge-runtime run` as processes that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from coordinator.broker import _own_iotcore
from coordinator.export import JOURNAL, SPOOL, standing_of
from coordinator.journal import Journal
from coordinator.show import RunView
from tests.support.mosquitto import Mosquitto
from wire import tensor
from wire.errors import StoreError
from wire.spool import Spool

MIB = 1 << 20


class Iotcore:
    """The iotcore wheel as a broker, started as the product starts it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._broker = _own_iotcore(self.root)
        self.port = int(self._broker.url.rpartition(":")[2])

    def stop(self) -> None:
        self._broker.stop()


@dataclass
class Federation:
    """One broker, one coordinator, some devices; everything lives below `root`."""

    root: Path
    algo: str = "fedavg"
    model: str = "linear"
    devices: int = 3
    rounds: int = 3
    seed: int = 0
    quorum: int = 0
    seconds: float = 60.0
    keepalive: float = 4.0
    budgets: tuple[int, ...] = (512 * MIB,)
    recipe: dict[str, object] = field(default_factory=dict)
    params: dict[str, object] = field(default_factory=dict)
    evaluate: bool = False
    mode: str = "warm"
    engine: str = "native"
    samples: int = 40
    broker_kind: str = "mosquitto"
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)  # of relays between a device and the broker
    tables: dict[str, str] = field(default_factory=dict)  # what else a device's configuration says

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self.broker = (
            Mosquitto(self.root / "broker") if self.broker_kind == "mosquitto" else Iotcore(self.root / "broker")
        )

    def __enter__(self) -> Self:
        self.broker.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait()
        self.broker.stop()

    @property
    def names(self) -> list[str]:
        return [f"device-{i}" for i in range(self.devices)]

    def start(self) -> None:
        """Start the coordinator and all devices."""
        self.start_coordinator()
        for name in self.names:
            self.start_device(name)

    def start_coordinator(self) -> None:
        path = self.root / "coordinator.toml"
        lines = [
            f'algo = "{self.algo}"',
            f'model = "{self.model}"',
            f"rounds = {self.rounds}",
            f"seed = {self.seed}",
            'federation = "test"',
            f'state = "{self.root / "coordinator"}"',
        ]
        if self.evaluate:
            lines.append('data = "digits"')
        lines += ["[broker]", f'url = "mqtt://127.0.0.1:{self.broker.port}"', "[round]", f"devices = {self.devices}"]
        lines += [f"quorum = {self.quorum}", f"seconds = {self.seconds}", f"keepalive = {self.keepalive}"]
        lines += ["[recipe]", *(f"{k} = {json.dumps(v)}" for k, v in self.recipe.items())]
        lines += ["[params]", *(f"{k} = {json.dumps(v)}" for k, v in self.params.items())]
        path.write_text("\n".join(lines) + "\n")
        self._spawn("coordinator", ["coordinator", "start", "--config", str(path)])

    def start_device(self, name: str) -> None:
        number = int(name.rpartition("-")[2])
        data = self.save_data(name)
        path = self.root / f"{name}.toml"
        budget = self.budgets[number % len(self.budgets)]
        port = self.ports.get(name, self.broker.port)
        path.write_text(
            f'federation = "test"\ndevice = "{name}"\n[broker]\nurl = "mqtt://127.0.0.1:{port}"\n'
            f'[data]\nsource = "npz"\npath = "{data}"\nvalidation = 0.1\ntest = 0.1\n[memory]\nbudget = {budget}\n'
            f'[worker]\nmode = "{self.mode}"\nengine = "{self.engine}"\nthreads = 1\npriority = "normal"\n'
            f'[state]\ndir = "{self.root / name}"\n'
            f"{self.tables.get(name, '')}\n"
        )
        self._spawn(name, ["edge_runtime.cli", "run", "--config", str(path)])

    def save_data(self, name: str) -> Path:
        """Write the digits that a device has, unless they are there."""
        number, data = int(name.rpartition("-")[2]), self.root / f"{name}.npz"
        if not data.exists():
            whole = np.load(Path(__file__).parents[2] / "edge_runtime" / "data" / "digits8x8.npz")
            rows = np.random.default_rng(100 + number).permutation(len(whole["y"]))[: self.samples]
            np.savez(data, x=(whole["x"][rows] / 16).astype(np.float32), y=whole["y"][rows], classes=10)
        return data

    def kill(self, name: str) -> None:
        """End one process with SIGKILL and reap it."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def restart(self, name: str) -> None:
        """Start a process that has ended."""
        if name == "coordinator":
            self.start_coordinator()
        else:
            self.start_device(name)

    def view(self) -> RunView:
        """Read the journal so far; empty when there is none yet."""
        view = RunView()
        try:
            with Journal(self.root / "coordinator" / JOURNAL, viewing=True) as journal:
                view.absorb(journal.replay())
        except StoreError:
            pass
        return view

    def wait(self, condition, seconds: float = 60.0) -> RunView:
        """Wait until `condition(view)` holds; fails with all logs when it does not in time."""
        until = time.monotonic() + seconds
        while True:
            view = self.view()
            if condition(view):
                return view
            if time.monotonic() > until:
                raise AssertionError(f"not in {seconds} s:\n{self.logs()}")
            time.sleep(0.05)

    def wait_finished(self, seconds: float = 60.0) -> RunView:
        """Wait for the coordinator's own end and expect exit code 0."""
        try:
            code = self.processes["coordinator"].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not finished in {seconds} s:\n{self.logs()}") from None
        assert code == 0, self.logs()
        return self.view()

    def weights(self) -> dict[str, np.ndarray]:
        """Give the latest global weights, canonical order."""
        standing = standing_of(self.root / "coordinator")
        with tensor.open_blob(Spool(self.root / "coordinator" / SPOOL).path(standing.state)) as blob:
            return {n: np.array(blob.tensor(n)) for n in blob.names if n.startswith("w/")}

    def logs(self) -> str:
        return "\n".join(
            f"--- {name} ({self.processes[name].poll()})\n"
            + "\n".join(path.read_text(errors="replace").splitlines()[-25:])
            for name in self.processes
            if (path := self.root / f"{name}.log").exists()
        )

    def begin(self, name: str, words: list[str]) -> None:
        """Start a process by its whole command line, with a log of its own."""
        env = {**os.environ, "OMP_NUM_THREADS": "1", **self.env}
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)

    def _spawn(self, name: str, argv: list[str]) -> None:
        self.begin(name, [sys.executable, "-m", *argv])
