"""`coordinator demo`: a real broker, a real coordinator and real device processes on one machine, with real data.

The demo is an operator in a hurry: it splits the vendored digits into Dirichlet shares, writes the same configuration files
that a person would write, starts the same commands, and watches the journal as `coordinator status` does. Nothing in it
is simulated except that all devices sit on one machine.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coordinator import algorithms
from coordinator import broker as brokers
from coordinator.export import JOURNAL, MODEL
from coordinator.journal import Journal
from coordinator.recipes import recipe_of
from coordinator.show import RunView
from coordinator.simulate import fleet, outputs, partitions, report, watch
from coordinator.simulate.held import Held
from coordinator.simulate.world import installed
from edge_runtime.data import Dataset, Source, load
from wire import zoo
from wire.child import die_with_parent
from wire.errors import ConfigError, NestlingError, StoreError

MIB = 1 << 20
_MODEL = "digits-cnn"
_PARTITION = "dir0.5"
_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Demo:
    """What to show.

    Attributes:
        algo: Algorithm.
        devices: Device processes.
        rounds: Rounds; None for the demo's own number.
        seed: Root of all randomness.
        engine: Training engine of the devices.
        out: Folder for everything that the demo writes.
    """

    algo: str
    devices: int
    rounds: int | None
    seed: int
    engine: str
    out: Path


def run_demo(demo: Demo, json_file: Path | None) -> int:
    """Run the demo to its end and return the exit code.

    Raises:
        ConfigError: Fewer than two devices, or the folder cannot be used.
        LinkError: No broker can be started on this machine.
    """
    if demo.devices < 2:
        raise ConfigError(f"--devices {demo.devices}: a federation has at least 2")
    installed(demo.engine)
    outputs.ready(json_file)
    began = time.monotonic()
    run = _fresh(demo.out)
    interrupted: list[int] = []
    held = Held()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda caught, _: interrupted.append(caught))
    with ExitStack() as stack:
        stack.callback(_restore)
        shares = split(demo, run)
        broker = stack.enter_context(brokers.choose("", "", run))
        print(f"broker: {broker.name} at {broker.url} ({broker.note})")
        processes = stack.enter_context(_fleet())
        leader = processes(
            "coordinator", ["coordinator", "start", "--config", str(_lead_config(demo, run, broker.url))]
        )
        for device in shares.devices:
            config = _device_config(demo, run, device, shares, broker.url)
            held.add(device, processes(device, ["edge_runtime.cli", "run", "--config", str(config)]).pid)
        print(f"coordinator and {demo.devices} devices started; their logs are in {run}")
        view = _watch(run, leader, demo, (interrupted, held))
        code = leader.poll()
    if interrupted:
        print("interrupted: everything that the demo started has ended", file=sys.stderr)
        return 130
    if code != 0 or not view.finished:
        tail = (run / "coordinator.log").read_text("utf-8", "replace").splitlines()[-5:]
        print("the coordinator ended early:\n  " + "\n  ".join(tail), file=sys.stderr)
        return 4
    return _finish(run, view, (shares, held), time.monotonic() - began, json_file)


@dataclass(frozen=True, slots=True)
class Shares:
    """How the data are spread.

    Attributes:
        devices: Names, in order of their budgets.
        budgets: Device to bytes above the worker's base.
        digest: Of the partition.
    """

    devices: tuple[str, ...]
    budgets: dict[str, int]
    digest: str


def split(demo: Demo, run: Path) -> Shares:
    """Write one share of the training data per device, and the global test set, as npz files."""
    whole = load(Source("digits", validation=0.0, test=0.2, seed=0))
    x, y = whole.train
    parts = partitions.partition(_PARTITION, y, demo.devices, seed=demo.seed)
    devices = tuple(f"device-{i + 1}" for i in range(demo.devices))
    for device, part in zip(devices, parts.parts, strict=True):
        _save(run / f"{device}.npz", whole, x[part], y[part])
    _save(run / "test.npz", whole, *whole.test)
    return Shares(devices, dict(zip(devices, budgets(demo), strict=True)), parts.digest)


def budgets(demo: Demo) -> list[int]:
    """Spread memory budgets over the fleet: from what the narrowest of five widths of the model takes to what all of it takes.

    It is what they take on the devices' engine. An algorithm that never cuts the model asks only devices that can hold all of
    it; for such a one all budgets are the last.

    Returns:
        Bytes above the worker's base, rounded up to whole MiB, one per device.
    """
    params = algorithms.by_name(demo.algo).PARAMS
    limits = fleet.budgets(zoo.load(_MODEL), recipe_of(params), demo.devices, MIB, (demo.engine,))
    return limits if "fractions" in params else [limits[-1]] * demo.devices


def _save(path: Path, whole: Dataset, x: NDArray[np.float32], y: NDArray[np.int64]) -> None:
    np.savez(path, x=x, y=y, classes=np.array(whole.classes))


def _fresh(out: Path) -> Path:
    """Make a folder for this run; an older demo's folder is moved aside by its number, nothing is deleted."""
    out.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name[4:]) for p in out.glob("run-*") if p.name[4:].isdecimal()), default=0)
    run = out / f"run-{number}"
    run.mkdir()
    return run


