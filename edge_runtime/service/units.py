"""The files of the services: the units with this interpreter in them, and drop-ins for this device's data and broker.

The units are strict and know nothing of a device. What a real one needs is found out here: `ProtectHome=` hides a maker's
folder and often the interpreter, `PrivateTmp=` what lies in /tmp, `IPAddressDeny=` the broker.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.service.placed import SETTINGS, Placed
from wire import service
from wire.errors import StoreError
from wire.link import Address
from wire.service import INTERPRETER, UNITS, allowed, said
from wire.settings import text

AGENT, DOOR, TRAINER = "edge-runtime.service", "edge-trainer.socket", "edge-trainer@.service"
SYSUSERS = "/etc/sysusers.d/edge-runtime.conf"
CONFIG = f"{SETTINGS}/device.toml"
_DROP_IN = "50-this-device.conf"


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
    code, search = service.code("edge_runtime")
    return Site(
        sys.executable,
        code,
        search,
        _group(placed.data),
        allowed(Address.parse(placed.config.broker.url).host),
    )


def _group(data: Path | None) -> int:
    if data is None:
        return -1
    status = data.stat()
    wanted = 0o5 if data.is_dir() else 0o4
    return status.st_gid if status.st_mode & wanted != wanted and status.st_mode >> 3 & wanted == wanted else -1


def shown(placed: Placed, site: Site, *, data: bool) -> list[str]:
    """Give the hidden paths that a unit needs, none below another; the data for the trainer only."""
    wanted = [*site.code, *([str(placed.data)] if data and placed.data is not None else [])]
    return service.shown(wanted)


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
            found[f"{UNITS}/{name}"] = unit.replace(INTERPRETER, said(site.interpreter))
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
        head = ["[Unit]", f"RequiresMountsFor={said(str(placed.data))}"]
    for name, lines, first in ((AGENT, agent, []), (TRAINER, trainer, head)):
        if lines or first:
            found[f"{UNITS}/{name}.d/{_DROP_IN}"] = "\n".join([*first, "[Service]", *lines, ""])
    return found


def _surroundings(placed: Placed, site: Site, *, data: bool) -> list[str]:
    return service.surroundings(shown(placed, site, data=data), site.search)
