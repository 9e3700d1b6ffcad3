"""An emulated Raspberry Pi 3: Debian for arm64 as a Cortex-A53, what pip installs there, `check`, and a real training order.

  python -m tests pi                     four to eight minutes the first time, then two to five; needs root
  python -m tests pi --torch 2.10.0      a wheel that such a processor cannot run: it fails, and says why
  python -m tests pi --cpu cortex-a76    as a Raspberry Pi 5
  python -m tests pi --engine native     without torch, in 64 bits as a Cortex-A53 and in 32 as a Cortex-A7: a worker does
                                         orders, dense and masked, as one here does, then an agent does; SECONDS
  python -m tests pi --engine native --arch armhf --suite trixie    one of them; another Debian

The root filesystem and the wheels stay in --keep (default .pi). Broker and coordinator run on this machine, the agent and its
worker under the emulator, which changes nothing here: mounts and the kernel's word about foreign programs are in namespaces
of their own. Seconds say how long this takes here, nothing about a Pi; memory includes the emulator's own; a memory limit is
not enforced under it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.bench import Row, outcome, table
from tests.support.emulated import CPUS, KINDS, SUITE, Guest, debian
from tests.support.federation import Federation
from tests.support.mosquitto import proc_memory
from tests.support.wheels import fetch, own_wheel

ROOT = Path(__file__).parents[2]
APT = "sudo apt-get install mmdebstrap qemu-user-static util-linux mosquitto"
NEEDED = ("mmdebstrap", "qemu-aarch64-static", "unshare")
TORCH = "2.9.1"
OWN = ("wire", "edge_runtime", "coordinator")
CROSS = "aarch64-linux-gnu-g++"
ARM64 = sorted(name for name, (arch, *_) in CPUS.items() if arch == "arm64")
MIB = 1 << 20
ROUNDS = 2
SECONDS_ORDER = 400.0
CONFIG = """\
federation = "test"
device = "device-0"
[broker]
url = "mqtt://127.0.0.1:{port}"
[data]
source = "npz"
path = "{work}/device-0.npz"
validation = 0.1
test = 0.1
[memory]
budget = "96 MiB"
[worker]
threads = 1
priority = "normal"
[state]
dir = "{work}/state"
"""


class Unfit(Exception):
    """What is to be shown cannot be: the text says what and why."""


def main(words: list[str]) -> int:
    """Make the machine, install, check, train; 0 when all of it went well, 1 when not, 2 when tools are missing."""
    parser = argparse.ArgumentParser(
        "python -m tests pi", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, default=ROOT / ".pi", metavar="FOLDER", help="default: .pi")
    parser.add_argument("--torch", default=TORCH, metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--cpu", choices=ARM64, default="cortex-a53", help="of --engine torch; default: %(default)s")
    parser.add_argument("--engine", choices=("torch", "native"), default="torch", help="default: %(default)s")
    parser.add_argument(
        "--arch", type=_names, default=list(KINDS), metavar="A,B", help="of --engine native; default: all"
    )
    parser.add_argument("--suite", default=SUITE, help="of --engine native, a Debian; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON object")
    options = parser.parse_args(words)
    native = importlib.import_module("tests.long._native_devices") if options.engine == "native" else None
    missing = native.missing(options.arch) if native else [tool for tool in NEEDED if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        apt = native.APT if native else APT
        print(f"not here: {', '.join(missing)}\n{apt}" if missing else "needs root: sudo", file=sys.stderr)
        return 2
    keep = options.keep.resolve()
    try:
        rows = native.run(keep, options.arch, options.suite) if native else run(keep, options.torch, options.cpu)
    except (Unfit, AssertionError, subprocess.SubprocessError) as error:
        print(f"pi: {error}", file=sys.stderr)
        return 1
    what = f"{', '.join(options.arch)}, {options.suite}" if native else f"{options.cpu}, torch {options.torch}"
    result = outcome(f"pi ({what})", rows)
    print(json.dumps(result, indent=1) if options.json else table(result))
    return 0 if result["holds"] else 1


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - KINDS.keys():
        raise argparse.ArgumentTypeError(f"no {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    return names


def run(keep: Path, torch: str, cpu: str) -> list[Row]:
    """Do all of it; gives the rows."""
    root, work = keep / "root", keep / f"work-{torch}"
    say(f"Debian {SUITE} for arm64 in {root}")
    debian(root)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    guest = Guest(root, work, cpu)
    home = installed(guest, keep, torch)
    rows = footprint(root, home)
    with Federation(work, model="digits-cnn", devices=1, rounds=ROUNDS, seconds=SECONDS_ORDER, keepalive=60.0) as fed:
        fed.recipe = {"rule": "sgd", "epochs": 2, "batch": 8, "rate": 0.1, "momentum": 0.9}
        fed.save_data("device-0")
        config = work / "device-0.toml"
        config.write_text(CONFIG.format(port=fed.broker.port, work=work))
        say("edge-runtime check")
        rows.append(checked(guest, home, config))
        say(f"{ROUNDS} orders over a real broker")
        return rows + trained(guest, home, config, fed)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- install ---------------------------------------------------------------------------------------------------------


def installed(guest: Guest, keep: Path, torch: str) -> str:
    """Install as on a device: an environment of its own, pip, the pinned versions. Gives its folder, as seen inside."""
    home = f"/opt/torch-{torch}"
    outside, site = guest.root / home[1:], f"{home}/lib/python{guest.version}/site-packages"
    wheels = keep / f"wheels-{torch}"
    own = own_wheel(wheels, CROSS if shutil.which(CROSS) else "false")
    if own.stem.endswith("any"):
        say(f"no {CROSS} here: without compiled kernels")
    ready, constraints = outside / "complete", pins(torch)
    if not ready.exists():
        say(f"fetching wheels for linux_aarch64, Python {guest.version}, torch {torch}")
        fetch(wheels, guest.version, ["nestling", f"torch=={torch}"], constraints)
    guest.lend(wheels, "wheels")
    pip = [f"{home}/bin/python", "-m", "pip", "--python", f"{home}/bin/python", "install", "--no-index", "-q"]
    pip += ["--no-compile", "--root-user-action=ignore", "--find-links", str(guest.work / "wheels")]
    if not ready.exists():
        say("pip install, emulated: a minute or two")
        shutil.rmtree(outside, ignore_errors=True)
        (guest.work / "constraints.txt").write_text(constraints)
        heard(guest.words(guest.python, "-m", "venv", "--system-site-packages", "--without-pip", home))
        heard(guest.words(*pip, "-c", str(guest.work / "constraints.txt"), "nestling", f"torch=={torch}"))
        guest.compile(site, f"/usr/lib/python{guest.version}", "/usr/lib/python3")
        ready.touch()
    heard(guest.words(*pip, "--no-deps", "--force-reinstall", str(guest.work / "wheels" / own.name)))
    guest.compile(*(f"{site}/{name}" for name in OWN))
    return home


def pins(torch: str) -> str:
    """Give the constraints that the tests run with, with this torch."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return "\n".join([*(line for line in lines if not line.startswith("torch")), f"torch=={torch}", ""])


