"""`edge-runtime check`: is this machine ready? One finding per question, each with what to do about it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.config import Config, load
from edge_runtime.memory import limit, probe
from wire.errors import ConfigError, NestlingError

MIB = 1 << 20
_BYTES_LEAST = 16 * MIB
_SECONDS_BROKER = 5.0
_SECONDS_TORCH = 180.0
_EARLIEST = 1_750_000_000  # seconds since 1970: a clock before this program was written is wrong
_TORCH = (
    "import torch; torch.set_num_threads(1);"
    "c = torch.nn.Conv2d(1, 4, 3); c(torch.zeros(2, 1, 8, 8)).sum().backward(); print(torch.__version__)"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One question's answer.

    Attributes:
        what: The question.
        fine: Whether this machine can take part as far as this goes.
        found: What was seen.
        advice: What to do; may also stand behind a fine one.
    """

    what: str
    fine: bool
    found: str
    advice: str = ""


def examine(path: Path) -> list[Finding]:
    """Ask everything; a question that breaks is an answer as well. Takes seconds: the engine is really run."""
    try:
        config = load(path)
    except ConfigError as error:
        return [Finding("configuration", fine=False, found=str(error), advice="mend the file and check again")]
    questions: list[Callable[[Config], Finding]] = [
        _clock,
        _disk,
        _memory,
        _group,
        _compression,
        _broker,
        _data,
        _engine,
        _kernels,
    ]
    findings = [Finding("configuration", fine=True, found=str(path))]
    for question in questions:
        try:
            findings.append(question(config))
        except (NestlingError, OSError) as error:
            findings.append(Finding(question.__name__.strip("_"), fine=False, found=str(error)))
    return findings


def _clock(_: Config) -> Finding:
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < _EARLIEST:
        return Finding(
            "clock", fine=False, found=shown, advice="set the time (timedatectl set-ntp true): TLS depends on it"
        )
    return Finding("clock", fine=True, found=shown)


def _disk(config: Config) -> Finding:
    root = Path(config.state.dir)
    root.mkdir(parents=True, exist_ok=True)
    mark = root / ".check"
    mark.write_bytes(b"x")
    mark.unlink()
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    if free < 64 * MIB:
        return Finding(
            "disk", fine=False, found=f"{free // MIB} MiB free in {root}", advice="make room or set [state] dir"
        )
    return Finding("disk", fine=True, found=f"{free // MIB} MiB free in {root}")


def _memory(config: Config) -> Finding:
    file = Path(config.state.dir) / limit.FILE
    try:
        told = limit.said(file)
    except ConfigError as error:
        advice = f'write an amount such as "24 MiB" into {file}, or delete it: as it is, it limits nothing'
        return Finding("memory", fine=False, found=f"{file}: {error}", advice=advice)
    free, whole = probe.available(), probe.total()
    allowed = min((most for most in (config.bytes_budget, told) if most), default=0)
    granted = probe.budget(allowed, config.bytes_reserve)
    found = (
        f"{free // MIB} of {whole // MIB} MiB available; an order may take {granted // MIB} MiB above the worker's base"
    )
    found += f" ({file} allows {told // MIB} MiB)" if told else ""
    if granted < _BYTES_LEAST:
        advice = "end other programs, or lower [memory] reserve"
        advice = f"delete {file}, or allow more in it" if 0 < told < _BYTES_LEAST else advice
        return Finding("memory", fine=False, found=found, advice=advice)
    if config.bytes_budget and granted < allowed:
        return Finding("memory", fine=True, found=found, advice="[memory] budget is more than what is free now")
    return Finding("memory", fine=True, found=found)


def _group(_: Config) -> Finding:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    listed = controllers.read_text("ascii").split() if controllers.is_file() else []
    if "memory" in listed or Path("/sys/fs/cgroup/memory").is_dir():
        return Finding("memory control group", fine=True, found="there")
    return Finding(
        "memory control group",
        fine=True,
        found="not there: a unit's MemoryMax= would be ignored; our own limit (RLIMIT_DATA) works",
        advice="on a Raspberry Pi, append 'cgroup_enable=memory' to /boot/firmware/cmdline.txt and restart",
    )


def _compression(_: Config) -> Finding:
    for name in ("zstandard", "compression.zstd"):
        try:
            if importlib.util.find_spec(name) is not None:
                return Finding("compression", fine=True, found=name)
        except ModuleNotFoundError:
            continue
    return Finding("compression", fine=False, found="no zstandard", advice="pip install zstandard, or use Python 3.14")


def _broker(config: Config) -> Finding:
    from edge_runtime.life import address, client_id
    from wire.link import Down, Up
    from wire.link.mqtt import MqttLink

    where = address(config)
    link = MqttLink(where, f"{client_id(config)}:check", session_seconds=0, keepalive=10)
    link.start()
    until = time.monotonic() + _SECONDS_BROKER
    why = f"no answer in {_SECONDS_BROKER:g} s"
    try:
        while time.monotonic() < until:
            event = link.next(0.2)
            if isinstance(event, Up):
                return Finding("broker", fine=True, found=f"{where} speaks MQTT 5 and lets us in")
            if isinstance(event, Down):
                why = event.why
                if event.refused:
                    break
    finally:
        link.stop()
    advice = "is the coordinator (or the broker) running, is [broker] url right, does a firewall stand between?"
    return Finding("broker", fine=False, found=f"{where}: {why}", advice=advice)


def _data(config: Config) -> Finding:
    from edge_runtime.data import load as load_data

    data = load_data(config.data)
    count = len(data.train[1])
    found = f"{data.name}: {count} to train on, {len(data.test[1])} to test, {data.classes} classes, {data.input_shape}"
    if not count:
        return Finding(
            "data", fine=False, found=found, advice="lower [data] validation and test, or bring more samples"
        )
    return Finding("data", fine=True, found=found)


def _engine(_: Config) -> Finding:
    from edge_runtime.engines import available

    if not available():
        advice = "pip install 'nestling[torch]' (on a Raspberry Pi with -c constraints.txt)"
        return Finding("engine", fine=False, found="none is installed", advice=advice)
    done = subprocess.run(
        [sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=_SECONDS_TORCH, check=False
    )
    if done.returncode == 0:
        return Finding("engine", fine=True, found=f"torch {done.stdout.strip()} convolves forward and back")
    if done.returncode == -4:
        advice = "this torch was built for a newer processor: pip install 'torch==2.9.1'"
        return Finding("engine", fine=False, found="torch dies with an illegal instruction (SIGILL)", advice=advice)
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    advice = "install the build for this machine: pip install -c constraints.txt 'nestling[torch]'"
    return Finding("engine", fine=False, found=f"torch ended with {done.returncode}: {last}", advice=advice)


def _kernels(_: Config) -> Finding:
    from edge_runtime.kernels import library

    found = library.open_library()
    if found is not None:
        return Finding("kernels", fine=True, found=f"compiled for {found.isa}")
    return Finding(
        "kernels",
        fine=True,
        found=f"none compiled, torch does sparse layers more slowly: {library.why_not()}",
        advice=f"install clang or g++ (Termux: pkg install clang) and run: {library.AGAIN}",
    )
