"""One real agent under test, and a scripted coordinator that speaks to it over a real broker."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from tests.support.mosquitto import proc_memory
from wire import codec, link, messages, topics, zoo
from wire import spec as specs
from wire import structure as cutting
from wire.chunks import read_piece
from wire.link.mqtt import Address, MqttLink
from wire.messages import Ack, Beat, BlobRef, Lead, Need, Order, Presence, Recipe, Refusal, Reply
from wire.spec import Structure
from wire.tensor import open_blob, write_blob

RUN = "ab" * 8
KINDS = {"reply": Reply, "refusal": Refusal, "beat": Beat, "need": Need}


@dataclass
class Agent:
    """`edge-runtime run` as a process; everything of it lives below `root`."""

    root: Path
    port: int
    federation: str = "test"
    name: str = "d0"
    mode: str = "auto"
    budget: int | str = "512 MiB"
    samples: int = 40
    more: str = ""
    tables: str = ""
    broker: str = ""
    priority: str = "normal"
    engine: str = "native"
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True)
        data = self.root / "data.npz"
        if not data.exists():
            rng = np.random.default_rng(7)
            x = rng.random((self.samples, 64)).astype(np.float32)
            np.savez(data, x=x, y=rng.integers(0, 10, self.samples), classes=10)
        broker = self.broker or f'url = "mqtt://127.0.0.1:{self.port}"'
        self.config.write_text(
            f'federation = "{self.federation}"\ndevice = "{self.name}"\n[broker]\n{broker}\n'
            f'[data]\nsource = "npz"\npath = "{data}"\n[memory]\nbudget = "{self.budget}"\n'
            f'[worker]\nmode = "{self.mode}"\npriority = "{self.priority}"\nengine = "{self.engine}"\n{self.more}\n'
            f'[state]\ndir = "{self.root / "state"}"\n{self.tables}\n'
        )
        argv = [sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(self.config)]
        with self.log.open("ab") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1", **self.env}
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        return self

    @property
    def config(self) -> Path:
        return self.root / "device.toml"

    @property
    def log(self) -> Path:
        return self.root / "agent.log"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def workers(self) -> list[int]:
        """The pids of its children."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def memory(self, key: str = "VmRSS") -> int:
        return proc_memory(self.pid, key)

    def cpu(self) -> float:
        """Seconds of processor time of the agent alone."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """End it without a word."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to leave; gives the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(10)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


@dataclass
class Upload:
    """What has come of one order's update."""

    reply: Reply
    pieces: dict[int, bytes] = field(default_factory=dict)
    sent: int = 0

    @property
    def complete(self) -> bool:
        return self.reply.update is None or len(self.pieces) == self.reply.update.pieces

    @property
    def have(self) -> bytes:
        return sum(1 << i for i in self.pieces).to_bytes(64, "little")

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in sorted(self.pieces.items()))


