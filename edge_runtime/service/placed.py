"""The configuration as the services read it: the owner's, with every file where a service can reach it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime import identity
from edge_runtime.config import BrokerConfig, Config
from edge_runtime.data import SOURCES
from edge_runtime.data.resolve import resolve
from wire.errors import ConfigError, PeerError
from wire.invitation import decode
from wire.link import Address

SETTINGS = "/etc/edge-runtime"
STATE = "/var/lib/edge-runtime"
SOCKET = "/run/edge-trainer.sock"
CREDENTIAL = "enrolment"
"""The invitation, as a credential of the agent's unit."""
CREDENTIALS = "/run/credentials/edge-runtime.service"


@dataclass(frozen=True, slots=True)
class Placed:
    """A configuration and what goes with it.

    Attributes:
        config: As the services read it.
        copies: Files to copy: where to, and where from.
        secrets: Those of the copies that nobody else may read.
        data: The device's data; None where they are in the package.
    """

    config: Config
    copies: Mapping[str, Path]
    secrets: frozenset[str] = field(default_factory=frozenset)
    data: Path | None = None


def invited(config: Config, token: Path) -> Config:
    """Give a configuration as it will be once an invitation is taken: whose it is, and where the broker is.

    Raises:
        ConfigError: The file holds no invitation.
    """
    try:
        found = decode(token.read_text("ascii"))
    except (OSError, ValueError, PeerError) as error:
        raise ConfigError(f"{token}: {error}") from None
    folder = f"{STATE}/{identity.FOLDER}"
    broker = BrokerConfig(
        str(Address(found.host, found.port, tls=True)),
        ca=f"{folder}/{identity.AUTHORITY}",
        cert=f"{folder}/{identity.FILE}",
    )
    return dataclasses.replace(config, device=found.device, federation=found.federation, broker=broker)


def place(config: Config, token: Path | None = None) -> Placed:
    """Decide where everything goes.

    Certificate and key go to the state folder, because they are renewed there; a password is a credential of the unit; the
    operator's budget is a file that both services see.

    Args:
        config: The owner's.
        token: File with an invitation that is to be taken at the first start; None where it has what it needs.

    Raises:
        ConfigError: A file that the configuration names is not there.
        DataError: The data are not there.
    """
    broker, copies, changed = config.broker, {}, {}
    if token is not None:
        config, copies = invited(config, token), {f"{SETTINGS}/{CREDENTIAL}": token.absolute()}
        broker = config.broker
    for name in ("ca", "cert", "key", "password_file"):
        if not getattr(broker, name) or token is not None:
            continue
        source = Path(getattr(broker, name)).expanduser().absolute()
        if not source.is_file():
            raise ConfigError(f"[broker] {name}: {source} is not there")
        changed[name] = _home(name, source, Path(config.state.dir).absolute())
        copies[changed[name]] = source
    if "password_file" in changed:
        copies[f"{SETTINGS}/password"] = copies.pop(changed["password_file"])
    data = _data(config)
    named = config.data if data is None else dataclasses.replace(config.data, path=str(data))
    return Placed(
        dataclasses.replace(
            config,
            broker=dataclasses.replace(broker, **changed),
            data=named,
            memory=dataclasses.replace(config.memory, file=f"{SETTINGS}/budget"),
            worker=dataclasses.replace(config.worker, socket=SOCKET),
            state=dataclasses.replace(config.state, dir=STATE),
        ),
        copies,
        frozenset(copies) - {f"{SETTINGS}/ca.pem"},
        data,
    )


def _home(name: str, source: Path, state: Path) -> str:
    """Say where a broker's file will be found: what enrolment left in the state folder stays in its place there."""
    if name == "password_file":
        return f"{CREDENTIALS}/password"
    if source.is_relative_to(state):
        return f"{STATE}/{source.relative_to(state)}"
    return f"{SETTINGS}/ca.pem" if name == "ca" else f"{STATE}/keys/{name}.pem"


def _data(config: Config) -> Path | None:
    source = config.data
    reader = SOURCES.get(source.source)
    if reader is not None and not reader.needs_path:
        return None
    if reader is None:
        return resolve(source.source, source.path).absolute()
    path = Path(source.path).expanduser().absolute()
    if not path.exists():
        raise ConfigError(f"[data] path: {path} is not there")
    return path