def _quoted(value: object) -> str:
    """Write a TOML string; JSON's form is one."""
    return json.dumps(str(value))


def _lead_config(demo: Demo, run: Path, url: str) -> Path:
    path = run / "coordinator.toml"
    path.write_text(
        f'algo = "{demo.algo}"\nmodel = "{_MODEL}"\nrounds = {demo.rounds or _ROUNDS}\nseed = {demo.seed}\n'
        f'federation = "demo"\nstate = {_quoted(run / "coordinator")}\ndata = {_quoted("npz=" + str(run / "test.npz"))}\n\n'
        f'[broker]\nurl = "{url}"\n\n[round]\ndevices = {demo.devices}\nseconds = 120.0\nkeepalive = 10.0\n',
        "utf-8",
    )
    return path


def _device_config(demo: Demo, run: Path, device: str, shares: Shares, url: str) -> Path:
    path = run / f"{device}.toml"
    path.write_text(
        f'federation = "demo"\ndevice = "{device}"\n\n[broker]\nurl = "{url}"\n\n'
        f'[data]\nsource = "npz"\npath = {_quoted(run / (device + ".npz"))}\nvalidation = 0.1\ntest = 0.1\n\n'
        f"[memory]\nbudget = {shares.budgets[device]}\n\n"
        f'[worker]\nengine = "{demo.engine}"\nthreads = 1\nmode = "warm"\npriority = "normal"\n\n'
        f"[state]\ndir = {_quoted(run / device)}\n",
        "utf-8",
    )
    return path


Start = Callable[[str, list[str]], "subprocess.Popen[bytes]"]


@contextmanager
def _fleet() -> Iterator[Start]:
    """Give a way to start commands; on leaving, all of them are asked to end and then made to."""
    started: list[subprocess.Popen[bytes]] = []
    parent = os.getpid()

    def start(name: str, argv: list[str]) -> subprocess.Popen[bytes]:
        folder = Path(argv[-1]).parent
        with (folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),  # noqa: PLW1509 - the demo has one thread here
            )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + 5.0
        for process in started:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watch(run: Path, leader: subprocess.Popen[bytes], demo: Demo, seen: tuple[list[int], Held]) -> RunView:
    """Follow the journal until the coordinator ends, and what the devices hold."""
    view = RunView()
    interrupted, held = seen
    with watch.Screen(demo.rounds or _ROUNDS) as screen:
        while not interrupted:
            ended = leader.poll() is not None
            try:
                with Journal(run / "coordinator" / JOURNAL, viewing=True) as journal:
                    while not interrupted:
                        ended = leader.poll() is not None
                        if journal.last() > view.last:
                            view.absorb(journal.replay(view.last))
                            screen.show(view)
                        if ended:
                            return view
                        held.look()
                        time.sleep(0.1)
            except StoreError:
                if ended:
                    return view
                held.look()
                time.sleep(0.1)
    return view


def _finish(run: Path, view: RunView, parts: tuple[Shares, Held], seconds: float, json_file: Path | None) -> int:
    (shares, held), model = parts, run / "coordinator" / MODEL
    result = report.result(
        view, zoo.load(_MODEL), data="digits", partition=_PARTITION, partition_digest=shares.digest, seconds=seconds
    )
    peaks = held.peaks()
    result["bytes_processes"] = {name: dataclasses.asdict(peak) for name, peak in peaks.items()}
    result["bytes_devices"] = sum(peak.agent + peak.worker for peak in peaks.values())
    outputs.write(run / "result.json", result)
    if json_file is not None:
        outputs.write(json_file, result)
    plot = report.plot(result, run / "plot.png")
    print(report.text(result))
    if peaks:
        agents, workers = sum(peak.agent for peak in peaks.values()), sum(peak.worker for peak in peaks.values())
        print(
            f"memory of all {len(peaks)} devices at their peaks: {(agents + workers) / MIB:.0f} MiB,"
            f" of which agents {agents / MIB:.0f} and workers {workers / MIB:.0f} (as the kernel splits what they share)\n"
        )
    print(f"model: {model}\nplot:  {plot}\ndata:  {json_file or run / 'result.json'}")
    over = [d["name"] for d in result["devices"] if d["bytes_peak"] > d["bytes_budget"]]
    if over:
        raise NestlingError(f"over their memory budget: {', '.join(over)}")
    return 0


def _restore() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
