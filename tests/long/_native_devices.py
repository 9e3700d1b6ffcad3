"""A whole device without torch on emulated 64-bit and 32-bit processors: `python -m tests pi --engine native`.

Each machine is a Debian of its own with its own numpy: for arm64 what pip installs; for armhf, for which few wheels are
made, what Debian has (Debian 12: numpy 1.24, whose scalars promote by older rules, and msgpack and zstandard older than
pip would have). A worker there does real orders over the digits, dense and with masks, through its own door, and so does
one here with the same engine; what they give is compared. Then an agent there does the orders of a coordinator here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coordinator.blocks.initial import initial_weights
from edge_runtime.kernels.compile import CompileError, compiler
from edge_runtime.spawn import command
from tests.bench import Row
from tests.long import pi
from tests.support.emulated import KINDS, Guest, debian
from tests.support.federation import Federation
from tests.support.orders import job, masked_job, some_masks
from tests.support.wheels import fetch, own_wheel
from tests.support.workers import orders
from wire import zoo
from wire.job import Done, Job
from wire.maskfile import outline_of_model
from wire.messages import Recipe
from wire.spec import Structure
from wire.tensor import open_blob

APT = "sudo apt-get install mmdebstrap qemu-user-static util-linux mosquitto g++-aarch64-linux-gnu g++-arm-linux-gnueabihf"
CPU = {"arm64": "cortex-a53", "armhf": "cortex-a7"}
DEBIANS = {
    "arm64": (),
    "armhf": ("python3-numpy", "libopenblas0-pthread", "python3-msgpack", "python3-zstandard", "python3-psutil"),
}
"""What comes from Debian and not by pip."""
HOME = "/opt/native"
MIB = 1 << 20
SECONDS_ORDER = 400.0
TORCH = "No module named 'torch'"
APART = 1e-4
"""How far a tensor's update may be from this machine's, of its greatest move: other processors and matrix libraries add in
another order, and 32-bit ARM takes the smallest numbers for zero."""
RECIPE = Recipe(rule="sgd", batch=16, rate=0.05, momentum=0.9, steps=20, seed=7)
SOURCE = json.dumps({"source": "digits", "validation": 0.1, "test": 0.1})
IMPORTS = """
import importlib, json, pkgutil
found = {}
for top in ("wire", "edge_runtime"):
    for module in pkgutil.walk_packages(importlib.import_module(top).__path__, top + "."):
        try:
            importlib.import_module(module.name)
            found[module.name] = ""
        except Exception as error:
            found[module.name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """What a worker is to train.

    Attributes:
        model: Of the zoo.
        density: Of its masks; 0 for none.
    """

    model: str
    density: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.model}, {f'{self.density:.0%} kept' if self.density else 'dense'}"

    @property
    def folder(self) -> str:
        return f"{self.model}-{self.density:g}"


CASES = (Case("digits-mlp"), Case("digits-mlp", 0.2), Case("digits-cnn-bn"), Case("digits-cnn", 0.05))


def missing(arches: list[str]) -> list[str]:
    """Name the tools that are not here."""
    tools = ["mmdebstrap", "unshare", "mosquitto", *(KINDS[arch].emulator for arch in arches)]
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    found = [tool for tool in tools if shutil.which(tool, path=path) is None]
    for arch in arches:
        try:
            compiler(KINDS[arch].cxx)
        except CompileError:
            found.append(KINDS[arch].cxx)
    return found


def run(keep: Path, arches: list[str], suite: str) -> list[Row]:
    """Do all of it on each machine; gives the rows."""
    rows: list[Row] = []
    for arch in arches:
        began = time.monotonic()
        root = keep / f"root-{suite}-{arch}"
        pi.say(f"Debian {suite} for {arch} in {root}")
        debian(root, suite, arch, DEBIANS[arch])
        work = keep / f"work-{suite}-{arch}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        guest = Guest(root, work, CPU[arch])
        installed(guest, keep, arch)
        where = f"{arch} as {guest.cpu}"
        rows += [imported(guest, where), *worked(guest, where), *took_part(guest, where)]
        rows.append(Row(where, "all of it", time.monotonic() - began, "s", "lower"))
    return rows


