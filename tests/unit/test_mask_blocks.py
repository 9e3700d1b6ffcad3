"""Masks: exactly as many as asked for, ties by place, and the mean of masked models by hand and by its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from coordinator.algorithm import Answer, State
from coordinator.algorithms import fedavg
from coordinator.blocks.masks import (
    densities,
    density,
    masked_mean,
    masked_weights,
    random_masks,
    top_global,
    top_per_tensor,
)
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import NonFinite
from wire.masked import maskable
from wire.messages import Usage
from wire.spec import ModelSpec, Node, Structure, tensor_shapes
from wire.zoo import by_name

FEW = nps.arrays(np.float32, st.integers(0, 12), elements=st.integers(-3, 3))


def answer(device, samples, update, sent=None):
    return Answer(device, samples, Structure(), {}, Usage(), update, sent or {})


def test_weights_of_layers_may_be_masked_and_nothing_else():
    assert maskable(by_name("lenet-300-100")) == ("fc1.weight", "fc2.weight", "out.weight")
    kinds = {node.params["weight"]: node.op for node in by_name("resnet-18").nodes if node.params}
    found = maskable(by_name("resnet-18"))
    assert found == tuple(t.name for t in by_name("resnet-18").tensors if kinds.get(t.name) in ("linear", "conv2d"))


def test_a_shared_tensor_may_not_be_masked():
    spec = linear(2, 2)
    (layer,) = [node for node in spec.nodes if node.op == "linear"]
    tied = (*spec.nodes, Node("again", "linear", (layer.name,), layer.params))
    assert maskable(spec) == (layer.params["weight"],)
    assert maskable(ModelSpec(spec.name, (2,), 2, spec.groups, spec.tensors, tied)) == ()


@settings(deadline=None)
@given(st.lists(FEW, min_size=1, max_size=4), st.floats(0, 1))
def test_the_largest_are_those_of_a_stable_sort(arrays, part):
    scores = {str(place): array for place, array in enumerate(arrays)}
    line = np.concatenate(arrays)
    count = round(part * line.size)
    wanted = np.zeros(line.size, bool)
    wanted[np.argsort(-line, kind="stable")[:count]] = True
    found = top_global(scores, count)
    assert np.concatenate(list(found.values())).tolist() == wanted.tolist()
    counts = {name: min(2, array.size) for name, array in scores.items()}
    for name, mask in top_per_tensor(scores, counts).items():
        assert np.flatnonzero(mask).tolist() == sorted(np.argsort(-scores[name], kind="stable")[: counts[name]])


def test_a_score_that_is_no_number_is_refused_and_infinity_is_first():
    with pytest.raises(NonFinite):
        top_global({"a": np.array([1, np.nan, 3], np.float32)}, 2)
    assert top_global({"a": np.array([[1.0, np.inf], [-np.inf, 2.0]])}, 1)["a"].tolist() == [[False, True], [False] * 2]


@pytest.mark.parametrize("count", [-1, 4])
def test_no_more_than_there_are(count):
    with pytest.raises(ValueError, match="cannot be kept"):
        top_global({"a": np.ones(3)}, count)


def test_random_masks_have_their_counts_and_follow_the_source():
    shapes, counts = {"a": (3, 4), "b": (5,), "c": (2,)}, {"a": 7, "b": 0, "c": 2}
    one, same, other = (random_masks(shapes, counts, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert {n: (m.shape, int(m.sum())) for n, m in one.items()} == {n: (shapes[n], counts[n]) for n in shapes}
    assert all(np.array_equal(one[n], same[n]) for n in shapes)
    assert not np.array_equal(one["a"], other["a"])
    often = sum(random_masks({"a": (4,)}, {"a": 1}, np.random.default_rng(s))["a"] for s in range(4000))
    assert often.min() > 900


def test_densities_by_hand():
    masks = {"a": np.array([[True, False], [False, False]]), "b": np.ones(4, bool)}
    assert (density(masks), densities(masks), density({})) == (5 / 8, {"a": 0.25, "b": 1.0}, 1.0)


def test_masked_weights_are_zero_elsewhere_and_the_rest_is_left():
    weights = {"a": np.array([1.0, -2.0, np.inf], np.float32), "b": np.ones(2, np.float32)}
    result = masked_weights(weights, {"a": np.array([True, False, False])})
    assert result["a"].tolist() == [1, 0, 0]
    assert not np.signbit(result["a"]).any()
    assert result["b"] is weights["b"]
    assert weights["a"].tolist() == [1, -2, np.inf]


def test_the_mean_is_over_those_who_have_a_weight():
    spec = linear(3, 1)
    weight, bias = maskable(spec)[0], "o.bias"
    server = {weight: np.array([[10, 20, 30]], np.float32), bias: np.zeros(1, np.float32)}
    a = answer(
        "a",
        1,
        {weight: np.array([[4, 0, 0]], np.float32), bias: np.ones(1, np.float32)},
        {weight: np.array([[True, False, False]])},
    )
    b = answer("b", 3, {weight: np.array([[8, -4, 0]], np.float32)}, {weight: np.array([[True, True, False]])})
    after = masked_mean(spec, server, (a, b))
    assert after[weight].tolist() == [[10 + 0.25 * 4 + 0.75 * 8, 16.0, 30.0]]
    assert after[bias].tolist() == [0.25]  # which b has too, but did not move


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_partial_overlap_is_its_definition(seed):
    spec, rng = linear(4, 3), np.random.default_rng(seed)
    (name,) = maskable(spec)
    server = random_arrays(spec, Structure(), seed)
    answers = []
    for device in range(4):
        mask = rng.random(server[name].shape) < 0.4
        update = random_arrays(spec, Structure(), seed + 1 + device)
        update[name] = np.where(mask, update[name], np.float32(0))
        answers.append(answer(str(device), int(rng.integers(0, 5)), update, {name: mask}))
    after = masked_mean(spec, server, answers)
    for place in np.ndindex(server[name].shape):
        having = [a for a in answers if a.sent[name][place] and a.samples]
        top = sum(a.samples * (float(server[name][place]) + float(a.update[name][place])) for a in having)
        wanted = top / sum(a.samples for a in having) if having else server[name][place]
        assert abs(after[name][place] - wanted) < 1e-5


def test_one_mask_gives_fedavg_of_the_masked_models_to_the_bit():
    spec = small_cnn()
    rng = np.random.default_rng(3)
    shapes = tensor_shapes(spec, Structure())
    masks = {name: rng.random(shapes[name]) < 0.3 for name in maskable(spec)}
    server = masked_weights(random_arrays(spec, Structure(), 9), masks)
    updates = [masked_weights(random_arrays(spec, Structure(), seed), masks) for seed in range(5)]
    dense = [answer(f"d{i}", 3 + i, update) for i, update in enumerate(updates)]
    sparse = [
        answer(f"d{i}", 3 + i, update, {n: m.copy() for n, m in masks.items()}) for i, update in enumerate(updates)
    ]
    wanted = fedavg.close(State(spec, 1, server), dense).weights
    found = masked_mean(spec, server, sparse)
    assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_nobody_changes_nothing():
    spec = linear(2, 2)
    server = random_arrays(spec, Structure(), 1)
    for answers in ((), (answer("a", 0, server),)):
        after = masked_mean(spec, server, answers)
        assert all(after[name] is server[name] for name in server)
