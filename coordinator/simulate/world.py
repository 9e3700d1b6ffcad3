"""What a simulation is made of and does not change: the data and how they are spread, the fleet, the model."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from coordinator import algorithms
from coordinator.recipes import merged, recipe_of
from coordinator.simulate import fleet, partitions, weather
from edge_runtime.data import Dataset, load, parse
from edge_runtime.data.parts import hold_out
from edge_runtime.engines import available, suited
from wire import zoo
from wire.errors import ConfigError
from wire.messages import BlobRef
from wire.spec import ModelSpec, encode
from wire.spool import Spool

TEST = 0.2
"""Share of the data that the global model is measured on, where they bring no test part of their own."""
VALIDATION = 0.1
"""Share of the data that it is measured on while parameters are tried out."""
OWN_VALIDATION = OWN_TEST = 0.1
"""Shares of a device's data that it holds out."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every round.

    Attributes:
        select: Who is asked, see `coordinator.select`.
        quorum: Least number of replies; 0 for all.
        seconds: Virtual time that it may take.
        evaluate_every: Measure the model after every so many rounds, and after the last one.
        tuning: Measure it on a validation part, which is then held out of the training data, and never on the test part.
    """

    select: str = "all"
    quorum: int = 0
    seconds: float = 3600.0
    evaluate_every: int = 1
    tuning: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """What to simulate.

    Attributes:
        algo: Name of the algorithm.
        model: Name in the zoo or path of a spec file; of a narrower one, ``NAME@FRACTION``, the fleet is that of the whole.
        data: Data set, NAME or NAME=PATH.
        partition: How it is spread, see `coordinator.simulate.partitions`.
        fleet: Profile, see `coordinator.simulate.fleet`.
        weather: See `coordinator.simulate.weather`.
        devices: How many.
        rounds: How many.
        seed: Root of all randomness.
        terms: Of every round.
        engine: Training engine; empty for the best that is installed and has all ops of the model. See `named`.
        params: Changes to the algorithm's parameters; those of its recipe are called ``recipe.NAME``.
    """

    algo: str = "nestfl"
    model: str = "digits-cnn"
    data: str = "digits"
    partition: str = "dir0.5"
    fleet: str = "mixed"
    weather: str = "fair"
    devices: int = 5
    rounds: int = 15
    seed: int = 0
    terms: Terms = field(default_factory=Terms)
    engine: str = ""
    params: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Client:
    """One virtual device and its data."""

    machine: fleet.Machine
    data: Dataset


@dataclass(frozen=True, slots=True)
class World:
    """What stays the same during a run.

    Attributes:
        config: What was asked for.
        run: Token of the run.
        spec: The model.
        spec_ref: Its blob.
        spool: All blobs.
        clients: By name.
        test: Data that the global model is measured on.
        digest: Of the partition.
        weather: What becomes of orders.
    """

    config: Config
    run: str
    spec: ModelSpec
    spec_ref: BlobRef
    spool: Spool
    clients: Mapping[str, Client]
    test: Dataset
    digest: str
    weather: weather.Weather


def named(config: Config) -> Config:
    """Name the engine: a run that is kept says what it was done with.

    Raises:
        ConfigError: There is no such engine here.
        Unsupported: No engine here has all ops of the model.
    """
    if config.engine:
        installed(config.engine)
    return dataclasses.replace(config, engine=config.engine or suited(zoo.load(config.model)))


def installed(engine: str) -> None:
    """Check that there is such an engine here.

    Raises:
        ConfigError: There is not.
    """
    if engine not in available():
        raise ConfigError(f"engine {engine!r} is not installed here; there are {', '.join(available())}")


def build(config: Config, folder: Path) -> World:
    """Load the data, spread them, and make the fleet.

    Raises:
        NestlingError: The configuration, the data or the model cannot work; the text says what to write.
    """
    config = named(config)
    spec = zoo.load(config.model)
    algorithm = algorithms.by_name(config.algo)
    recipe = recipe_of(merged(algorithm.PARAMS, config.params))
    wide = zoo.load(zoo.whole(config.model))
    machines = fleet.make(config.fleet, config.devices, wide, recipe, (config.engine,))
    if zoo.whole(config.model) != config.model:
        machines = tuple(
            dataclasses.replace(machine, step=None) for machine in machines
        )  # known of the whole model only
    whole = _data(config)
    split = partitions.partition(config.partition, whole.train[1], config.devices, seed=config.seed, ids=whole.ids)
    shares = [_share(whole, machine.name, part) for machine, part in zip(machines, split.parts, strict=True)]
    spool = Spool(folder / "spool")
    return World(
        config=config,
        run=token("run", config.algo, config.model, split.digest, config.seed),
        spec=spec,
        spec_ref=spool.add_bytes(encode(spec)),
        spool=spool,
        clients={m.name: Client(m, share) for m, share in zip(machines, shares, strict=True)},
        test=whole,
        digest=split.digest,
        weather=weather.forecast(config.weather),
    )


def _data(config: Config) -> Dataset:
    """Load the data; the test part is what the global model is measured on."""
    source = parse(config.data, validation=VALIDATION if config.terms.tuning else 0.0, test=TEST, seed=0)
    whole = load(source)
    return dataclasses.replace(whole, test=whole.validation) if config.terms.tuning else whole


def _share(whole: Dataset, name: str, rows: partitions.Indices) -> Dataset:
    """Give a device its samples, with its own validation and test parts held out."""
    x, y = whole.train[0][rows], whole.train[1][rows]
    test, validation, train = hold_out(y, OWN_TEST, OWN_VALIDATION, 0)
    return Dataset(
        train=(x[train], y[train]),
        validation=(x[validation], y[validation]),
        test=(x[test], y[test]),
        classes=whole.classes,
        input_shape=whole.input_shape,
        name=f"{whole.name} of {name}",
        labels=whole.labels,
    )


def token(*words: str | int) -> str:
    """Give a name of 16 hex digits for whatever these words say."""
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()[:16]