# --- install ---------------------------------------------------------------------------------------------------------


def installed(guest: Guest, keep: Path, arch: str) -> None:
    """Install as on a device, without an extra and so without torch: an environment of its own, pip, our own wheel."""
    outside, wheels = guest.root / HOME[1:], keep / f"wheels-{guest.version}-{arch}"
    constraints, debians = pi.pins("0"), DEBIANS[arch]
    own = own_wheel(wheels, guest.kind.cxx, guest.kind.wheels)
    ready = outside / "complete"
    if not ready.exists():
        pi.say(f"fetching wheels for {guest.kind.machine}, Python {guest.version}")
        fetch(wheels, guest.version, ["paho-mqtt" if debians else "nestling"], constraints, guest.kind.machine)
    guest.lend(wheels, "wheels")
    python, site = f"{HOME}/bin/python", f"{HOME}/lib/python{guest.version}/site-packages"
    pip = [python, "-m", "pip", "--python", python, "install", "--no-index", "-q", "--no-compile"]
    pip += ["--root-user-action=ignore", "--find-links", str(guest.work / "wheels")]
    if not ready.exists():
        pi.say("pip install, emulated: half a minute")
        shutil.rmtree(outside, ignore_errors=True)
        (guest.work / "constraints.txt").write_text(constraints)
        guest.compile(f"/usr/lib/python{guest.version}", "/usr/lib/python3")  # pip's own, among others
        pi.heard(guest.words(guest.python, "-m", "venv", "--system-site-packages", "--without-pip", HOME))
        named = ["--no-deps", "nestling", "paho-mqtt"] if debians else ["nestling"]
        pi.heard(guest.words(*pip, "-c", str(guest.work / "constraints.txt"), *named))
        guest.compile(site)
        ready.touch()
    pi.heard(guest.words(*pip, "--no-deps", "--force-reinstall", str(guest.work / "wheels" / own.name)))
    guest.compile(*(f"{site}/{name}" for name in pi.OWN))


