"""The registry: whatever is listed can be loaded, says where it comes from, and is held to that by tests that are there."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from pathlib import Path

import msgpack
import numpy as np
import pytest

from coordinator import algorithms
from coordinator.advance import load_state, save_state
from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.blocks.initial import initial_weights
from wire import zoo
from wire.errors import ConfigError
from wire.masked import maskable
from wire.messages import Recipe, Usage
from wire.schema import from_plain, to_plain, unpack
from wire.spec import tensor_shapes
from wire.spool import Spool

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_what_is_listed_has_a_paper_and_tests(name):
    facts = algorithms.describe()[name]
    assert facts["summary"].endswith(".")
    assert facts["text"]
    assert facts["tier"] in ("paper", "baseline", "ours")
    assert "import" in (ROOT / facts["tests"]).read_text("utf-8")


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_first_round_can_be_planned_with_the_defaults(name):
    spec = zoo.by_name("digits-cnn")
    algorithm = algorithms.by_name(name)
    state = algorithm.init(spec, initial_weights(spec, 0), {})
    devices = tuple(DeviceView(f"device-{i}", 1 << 30, samples=100) for i in range(3))
    state, drafts = algorithm.plan(state, 1, devices, rng_of(0, 1))
    assert drafts
    assert state.round == 1
    assert not algorithm.plan(state, 2, (), rng_of(0, 2))[1], "no devices, no drafts"


SPEC = zoo.by_name("digits-mlp")
DEVICES = tuple(DeviceView(f"d{i}", 1 << 40, samples=50 + i) for i in range(3))
GREAT, MINUS = 3e38, -1e308
SAID = {
    "well": {
        "rest": 3.0,
        "accuracy.train": 0.9,
        "lambda": 0.01,
        "loss.start": 2.0,
        "loss.sent": 1.9,
        "loss.probe": 1.95,
    },
    "little": {"loss": 1.0},
    "great": {"rest": 1e308, "lambda": 1e308, "loss.start": 1e308, "loss.sent": MINUS, "accuracy.train": 1.0},
    "below": {"rest": MINUS, "lambda": MINUS, "loss.start": MINUS, "dpf.fade": MINUS, "seconds.out.weight": MINUS},
    "nothing": {},
}
"""Metrics of answers by how they are meant; `nothing` has no update either."""


def answered(state, draft, how, seed):
    """Give what a device may say; the coordinator has checked no more than shapes and that numbers are finite."""
    rng, update, sent, extras, metrics = np.random.default_rng(seed), {}, {}, {}, dict(SAID[how])
    for name, shape in tensor_shapes(SPEC, draft.structure).items() if how != "nothing" else ():
        update[name] = (0.01 * rng.standard_normal(shape)).astype(np.float32)
        if name in state.masks and not draft.recipe.knobs.get("dense"):
            update[name][~state.masks[name]] = 0.0
            sent[name] = state.masks[name]
    for name in maskable(SPEC) if how in ("well", "great") else ():
        line = (
            rng.exponential(size=state.weights[name].size)
            if how == "well"
            else GREAT * np.ones(state.weights[name].size)
        )
        extras[name], metrics[f"theta.{name}"] = (np.arange(line.size), line.astype(np.float32)), 0.0
    return Answer(draft.device, 50, draft.structure, metrics, Usage(seconds=1.0 + seed % 3), update, sent, extras)


def begun(name):
    algorithm = algorithms.by_name(name)
    own = {"horizon": 8.0, "every": 2.0, "initial.rounds": 3.0, "interval": 2.0, "prunings": 4.0}
    params = {key: value for key, value in own.items() if key in algorithm.PARAMS}
    return algorithm, algorithm.init(SPEC, initial_weights(SPEC, 0), params)


@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_run_goes_on_from_any_saved_state_whatever_devices_say(name, how, tmp_path):
    (algorithm, state), spool = begun(name), Spool(tmp_path)
    for number in range(1, 10):
        state, drafts = algorithm.plan(state, number, DEVICES if number != 5 else (), rng_of(0, number))
        told = tuple(answered(state, draft, how, 10 * number + i) for i, draft in enumerate(drafts))
        saved = save_state(spool, state).digest
        again = load_state(spool, saved, SPEC)
        assert save_state(spool, again).digest == saved
        state = algorithm.close(state, told)
        assert save_state(spool, algorithm.close(again, told)).digest == save_state(spool, state).digest
        assert all(np.isfinite(array).all() for array in state.weights.values())


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_round_without_answers_or_samples_leaves_the_model_as_it_is(name):
    algorithm, state = begun(name)
    for number in range(1, 10):
        state, drafts = algorithm.plan(state, number, DEVICES, rng_of(0, number))
        told = tuple(answered(state, draft, "well", 10 * number + i) for i, draft in enumerate(drafts))
        if all(draft.recipe.rule != "score" for draft in drafts):  # whose answers need no samples
            for none in ((), [dataclasses.replace(answer, samples=0) for answer in told]):
                after = algorithm.close(state, none)
                assert all(np.array_equal(after.weights[key], state.weights[key]) for key in state.weights)
                assert after.masks is state.masks
        state = algorithm.close(state, told)


NUMBERS = [
    (name, param)
    for name in algorithms.ALGORITHMS
    for param, default in algorithms.by_name(name).PARAMS.items()
    if not isinstance(default, str)
]


@pytest.mark.parametrize(("name", "param"), NUMBERS)
def test_a_number_that_cannot_be_is_refused_by_its_name(name, param):
    for value in (math.nan, -1.0, -math.inf):
        with pytest.raises(ConfigError, match=re.escape(param)):
            algorithms.by_name(name).init(SPEC, initial_weights(SPEC, 0), {param: value})


@pytest.mark.parametrize(("name", "param"), NUMBERS)
def test_the_least_and_the_greatest_number_are_refused_by_name_or_make_orders_that_can_be_written(name, param):
    """What a device would say of such orders is another matter (`tests/unit/test_recipes.py`)."""
    algorithm, policies = algorithms.by_name(name), ({},)
    if name == "fedmp":
        policies = ({"policy": "bounded"}, {"policy": "deadline"}, {"policy": "deadline", "curve": "bandit"})
    for value, policy in itertools.product((5e-324, 1e17, 1.5e308, math.inf), policies):
        state, why = None, param
        try:
            state = algorithm.init(SPEC, initial_weights(SPEC, 0), {**policy, param: value})
        except ConfigError as error:
            why = str(error)
        assert param in why
        for number in range(1, 4) if state else ():
            state, drafts = algorithm.plan(state, number, DEVICES, rng_of(0, number))
            for draft in drafts:
                assert from_plain(Recipe, unpack(msgpack.packb(to_plain(draft.recipe)), 1 << 16)) == draft.recipe
            metrics = {"loss": 1e-3, "loss.first": 1e-3}
            told = [answered(state, draft, "well", 10 * number + i) for i, draft in enumerate(drafts)]
            told = [dataclasses.replace(a, metrics={**a.metrics, **metrics}, seconds_turn=5.0) for a in told]
            with np.errstate(over="ignore", invalid="ignore"):  # as in `advance`, which leaves such a round out
                state = algorithm.close(state, told)
