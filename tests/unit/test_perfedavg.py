"""Per-FedAvg: the plain mean of meta-updates; the personal model is what a device's own test is about."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import perfedavg
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config
from edge_runtime import personal
from edge_runtime.worker import perform
from tests.support.models import random_arrays, small_cnn
from tests.support.orders import dataset, job
from wire.errors import Malformed
from wire.messages import Recipe, Usage
from wire.spec import Structure
from wire.tensor import open_blob

SPEC = small_cnn()
WHOLE = Structure()


def answer(device, samples, update, structure=WHOLE):
    return Answer(device, samples, structure, {}, Usage(), update)


def start(**params):
    return perfedavg.init(SPEC, random_arrays(SPEC, WHOLE, 9), params)


def test_every_device_counts_the_same():
    state, updates = start(), [random_arrays(SPEC, WHOLE, seed) for seed in range(3)]
    told = [answer(f"d{i}", n, u) for i, (n, u) in enumerate(zip((1, 100, 7), updates, strict=True))]
    after = perfedavg.close(state, (*told, answer("nothing", 0, random_arrays(SPEC, WHOLE, 5))))
    for name, array in state.weights.items():
        wanted = array.astype(np.float64) + np.mean([u[name].astype(np.float64) for u in updates], axis=0)
        np.testing.assert_allclose(after.weights[name], wanted, atol=1e-6)


def test_a_tensor_that_was_not_sent_did_not_move():
    state = start()
    after = perfedavg.close(state, (answer("a", 1, {"o.bias": np.ones(4, np.float32)}), answer("b", 1, {})))
    np.testing.assert_array_equal(after.weights["c.weight"], state.weights["c.weight"])
    np.testing.assert_allclose(after.weights["o.bias"], state.weights["o.bias"] + 0.5, atol=1e-6)


def test_nobody_changes_nothing_and_a_part_is_refused():
    state = start()
    assert perfedavg.close(state, ()) is state
    assert perfedavg.close(state, (answer("a", 0, random_arrays(SPEC, WHOLE)),)) is state
    with pytest.raises(Malformed, match="dev"):
        perfedavg.close(state, (answer("dev", 1, {}, Structure(0, {"a": (2, 6)})),))


def test_the_recipe_says_how_far_to_look():
    state = start(**{"recipe.hf": 1.0, "recipe.alpha": 0.05})
    _, drafts = perfedavg.plan(state, 1, (DeviceView("a", 1 << 40),), rng_of(0, 1))
    assert drafts[0].recipe.rule == "maml"
    assert drafts[0].recipe.knobs == {"alpha": 0.05, "hf": 1.0, "delta": 1e-3, "tune": 1.0}


def test_the_kept_model_is_the_tuned_one_and_the_sent_update_is_not(tmp_path):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    found = []
    for tune in (0.0, 3.0):
        recipe = Recipe(rule="maml", epochs=2, batch=8, rate=0.05, knobs={"alpha": 0.1, "tune": tune})
        done = perform(job(tmp_path / str(tune), SPEC, arrays, [WHOLE], recipe), data)
        with open_blob(Path(done.update)) as blob:
            update = {name: blob.tensor(name).copy() for name in blob.names}
        found.append((done, update, personal.read(Path(done.keep)).arrays))
    (plain, sent, meta), (tuned, same, own) = found
    for name, array in arrays.items():
        np.testing.assert_array_equal(same[name], sent[name])
        np.testing.assert_allclose(meta[name], array + sent[name], atol=1e-6)
    assert any(np.abs(own[name] - meta[name]).max() > 1e-3 for name in own)
    assert tuned.metrics["loss.after"] < plain.metrics["loss.after"]


def test_it_learns_and_its_personal_models_are_better():
    config = Config(
        algo="perfedavg", model="digits-mlp", partition="dir0.3", fleet="even", devices=4, rounds=3,
        params={"recipe.epochs": 1.0},
    )  # fmt: skip
    for hf in (0.0, 1.0):
        result = simulate(dataclasses.replace(config, params={**config.params, "recipe.hf": hf}))
        assert result["accuracy"]["full"] > 0.5
        assert result["personal"]["before"]["mean"] > result["personal"]["after"]["mean"] + 0.05
