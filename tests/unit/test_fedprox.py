"""FedProx: with no pull and all of the work it is FedAvg; slow devices are asked for what their time holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, fedprox
from coordinator.simulate.run import Log, play, simulate
from coordinator.simulate.world import Config, build
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed
from wire.messages import Usage
from wire.spec import Structure

GREAT = 1 << 40
SPEC = small_cnn()


def start(**params):
    return fedprox.init(SPEC, random_arrays(SPEC, Structure(), 9), params)


def answer(device, seconds, samples=10, seed=0, structure=None):
    update = random_arrays(SPEC, Structure(), seed)
    return Answer(device, samples, structure or Structure(), {}, Usage(seconds=seconds), update)


def devices(**samples):
    return tuple(DeviceView(name, GREAT, samples=count) for name, count in samples.items())


def asked(state, number, views):
    state, drafts = fedprox.plan(state, number, views, rng_of(0, number))
    return state, {draft.device: draft.recipe.steps for draft in drafts}


def test_slow_devices_do_what_the_medians_time_holds():
    """Batches of 32, two epochs: 320 samples are 20 steps, 640 are 40."""
    views = devices(a=320, b=320, c=320, d=640)
    state, steps = asked(start(), 1, views)
    assert steps == dict.fromkeys("abcd", 0), "nobody is known yet: everything, as FedAvg says it"
    assert state.scalars["asked"] == {"a": 20, "b": 20, "c": 20, "d": 40}
    state = fedprox.close(state, tuple(answer(n, s) for n, s in zip("abcd", (10.0, 20.0, 200.0, 40.0), strict=True)))
    assert state.scalars["pace"] == {"a": 0.5, "b": 1.0, "c": 10.0, "d": 1.0}
    state, steps = asked(state, 2, views)  # 10, 20, 200 and 40 s for all of it: the median is 30
    assert steps == {"a": 0, "b": 0, "c": 3, "d": 30}
    assert state.scalars["asked"] == {"a": 20, "b": 20, "c": 3, "d": 30}
    state = fedprox.close(state, (answer("c", 30.0), answer("d", 30.0)))
    assert asked(state, 3, views)[1] == steps, "less work is not taken for more speed"


def test_at_least_one_step_and_patience():
    views = devices(a=320, b=320, c=320)

    def third(patience, slow):
        state = asked(start(patience=patience), 1, views)[0]
        state = fedprox.close(state, (answer("a", 20.0), answer("b", 20.0), answer("c", slow)))
        return asked(state, 2, views)[1]["c"]

    assert third(1.0, 1e9) == 1
    assert third(1.0, 21.0) == 19
    assert third(2.0, 40.0) == 0
    assert third(2.0, 50.0) == 16
    assert third(0.0, 1e9) == 0


def test_what_is_not_known_is_asked_for_in_full():
    views = (*devices(a=320, b=0), DeviceView("c", 0, samples=10))
    state, steps = asked(start(), 1, views)
    assert steps == {"a": 0, "b": 0}, "c has no memory for it"
    state = fedprox.close(state, (answer("a", 20.0), answer("b", 1e6)))
    assert asked(state, 2, views)[1] == {"a": 0, "b": 0}
    assert fedprox.steps_of(fedprox.recipe_at({**fedprox.PARAMS, "recipe.steps": 7.0}, 1), 1) == 7


def test_joined_by_samples_as_fedavg_joins():
    plain = fedavg.init(SPEC, random_arrays(SPEC, Structure(), 9), {})
    told = tuple(answer(n, 1.0, samples, seed) for seed, (n, samples) in enumerate([("a", 3), ("b", 5), ("c", 0)]))
    wanted, found = fedavg.close(plain, told), fedprox.close(start(), told)
    for name, array in wanted.weights.items():
        np.testing.assert_array_equal(found.weights[name], array)
    with pytest.raises(Malformed, match="a answers"):
        fedprox.close(start(), (answer("a", 1.0, structure=Structure(0, {"a": (2, 6)})),))


def test_wrong_parameters_are_explained():
    for name in ("patience", "recipe.mu"):
        with pytest.raises(ConfigError, match=name):
            fedprox.init(linear(), random_arrays(linear(), Structure()), {name: -1.0})
    with pytest.raises(ConfigError, match="patience"):
        fedprox.init(linear(), random_arrays(linear(), Structure()), {"patience": float("nan")})


def test_a_device_that_says_it_has_more_samples_than_there_are_numbers():
    recipe = dataclasses.replace(fedprox.recipe_at(start().scalars["params"], 1), epochs=4096, batch=1)
    assert fedprox.steps_of(recipe, 1 << 53) == 1 << 53, "what a recipe and a saved state can say"


SMALL = Config(
    algo="fedprox", model="digits-mlp", partition="dir0.5", fleet="stragglers", devices=4, rounds=3,
    params={"recipe.rate": 0.3, "recipe.epochs": 1.0},
)  # fmt: skip


def test_without_a_pull_and_with_all_the_work_it_is_fedavg_to_the_bit(tmp_path):
    states = []
    for algo, params in (("fedavg", {}), ("fedprox", {"recipe.mu": 0.0, "patience": 0.0})):
        config = dataclasses.replace(SMALL, algo=algo, params={**SMALL.params, **params})
        world, log = build(config, tmp_path / algo), Log()
        list(play(world, log))
        replies = [log.view.rounds[n].replies for n in sorted(log.view.rounds)]
        states.append([[(d, r.update.digest) for d, r in sorted(one.items())] for one in replies])
    assert states[0] == states[1]
    assert len(states[0]) == 3


def test_stragglers_are_not_waited_for():
    much = dataclasses.replace(SMALL, rounds=2, params={**SMALL.params, "recipe.epochs": 8.0})
    whole = simulate(dataclasses.replace(much, params={**much.params, "patience": 0.0}))
    part = simulate(much)
    assert part["seconds_virtual"] < 0.85 * whole["seconds_virtual"]
    assert part["accuracy"]["full"] > whole["accuracy"]["full"] - 0.1
