"""Questions about the machine itself: clock, disk, memory, its control group, the size of its pages."""

from __future__ import annotations

import os
import time
from pathlib import Path

from edge_runtime.config import Config
from edge_runtime.health.finding import Finding, Machine
from edge_runtime.memory import limit, probe
from wire.errors import ConfigError

MIB = 1 << 20
BYTES_LEAST = 16 * MIB
_BYTES_DISK = 64 * MIB
_EARLIEST = 1_750_000_000  # seconds since 1970: a clock before this program was written is wrong
_PAGE = 4096
_GROUP = "memory control group"


def clock(_: Config, where: Machine) -> Finding:
    """Ask whether the clock can be right: certificates depend on it."""
    now = time.time()
    shown = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < _EARLIEST:
        how = "Android's settings, System, Date & time" if where.android else "timedatectl set-ntp true"
        return Finding("clock", fine=False, found=shown, advice=f"set the time ({how}): TLS depends on it")
    return Finding("clock", fine=True, found=shown)


def disk(config: Config, _: Machine) -> Finding:
    """Ask whether the state folder can be written and has room."""
    root = Path(config.state.dir)
    root.mkdir(parents=True, exist_ok=True)
    mark = root / ".check"
    mark.write_bytes(b"x")
    mark.unlink()
    status = os.statvfs(root)
    free = status.f_bavail * status.f_frsize
    found = f"{free // MIB} MiB free in {root}"
    if free < _BYTES_DISK:
        return Finding("disk", fine=False, found=found, advice="make room or set [state] dir")
    return Finding("disk", fine=True, found=found)


def memory(config: Config, where: Machine) -> Finding:
    """Ask what an order may take."""
    file = config.budget_file
    try:
        told = limit.said(file)
    except ConfigError as error:
        advice = f'write an amount such as "24 MiB" into {file}, or delete it: as it is, it limits nothing'
        return Finding("memory", fine=False, found=f"{file}: {error}", advice=advice)
    free, whole = probe.available(where.root), probe.total(where.root)
    allowed = min((most for most in (config.bytes_budget, told) if most), default=0)
    granted = probe.budget(allowed, config.bytes_reserve, where.root, shared=not config.worker.socket)
    found = (
        f"{free // MIB} of {whole // MIB} MiB available; an order may take {granted // MIB} MiB above the worker's base"
    )
    found += f" ({file} allows {told // MIB} MiB)" if told else ""
    if granted < BYTES_LEAST:
        advice = "end other programs, or lower [memory] reserve"
        advice = f"delete {file}, or allow more in it" if 0 < told < BYTES_LEAST else advice
        return Finding("memory", fine=False, found=found, advice=advice)
    if config.bytes_budget and granted < allowed:
        return Finding("memory", fine=True, found=found, advice="[memory] budget is more than what is free now")
    return Finding("memory", fine=True, found=found)


def group(_: Config, where: Machine) -> Finding | None:
    """Ask whether the kernel would hold a limit on this process's control group: its own one, not only the root's."""
    if where.android:
        return None
    ours = "our own limit (RLIMIT_DATA) works all the same"
    controllers, version_1 = _own_group(where)
    if version_1 or "memory" in controllers:
        room = probe.group_room(where.root)
        held = "nothing bounds it now" if room is None else f"{room // MIB} MiB are left in it"
        return Finding(_GROUP, fine=True, found=f"there; {held}")
    whole = where.text("sys/fs/cgroup/cgroup.controllers").split()
    if "memory" in whole:
        found = f"this process's own group has none, though the kernel could: MemoryMax= on it is ignored; {ours}"
        advice = "run as the unit that `edge-runtime install` writes, whose MemoryMax= switches it on for its own group"
        return Finding(_GROUP, fine=True, found=found, advice=advice)
    off = "cgroup_disable=memory" in where.text("proc/cmdline")
    why = "switched off on the kernel's command line" if off else "not there"
    found = f"{why}: a unit's MemoryMax= is ignored without a word; {ours}"
    if where.is_pi or off:
        advice = "append 'cgroup_enable=memory cgroup_memory=1' to the line in /boot/firmware/cmdline.txt and restart"
        return Finding(_GROUP, fine=True, found=found, advice=advice)
    return Finding(_GROUP, fine=True, found=found)


def _own_group(where: Machine) -> tuple[list[str], bool]:
    """Give the controllers of this process's group, and whether version 1's memory controller holds it."""
    controllers: list[str] = []
    for line in where.text("proc/self/cgroup").splitlines():
        number, names, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not names:
            controllers = where.text(f"sys/fs/cgroup/{path.lstrip('/')}/cgroup.controllers").split()
        elif "memory" in names.split(","):
            return controllers, (where.root / "sys/fs/cgroup/memory").is_dir()
    return controllers, False


def pages(_: Config, where: Machine) -> Finding:
    """Ask for the size of a page: what is built for 4 KiB alone dies on a Raspberry Pi 5's kernel."""
    found = f"{where.bytes_page >> 10} KiB"
    if where.bytes_page <= _PAGE:
        return Finding("memory pages", fine=True, found=found)
    preloaded = os.environ.get("LD_PRELOAD", "")
    back = "append 'kernel=kernel8.img' to /boot/firmware/config.txt and restart" if where.is_pi else ""
    if "jemalloc" in preloaded:
        advice = "unset LD_PRELOAD" + (f", or {back} for pages of 4 KiB" if back else "")
        return Finding("memory pages", fine=False, found=f"{found}, and {preloaded} is built for 4 KiB", advice=advice)
    advice = f"if a library dies with 'Unsupported system page size', {back}" if back else ""
    return Finding("memory pages", fine=True, found=found, advice=advice)
