"""Masked models through a real broker: masks fetched once, values alone both ways, kills on both sides."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from edge_runtime import personal
from edge_runtime.keep import Keep
from tests.support.federation import MIB, Federation
from wire.maskfile import KIND
from wire.spool import Spool
from wire.tensor import open_blob

WEIGHTS = 64 * 96 + 96 * 96 + 96 * 10
BIASES = 96 + 96 + 10
RECIPE = {"epochs": 2, "rate": 0.2, "batch": 16}


def federation(root, algo, rounds, **params):
    return Federation(
        root, algo=algo, model="digits-mlp", rounds=rounds, devices=2, recipe=RECIPE, params=params, samples=200
    )


def test_taper_trains_kept_weights_over_a_real_broker(tmp_path):
    params = {"density": 0.1, "start": 0.3, "every": 1.0, "until": 0.5, "horizon": 8.0}
    with federation(tmp_path, "taper", 8, **params) as running:
        running.start()
        running.wait(lambda view: view.rounds.get(3) is not None and view.rounds[3].outcome == "closed")
        running.kill("device-1")
        running.restart("device-1")
        running.wait(lambda view: view.rounds.get(5) is not None and view.rounds[5].outcome == "closed")
        running.kill("coordinator")
        running.restart("coordinator")
        view = running.wait_finished()
        weights = running.weights()
        kept = {name: int(np.count_nonzero(array)) for name, array in weights.items()}
    assert [view.rounds[n].outcome for n in range(1, 9)] == ["closed"] * 8
    orders = {n: next(iter(view.rounds[n].orders.values())) for n in range(1, 9)}
    assert orders[1].recipe.rule == "score"
    assert orders[1].masks is None
    sizes = [sum(orders[n].structures[0].kept.values()) for n in range(2, 9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == round(0.1 * WEIGHTS)
    assert orders[7].masks == orders[8].masks, "from half of the horizon on the masks stay"
    for number in range(2, 9):
        (shell,) = orders[number].shells
        values = sum(orders[number].structures[0].kept.values()) + BIASES
        assert 2 * values < shell.size < 2 * values + 400, "bfloat16 and a short header"
        for reply in view.rounds[number].replies.values():
            assert 2 * values < reply.update.size < 2 * values + 400
    # the accelerated step moves kept weights and biases alone
    assert sum(kept[f"w/{name}"] for name in ("fc1.weight", "fc2.weight", "out.weight")) <= sizes[-1]


def test_masks_are_fetched_once_and_the_personal_model_has_them(tmp_path):
    with federation(tmp_path, "fixed", 4, density=0.2) as running:
        running.start()
        view = running.wait_finished()
        blobs = Spool(running.root / "device-0" / "spool")
        ref = next(iter(view.rounds[4].orders.values())).masks
        with open_blob(blobs.path(ref.digest)) as blob:
            assert blob.kind == KIND
            masks = {name: blob.mask(name) for name in blob.names}
        held = Keep(running.root / "device-0" / "keep").current("test", "sgd")
        assert held is not None
        model = personal.read(held)
        config, samples = running.root / "device-0.toml", running.root / "device-0.npz"
        words = ["predict", "--config", str(config), "--input", str(samples), "--json"]
        runs = subprocess.run(
            [sys.executable, "-m", "edge_runtime.cli", *words],
            capture_output=True,
            check=True,
            timeout=100,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert {order.masks for n in range(1, 5) for order in view.rounds[n].orders.values()} == {ref}
    for name, mask in masks.items():
        assert model.arrays[name].shape == mask.shape
        assert not model.arrays[name][~mask].any()
        assert model.arrays[name][mask].any()
    assert json.loads(runs.stdout)
    first, second = (view.rounds[n].bytes_down for n in (1, 3))
    assert second < first, "the second time without masks"


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [(24, {"sizes": "0.05 1"}), (16, {"sizes": "0.6 0.5", "fractions": "0.3 1", "by": "layer"})],
    ids=["whole", "cut"],
)
def test_devices_of_two_sizes_train_nested_masks_and_both_are_measured(tmp_path, budget, sizes):
    wide = federation(tmp_path, "fiarse", 3, **sizes)
    wide.model, wide.budgets, wide.evaluate = "digits-cnn", (budget * MIB, 512 * MIB), True
    with wide as running:
        running.start()
        running.wait(lambda view: view.rounds.get(1) is not None and view.rounds[1].outcome == "closed")
        running.kill("coordinator")
        running.restart("coordinator")
        view = running.wait_finished()
    assert [view.rounds[n].outcome for n in range(1, 4)] == ["closed"] * 3
    for number in range(1, 4):
        orders = view.rounds[number].orders
        small, whole = orders["device-0"], orders["device-1"]
        assert [order.structures[0].capacity for order in (small, whole)] == [0, 1]
        assert small.masks is not None
        assert (whole.masks is None) == (budget == 24)
        assert all(bool(order.structures[0].widths) == ("fractions" in sizes) for order in (small, whole))
        kept = sum(small.structures[0].kept.values())
        sent = {name: reply.update.size for name, reply in view.rounds[number].replies.items()}
        assert 4 * kept < sent["device-0"] < sent["device-1"] / 5
    assert set(view.rounds[3].metrics) == {"accuracy.0", "loss.0", "accuracy.1", "loss.1"}


@pytest.mark.parametrize(
    ("algo", "params"),
    [("prunefl", {"stages": "further", "every": 2.0, "target": 0.3}), ("feddip", {"every": 2.0, "horizon": 4.0})],
)
def test_what_devices_tell_beside_the_update_arrives(tmp_path, algo, params):
    with federation(tmp_path, algo, 5, **params) as running:
        running.start()
        view = running.wait_finished()
    assert [view.rounds[n].outcome for n in range(1, 6)] == ["closed"] * 5
    assert next(iter(view.rounds[5].orders.values())).structures[0].masks
    told, kept = view.rounds[4].facts, next(iter(view.rounds[5].orders.values())).structures[0].kept
    assert told["round"] == 4
    assert told["density"] == pytest.approx(sum(kept.values()) / WEIGHTS)
    assert told["density.fc1.weight"] == pytest.approx(kept["fc1.weight"] / (64 * 96))
