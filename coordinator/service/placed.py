"""The files of the service: its unit with this interpreter in it, its configuration, copies, and what mosquitto needs.

The unit knows nothing of a machine. What a real one needs is found out here: where Python and the evaluation data are hidden
from services, what has to be handed to a user who exists only while the service runs, and where the broker is.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.config import Config
from coordinator.keys.patterns import patterns
from wire import service, zoo
from wire.errors import ConfigError, StoreError
from wire.link import Address
from wire.service import INTERPRETER, UNITS, said
from wire.settings import text

UNIT = "coordinator.service"
SETTINGS = "/etc/nestling"
CONFIG = f"{SETTINGS}/coordinator.toml"
STATE = "/var/lib/nestling"
CREDENTIALS = f"/run/credentials/{UNIT}"
SNIPPET, RULES = "/etc/mosquitto/conf.d/nestling.conf", "/etc/mosquitto/nestling.acl"
DROP_IN = f"{UNITS}/{UNIT}.d/50-this-machine.conf"
_HERE = Path(__file__).parent / "units"
_SECRETS = {"password_file": "broker.password", "key": "broker.key", "cert": "broker.key"}


@dataclass(frozen=True, slots=True)
class Placed:
    """What is to be written.

    Attributes:
        config: The run's, as the service reads it.
        texts: By path.
        copies: Files to copy: where to, and where from.
        secrets: Those of the copies that only root may read, and systemd, which hands them on.
        shown: Hidden paths that the service has to see.
    """

    config: Config
    texts: Mapping[str, str]
    copies: Mapping[str, Path]
    secrets: frozenset[str] = field(default_factory=frozenset)
    shown: tuple[str, ...] = ()


def place(config: Config, *, mosquitto: bool = False) -> Placed:
    """Decide what goes where. Cost: starts the interpreter once, and may ask for the broker's addresses.

    Args:
        config: The operator's.
        mosquitto: Whether the broker of this machine is set up as well.

    Raises:
        ConfigError: A file that the configuration names is not there, or a unit cannot name a path.
        StoreError: The unit that came with this package cannot be read.
    """
    broker, copies, moved = config.broker, dict[str, Path](), dict[str, Any]()
    if _spoken(broker.url):
        raise ConfigError(
            "[broker] url has a password in it, and everybody on this machine can read what a service is configured with:"
            " write the password into a file, and name that, password_file = ..."
        )
    for name in ("ca", "cert", "key", "password_file"):
        if getattr(broker, name):
            source = _file(f"[broker] {name}", getattr(broker, name))
            secret = name in _SECRETS and (name != "cert" or not broker.key)  # one file may hold both
            kept = _SECRETS[name] if secret else f"broker.{name}"
            copies[f"{SETTINGS}/{kept}"] = source
            moved[name] = f"{CREDENTIALS}/{kept}" if secret else f"{SETTINGS}/{kept}"
    run: dict[str, Any] = {"state": f"{STATE}/run"}
    if config.model.partition("@")[0] not in zoo.MODELS:
        run["model"] = f"{SETTINGS}/model.spec"
        copies[run["model"]] = _file("model", config.model)
    if config.weights:
        run["weights"] = f"{SETTINGS}/weights.safetensors"
        copies[run["weights"]] = _file("weights", config.weights)
    data = _data(config.data)
    if data is not None:
        run["data"] = f"{config.data.partition('=')[0]}={data}"
    placed = dataclasses.replace(config, broker=dataclasses.replace(broker, **moved), **run)
    code, search = service.code("coordinator")
    shown = service.shown([*code, *([str(data)] if data is not None else [])])
    lines = service.surroundings(shown, search)
    allow = service.allowed(Address.parse(broker.url).host) if broker.url else ""
    if allow and allow != service.PRIVATE:  # those the unit lets in already
        lines.append(f"IPAddressAllow={allow}")
    if f"{SETTINGS}/broker.key" in copies:
        lines.append(f"LoadCredential=broker.key:{SETTINGS}/broker.key")
    head = ["[Unit]", f"RequiresMountsFor={said(str(data))}"] if data is not None else []
    about = "Written by `coordinator install`; changes here count from the next start on."
    texts = {CONFIG: text(placed, about), f"{UNITS}/{UNIT}": _read(UNIT).replace(INTERPRETER, said(sys.executable))}
    if lines or head:
        texts[DROP_IN] = "\n".join([*head, "[Service]", *lines, ""])
    if mosquitto:
        texts |= _mosquitto(config)
    return Placed(placed, texts, copies, frozenset(f"{SETTINGS}/{kept}" for kept in _SECRETS.values()), tuple(shown))


def _mosquitto(config: Config) -> dict[str, str]:
    if config.broker.listen or not config.broker.url:
        raise ConfigError(
            "--mosquitto sets up the broker that runs on this machine: name it, [broker] url ="
            ' "mqtt://coordinator@localhost"; without a url the coordinator starts one of its own, which needs nothing'
        )
    user = Address.parse(config.broker.url, username=config.broker.username).user or "coordinator"
    if not user.isprintable() or user != user.strip():
        raise ConfigError(f"[broker] username: access rules cannot name {user!r}")
    return {SNIPPET: _read("mosquitto-nestling.conf"), RULES: patterns("mosquitto", config.federation, user)}


def _spoken(url: str) -> bool:
    return bool(url) and Address.parse(url, username="-").password != ""


def _read(name: str) -> str:
    try:
        return (_HERE / name).read_text("utf-8")
    except OSError as error:
        raise StoreError(f"{error.filename}: {error.strerror}; install nestling again") from error


def _file(what: str, path: str) -> Path:
    found = Path(path).expanduser().absolute()
    if not found.is_file():
        raise ConfigError(f"{what}: {found} is not there")
    return found


def _data(said_of_it: str) -> Path | None:
    """Give the path of NAME=PATH; a name alone is looked up by the service itself, in the system's data folders."""
    path = said_of_it.partition("=")[2]
    if not path:
        return None
    found = Path(path).expanduser().absolute()
    if not found.exists():
        raise ConfigError(f"data: {found} is not there")
    return found
