"""What a device pays for taking part: the idle agent's memory and processor time, and a worker's with either engine loaded.

`python -m tests bench footprint --json`. A real agent, connected over TLS with a certificate of its own, as the kernel
accounts for it: VmRSS, and of smaps_rollup what only this process has. What is shared depends on who shares it: a second
agent runs beside the one that is measured, as other Python programs do on a device. Peers are rows where they are installed.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.bench import Row, outcome
from tests.bench.memory import _data, _frame, _worker
from tests.support.devices import Agent, Script
from tests.support.models import random_arrays
from tests.support.mosquitto import proc_memory, wait_until
from tests.support.orders import job
from tests.support.tls import TlsBroker
from tests.support.transfer import random_file
from wire import zoo
from wire.job import Done, Failed
from wire.messages import Ack, Presence, Recipe
from wire.spec import Structure

MIB = 1 << 20
MB = 1_000_000
ROUNDS = 100
_STARTS = 5
_SECONDS_IDLE = 30.0
_KEEPALIVE = 20.0
_SECONDS_WARM = 1.0
_BYTES_MODEL = 64 * MB
_WORKERS = {"torch": 235.0, "native": 60.0}
"""Engine to the mebibytes that its worker may have resident after a step."""

_HEAVY = ("numpy", "torch", "psutil", "cryptography", "zstandard")
_PEERS = {
    "flwr, SuperNode": ("flwr", "import flwr.supernode.cli.flower_supernode"),
    "flwr, client": ("flwr", "import flwr.client"),
    "LiteRT, inference": ("ai_edge_litert", "from ai_edge_litert.interpreter import Interpreter"),
    "onnxruntime, inference": ("onnxruntime", "import onnxruntime"),
    "MNN": ("MNN", "import MNN"),
    "bare Python": ("sys", "pass"),
    "paho alone": ("paho", "import paho.mqtt.client"),
}
"""Case to the package that it takes and what its process imports; no peer connects to anything."""
_TELL = (
    "\nfor line in open('/proc/self/status'):\n    if line.startswith('VmRSS:'): print(int(line.split()[1]) * 1024)\n"
)


def run() -> dict[str, object]:
    """Measure and give the result in the bench shape."""
    with tempfile.TemporaryDirectory(prefix="footprint-") as folder:
        root = Path(folder)
        with TlsBroker(root / "broker") as broker, Script(broker.port, root / "script", keepalive=_KEEPALIVE) as script:
            rows = _starts(broker, script, root) + _idle(broker, script, root)
        rows += _worker_rows(root)
    return outcome("footprint", rows + _peer_rows())


def _agent(broker: TlsBroker, root: Path, name: str) -> Agent:
    table = broker.device(root / name, name)
    return Agent(root / name, broker.port, name=name, mode="auto", more=f"seconds_warm = {_SECONDS_WARM}", broker=table)


def _starts(broker: TlsBroker, script: Script, root: Path) -> list[Row]:
    """Start to registered, the compiled files being there; the median of some starts."""
    own, child = [], []
    for _ in range(_STARTS + 1):  # the first one compiles
        with _agent(broker, root, "d0") as agent:
            _wait_online(script, "d0")
            own.append(agent.cpu())
            wait_until(lambda agent=agent: not agent.workers())
            child.append(_children(agent))
            agent.stop()
            script.wait(Presence, where=lambda p: p.state == "bye" and p.device == "d0")
    case = "agent, from start to registered"
    return [
        Row(case, "time of the processor", statistics.median(own[1:]), "s", "lower", 0.5),
        Row(case, "its worker's, which looks at the data", statistics.median(child[1:]), "s", "lower"),
    ]


def _wait_online(script: Script, name: str) -> None:
    script.wait(Presence, where=lambda p: p.state == "online" and p.device == name)


def _children(agent: Agent) -> float:
    ticks = Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()[13:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _idle(broker: TlsBroker, script: Script, root: Path) -> list[Row]:
    """One agent, beside another: at rest, over rounds, while it receives a model."""
    with _agent(broker, root, "d1") as other, _agent(broker, root, "d0") as agent:
        for name in ("d0", "d1"):
            _wait_online(script, name)
        script.until(lambda: not agent.workers() and not other.workers())
        script.turn(2.0)
        case, at_rest = "agent, idle over TLS", agent.memory("VmRSS")
        own = _rollup(agent.pid)
        rows = [
            Row(case, "resident", at_rest / MIB, "MiB", "lower", 24.0),
            Row(case, "unique", (own["Private_Clean"] + own["Private_Dirty"]) / MIB, "MiB", "lower", 14.0),
            Row(case, "of that, written to", own["Private_Dirty"] / MIB, "MiB", "lower"),
            Row(case, "heavy packages loaded", float(len(_loaded(agent.pid))), "packages", "lower", 0.0),
            Row(case, "share of one core", 100 * _share(agent.pid, script), "%", "lower", 0.2),
        ]
        rows.append(_received(agent, script, root))
        rows.append(_grown(agent, script, at_rest))
    return rows


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _loaded(pid: int) -> set[str]:
    """Name the heavy packages whose compiled parts are in a process: none of them works without."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")
    return {name for name in _HEAVY if f"/{name}/" in maps or f"/lib{name}" in maps}