def imported(guest: Guest, where: str) -> Row:
    """Load every module of the device there; none may fail but for torch.

    Raises:
        Unfit: One does.
    """
    words = guest.words(f"{HOME}/bin/python", "-c", IMPORTS)
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise pi.Unfit(f"{where}: modules do not load: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    wrong = {name: why for name, why in found.items() if why and TORCH not in why}
    if wrong or not any(TORCH in why for why in found.values()):
        raise pi.Unfit(f"{where}: {wrong or 'torch is there'}")
    return Row(where, "modules that load without torch", sum(not why for why in found.values()), "", "higher", 1)


# --- a worker --------------------------------------------------------------------------------------------------------


def worked(guest: Guest, where: str) -> list[Row]:
    """Let one worker there and one here do the same orders; gives what they took, and how far apart they are."""
    follows = [*command(SOURCE, engine="native"), "--preload"]
    rows, here, there = [], guest.work / "here", guest.work / "there"
    jobs = [made(case, guest.work / "orders" / case.folder) for case in CASES]
    kin = orders(
        [sys.executable, "-P", "-m", *follows], jobs, here, SECONDS_ORDER, env=os.environ | {"PYTHONPATH": str(pi.ROOT)}
    )
    pi.say(f"{where}: a worker, {len(jobs)} orders of {RECIPE.steps} steps")
    found = orders(guest.words(f"{HOME}/bin/python", "-m", *follows), jobs, there, SECONDS_ORDER * len(jobs))
    for case, order, ours, theirs in zip(CASES, jobs, kin, found, strict=True):
        usage, metrics = theirs.usage, theirs.metrics
        if usage.engine != "native":
            raise pi.Unfit(f"{where}: the order was done by engine {usage.engine!r}")
        name, furthest = f"{where}: {case.name}", apart(case, order, ours, theirs)
        rows += [
            Row(name, "loss afterwards, of before", loss_of(metrics), "", "lower", 0.9),
            Row(name, "accuracy afterwards", metrics["accuracy.after"], "", "higher"),
            Row(name, "furthest from this machine's", furthest, "", "lower", APART),
            Row(name, "peak above base", usage.bytes_peak / MIB, "MiB", "lower"),
            Row(name, "of this machine's", ours.usage.bytes_peak / MIB, "MiB", "lower"),
            Row(name, "base, emulator included", usage.bytes_base / MIB, "MiB", "lower"),
            Row(name, "seconds here, emulated", usage.seconds, "s", "lower"),
        ]
    rows.append(Row(where, "of the base, an empty Python's", pi.empty(guest) / MIB, "MiB", "lower"))
    return rows


def made(case: Case, folder: Path) -> Job:
    """Write an order's files."""
    spec = zoo.by_name(case.model)
    arrays = initial_weights(spec, seed=11)  # not the masks' own, of which they are drawn alike
    if not case.density:
        return job(folder, spec, arrays, [Structure()], RECIPE, micro=RECIPE.batch)
    masks = some_masks(spec, case.density)
    for name in masks:  # as large a sum of fewer
        arrays[name] *= np.float32(case.density**-0.5)
    return masked_job(folder, spec, arrays, masks, RECIPE, micro=RECIPE.batch)


def loss_of(metrics: Mapping[str, float]) -> float:
    """Give the loss over samples that were kept from training, as a part of what it was."""
    return metrics["loss.after"] / metrics["loss.before"]


def apart(case: Case, order: Job, ours: Done, theirs: Done) -> float:
    """Give the greatest difference between two updates, tensor by tensor, as a part of the tensor's greatest move.

    A bias before a batch norm moves by rounding alone: no move counts for less than a thousandth of the model's greatest.
    """
    spec = zoo.by_name(case.model)
    masks = some_masks(spec, case.density) if case.density else {}
    outline = outline_of_model(spec, masks)
    one, other = (open_blob(Path(done.update), outline=outline) for done in (ours, theirs))
    if one.names != other.names or not one.names:
        raise pi.Unfit(f"{case.name}: updates of {one.names} and {other.names}")
    if ours.samples != theirs.samples or ours.structure != order.order.structures[0]:
        raise pi.Unfit(f"{case.name}: {ours.samples} and {theirs.samples} samples")
    moves = {name: float(np.abs(one.values(name)).max()) for name in one.names}
    far = {name: float(np.abs(one.values(name) - other.values(name)).max()) for name in one.names}
    if not (least := max(moves.values()) / 1000) > 0:
        raise pi.Unfit(f"{case.name}: nothing has moved")
    return max(apart / max(moves[name], least) for name, apart in far.items())


# --- an agent --------------------------------------------------------------------------------------------------------


def took_part(guest: Guest, where: str) -> list[Row]:
    """Let an agent there do the orders of a coordinator here."""
    work = guest.work / "federation"
    with Federation(work, model="digits-mlp", devices=1, rounds=2, seconds=SECONDS_ORDER, keepalive=60.0) as fed:
        fed.recipe = {"rule": "sgd", "epochs": 4, "batch": 8, "rate": 0.1, "momentum": 0.9}
        fed.save_data("device-0")
        config = work / "device-0.toml"
        config.write_text(pi.CONFIG.format(port=fed.broker.port, work=work))
        pi.say(f"{where}: edge-runtime check")
        rows = [pi.checked(guest, HOME, config)]
        pi.say(f"{where}: {fed.rounds} orders over a real broker")
        rows += pi.trained(guest, HOME, config, fed)
    return [dataclasses.replace(row, case=f"{where}: {row.case}") for row in rows]
