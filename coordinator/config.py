"""What an operator may set, as frozen dataclasses read from TOML; the command line writes over the file.

Every key has a default except `algo`; `coordinator start --help` shows the usual ones as flags.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from coordinator.select import count
from wire import settings, topics
from wire.errors import ConfigError
from wire.schema import Limit, Name, Natural, Positive


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Where the broker is; all empty means: start one on this machine.

    Attributes:
        url: ``mqtt://[user[:password]@]host[:port]`` or ``mqtts://...``.
        listen: Address to open on the network with a broker of our own, for example ``0.0.0.0`` or ``192.168.1.5:8883``; the
            port above it is for invitations.
        address: With `listen`, the name or number by which devices reach this machine; empty to find out.
        seconds_certificate: With `listen`, how long a device's certificate is valid; it is renewed when a third is left.
        username: Of the coordinator at the broker.
        password_file: File with its password on the first line.
        ca: File with the broker's certificate authority.
        cert: File with the coordinator's certificate.
        key: File with its key.
    """

    url: str = ""
    listen: str = ""
    address: str = ""
    seconds_certificate: Annotated[float, Limit(3.0, 3.2e8)] = 2_592_000.0
    username: str = ""
    password_file: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class RoundConfig:
    """How a round is run.

    Attributes:
        devices: Devices that must be present before a round is planned.
        select: Whom a round asks: ``all``, ``random:5`` (devices) or ``random:0.2`` (a share of those present).
        quorum: Answers that settle a round at its deadline; 0 means all that were asked.
        seconds: Time until the deadline.
        keepalive: Seconds; a device that is silent for 1.5 times as long counts as lost.
    """

    devices: Positive = 1
    select: Annotated[str, Limit(1, 64)] = "all"
    quorum: Natural = 0
    seconds: Annotated[float, Limit(0.1, 86400)] = 600.0
    keepalive: Annotated[float, Limit(0.5, 3600)] = 20.0


@dataclass(frozen=True, slots=True)
class Config:
    """A whole run.

    Attributes:
        algo: Name of the algorithm; `coordinator algos` lists them.
        model: Name in the zoo or path of a spec file.
        weights: File of weights to start from, as safetensors; empty for weights by chance.
        rounds: How many.
        seed: Root of all randomness of the run.
        federation: Name that keeps several fleets on one broker apart.
        state: Folder for journal, spool and the broker's files.
        data: Data set for evaluation on this machine, NAME or NAME=PATH; empty for none.
        broker: See `BrokerConfig`.
        round: See `RoundConfig`.
        recipe: What to change in the algorithm's training recipe: rate, epochs, batch, momentum, decay, clip, rule.
        params: What else the algorithm understands; `coordinator algos NAME` lists it.
    """

    algo: Name
    model: str = "digits-cnn"
    weights: str = ""
    rounds: Positive = 20
    seed: Natural = 0
    federation: Name = "home"
    state: str = "coordinator-state"
    data: str = ""
    broker: BrokerConfig = field(default_factory=BrokerConfig)
    round: RoundConfig = field(default_factory=RoundConfig)
    recipe: Mapping[Name, float | str] = field(default_factory=dict)
    params: Mapping[Name, float | str] = field(default_factory=dict)


def load(path: Path | None, flags: Mapping[str, object]) -> Config:
    """Read a file and lay the command line's flags over it.

    Args:
        path: TOML file, or None for flags only.
        flags: Dotted key to value, for example ``{"round.seconds": 30.0}``; None values are left out.

    Raises:
        ConfigError: Naming file, key and what to write.
    """
    config = settings.read(Config, path, flags)
    topics.valid_name(config.federation, "federation")
    if config.broker.url and config.broker.listen:
        raise ConfigError("give --broker (a broker that runs already) or --listen (start one here), not both")
    if config.broker.address and not config.broker.listen:
        raise ConfigError("--address is for --listen: it says how devices reach a broker that is started here")
    if config.round.quorum > config.round.devices:
        raise ConfigError(
            f"round.quorum {config.round.quorum} is above round.devices {config.round.devices}: no round could reach it"
        )
    count(config.round.select, 1)
    return dataclasses.replace(config, state=str(Path(config.state).expanduser()))
