"""Ranking and partitions against hand-made arrays and loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks.initial import initial_weights
from coordinator.blocks.nesting import kept_counts, partition, rank
from tests.support.models import random_arrays, small_cnn
from wire.errors import NonFinite
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, group_sizes, parameter_count
from wire.structure import cut, ranking_digest, shell, to_wire


def two_layers(inputs=2, first=3, second=3):
    """No nodes that matter: ranking looks at tensors only."""
    tensors = (
        TensorSpec("1.weight", (Axis("a"), Axis(inner=inputs))),
        TensorSpec("1.bias", (Axis("a"),)),
        TensorSpec("2.weight", (Axis("b"), Axis("a"))),
    )
    groups = (AxisGroup("a", first), AxisGroup("b", second))
    return ModelSpec("two", (inputs,), second, groups, tensors, (Node("n", "relu", ("input",)),))


def test_kept_counts_round_up_and_never_reach_zero():
    assert kept_counts(10, (0.2, 0.4, 0.6, 0.8, 1.0)) == (2, 4, 6, 8, 10)
    assert kept_counts(7, (0.2, 0.5, 1.0)) == (2, 4, 7)
    assert kept_counts(3, (0.01, 1.0)) == (1, 3)
    assert kept_counts(5, (0.6,)) == (3,)  # 0.6 * 5 is a little more than 3 in floats


def test_ranking_by_hand_is_progressive():
    spec = two_layers()
    weights = {
        # L1 of a: 1, 5, 3 -> a0 goes first, then a2
        "1.weight": np.array([[0.5, -0.5], [2.0, 3.0], [-3.0, 0.0]], np.float32),
        "1.bias": np.array([100.0, 0.0, 0.0], np.float32),  # a bias is not counted
        # L1 of b over all inputs: 10, 4, 5 -> b1 goes first. Without a0: 1, _, 5 -> b0 goes next, not b2
        "2.weight": np.array([[9.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 3.0, -2.0]], np.float32),
    }
    levels = rank(spec, weights, {"a": (1, 2, 3), "b": (1, 2, 3)})
    assert levels["a"].tolist() == [2, 0, 1]
    assert levels["b"].tolist() == [1, 2, 0]
    assert levels["a"].dtype == np.uint8


def test_of_equal_channels_the_lower_index_stays():
    spec = two_layers()
    ones = {"1.weight": np.ones((3, 2), np.float32), "1.bias": np.ones(3), "2.weight": np.ones((3, 3), np.float32)}
    levels = rank(spec, ones, {"a": (1, 2, 3), "b": (2, 2, 3)})
    assert levels["a"].tolist() == [0, 1, 2]
    assert levels["b"].tolist() == [0, 0, 2]


def test_a_weight_that_is_no_number_is_refused_by_name():
    spec = two_layers()
    weights = initial_weights(spec, 0)
    weights["2.weight"][1, 1] = np.nan
    with pytest.raises(NonFinite, match=r"2\.weight"):
        rank(spec, weights, {"a": (1, 3), "b": (1, 3)})


def naive_rank(spec, weights, widths):
    """Loops over single weights; sets of channels."""
    kept = {g.name: set(range(g.size)) for g in spec.groups}
    levels = {g: [0] * len(kept[g]) for g in widths}
    top = len(next(iter(widths.values())))
    for k in reversed(range(top)):
        scores = {g: dict.fromkeys(kept[g], 0.0) for g in widths}
        for tensor in spec.tensors:
            group = tensor.axes[0].group
            if len(tensor.axes) < 2 or group not in widths:
                continue
            for index, value in np.ndenumerate(weights[tensor.name]):
                channels = [i // a.inner for i, a in zip(index, tensor.axes, strict=True)]
                there = all(not a.group or c in kept[a.group] for c, a in zip(channels, tensor.axes, strict=True))
                if there:
                    scores[group][channels[0]] += abs(float(value))
        for g, counts in widths.items():
            best = sorted(kept[g], key=lambda c: (-scores[g][c], c))
            for c in best[counts[k] :]:
                levels[g][c] = k + 1
                kept[g].discard(c)
    return levels


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_ranking_agrees_with_loops(seed):
    spec = small_cnn()
    weights = random_arrays(spec, Structure(), seed)
    widths = {"a": kept_counts(6, (0.2, 0.5, 1.0)), "b": kept_counts(12, (0.2, 0.5, 1.0))}
    found = rank(spec, weights, widths)
    assert {g: v.tolist() for g, v in found.items()} == naive_rank(spec, weights, widths)
    for group, counts in widths.items():
        assert tuple(int((found[group] <= k).sum()) for k in range(3)) == counts


def test_recurrent_weights_are_ranked_over_the_units_that_are_left():
    tensors = (TensorSpec("hh", (Axis("h", 1, 2), Axis("h"))),)  # two gates
    spec = ModelSpec("rnn", (1,), 1, (AxisGroup("h", 3),), tensors, (Node("n", "relu", ("input",)),))
    gate = np.array([[0, 0, 9], [1, 1, 0], [1, 0, 0]], np.float32)
    levels = rank(spec, {"hh": np.concatenate([gate, 0 * gate])}, {"h": (1, 2, 3)})
    # h2 goes first (1); without it h0 has 0 and h1 has 2
    assert levels["h"].tolist() == [1, 0, 2]


def test_partitions_are_the_shells_and_tile_the_model():
    spec = small_cnn()
    weights = random_arrays(spec, Structure(), 3)
    widths = {"a": (2, 4, 6), "b": (3, 8, 12)}
    levels = rank(spec, weights, widths)
    whole = Structure(2, widths, ranking_digest(levels))
    wired = to_wire(spec, weights, levels)
    total = 0
    for capacity in range(3):
        views = list(partition(spec, wired, whole, capacity))
        wanted = np.concatenate(list(shell(spec, wired, whole.narrowed(capacity)).values()))
        assert np.array_equal(np.concatenate([v.ravel() for v in views]), wanted)
        narrow = whole.narrowed(1)
        if capacity <= 1:
            inside = partition(spec, cut(spec, wired, narrow), narrow, capacity)
            assert np.array_equal(np.concatenate([v.ravel() for v in inside]), wanted)
        total += wanted.size
    assert total == parameter_count(spec, Structure())
    assert group_sizes(spec, whole) == group_sizes(spec, Structure())


def test_partitions_are_views():
    spec = small_cnn()
    whole = Structure(1, {"a": (2, 6), "b": (5, 12)}, "")
    arrays = {name: np.zeros_like(array) for name, array in random_arrays(spec, Structure()).items()}
    for view in partition(spec, arrays, whole, 1):
        view[...] = 1
    inner = cut(spec, arrays, whole.narrowed(0))
    assert all(not array.any() for array in inner.values())
    ones = sum(int(array.sum()) for array in arrays.values())
    assert ones == parameter_count(spec, whole) - parameter_count(spec, whole.narrowed(0))


def test_initial_weights_follow_seed_and_place():
    spec = small_cnn()
    first, again, other = (initial_weights(spec, seed) for seed in (1, 1, 2))
    for tensor in spec.tensors:
        array = first[tensor.name]
        assert array.dtype == np.float32
        assert np.array_equal(array, again[tensor.name])
        bound = {"kaiming": (6 / tensor.fan_in) ** 0.5, "fan": tensor.fan_in**-0.5, "zeros": 0.0}[tensor.init]
        assert np.abs(array).max() <= bound
        assert tensor.init == "zeros" or np.abs(array).max() > 0.8 * bound
        assert tensor.init == "zeros" or not np.array_equal(array, other[tensor.name])
