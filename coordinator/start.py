"""`coordinator start`: put the pieces together, lead the run, leave a model behind."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from coordinator import algorithms
from coordinator.advance import rehearse, stored
from coordinator.blocks.initial import initial_weights
from coordinator.broker import Broker, Entrance, choose, instructions
from coordinator.config import Config
from coordinator.evaluate import Evaluator
from coordinator.export import JOURNAL, MODEL, SPOOL, standing_of, write_model
from coordinator.journal import Journal, RunStarted
from coordinator.keys.between import Between
from coordinator.mail import Mail, offline
from coordinator.server import Server
from coordinator.standing import Standing, absorb, fold
from coordinator.steps import Store
from coordinator.weights import read, started
from wire import codec, topics, zoo
from wire import spec as specs
from wire.errors import ConfigError, one_line
from wire.link import Address, Will
from wire.link.mqtt import MqttLink
from wire.messages import BlobRef, Lead
from wire.schema import to_plain
from wire.spec import ModelSpec
from wire.spool import Spool


def start(config: Config, *, instead: bool = False) -> int:
    """Run the service until its rounds are done (exit code 0; 4 where none was closed), or until SIGTERM or Ctrl-C (130).

    Raises:
        ConfigError: The algorithm, the model or the data set is not there, or the folder holds another run.
        LinkError: There is no broker.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s.%(msecs)03d %(message)s", datefmt="%H:%M:%S"
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_as_line)
    say = logging.getLogger("coordinator").info
    algorithms.by_name(config.algo)
    state = Path(config.state)
    store, standing = prepare(config, state, instead=instead)
    if standing.finished and standing.settled and standing.done >= config.rounds:
        store.journal.close()
        say(
            "this run is finished after %d rounds; it goes on with more --rounds; other settings with --replace begin another",
            standing.done,
        )
        return _left(state, "the model: %s", say)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: stopping.append(caught))
    entrance = Entrance(config.federation, config.broker.address)
    with closing(store.journal), choose(config.broker.url, config.broker.listen, state, entrance) as broker:
        say("broker: %s at %s: %s", broker.name, Address.parse(broker.url), broker.note)
        say("on a device: %s", instructions(broker, config.federation))
        server = compose(config, store, standing, broker, say)
        done = server.run(stop=lambda: bool(stopping))
    if not done:
        say("stopped; start again with the same --state to go on")
        return 130
    return _left(state, "the model: %s", say)


def _left(state: Path, words: str, say: Callable[..., None]) -> int:
    """Write the model that a run has left behind; 4 where no round was closed, so that nobody has trained anything."""
    if not standing_of(state).closed:
        say(
            "no round was closed, so that there is no model: the lines above, and coordinator devices, say who answered what"
        )
        return 4
    say(words, write_model(state, None)[0])
    return 0


def _as_line(record: logging.LogRecord) -> bool:
    record.msg, record.args = one_line(record.getMessage()), ()
    return True


def prepare(config: Config, state: Path, *, instead: bool = False) -> tuple[Store, Standing]:
    """Open or create a run's folder; where it holds a run with other settings, begin another one `instead`.

    The journal goes on, so that what the one before left at the broker and learnt of devices' memory is known.

    Raises:
        ConfigError: The folder holds a run with other settings, and there is to be no other instead. Or the algorithm refuses
            its parameters with this model: then no run has begun.
        StoreError: It cannot be read or written.
    """
    spec = zoo.load(config.model)
    spool = Spool(state / SPOOL)
    ref = spool.add_bytes(specs.encode(spec))
    journal = Journal(state / JOURNAL)
    try:
        standing = over = fold(journal.replay())
        before = standing.started
        weights = _weights(config, spec, spool, before)
        if before is not None and not _same(before, config, weights, ref):
            standing = _given_up(state, standing, instead=instead)
            weights = _weights(config, spec, spool, None)
        spool.sync([ref.digest, *([weights] if weights else [])])
        if standing.started is None:
            rehearse(config, spec, started(spool, weights) if weights else initial_weights(spec, config.seed))
            about: dict[str, str | int | float | bool] = {
                "algo": config.algo,
                "model": spec.name,
                "spec": ref.digest,
                "seed": config.seed,
                "federation": config.federation,
                **({"weights": weights} if weights else {}),
            }
            begun = RunStarted(run=secrets.token_hex(8), config=digest(config, weights), about=about)
            if before is not None:
                _set_aside(state, over)
            journal.append([begun])
            standing = absorb(standing, begun)
    except BaseException:
        journal.close()
        raise
    return Store(spool, journal, spec, ref, weights), standing


