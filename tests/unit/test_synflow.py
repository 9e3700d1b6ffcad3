"""SynFlow's rounds, with the rule's own scores: one order to one device, then training under the masks."""

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import by_name, synflow
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import score
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError
from wire.messages import Usage
from wire.spec import Node, Structure
from wire.structure import masked
from wire.zoo import load, mlp

SPEC = mlp("mlp", (20,), 5, (30, 25))
WEIGHTS = random_arrays(SPEC, Structure(), 3, 1.0)
SIZE = 20 * 30 + 30 * 25 + 25 * 5
GREAT = 1 << 40
ALL = (DeviceView("b", GREAT), DeviceView("a", GREAT))


def start(**params):
    return synflow.init(SPEC, WEIGHTS, params)


def scored(draft):
    """Do the order of the first round on a device without samples."""
    engine = open_engine("torch")()
    engine.load(SPEC, Structure(), WEIGHTS)
    x, y = np.zeros((0, 20), np.float32), np.zeros(0, np.int64)
    result = score.train(rules.Task(draft.recipe, engine, x, y, 1, 1, lambda *_: None))
    extras = {name: (np.arange(e.values.size), e.values.ravel()) for name, e in result.extras.items()}
    return Answer(draft.device, 0, Structure(), result.metrics, Usage(), {}, extras=extras)


@pytest.mark.parametrize("density", [0.3, 0.05])
def test_one_device_finds_the_masks_without_data(density):
    state, drafts = synflow.plan(start(density=density), 1, ALL, rng_of(0, 1))
    assert [d.device for d in drafts] == ["a"]
    assert drafts[0].recipe.knobs == {"synflow": 100.0, "density": density}
    after = synflow.close(state, (scored(drafts[0]),))
    assert sum(int(mask.sum()) for mask in after.masks.values()) == round(density * SIZE)
    assert all(mask.any() for mask in after.masks.values())
    alive = {name: WEIGHTS[name] * mask for name, mask in after.masks.items()}
    first, second, last = (np.abs(alive[f"{name}.weight"]) for name in ("fc1", "fc2", "out"))
    assert (last @ second @ first).any()
    for before, behind in ((first, second), (second, last)):  # no unit is fed for nothing
        assert ((before.sum(1) > 0) == (behind.sum(0) > 0)).all()


def test_then_every_device_trains_what_is_kept():
    state, drafts = synflow.plan(start(density=0.2), 1, ALL, rng_of(0, 1))
    assert synflow.close(state, ()) is state
    state = synflow.close(state, (scored(drafts[0]),))
    state, drafts = synflow.plan(state, 2, ALL, rng_of(0, 2))
    assert [d.device for d in drafts] == ["a", "b"]
    assert all(d.structure == masked(state.masks) and d.recipe.rule == "sgd" for d in drafts)
    moves = {name: np.where(state.masks.get(name, True), 1.0, 0.0).astype(np.float32) for name in WEIGHTS}
    moves = {name: np.broadcast_to(array, WEIGHTS[name].shape) for name, array in moves.items()}
    after = synflow.close(state, (Answer("a", 4, masked(state.masks), {}, Usage(), moves, sent=state.masks),))
    for name, array in WEIGHTS.items():
        np.testing.assert_allclose(after.weights[name], array + moves[name], atol=1e-6)


def test_models_without_such_a_flow_are_refused():
    synflow.init(load("conv-2"), {}, {})
    for spec, why in ((load("resnet-18"), "group_norm"), (small_cnn(), "tanh")):
        with pytest.raises(ConfigError, match=why):
            synflow.init(spec, {}, {})
    square = linear(2, 2)
    twice = dataclasses.replace(square, nodes=(*square.nodes, Node("again", "linear", ("o",), square.nodes[0].params)))
    with pytest.raises(ConfigError, match="share"):
        synflow.init(twice, {}, {})


def test_parameters_are_checked():
    for params in ({"density": 0.0}, {"iterations": 0.0}, {"iterations": 1.5}, {"schedule": "x"}, {"batches": 1.0}):
        with pytest.raises(ConfigError):
            start(**params)


def test_registry():
    assert by_name("synflow") is synflow


def test_who_does_not_answer_is_followed_by_the_next():
    plans = [synflow.plan(start(), number, ALL, rng_of(0, number))[1] for number in (1, 2, 3)]
    assert [draft.device for (draft,) in plans] == ["a", "b", "a"]
    state = start()
    assert synflow.close(state, (Answer("a", 3, Structure(), {}, Usage(), {}),)) is state
