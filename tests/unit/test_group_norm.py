"""Group norm: against the formula, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coordinator.blocks.initial import initial_weights
from tests.support.engines import make
from wire import zoo
from wire.errors import SpecError
from wire.spec import NORM_EPSILON, Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, decode, encode

pytestmark = pytest.mark.usefixtures("every_engine")


def normed(groups, *, prunable=False, classes=24):
    """Give a model that is one norm over six channels of two by two, and the output is what it says."""
    tensors = (TensorSpec("n.weight", (Axis("c"),), "ones"), TensorSpec("n.bias", (Axis("c"),)))
    params = {"weight": "n.weight", "bias": "n.bias"}
    nodes = (Node("n", "group_norm", ("input",), params, {"groups": groups}), Node("f", "flatten", ("n",)))
    return ModelSpec("n", (6, 2, 2), classes, (AxisGroup("c", 6, prunable=prunable),), tensors, nodes)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_it_is_the_formula(groups):
    rng = np.random.default_rng(groups)
    spec = check(normed(groups))
    assert decode(encode(spec)) == spec
    weights = {name: rng.standard_normal(6).astype(np.float32) for name in ("n.weight", "n.bias")}
    engine = make()
    engine.load(spec, Structure(), weights)
    x = rng.standard_normal((3, 6, 2, 2)).astype(np.float32) + 2
    runs = x.reshape(3, groups, -1).astype(np.float64)
    plain = (runs - runs.mean(2, keepdims=True)) / np.sqrt(runs.var(2, keepdims=True) + NORM_EPSILON)
    expected = plain.reshape(x.shape) * weights["n.weight"][:, None, None] + weights["n.bias"][:, None, None]
    np.testing.assert_allclose(engine.forward(x), expected.reshape(3, 24), atol=1e-5)
    engine.forward_backward(x, np.array([0, 5, 23]))
    assert all(np.abs(grad).max() > 0 for grad in engine.grads.values())


def test_groups_that_do_not_fit():
    with pytest.raises(SpecError, match="6 channels do not fall into 4 groups"):
        check(normed(4))
    with pytest.raises(SpecError, match="groups 0"):
        check(normed(0))
    spec = normed(1)
    node = dataclasses.replace(spec.nodes[0], params={"weight": "n.weight"})
    with pytest.raises(SpecError, match="params"):
        check(dataclasses.replace(spec, nodes=(node, spec.nodes[1])))
    with pytest.raises(SpecError, match=r"weight \(5,\) does not meet \(6,\)"):
        check(dataclasses.replace(spec, groups=(AxisGroup("c", 5, prunable=False),)))


def test_groups_that_would_be_cut_apart_are_refused():
    assert zoo.resnet("tiny", (3, 8, 8), 4, ((4, 1), (6, 1))).nodes[1].attrs == {"groups": 1}
    spec = zoo.resnet("tiny", (3, 8, 8), 4, ((4, 1), (6, 1)))
    nodes = tuple(dataclasses.replace(n, attrs={"groups": 2}) if n.name == "norm" else n for n in spec.nodes)
    with pytest.raises(SpecError, match=r"'norm'.*cuts groups of 2 channels apart"):
        check(dataclasses.replace(spec, nodes=nodes))


def test_where_channels_stand_does_not_matter_and_narrow_widths_run():
    spec = zoo.resnet("tiny", (3, 8, 8), 4, ((4, 1), (6, 2)))
    weights = initial_weights(spec, 1)
    assert np.array_equal(weights["norm.weight"], np.ones(4))
    engine, other = make(), make()
    engine.load(spec, Structure(), weights)
    moved = dict(weights)
    for tensor in spec.tensors:
        for place, axis in enumerate(tensor.axes):
            if axis.group == "stage2":
                moved[tensor.name] = np.take(moved[tensor.name], [3, 1, 5, 0, 2, 4], place)
    other.load(spec, Structure(), moved)
    x = np.random.default_rng(2).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(engine.forward(x), other.forward(x), atol=1e-5)
    widths = {g.name: (1, g.size) for g in spec.groups if g.prunable}
    narrow = engine.narrow(Structure(0, widths, "ab" * 32))
    assert narrow.forward(x).shape == (2, 4)
