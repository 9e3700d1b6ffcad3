"""Writing a service into Termux and taking it out again.

The scripts are installed as they are, apart from their first line; all that differs from phone to phone is in a service's
``conf``. Written for the layout of Termux: a home, and beside it a prefix with everything else.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edge_runtime import exits
from wire.errors import ConfigError, StoreError

PREFIX = Path("/data/data/com.termux/files/usr")
"""Where Termux keeps everything but the home folder."""
MARK = "# nestling"
"""How the first line of a service's ``conf`` begins: what has none is not ours."""
BOOT = "nestling"
FINAL = {"agent": (exits.CONFIG, exits.DATA), "coordinator": (0, 2, 4)}
"""After these codes a service stays down: a restart would end the same way. The coordinator's 0 is the last round's end."""
SERVICES = {"agent": "nestling-agent", "coordinator": "nestling-coordinator"}
"""Role to the service's name."""
_SCRIPTS = {"run": "run.sh", "finish": "finish.sh", "log/run": "log.sh"}
_HERE = Path(__file__).parent
_SECONDS_SV = 30.0
_SECONDS_GONE = 10.0
_SECONDS_PAUSE = 15


@dataclass(frozen=True, slots=True)
class Service:
    """What is to run for as long as the phone is on.

    Attributes:
        role: ``agent`` or ``coordinator``.
        words: Its command line.
        folder: Where it runs; what it is told as relative paths begins there.
        wake_lock: Keep the processor awake while it runs.
    """

    role: str
    words: tuple[str, ...]
    folder: Path
    wake_lock: bool = True

    @property
    def name(self) -> str:
        """What `sv` calls it."""
        return SERVICES[self.role]


def agent(config: Path, *, wake_lock: bool = True) -> Service:
    """Describe the agent of a configuration file, which has been read and found good."""
    where = config.resolve()
    words = (sys.executable, "-m", "edge_runtime.cli", "run", "--config", str(where))
    return Service("agent", words, where.parent, wake_lock)


def coordinator(words: tuple[str, ...], folder: Path, *, wake_lock: bool = True) -> Service:
    """Describe `coordinator start` with these words behind it."""
    return Service(
        "coordinator", (sys.executable, "-m", "coordinator.cli", "start", *words), folder.resolve(), wake_lock
    )


def prefix_of(given: Path | None) -> Path:
    """Find Termux: what is given, else $PREFIX, else where it always is.

    Raises:
        ConfigError: This is no Termux, or one without termux-services.
    """
    prefix = given or Path(os.environ.get("PREFIX") or PREFIX)
    if not (prefix / "bin/sh").exists():
        raise ConfigError(f"{prefix} is no Termux: run this in Termux on a phone, or name its prefix with --prefix")
    if not (prefix / "share/termux-services/svlogger").exists():
        raise ConfigError(f"{prefix} has no termux-services: pkg install termux-services, then open a new session")
    return prefix.absolute()


def install(service: Service, prefix: Path) -> list[Path]:
    """Write a service and the boot script, and start it. Doing so again changes what it runs.

    Returns:
        What was written.

    Raises:
        ConfigError: A service of that name is not ours.
        StoreError: The files cannot be written.
    """
    root = prefix / "var/service" / service.name
    home = prefix.parent / "home"
    _ours(root)
    try:
        (root / "log").mkdir(parents=True, exist_ok=True)
        (root / "down").touch()  # the daemon looks in every five seconds: nothing half-written is to be started
        written = [_write(root / "conf", conf(service, prefix), 0o600)]
        for name, source in _SCRIPTS.items():
            written.append(_write(root / name, _script(source, prefix), 0o700))
        boot = home / ".termux/boot"
        boot.mkdir(parents=True, exist_ok=True)
        written.append(_write(boot / BOOT, _script("boot.sh", prefix), 0o700))
        (root / "down").unlink()
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    if _is_open(root):
        _sv(prefix, "restart", root)
    return written


