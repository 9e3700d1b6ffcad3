"""What memory this machine has to give: a few small files of /proc and /sys, read anew each time.

Every function takes the root of those trees as an argument, so that tests hand in a folder.
"""

from __future__ import annotations

from pathlib import Path

MEBIBYTE = 1 << 20
SYSTEM = Path("/")


def available(root: Path = SYSTEM) -> int:
    """Give MemAvailable in bytes: what can be taken without swapping. 0 when the kernel does not say."""
    return _kilobytes(root / "proc/meminfo", "MemAvailable")


def total(root: Path = SYSTEM) -> int:
    """Give all memory of the machine in bytes; 0 when the kernel does not say."""
    return _kilobytes(root / "proc/meminfo", "MemTotal")


def resident(pid: int, root: Path = SYSTEM) -> int:
    """Give the resident size of a process of ours in bytes; 0 when it is gone or the kernel does not say."""
    return _kilobytes(root / "proc" / str(pid) / "status", "VmRSS")


def group_room(root: Path = SYSTEM) -> int | None:
    """Give what is left in this process's memory control group and those above it, in bytes; None when nothing bounds them.

    Files that were read or written once are in a group's use, but do not count: the kernel takes their pages back first.
    Raspberry Pi OS switches the controller off by default; then there is no bound, whatever a unit file says.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    rooms: list[int] = []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            top = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = top / path.lstrip("/")
        above = [folder for folder in own.parents if folder.is_relative_to(top)]
        rooms += [room for room in (_left(folder, *names) for folder in (own, *above)) if room is not None]
    return min(rooms, default=None)


def _left(folder: Path, limit: str, used: str, spare: str) -> int | None:
    """Give what one group has left, by the names of its files and of the line of ``memory.stat`` that does not count."""
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
    except (OSError, ValueError):
        return None
    if not most.isdecimal() or int(most) >= 1 << 60:
        return None
    return max(0, int(most) - max(0, now - _number(folder / "memory.stat", spare)))


def budget(configured: int, reserve: int, root: Path = SYSTEM, *, coming: int = 0, shared: bool = True) -> int:
    """Give the bytes that an order may take right now.

    Args:
        configured: The operator's limit; 0 for none.
        reserve: What must stay available to the rest of the machine.
        root: Of /proc and /sys.
        coming: What its worker will take before the order does; below 0 for what it will give back.
        shared: Whether the worker is in this process's control group.

    Returns:
        The least of the limit, of MemAvailable less the reserve, and of what the control group has left.
    """
    rooms = [configured] if configured else []
    free = available(root)
    if free:
        rooms.append(max(0, free - reserve - coming))
    group = group_room(root) if shared else None
    if group is not None:
        rooms.append(max(0, group - coming))
    return min(rooms, default=0)


def _kilobytes(path: Path, key: str) -> int:
    return _number(path, key + ":") * 1024


def _number(path: Path, key: str) -> int:
    """Give the number after the first word of a line; 0 where there is none."""
    try:
        with path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.split(None, 1)[:1] == [key]:
                    return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return 0
