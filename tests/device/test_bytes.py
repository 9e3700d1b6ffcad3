"""What a round moves: a simulation reports the bytes that real links carry, and `status` says what the link counted."""

from __future__ import annotations

import json
from contextlib import ExitStack

import numpy as np
import pytest

from coordinator import show
from coordinator.simulate.run import Log, play
from coordinator.simulate.world import Config, build
from tests.support.federation import Federation
from tests.support.relay import Relay
from wire import zoo
from wire.spec import Structure, encode, parameter_count

ROUNDS, DEVICES = 3, 2
SPEC = zoo.mlp("wide", (1, 8, 8), 10, (1024, 384))
MORE = 0.05
"""What links may carry beside blobs: topics, orders, replies, receipts, signs of life; and TCP's and MQTT's own at a relay."""


def simulated(root, algo, params):
    """Give the rounds of a simulation, and the bytes of each round's new blobs, published once."""
    rng, data = np.random.default_rng(0), root / "data.npz"
    np.savez(data, x=rng.random((120, 1, 8, 8)).astype(np.float32), y=np.arange(120) % 10, classes=10)
    config = Config(
        algo=algo, model=str(root / "model.msgpack"), data=f"npz={data}", partition="iid", fleet="even",
        devices=DEVICES, rounds=ROUNDS, params=params, engine="native",
    )  # fmt: skip
    log = Log()
    for _ in play(build(config, root / "simulated"), log):
        pass
    published, live = [], set()
    for current in log.view.rounds.values():
        blobs = {ref.digest: ref.size for order in current.orders.values() for ref in order.blobs}
        published.append(sum(size for digest, size in blobs.items() if digest not in live))
        live = set(blobs)
    return log.view.rounds, published


@pytest.mark.parametrize(("algo", "params"), [("fedavg", {}), ("fixed", {"density": 0.3})])
def test_a_simulation_reports_the_bytes_that_real_links_carry(tmp_path, capsys, algo, params):
    assert parameter_count(SPEC, Structure()) * 4 * params.get("density", 1.0) > 300_000
    (tmp_path / "model.msgpack").write_bytes(encode(SPEC))
    params |= {"recipe.epochs": 1.0, "recipe.batch": 16.0}
    virtual, published = simulated(tmp_path, algo, params)
    own = {name: value for name, value in params.items() if not name.startswith("recipe.")}
    fleet = Federation(
        tmp_path / "real", algo=algo, model=str(tmp_path / "model.msgpack"), devices=DEVICES, rounds=ROUNDS,
        recipe={"epochs": 1, "batch": 16}, params=own,
    )  # fmt: skip
    with fleet, ExitStack() as stack:
        relays = [stack.enter_context(Relay(fleet.broker.port)) for _ in fleet.names]
        fleet.ports = {name: relay.port for name, relay in zip(fleet.names, relays, strict=True)}
        fleet.start()
        real = fleet.wait_finished().rounds
        down, up = (sum(getattr(relay, way) for relay in relays) for way in ("bytes_down", "bytes_up"))

    def carried(counted, blobs):
        assert blobs <= counted <= blobs * (1.0 + MORE), (counted, blobs)

    for number in range(1, ROUNDS + 1):
        carried(real[number].closed.bytes_up, virtual[number].bytes_up)
        carried(real[number].closed.bytes_down, published[number - 1])
    carried(down, sum(current.bytes_down for current in virtual.values()))
    carried(up, sum(current.bytes_up for current in virtual.values()))

    assert show.show_status(tmp_path / "real" / "coordinator", as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)["rounds"]
    assert [row["bytes_received"] for row in rows] == [real[n].closed.bytes_up for n in range(1, ROUNDS + 1)]
    assert show.show_status(tmp_path / "real" / "coordinator", as_json=False) == 0
    words = [line.split()[4:7] for line in capsys.readouterr().out.splitlines()[-ROUNDS:]]
    assert words == [[str(row[f"bytes_{way}"] >> 10) for way in ("received", "down", "published")] for row in rows]
