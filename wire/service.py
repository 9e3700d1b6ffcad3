"""What the services of both sides have in common where systemd runs them: hidden paths, files in their place, a room to try.

The units of either side hide a maker's folders and are read by a user who exists only while they run. So both sides have to
find out what a unit must see after all, to write files as a whole, and to try a command as such a user. Nothing here starts
or stops a service.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from wire.errors import ConfigError

UNITS = "/etc/systemd/system"
INTERPRETER = "/opt/nestling/bin/python"
"""Python in the units as they stand in the tree."""
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - what the units see none of
NOBODY_YET = 64998
"""A user without a name, as systemd's dynamic ones are (61184..65519)."""
PRIVATE = "link-local 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
_SAFE = re.compile(r"[\w/.,+@=~ -]+")


def running() -> bool:
    """Whether systemd runs this machine."""
    return Path("/run/systemd/system").is_dir()


def run(*argv: str) -> str:
    """Run a command of the system; gives what went wrong, empty when nothing did."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=700, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{argv[0]}: {error}"
    return "" if done.returncode == 0 else f"{' '.join(argv)}: {done.stderr.strip() or done.returncode}"


# --- what a unit sees ------------------------------------------------------------------------------------------------


def code(package: str) -> tuple[tuple[str, ...], str]:
    """Give the folders that this interpreter reads, and where a package of ours is if it does not find that by itself.

    Cost: starts the interpreter once.
    """
    home = str(Path(__file__).parents[1])
    argv = [sys.executable, "-B", "-P", "-c", f"import {package}"]  # -B: what it compiled would outlast an uninstall
    found = subprocess.run(argv, cwd="/", capture_output=True, check=False, env={})
    roots = {sys.prefix, sys.base_prefix, home, *(str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix))}
    return tuple(sorted(roots - {"/usr", "/"})), home if found.returncode else ""


def hidden(path: str) -> bool:
    """Whether the units would not see a path."""
    return any(Path(path).is_relative_to(place) for place in HIDDEN)


def shown(wanted: Iterable[str]) -> list[str]:
    """Give the hidden ones of some paths, none below another."""
    found = sorted({path for path in wanted if hidden(path)})
    return [path for path in found if not any(Path(path).is_relative_to(o) for o in found if o != path)]


def surroundings(paths: Sequence[str], search: str) -> list[str]:
    """Give the lines of a drop-in by which a unit sees hidden paths, and finds the package.

    Args:
        paths: As `shown` gives them.
        search: As `code` gives it.

    Raises:
        ConfigError: A path has characters that a unit cannot say.
    """
    lines = [f"BindReadOnlyPaths={said(path)}" for path in paths]
    if any(hidden(path) and not path.startswith(("/tmp", "/var/tmp")) for path in paths):  # noqa: S108 - compared with
        lines.insert(0, "ProtectHome=tmpfs")
    if search:
        lines.append(f'Environment="PYTHONPATH={_plain(search)}"')
    return lines


def said(path: str) -> str:
    """Write a path as a unit names it.

    Raises:
        ConfigError: It has characters that a unit cannot say.
    """
    return f'"{_plain(path)}"' if " " in path else _plain(path)


def _plain(path: str) -> str:
    if not _SAFE.fullmatch(path):
        raise ConfigError(f"{path!r}: a unit cannot name this path; use one of letters, digits and / . , + @ = ~ -")
    return path


# --- whom a unit may speak to ----------------------------------------------------------------------------------------


def allowed(host: str) -> str:
    """Say which addresses a service may speak to, to reach a broker; empty for one on this machine.

    A number is itself. A name may become another number one day, and has to be asked for: so the private networks when it
    is in one of them now, or cannot be found; and all when it is out in the world.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0].strip("[]"))
    except ValueError:
        return "" if host == "localhost" else _of_name(host)
    return "" if address.is_loopback else f"{address}"


def _of_name(name: str) -> str:
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(name, None)}
    except OSError:
        return PRIVATE
    return PRIVATE if all(ipaddress.ip_address(one).is_private for one in found) else "any"


# --- files -----------------------------------------------------------------------------------------------------------


def put(path: Path, data: bytes, mode: int) -> None:
    """Replace a file as a whole; a secret is one from its first byte on."""
    new = fresh(path)
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)
            if os.geteuid() == 0:  # in the folder of a service that has run already, the service is to read it
                owner = path.parent.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(data)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def fresh(path: Path) -> Path:
    """Give the name under which `put` writes a file; one of that name is there only while it does, or once it was killed."""
    return path.with_name(f".{path.name}.new")


def clear(paths: Iterable[Path]) -> None:
    """Remove files, links (not what they lead to), and folders with all that is in them."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def folders(path: Path, private: Path) -> list[Path]:
    """Make a folder and its parents, from `private` on closed to others; gives those that were not there."""
    if path.is_dir():
        return []
    made = folders(path.parent, private)
    path.mkdir()
    path.chmod(0o700 if path.is_relative_to(private) else 0o755)
    return [*made, path]


# --- trying ----------------------------------------------------------------------------------------------------------


def enclosed(
    command: Sequence[str], paths: Sequence[str], room: Path, *, user: int = NOBODY_YET, groups: Sequence[int] = ()
) -> list[str]:
    """Give a command line that runs a command as another user, behind the units' walls; only for root.

    Args:
        command: What to run.
        paths: Hidden files and folders that it is to see after all, none below another.
        room: A folder outside of what is hidden with one `holds` in it.
        user: Number of the user, and of its group.
        groups: Numbers of further groups.
    """
    quoted = shlex.quote
    steps = ["mount --make-rprivate /"]
    for number, path in enumerate(paths):
        hold = quoted(str(room / "holds" / str(number)))
        made = "mkdir -p" if Path(path).is_dir() else "touch"
        steps += [f"{made} {hold}", f"mount --bind {quoted(path)} {hold}"]
    for place in HIDDEN:
        if Path(place).is_dir():
            mode = "1777" if place.endswith("tmp") else "755"
            steps.append(f"mount -t tmpfs -o mode={mode} tmpfs {place}")
    for number, path in enumerate(paths):
        parent = quoted(str(Path(path).parent))
        made = f"mkdir -p {quoted(path)}" if Path(path).is_dir() else f"mkdir -p {parent} && touch {quoted(path)}"
        steps += [made, f"mount --bind {quoted(str(room / 'holds' / str(number)))} {quoted(path)}"]
    groups_said = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    rights = "--no-new-privs --bounding-set=-all --inh-caps=-all"
    steps.append(f"exec setpriv --reuid={user} --regid={user} {groups_said} {rights} -- {shlex.join(command)}")
    return ["unshare", "--mount", "sh", "-c", "umask 022 && " + " && ".join(steps)]