def _share(pid: int, script: Script) -> float:
    """Give the share of one core over some time in which nothing happens but signs of life."""
    before, began = _nanoseconds(pid), time.monotonic()
    script.turn(0.0)
    while time.monotonic() < began + _SECONDS_IDLE:
        script.turn(1.0)
    return (_nanoseconds(pid) - before) / 1e9 / (time.monotonic() - began)


def _nanoseconds(pid: int) -> int:
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _received(agent: Agent, script: Script, root: Path) -> Row:
    """The highest that it was while 64 MB came in, above what it was before."""
    ref = random_file(root / "model", _BYTES_MODEL)
    script.publish(root / "model", ref)
    order = replace(script.order(1), shells=(ref,))
    script.turn(2.0)
    before = agent.memory("VmRSS")
    Path(f"/proc/{agent.pid}/clear_refs").write_text("5")  # the high-water mark begins anew
    script.send(order)
    whole = agent.root / "state/spool" / ref.digest
    script.until(whole.exists, 120.0)
    peak = agent.memory("VmHWM")
    script.until(lambda: any(getattr(seen, "order", "") == order.id for seen in script.seen))
    script.send(Ack(order.id, "unwanted"))  # what it makes of random bytes
    script.clear(ref)
    return Row("agent, receives 64 MB over TLS", "memory more than before", (peak - before) / MIB, "MiB", "lower", 2.0)


def _grown(agent: Agent, script: Script, at_rest: int) -> Row:
    """Do many rounds, and come to rest."""
    for number in range(2, ROUNDS + 2):
        order = script.order(number)
        script.send(order)
        script.wait_update(order.id)
        script.commit(order.id)
        script.clear(order.shells[0])
    script.until(lambda: not agent.workers())
    script.turn(2.0)
    grown = agent.memory("VmRSS") - at_rest
    return Row(f"agent, after {ROUNDS} rounds and that", "resident more than at rest", grown / MIB, "MiB", "lower", 1.0)


def _worker_rows(root: Path) -> list[Row]:
    """Of each engine, a worker that has trained one batch of LeNet-5."""
    return [row for engine, target in _WORKERS.items() for row in _worker_row(root, engine, target)]


def _worker_row(root: Path, engine: str, target: float) -> list[Row]:
    spec = zoo.by_name("lenet-5")
    folder = root / engine
    folder.mkdir()
    arrays = random_arrays(spec, Structure(), scale=0.05)
    with _worker(_data(folder / "data.npz", spec, 64), preload=True, engine=engine) as (child, heard, ready):
        child.send(job(folder / "1", spec, arrays, [Structure()], Recipe(batch=32, steps=1, clip=1.0), number=1))
        while not isinstance(frame := _frame(heard), Done):
            assert not isinstance(frame, Failed), frame
        resident, highest = proc_memory(child.pid, "VmRSS"), proc_memory(child.pid, "VmHWM")
    case = f"worker, engine {engine} loaded"
    return [
        Row(case, "resident before its first order", ready.bytes_base / MIB, "MiB", "lower"),
        Row(case, "resident after one step of LeNet-5", resident / MIB, "MiB", "lower", target),
        Row(case, "highest during that step", highest / MIB, "MiB", "lower"),
    ]


def _peer_rows() -> list[Row]:
    rows = []
    for case, (package, code) in _PEERS.items():
        if importlib.util.find_spec(package) is not None:
            done = subprocess.run([sys.executable, "-c", code + _TELL], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                resident = int(done.stdout.split()[-1])
                rows.append(Row(case, "resident after its import", resident / MIB, "MiB", "lower"))
    return rows
