"""Questions about what is installed: packages, compression, the engine (which is run), the compiled kernels."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

from edge_runtime import identity
from edge_runtime.config import Config
from edge_runtime.health.finding import Finding, Machine
from wire.errors import ConfigError

_SECONDS_TORCH = 180.0
_KEYS = {"cryptography": "cryptography"}
_CORE = {"paho.mqtt": "paho-mqtt", "msgpack": "msgpack", "numpy": "numpy"}
_TERMUX = {
    "paho-mqtt": "pip install paho-mqtt",
    "msgpack": "pkg install python-msgpack",
    "numpy": "pkg install python-numpy",
    "cryptography": "pkg install python-cryptography",
}
MISSING = "none is installed"
_OLDEST = (2, 6)
_TRIED = """
import json, sys
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit(print(json.dumps({"missing": True})))
torch.set_num_threads(1)
torch.nn.Conv2d(1, 4, 3)(torch.zeros(2, 1, 8, 8)).sum().backward()
print(json.dumps({"version": str(torch.__version__), "cuda": torch.version.cuda or ""}))
"""
_CUDA = re.compile(r"lib(?:cu[a-z]+|nv[A-Za-z]+|nccl|torch_cuda)\S*\.so\S*")


def packages(config: Config, where: Machine) -> Finding:
    """Ask for what every device needs, and for what one needs that takes signed orders only."""
    version = f"Python {platform.python_version()}"
    wanted = {**_CORE, **_KEYS} if _is_enrolled(config) else _CORE
    missing = [package for name, package in wanted.items() if not _is_there(name)]
    if not missing:
        return Finding("packages", fine=True, found=f"{version}, {', '.join(wanted.values())}")
    advice = "; ".join(_TERMUX[name] for name in missing) if where.android else f"pip install {' '.join(missing)}"
    return Finding("packages", fine=False, found=f"{version}, no {', no '.join(missing)}", advice=advice)


def compression(_: Config, where: Machine) -> Finding:
    """Ask for one of the two libraries that `wire.zstd` can do with."""
    for name in ("zstandard", "compression.zstd"):
        if _is_there(name):
            return Finding("compression", fine=True, found=name)
    advice = "pip install zstandard, or use Python 3.14, which has it"
    advice = "pkg upgrade: Termux's Python has it from 3.14 on" if where.android else advice
    return Finding("compression", fine=False, found="no zstandard", advice=advice)


def _is_enrolled(config: Config) -> bool:
    try:
        return bool(config.broker.cert) and identity.read(Path(config.broker.cert)) is not None
    except ConfigError:
        return False  # the broker's check says so


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not
        return False


def engine(_: Config, where: Machine) -> Finding:
    """Have a child convolve forward and back: an engine that is installed may still die of an instruction it lacks."""
    words = [where.python, "-c", _TRIED]
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS_TORCH,
            check=False,
        )
    except subprocess.TimeoutExpired:
        advice = "storage may be slow the first time: check again; python -m compileall writes what an import waits for"
        return Finding("engine", fine=False, found=f"torch did not convolve within {_SECONDS_TORCH:g} s", advice=advice)
    if done.returncode == 0:
        return _engine_runs(done.stdout, where)
    found, advice = _why(done.returncode, done.stderr, where)
    return Finding("engine", fine=False, found=found, advice=advice)


def _engine_runs(told: str, where: Machine) -> Finding:
    try:
        said = json.loads((told.splitlines() or [""])[-1])
        version, cuda = str(said.get("version", "")), str(said.get("cuda", ""))
    except (ValueError, AttributeError):
        return Finding("engine", fine=False, found=f"{where.python} says {told[:80]!r}", advice=_get_torch(where))
    if not version:
        return Finding("engine", fine=False, found=MISSING, advice=_get_torch(where))
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _OLDEST:
        return Finding("engine", fine=False, found=f"torch {version} is older than 2.6", advice=_get_torch(where))
    found = f"torch {version} convolves forward and back"
    if cuda and not (where.root / "proc/driver/nvidia").exists():
        found += f"; it is built for CUDA {cuda}, which this machine has no use for"
        return Finding("engine", fine=True, found=found, advice=f"to save gigabytes of disk: {_get_torch(where)}")
    return Finding("engine", fine=True, found=found)


def _why(code: int, stderr: str, where: Machine) -> tuple[str, str]:
    """Give what a torch that ended with a code was seen to do, and what to do about it."""
    code = 128 - code if code > 128 else code  # a shell or an emulator in between gives 128 + signal
    last = (stderr.strip().splitlines() or ["no word"])[-1]
    library = _CUDA.search(stderr)
    if code == -signal.SIGILL:
        found = "torch dies with an illegal instruction (SIGILL)"
        if where.processor == "aarch64" and "atomics" not in where.text("proc/cpuinfo").split():
            found += ": this processor has no atomics (ARMv8.0, as in a Raspberry Pi 3, 4 and Zero 2 W)"
        return found, f"this torch was built for a newer processor: {_get_torch(where)}"
    if library is not None:
        found = f"torch is built for CUDA and wants {library[0].strip(':,')}, which this machine lacks"
        return found, f"install a build without CUDA: {_get_torch(where)}"
    if "nsupported system page size" in stderr:
        advice = "unset LD_PRELOAD; on a Raspberry Pi 5 also: append 'kernel=kernel8.img' to /boot/firmware/config.txt"
        return f"an allocator dies of this kernel's pages of {where.bytes_page >> 10} KiB", advice
    if code == -signal.SIGKILL:
        who = "Android (see the phantom process killer)" if where.android else "the kernel, for want of memory"
        return f"torch was killed, probably by {who}", "torch alone takes some 220 MiB: end other programs"
    if code < 0:
        return f"torch dies of signal {-code}: {last}", f"install the build for this machine: {_get_torch(where)}"
    return f"torch ended with {code}: {last}", f"install the build for this machine: {_get_torch(where)}"


def _get_torch(where: Machine) -> str:
    if not where.is_64:
        return "there is no torch for a 32-bit system: install the 64-bit one (Raspberry Pi OS 64-bit)"
    if where.android:
        return "pkg install python-torch"
    if where.processor in ("aarch64", "arm64"):
        return "pip install 'torch==2.9.1', the newest that runs on every 64-bit Raspberry Pi"
    return "pip install -c constraints.txt 'nestling[torch]'"


def kernels(_: Config, where: Machine) -> Finding:
    """Ask for the compiled core, and where it lacks, for a compiler."""
    from edge_runtime.kernels import library
    from edge_runtime.kernels.compile import COMPILERS

    found = library.open_library()
    if found is not None:
        return Finding("kernels", fine=True, found=f"compiled for {found.isa}")
    get = "pkg install clang" if where.android else "sudo apt-get install g++"
    advice = f"run: {library.AGAIN}"
    if not any(map(shutil.which, COMPILERS)):
        advice = f"there is no C++ compiler: {get}, then {advice}"
    shown = f"none compiled, sparse layers are done more slowly: {library.why_not()}"
    return Finding("kernels", fine=True, found=shown, advice=advice)
