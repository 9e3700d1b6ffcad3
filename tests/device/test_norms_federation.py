"""Statistics of norms by width through a real broker: observed by devices, sent with their width, exported, predicted with."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from safetensors.numpy import load_file

from coordinator.advance import load_state
from coordinator.blocks import norms
from coordinator.export import standing_of, write_model
from coordinator.shells import structures_of
from edge_runtime import personal
from edge_runtime.keep import Keep
from tests.support.federation import Federation
from wire import zoo
from wire.spool import Spool
from wire.structure import cut, to_wire
from wire.tensor import open_blob

SPEC = zoo.by_name("digits-cnn-bn")
STILL = [f"norm{i}.{role}" for i in (1, 2, 3) for role in ("mean", "variance")]


def test_two_widths_have_their_own_statistics_everywhere(tmp_path):
    running = Federation(
        tmp_path,
        algo="heterofl",
        model=SPEC.name,
        rounds=3,
        devices=2,
        recipe={"steps": 1, "batch": 16, "rate": 1e-4},
        params={"fractions": "0.25 1", "mix": "a1-b1", "calibrate": 2.0},
        samples=200,
        evaluate=True,
    )
    with running:
        running.start()
        running.wait(lambda view: view.rounds.get(1) is not None and view.rounds[1].outcome == "closed")
        running.kill("coordinator")
        running.restart("coordinator")
        view = running.wait_finished()
        samples, config = tmp_path / "x.npy", tmp_path / "device-1.toml"
        np.save(samples, np.zeros((2, 1, 8, 8), np.float32))
        words = ["predict", "--config", str(config), "--input", str(samples), "--json"]
        told = subprocess.run(
            [sys.executable, "-m", "edge_runtime.cli", *words], capture_output=True, check=True, timeout=100
        )
    assert [view.rounds[n].outcome for n in range(1, 4)] == ["closed"] * 3
    for number in range(1, 4):
        orders = view.rounds[number].orders
        assert {order.verb for order in orders.values()} == {"calibrate" if number == 2 else "train"}
        wanted = [1, 1] if number == 2 else [1, 0]
        assert [orders[f"device-{i}"].structures[0].capacity for i in range(2)] == wanted
    folder = tmp_path / "coordinator"
    spool = Spool(folder / "spool")
    state = load_state(spool, standing_of(folder).state, SPEC)
    small, _ = structures_of(state)
    own = norms.own(state, small)
    shared = cut(SPEC, to_wire(SPEC, state.weights, state.levels), small)
    assert sorted(own) == sorted(STILL)
    blobs = Spool(tmp_path / "device-1" / "spool")
    (shell,) = view.rounds[3].orders["device-1"].shells
    with open_blob(blobs.path(shell.digest)) as blob:
        for name in STILL:
            np.testing.assert_array_equal(blob.tensor(f"n/{name}"), own[name])
    held = Keep(tmp_path / "device-1" / "keep").current("test", "heterofl")
    assert held is not None
    model = personal.read(held)
    assert model.structure.capacity == 0
    for name in STILL[2:]:  # the first norm's inputs are the same in all widths
        own_gap, shared_gap = (np.abs(model.arrays[name] - array[name]).max() for array in (own, shared))
        assert own_gap < shared_gap / 2, "one step from its own set, and not from the widest's"
    assert len(json.loads(told.stdout)["predictions"]) == 2
    written, _ = write_model(folder, 0.25, tmp_path / "small")
    exported = load_file(written)
    for name in STILL:
        np.testing.assert_array_equal(exported[name], own[name])
    assert {"accuracy.0", "accuracy.1"} <= set(view.rounds[3].metrics)