class Script:
    """A coordinator that does only what the test says, apart from taking in pieces."""

    def __init__(self, port: int, folder: Path, *, federation: str = "test", keepalive: float = 2.0) -> None:
        self.federation = federation
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.link = MqttLink(Address("127.0.0.1", port), f"{federation}-script", session_seconds=60, keepalive=10)
        self.seen: list[Any] = []
        self.uploads: dict[str, Upload] = {}
        self.drop: Callable[[int], bool] = lambda _: False
        self.acks = True
        self.lead = Lead("online", "c0" * 8, RUN, keepalive)
        self.link.subscribe([topics.all_up(self.federation), topics.presence(self.federation, "+")])
        self.link.start()
        self.wait(link.Up)
        self.say_lead()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.stop()

    # --- out

    def say_lead(self, boot: str = "", run: str = "") -> None:
        self.lead = replace(self.lead, boot=boot or self.lead.boot, run=run or self.lead.run)
        self.link.publish(topics.lead(self.federation), codec.encode(self.lead), retain=True)

    def send(self, message: Any, device: str = "d0") -> None:
        kind = {Order: "order", Ack: "ack", messages.Cancel: "cancel"}[type(message)]
        self.link.publish(topics.down(self.federation, device, kind), codec.encode(message))

    def publish(self, path: Path, ref: BlobRef, skip: Callable[[int], bool] = lambda _: False) -> None:
        for index in range(ref.pieces):
            if not skip(index):
                topic = topics.piece(self.federation, ref.digest, index)
                self.link.publish(topic, read_piece(path, ref, index), retain=True)

    def clear(self, ref: BlobRef) -> None:
        for index in range(ref.pieces):
            self.link.publish(topics.piece(self.federation, ref.digest, index), b"", retain=True)

    def order(self, number: int, *, model: str = "linear", publish: bool = True, **changes: Any) -> Order:
        """Make an order over the whole of a model with weights that depend on its number, and publish its blobs."""
        spec = zoo.by_name(model)
        rng = np.random.default_rng(number)
        shapes = specs.tensor_shapes(spec, Structure())
        arrays = {n: (0.1 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}
        text, weights = self.folder / f"{model}.spec", self.folder / f"{model}.{number}"
        text.write_bytes(specs.encode(spec))
        shell = write_blob(weights, "shell", cutting.shell(spec, arrays, Structure()), meta={"capacity": 0})
        text_ref = BlobRef(hashlib.sha256(text.read_bytes()).hexdigest(), text.stat().st_size)
        if publish:
            self.publish(text, text_ref)
            self.publish(weights, shell)
        order = Order(
            id=f"{number:016x}",
            run=self.lead.run,
            round=number,
            device="d0",
            verb="train",
            spec=text_ref,
            shells=(shell,),
            structures=(Structure(),),
            recipe=Recipe(rule="still", batch=8),
            seconds=60.0,
        )
        return replace(order, **changes)

    def file_of(self, order: Order, model: str = "linear") -> Path:
        return self.folder / f"{model}.{order.round}"

    def commit(self, order: str) -> None:
        self.send(Ack(order, "committed"))

    def commit_to(self, order: str, device: str) -> None:
        self.send(Ack(order, "committed"), device)

    # --- in

    def wait(self, kind: type, seconds: float = 20.0, where: Callable[[Any], bool] = lambda _: True) -> Any:
        """Take events until there is one of this kind; what came earlier and was not waited for yet counts."""
        until = time.monotonic() + seconds
        while True:
            for index, message in enumerate(self.seen):
                if isinstance(message, kind) and where(message):
                    return self.seen.pop(index)
            if time.monotonic() > until:
                raise AssertionError(f"no {kind.__name__} within {seconds} s; saw {str(self.seen)[:2000]}")
            self.turn(0.05)

    def wait_update(self, order: str, seconds: float = 30.0) -> Upload:
        """Take events until an update is here as a whole."""
        until = time.monotonic() + seconds
        while order not in self.uploads or not self.uploads[order].complete:
            assert time.monotonic() < until, f"no update within {seconds} s; saw {str(self.seen)[:2000]}"
            self.turn(0.05)
        return self.uploads[order]

    def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Go on talking until something holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s; saw {str(self.seen)[:2000]}"
            self.turn(0.02)

    def turn(self, seconds: float = 0.0) -> None:
        """Take in what comes within some time."""
        event: Any = self.link.next(seconds)
        while event is not None:
            if isinstance(event, link.Message):
                self._message(event)
                self.link.done(event)
            elif isinstance(event, link.Up):
                self.seen.append(event)
                if hasattr(self, "lead"):
                    self.say_lead()
            event = self.link.next(0.0)

    def _message(self, message: link.Message) -> None:
        place = topics.parse(message.topic)
        if place.index >= 0:
            self._piece(place.kind, place.index, message.payload)
            return
        if place.room == "s":
            if message.payload:
                self.seen.append(codec.decode(message.payload, Presence))
            return
        told = codec.decode(message.payload, KINDS[place.kind])
        self.seen.append(told)
        if isinstance(told, Reply):
            upload = self.uploads.setdefault(told.order, Upload(told))
            upload.reply = told
            if told.update is not None and self.acks:
                self.send(Ack(told.order, "more", upload.have), told.device)

    def _piece(self, order: str, index: int, data: bytes) -> None:
        upload = self.uploads.get(order)
        if upload is None or self.drop(index):
            return
        upload.pieces[index] = data
        upload.sent += 1
        if upload.sent % 8 == 0 and self.acks:
            self.send(Ack(order, "more", upload.have), upload.reply.device)


def tensors(data: bytes, folder: Path) -> dict[str, Any]:
    """Read an update's arrays."""
    path = folder / f"read.{hashlib.sha256(data).hexdigest()[:8]}"
    path.write_bytes(data)
    with open_blob(path) as blob:
        return {name: np.array(blob.tensor(name)) for name in blob.names}