def remove(role: str, prefix: Path) -> list[Path]:
    """Stop a service and delete what `install` wrote and what it logged; its state folder stays.

    Returns:
        What was deleted; empty if there was no such service.

    Raises:
        ConfigError: A service of that name is not ours.
        StoreError: A file cannot be deleted.
    """
    root = prefix / "var/service" / SERVICES[role]
    logs = prefix / "var/log/sv" / root.name
    boot = prefix.parent / "home/.termux/boot" / BOOT
    _ours(root)
    others = any((prefix / "var/service" / other).exists() for other in SERVICES.values() if other != root.name)
    gone = [path for path in (root, logs, *(() if others else (boot,))) if path.exists()]
    try:
        if root.exists():
            shutil.rmtree(_retired(root, prefix))
        for path in gone:
            if path.exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}") from error
    return gone


def _retired(root: Path, prefix: Path) -> Path:
    """Stop a service and take its folder out of the daemon's sight, which then ends the supervisor too. Takes five seconds.

    To delete the folder under a supervisor would leave what it writes after that; a supervisor that is told to exit is started
    again for as long as the folder is there.
    """
    (root / "down").touch()
    if _is_open(root):
        _sv(prefix, "down", root)
    retired = root.with_name(f".{root.name}.gone")
    shutil.rmtree(retired, ignore_errors=True)
    root.rename(retired)
    until = time.monotonic() + _SECONDS_GONE
    while _is_open(retired) and time.monotonic() < until:
        time.sleep(0.1)
    return retired


def _is_open(root: Path) -> bool:
    """Tell whether a supervisor runs over a service's folder: a pipe that nobody reads refuses."""
    try:
        os.close(os.open(root / "supervise/ok", os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def supervised(prefix: Path) -> bool:
    """Tell whether the service daemon runs."""
    try:
        os.kill(int((prefix / "var/run/service-daemon.pid").read_text("ascii")), 0)
    except (OSError, ValueError):
        return False
    return True


def conf(service: Service, prefix: Path) -> str:
    """Give what the scripts read: assignments, and the command as positional parameters."""
    search = shlex.quote(f"{Path(service.words[0]).parent}:{prefix}/bin")
    final = " ".join(str(code) for code in FINAL[service.role])
    lines = [
        f"{MARK}: what the scripts beside this file run; made by: edge-runtime termux install",
        f"PREFIX={shlex.quote(str(prefix))}",
        f"PATH={search}:$PATH",
        f"TMPDIR={shlex.quote(str(prefix / 'tmp'))}",
        "export PREFIX PATH TMPDIR",
        f"folder={shlex.quote(str(service.folder))}",
        f"wake_lock={'yes' if service.wake_lock else 'no'}",
        f"final={shlex.quote(final)} # it stays down after these exit codes",
        f"seconds_pause={_SECONDS_PAUSE} # before a start after any other",
        f"set -- {shlex.join(service.words)}",
    ]
    return "\n".join(lines) + "\n"


def _script(source: str, prefix: Path) -> str:
    """Android has no /bin/sh: the first line names Termux's own."""
    text = (_HERE / source).read_text("utf-8")
    return re.sub(r"\A#!/bin/sh\n", f"#!{prefix}/bin/sh\n", text)


def _write(path: Path, text: str, mode: int) -> Path:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, "utf-8")
    temporary.chmod(mode)
    temporary.replace(path)  # a script that runs now goes on with its old text
    return path


def _ours(root: Path) -> None:
    """Refuse a folder that somebody else made; one that an interrupted installation left is empty but for ``down``."""
    if not root.exists():
        return
    try:
        first = (root / "conf").read_text("utf-8", "replace")
    except OSError:
        first = MARK if {path.name for path in root.iterdir()} <= {"down", "log", ".conf.new"} else ""
    if not first.startswith(MARK):
        raise ConfigError(f"{root} is a service, but not one of ours: rename it or remove it first")


def _sv(prefix: Path, word: str, root: Path) -> None:
    words = [str(prefix / "bin/sv"), "-w", "20", word, str(root)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=_SECONDS_SV, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoreError(f"sv {word} {root.name}: {error}") from error
    if done.returncode:
        raise StoreError(f"sv {word} {root.name}: {(done.stdout + done.stderr).strip()}")