def _same(before: RunStarted, config: Config, weights: str, spec: BlobRef) -> bool:
    return before.config == digest(config, weights) and before.about.get("spec") == spec.digest


def _given_up(state: Path, standing: Standing, *, instead: bool) -> Standing:
    """Give what a run leaves to the one that begins in its place."""
    assert standing.started is not None
    if not instead:
        raise ConfigError(
            f"{state} holds a run with other settings ({dict(standing.started.about)}): give those, or use another --state"
            " for other devices, or begin this run in its place, with the same devices, by --replace"
        )
    return replace(standing, started=None)


def _set_aside(state: Path, over: Standing) -> None:
    """Keep the model of a run, as far as it has come: the one that follows sweeps away what it is made of."""
    assert over.started is not None
    if over.closed:
        write_model(state, None, (state / MODEL).with_stem(f"model-{over.started.run}"))
    (state / MODEL).unlink(missing_ok=True)


def _weights(config: Config, spec: ModelSpec, spool: Spool, before: RunStarted | None) -> str:
    """Name what the run starts from. One that has begun needs the file no more: what it said then is in the spool."""
    file = Path(config.weights).expanduser()
    if config.weights and before is not None and not file.exists():
        return str(before.about.get("weights", ""))
    return stored(spool, read(file, spec)) if config.weights else ""


def digest(config: Config, weights: str = "") -> str:
    """Name what defines a run: all but its length, the broker, the waiting and the evaluation; files by their content."""
    parts = {"algo", "model", "seed", "federation", "recipe", "params"}
    chosen = {key: value for key, value in to_plain(config).items() if key in parts}
    chosen["select"] = config.round.select
    chosen |= {"weights": weights} if weights else {}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def compose(config: Config, store: Store, standing: Standing, broker: Broker, say: Callable[[str], None]) -> Server:
    """Build a server over MQTT; nothing is sent before its `run`."""
    assert standing.started is not None
    address = Address.parse(
        broker.url,
        username=config.broker.username,
        password_file=config.broker.password_file,
        ca=config.broker.ca,
        cert=config.broker.cert,
        key=config.broker.key,
    )
    lead = Lead("online", secrets.token_hex(8), standing.started.run, config.round.keepalive)
    will = Will(topics.lead(config.federation), codec.encode(offline(lead)), retain=True)
    link = MqttLink(
        address, f"{config.federation}-coordinator", session_seconds=3600, keepalive=config.round.keepalive, will=will
    )
    mail = Mail(link, store.spool, config.federation, lead, _door(config, broker, link, say))
    evaluator = Evaluator(link.post, source(config.data), store.spool) if config.data else None
    return Server(config, store, standing, mail, evaluator, say=say)


def _door(config: Config, broker: Broker, link: MqttLink, say: Callable[[str], None]) -> Between | None:
    if not broker.listen:
        return None
    from coordinator.keys.door import Door, Policy

    return Door(Policy(Path(config.state).resolve(), broker.names, config.broker.seconds_certificate), link, say=say)


def source(data: str) -> str:
    """Turn NAME or NAME=PATH into the worker's data source (JSON): everything of it is for testing."""
    name, _, path = data.partition("=")
    return json.dumps({"source": name, "path": path, "validation": 0.0, "test": 1.0})
