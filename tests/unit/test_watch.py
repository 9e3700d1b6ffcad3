"""The squared gradient of weights that are not there, from what an engine shows of a step: against the dense gradient."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.engines import Update
from edge_runtime.kernels.importance import Passed, top, whole
from tests.support.models import batch
from tests.unit.test_masked_engine import DENSE, MIXED, SPARSE, deep, dense_twin, loaded, make, masks_of  # noqa: F401 - a fixture

SPEC = deep()
NODES = {node.params["weight"]: node for node in SPEC.nodes if node.params}


def passed(shown):
    result = {}
    for name, pairs in shown.items():
        attrs = NODES[name].attrs
        sides = [attrs["kernel"]] * 2 if attrs else []
        shape = (pairs[0][1].shape[1], pairs[0][0].shape[1], *sides)
        result[name] = Passed(shape, tuple(pairs), attrs.get("stride", 1), attrs.get("padding", 0))
    return result


@pytest.mark.parametrize("choice", [SPARSE, DENSE, MIXED], ids=["sparse", "dense", "mixed"])
@pytest.mark.parametrize("size", [10, 4])
def test_all_positions_from_what_passed(make, choice, size):  # noqa: F811 - the fixture
    masks = masks_of(SPEC)
    engine, twin = loaded(make, SPEC, masks, choice), dense_twin(SPEC, masks)
    x, y = batch(SPEC, 10)
    twin.forward_backward(x, y)
    shown = {}

    def watch(name, x, dy):
        shown.setdefault(name, []).append((x.copy(), dy.copy()))

    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        engine.forward_backward(x[rows], y[rows], scale=len(x[rows]) / len(x), watch=watch)
    assert list(shown)[:2] == ["out.weight", "fc4.weight"]  # the last first
    assert shown.keys() == masks.keys()
    for name, through in passed(shown).items():
        squared = np.zeros(through.shape, np.float32)
        whole(through, squared)
        expected = twin.grads[name] ** 2
        np.testing.assert_allclose(squared, expected, atol=2e-5 * expected.max(), err_msg=name)
        places, values = top(through, 7)
        np.testing.assert_array_equal(values, squared.ravel()[places])
        assert values.min() >= np.partition(squared.ravel(), -8)[-8]


def test_a_step_that_moves_weights_shows_the_gradients_before_it(make):  # noqa: F811 - the fixture
    masks = masks_of(SPEC)
    engine, still = loaded(make, SPEC, masks, SPARSE), loaded(make, SPEC, masks, SPARSE)
    x, y = batch(SPEC, 6)
    shown, same = {}, {}
    engine.forward_backward(x, y, update=Update(0.5), watch=lambda name, x, dy: shown.update({name: dy.copy()}))
    still.forward_backward(x, y, watch=lambda name, x, dy: same.update({name: dy.copy()}))
    for name in masks:
        np.testing.assert_array_equal(shown[name], same[name])
    engine.forward_backward(x, y, update=Update(0.5))
    assert len(shown) == len(masks)  # nobody watches by default
