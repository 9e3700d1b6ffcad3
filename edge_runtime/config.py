"""What a device's owner may set, as frozen dataclasses read from TOML."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from edge_runtime.amounts import amount
from edge_runtime.data import Source
from wire import settings, topics
from wire.errors import ConfigError
from wire.schema import Limit, Name, Natural, Positive


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """Where the broker is.

    Attributes:
        url: ``mqtt://host[:port]`` or ``mqtts://host[:port]``.
        username: The device's name at the broker; default: `Config.device`, when there is a password.
        password_file: File with the password on its first line.
        ca: File with the broker's certificate authority.
        cert: File with the device's certificate.
        key: File with its key.
    """

    url: str
    username: str = ""
    password_file: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """How much memory training may take.

    Attributes:
        budget: Above the worker's base, as bytes or as text such as ``"48 MiB"``; 0 for what the machine has to give.
        reserve: What must stay available to the rest of the machine.
        file: File with an amount that counts from the next batch on; default: ``budget`` in the state folder.
    """

    budget: int | str = 0
    reserve: int | str = "64 MiB"
    file: str = ""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The process that trains.

    Attributes:
        mode: ``spawn`` (one per order), ``warm`` (kept) or ``auto`` (kept for a while after an order, memory permitting).
        engine: Which engine; empty for the best that is installed.
        threads: Cores that training may use.
        seconds_warm: For ``auto``: how long it is kept.
        seconds_stall: A worker that has shown no progress for so long is killed.
        socket: Socket of a service manager that starts the worker for each connection; empty to start a child.
        priority: What an order gets of processor and disk: ``idle`` what nobody else wants, ``low``, or ``normal``.
    """

    mode: Literal["auto", "spawn", "warm"] = "auto"
    engine: str = ""
    threads: Positive = 1
    seconds_warm: Annotated[float, Limit(0, 86400)] = 60.0
    seconds_stall: Annotated[float, Limit(1, 86400)] = 600.0
    socket: str = ""
    priority: Literal["idle", "low", "normal"] = "idle"


@dataclass(frozen=True, slots=True)
class ConditionsConfig:
    """When this device may train; nothing is demanded by default. See `edge_runtime.probes`.

    Attributes:
        charging: Only when plugged in; a machine without a battery always is.
        battery_min: Percent that the battery must have.
        battery_celsius_max: How warm the battery may be.
        celsius_max: How warm the processor may be.
        unthrottled: Only while the processor is not held back for want of power or for heat.
        unmetered: Only on a network that is not paid by volume.
        metered: Interfaces that are, although they do not look like it: ``["wlan1"]``.
        load_max: What others may do on this machine, as load per core.
        hours: When, by this device's clock: ``["22:00-06:00"]``.
        seconds_settle: How long all must have held before training goes on.
        seconds_still: How long a worker stands still, with its memory, before it is ended.
        root: Where /proc and /sys are: in a container, where the machine's own are mounted.
    """

    charging: bool = False
    battery_min: Annotated[float, Limit(0, 100)] = 0.0
    battery_celsius_max: Annotated[float, Limit(0, 100)] = 0.0
    celsius_max: Annotated[float, Limit(0, 150)] = 0.0
    unthrottled: bool = False
    unmetered: bool = False
    metered: Annotated[tuple[Name, ...], Limit(0, 16)] = ()
    load_max: Annotated[float, Limit(0, 1000)] = 0.0
    hours: Annotated[tuple[Annotated[str, Limit(1, 32)], ...], Limit(0, 16)] = ()
    seconds_settle: Annotated[float, Limit(0, 86400)] = 30.0
    seconds_still: Annotated[float, Limit(0, 86400)] = 1.0
    root: str = "/"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What the agent says on stderr.

    Attributes:
        form: ``plain``, ``logfmt`` or ``json``; ``auto`` is plain on a terminal and logfmt elsewhere.
    """

    form: Literal["auto", "plain", "logfmt", "json"] = "auto"


@dataclass(frozen=True, slots=True)
class StateConfig:
    """What the agent keeps on disk.

    Attributes:
        dir: Folder.
        bytes_spool: Bound of the cache of models, as bytes or as text.
    """

    dir: str = "edge-state"
    bytes_spool: int | str = "2 GiB"


@dataclass(frozen=True, slots=True)
class Config:
    """A whole device.

    Attributes:
        device: Its name.
        broker: See `BrokerConfig`.
        federation: As the coordinator calls it.
        data: The device's data; see `edge_runtime.data.Source`.
        memory: See `MemoryConfig`.
        worker: See `WorkerConfig`.
        state: See `StateConfig`.
        conditions: See `ConditionsConfig`.
        log: See `LogConfig`.
    """

    device: Name
    broker: BrokerConfig
    federation: Name = "home"
    data: Source = field(default_factory=lambda: Source("digits"))
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    state: StateConfig = field(default_factory=StateConfig)
    conditions: ConditionsConfig = field(default_factory=ConditionsConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def bytes_budget(self) -> Natural:
        """The memory budget in bytes; 0 for no limit of the owner's."""
        return amount(self.memory.budget, "memory.budget")

    @property
    def budget_file(self) -> Path:
        """Where the operator says what an order may take, see `edge_runtime.memory.limit`."""
        return Path(self.memory.file or Path(self.state.dir) / "budget")

    @property
    def bytes_reserve(self) -> Natural:
        """The memory reserve in bytes."""
        return amount(self.memory.reserve, "memory.reserve")

    @property
    def bytes_spool(self) -> Natural:
        """The bound of the cache of models in bytes."""
        return amount(self.state.bytes_spool, "state.bytes_spool")


def load(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        ConfigError: Naming file, key and what to write.
    """
    config = settings.read(Config, path)
    try:
        topics.valid_name(config.device, "device")
        topics.valid_name(config.federation, "federation")
        amount(config.memory.budget, "memory.budget")
        amount(config.memory.reserve, "memory.reserve")
        amount(config.state.bytes_spool, "state.bytes_spool")
        _hours(config.conditions)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    folder = Path(config.state.dir).expanduser()
    return dataclasses.replace(config, state=dataclasses.replace(config.state, dir=str(folder)))


def _hours(conditions: ConditionsConfig) -> None:
    if conditions.hours:
        from edge_runtime.probes.hours import spans  # only who names hours loads what reads them

        spans(conditions.hours)
