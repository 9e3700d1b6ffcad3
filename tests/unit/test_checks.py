"""Models that would run, and not do what they say: they are refused by name, before anything is held or trained."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays
from tests.support.sequences import normed
from wire.errors import SpecError
from wire.spec import VALUES_MAX, Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check

pytestmark = pytest.mark.usefixtures("every_engine")


def two_layers(*between: Node, prunable: bool = True) -> ModelSpec:
    """A linear layer 3 -> 4 over a group that can be cut, these nodes, and a linear layer -> 2."""
    tensors = (
        *(TensorSpec("a.weight", (Axis("a"), Axis(inner=3))), TensorSpec("a.bias", (Axis("a"),))),
        *(TensorSpec("o.weight", (Axis(inner=2), Axis("a"))), TensorSpec("o.bias", (Axis(inner=2),))),
    )
    nodes = (
        Node("a", "linear", ("input",), {"weight": "a.weight", "bias": "a.bias"}),
        *between,
        Node("o", "linear", (between[-1].name,), {"weight": "o.weight", "bias": "o.bias"}),
    )
    return ModelSpec("two", (3,), 2, (AxisGroup("a", 4, prunable),), tensors, nodes)


def test_a_softmax_over_channels_that_can_be_cut_is_refused():
    """What is cut would be missing from the sum: a compact width is not the masked model."""
    with pytest.raises(SpecError, match=r"node 's' \(softmax\): what a softmax sums over must not be channels"):
        check(two_layers(Node("s", "softmax", ("a",))))
    whole = two_layers(Node("s", "softmax", ("a",)), prunable=False)
    assert check(whole) is whole


def doubled(times: int, op: str = "concat") -> ModelSpec:
    nodes = [Node("n0", op, ("input",) * 16)]
    nodes += [Node(f"n{i}", op, (f"n{i - 1}",) * 16) for i in range(1, times)]
    tensors = (TensorSpec("w", (Axis(inner=2), Axis(inner=16**times))), TensorSpec("b", (Axis(inner=2),)))
    nodes.append(Node("o", "linear", (nodes[-1].name,), {"weight": "w", "bias": "b"}))
    return ModelSpec("doubled", (1,), 2, (AxisGroup("c", 2, prunable=False),), tensors, tuple(nodes))


def test_a_value_that_no_machine_holds_is_refused_before_it_grows_further():
    """A line of a spec multiplies by 16; ten thousand of them make numbers that cannot even be told in a message."""
    assert check(doubled(2))
    start = time.perf_counter()
    with pytest.raises(SpecError, match=rf"node 'n10' \(concat\): .*{VALUES_MAX}"):
        check(dataclasses.replace(doubled(2), nodes=doubled(10_000).nodes))
    assert time.perf_counter() - start < 1.0
    with pytest.raises(SpecError, match=r"input.*entries"):
        check(dataclasses.replace(doubled(2), input_shape=(1 << 21, 1 << 20)))
    # The limit is of the model, not of the sizes by which `check` tries how it is cut.
    wide = two_layers(Node("r", "relu", ("a",)))
    many = tuple(AxisGroup(f"g{i}", 1) for i in range(4000))
    assert check(dataclasses.replace(wide, groups=(*many, *wide.groups)))


def with_params(spec: ModelSpec, node: str, **params: str) -> ModelSpec:
    nodes = tuple(dataclasses.replace(n, params={**n.params, **params}) if n.name == node else n for n in spec.nodes)
    used = {name for n in nodes for name in n.params.values()}
    return dataclasses.replace(spec, nodes=nodes, tensors=tuple(t for t in spec.tensors if t.name in used))


@pytest.mark.parametrize(
    ("node", "params"),
    [
        ("n", {"mean": "a.bias"}),
        ("n", {"variance": "n.weight"}),
        ("n", {"bias": "n.mean"}),
        ("a", {"bias": "n.mean"}),
        ("n", {"mean": "n.variance"}),
    ],
)
def test_statistics_that_are_something_else_as_well_are_refused(node, params):
    """No gradient moves them: a weight that is one as well would silently never be trained."""
    with pytest.raises(SpecError, match=r"tensor '[an]\.\w+' is a running (mean|variance)"):
        check(with_params(normed(), node, **params))


def test_two_norms_may_share_their_statistics():
    spec = normed()
    norm = next(n for n in spec.nodes if n.op == "batch_norm")
    again = dataclasses.replace(norm, name="n2", inputs=("n",))
    nodes = [
        *spec.nodes[:2],
        again,
        *(dataclasses.replace(n, inputs=("n2",)) for n in spec.nodes[2:3]),
        *spec.nodes[3:],
    ]
    shared = dataclasses.replace(spec, nodes=tuple(nodes))
    assert check(shared) is shared


def test_a_model_whose_output_no_weight_moves_is_refused_by_the_engine():
    tensors = (TensorSpec("w", (Axis(inner=2), Axis(inner=2))), TensorSpec("b", (Axis(inner=2),)))
    nodes = (Node("o", "linear", ("input",), {"weight": "w", "bias": "b"}), Node("r", "relu", ("input",)))
    spec = check(ModelSpec("still", (2,), 2, (AxisGroup("c", 2, prunable=False),), tensors, nodes))
    engine = MAKE()
    engine.load(spec, Structure(), random_arrays(spec, Structure()))
    x, y = batch(spec, 3)
    np.testing.assert_array_equal(engine.forward(x), np.maximum(x, 0))
    with pytest.raises(SpecError, match="nothing that can be trained"):
        engine.forward_backward(x, y)
