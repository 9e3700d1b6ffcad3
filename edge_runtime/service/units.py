"""The files of the services: the units with this interpreter in them, and drop-ins for this device's data and broker.

The units are strict and know nothing of a device. What a real one needs is found out here: `ProtectHome=` hides a maker's
folder and often the interpreter, `PrivateTmp=` what lies in /tmp, `IPAddressDeny=` the broker.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.service.placed import SETTINGS, Placed, text
from wire.errors import ConfigError, StoreError
from wire.link import Address

UNITS = "/etc/systemd/system"
AGENT, DOOR, TRAINER = "edge-runtime.service", "edge-trainer.socket", "edge-trainer@.service"
SYSUSERS = "/etc/sysusers.d/edge-runtime.conf"
CONFIG = f"{SETTINGS}/device.toml"
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - what the units see none of
_INTERPRETER = "/opt/nestling/bin/python"
_DROP_IN = "50-this-device.conf"
_PRIVATE = "link-local 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7"
_SAFE = re.compile(r"[\w/.,+@=~ -]+")


@dataclass(frozen=True, slots=True)
class Site:
    """What about this machine the units cannot know.

    Attributes:
        interpreter: Python that runs the services.
        code: Folders that it reads, whether or not they are hidden from the units.
        search: Where the package is when the interpreter does not find it by itself; empty when it does.
        group: Number of the group that may read the data when not everybody may; -1 where none is needed.
        allow: Value of `IPAddressAllow=`; empty for a broker on this machine.
    """

    interpreter: str
    code: tuple[str, ...]
    search: str
    group: int
    allow: str


def survey(placed: Placed) -> Site:
    """Find out what the units need here. Starts the interpreter once, and may ask for the broker's addresses."""
    package = str(Path(__file__).parents[2])
    found = subprocess.run(
        [sys.executable, "-P", "-c", "import edge_runtime"], cwd="/", capture_output=True, check=False, env={}
    )
    roots = {sys.prefix, sys.base_prefix, package, *(str(Path(p).resolve()) for p in (sys.prefix, sys.base_prefix))}
    return Site(
        sys.executable,
        tuple(sorted(roots - {"/usr", "/"})),
        package if found.returncode else "",
        _group(placed.data),
        allowed(Address.parse(placed.config.broker.url).host),
    )


def allowed(host: str) -> str:
    """Say which addresses the agent may speak to.

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
        return _PRIVATE
    return _PRIVATE if all(ipaddress.ip_address(one).is_private for one in found) else "any"


def _group(data: Path | None) -> int:
    if data is None:
        return -1
    status = data.stat()
    wanted = 0o5 if data.is_dir() else 0o4
    return status.st_gid if status.st_mode & wanted != wanted and status.st_mode >> 3 & wanted == wanted else -1


def hidden(path: str) -> bool:
    """Whether the units would not see a path."""
    return any(Path(path).is_relative_to(place) for place in HIDDEN)


def shown(placed: Placed, site: Site, *, data: bool) -> list[str]:
    """Give the hidden paths that a unit needs, none below another; the data for the trainer only."""
    wanted = [*site.code, *([str(placed.data)] if data and placed.data is not None else [])]
    found = sorted({path for path in wanted if hidden(path)})
    return [path for path in found if not any(Path(path).is_relative_to(o) for o in found if o != path)]


def files(placed: Placed, site: Site) -> dict[str, str]:
    """Give every text file of the services by its path.

    Raises:
        ConfigError: A path has characters that a unit cannot say.
        StoreError: The units that came with this package cannot be read.
    """
    found = {
        CONFIG: text(placed.config, "Written by `edge-runtime install`; changes here count from the next start on.")
    }
    try:
        for name in (AGENT, DOOR, TRAINER):
            unit = (Path(__file__).parent / "units" / name).read_text("utf-8")
            found[f"{UNITS}/{name}"] = unit.replace(_INTERPRETER, _said(site.interpreter))
        found[SYSUSERS] = (Path(__file__).parent / "units/edge-runtime.sysusers").read_text("utf-8")
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}; install nestling again") from error
    agent, trainer = _surroundings(placed, site, data=False), _surroundings(placed, site, data=True)
    if site.allow:
        agent.append(f"IPAddressAllow={site.allow}")
    if placed.config.broker.password_file:
        agent.append(f"LoadCredential=password:{SETTINGS}/password")
    head = []
    if site.group >= 0:
        trainer.append(f"SupplementaryGroups={site.group}")
    if placed.data is not None:
        head = ["[Unit]", f"RequiresMountsFor={_said(str(placed.data))}"]
    for name, lines, first in ((AGENT, agent, []), (TRAINER, trainer, head)):
        if lines or first:
            found[f"{UNITS}/{name}.d/{_DROP_IN}"] = "\n".join([*first, "[Service]", *lines, ""])
    return found


def _surroundings(placed: Placed, site: Site, *, data: bool) -> list[str]:
    paths = shown(placed, site, data=data)
    lines = [f"BindReadOnlyPaths={_said(path)}" for path in paths]
    if any(hidden(path) and not path.startswith(("/tmp", "/var/tmp")) for path in paths):  # noqa: S108 - compared with
        lines.insert(0, "ProtectHome=tmpfs")
    if site.search:
        lines.append(f'Environment="PYTHONPATH={_plain(site.search)}"')
    return lines


def _said(path: str) -> str:
    return f'"{_plain(path)}"' if " " in path else _plain(path)


def _plain(path: str) -> str:
    if not _SAFE.fullmatch(path):
        raise ConfigError(f"{path!r}: a unit cannot name this path; use one of letters, digits and / . , + @ = ~ -")
    return path
