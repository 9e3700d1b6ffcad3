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
    """Give what is left in this process's memory control group, in bytes; None when nothing bounds it.

    Raspberry Pi OS switches the controller off by default; then there is no bound, whatever a unit file says.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            folder, limit, used = root / "sys/fs/cgroup" / path.lstrip("/"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory" / path.lstrip("/")
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        except (OSError, ValueError):
            continue
        if most.isdecimal() and int(most) < 1 << 60:
            return max(0, int(most) - now)
    return None


def budget(configured: int, reserve: int, root: Path = SYSTEM) -> int:
    """Give the bytes that an order may take right now.

    Args:
        configured: The operator's limit; 0 for none.
        reserve: What must stay available to the rest of the machine.
        root: Of /proc and /sys.

    Returns:
        The least of the limit, of MemAvailable less the reserve, and of what the control group has left.
    """
    rooms = [configured] if configured else []
    free = available(root)
    if free:
        rooms.append(max(0, free - reserve))
    group = group_room(root)
    if group is not None:
        rooms.append(group)
    return min(rooms, default=0)


def _kilobytes(path: Path, key: str) -> int:
    try:
        with path.open(encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith(key + ":"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0
