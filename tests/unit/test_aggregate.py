"""Joining updates: by hand, and the shares that McMahan's mean gives."""

import numpy as np
import pytest

from coordinator.blocks.aggregate import add_partitions, shares
from tests.support.models import random_arrays, small_cnn
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec
from wire.structure import paste_add


def line(size=4):
    tensors = (TensorSpec("w", (Axis("h"),)),)
    return ModelSpec("line", (1,), 1, (AxisGroup("h", size),), tensors, (Node("n", "relu", ("input",)),))


def test_shares_by_hand():
    assert shares([1, 3]) == [0.25, 0.75]
    assert shares([5]) == [1.0]


def test_each_partition_has_its_own_weight():
    spec = line()
    total = {"w": np.zeros(4, np.float32)}
    structure = Structure(1, {"h": (1, 3, 4)}, "")
    add_partitions(spec, total, {"w": np.array([1, 2, 4], np.float32)}, structure, [10.0, 100.0])
    assert total["w"].tolist() == [10.0, 200.0, 400.0, 0.0]


def test_a_matrix_has_corners_of_the_wider_partition():
    tensors = (TensorSpec("w", (Axis("h"), Axis("h"))),)
    spec = ModelSpec("square", (1,), 1, (AxisGroup("h", 2),), tensors, (Node("n", "relu", ("input",)),))
    total = {"w": np.ones((2, 2), np.float32)}
    add_partitions(spec, total, {"w": np.ones((2, 2), np.float32)}, Structure(1, {"h": (1, 2)}, ""), [1.0, 2.0])
    assert total["w"].tolist() == [[2.0, 3.0], [3.0, 3.0]]


def test_one_weight_everywhere_is_a_scaled_paste():
    spec = small_cnn()
    structure = Structure(1, {"a": (2, 4, 6), "b": (3, 8, 12)}, "")
    update = random_arrays(spec, structure, 5)
    totals = [{n: np.zeros_like(a) for n, a in random_arrays(spec, Structure()).items()} for _ in range(2)]
    add_partitions(spec, totals[0], update, structure, [0.25, 0.25])
    paste_add(spec, totals[1], update, structure, 0.25)
    for name in totals[0]:
        assert np.array_equal(totals[0][name], totals[1][name])


def test_weights_must_match_the_capacity():
    with pytest.raises(ValueError, match="zip"):
        add_partitions(line(), {"w": np.zeros(4)}, {"w": np.ones(1)}, Structure(0, {"h": (1, 4)}, ""), [1.0, 1.0])