def footprint(root: Path, home: str) -> list[Row]:
    """Count what pip has put onto the card."""
    (site,) = (root / home[1:] / "lib").glob("python3.*/site-packages")
    sizes = {"torch": 0, "what torch needs": 0, "nestling": 0, "what nestling needs": 0}
    core = {"paho", "msgpack", "numpy", "numpy.libs", "psutil", "zstandard"}
    for path in site.rglob("*"):
        if path.is_file() and not path.is_symlink():
            top = path.relative_to(site).parts[0]
            of = top.partition("-")[0] if top.endswith(".dist-info") else top
            of = {"paho_mqtt": "paho", "nestling": "wire"}.get(of, of)
            part = "nestling" if of in OWN else "what nestling needs" if of in core else "what torch needs"
            sizes["torch" if of.startswith(("torch", "functorch")) else part] += path.stat().st_blocks * 512
    return [Row("pip install", f"{part}, with .pyc", size / 1e6, "MB", "lower") for part, size in sizes.items()]


# --- run -------------------------------------------------------------------------------------------------------------


def checked(guest: Guest, home: str, config: Path) -> Row:
    """Run `edge-runtime check` there, and show what it finds.

    Raises:
        Unfit: Something is not fine; the text is what `check` says to the operator.
    """
    words = guest.words(f"{home}/bin/edge-runtime", "check", "--json", "--config", str(config))
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    try:
        findings = json.loads(done.stdout)["findings"]
    except (ValueError, KeyError):
        raise Unfit(f"check ended with {done.returncode}: {done.stdout}{done.stderr}") from None
    for found in findings:
        say(f"  {'ok  ' if found['fine'] else 'FAIL'} {found['what']}: {found['found']}")
    if wrong := [found for found in findings if not found["fine"]]:
        raise Unfit("; ".join(f"{found['what']}: {found['found']}\n     -> {found['advice']}" for found in wrong))
    return Row("edge-runtime check", "findings that are fine", len(findings), "", "higher", len(findings))


def trained(guest: Guest, home: str, config: Path, fed: Federation) -> list[Row]:
    """Let a coordinator of this machine lead the agent there through its orders."""
    fed.start_coordinator()
    began = time.monotonic()
    fed.begin("device-0", guest.words(f"{home}/bin/edge-runtime", "run", "--config", str(config)))
    agent = fed.processes["device-0"]
    fed.wait(lambda view: bool(view.rounds), 120)
    born = time.monotonic() - began
    idle = proc_memory(agent.pid, "VmRSS")
    view = fed.wait_finished(SECONDS_ORDER)
    usages = [reply.usage for turn in view.rounds.values() for reply in turn.replies.values()]
    if len(usages) < fed.rounds:
        raise Unfit(f"only {len(usages)} of {fed.rounds} orders were done:\n{fed.logs()}")
    spent, last = usages[0], usages[-1]
    bare = empty(guest)
    return [
        Row("idle agent, emulated", "start to asked for", born, "s", "lower"),
        Row("idle agent, emulated", "RSS, emulator included", idle / MIB, "MiB", "lower"),
        Row("idle agent, emulated", "of that, an empty Python's", bare / MIB, "MiB", "lower"),
        Row("order", "done", len(usages), "", "higher", fed.rounds),
        Row("order", f"by engine {last.engine}, first", spent.seconds, "s", "lower"),
        Row("order", f"by engine {last.engine}, last", last.seconds, "s", "lower"),
        Row("order", "worker's base, emulator included", last.bytes_base / MIB, "MiB", "lower"),
        Row("order", "peak above it", last.bytes_peak / MIB, "MiB", "lower", last.bytes_budget / MIB),
    ]


def empty(guest: Guest) -> int:
    """Give the RSS of a Python that does nothing, under the same emulator."""
    words = guest.words(guest.python, "-c", "print(1, flush=True); input()")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as python:
        assert python.stdout is not None
        python.stdout.readline()
        size = proc_memory(python.pid, "VmRSS")
        python.communicate(b"\n", timeout=30)
    return size


def heard(words: list[str]) -> None:
    """Run something that must end well.

    Raises:
        Unfit: It did not; the text is the end of what it said.
    """
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500, check=False)
    if done.returncode:
        raise Unfit(f"{' '.join(words[-4:])} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
