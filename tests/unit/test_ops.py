"""Ops of the spec that gates and narrow networks are made of: against their formulas, their gradients, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edge_runtime.engines import Choice, Update
from tests.support.engines import make as MAKE
from tests.support.models import RANKING, batch, random_arrays
from wire import memory
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import (
    Axis,
    AxisGroup,
    ModelSpec,
    Node,
    Structure,
    TensorSpec,
    check,
    decode,
    encode,
    node_shapes,
    tensor_shapes,
)

pytestmark = pytest.mark.usefixtures("every_engine")
WHOLE = Structure()
CONV = {"kernel": 3, "stride": 1, "padding": 1}


def plain(op, shape=(4,), inputs=("input",)):
    """Give a model that is one op without weights."""
    flat = int(np.prod(shape))
    nodes = (Node("op", op, inputs), Node("f", "flatten", ("op",)), Node("o", "linear", ("f",), params("o")))
    tensors = (TensorSpec("o.weight", (Axis("c"), Axis(inner=flat))), TensorSpec("o.bias", (Axis("c"),)))
    return ModelSpec("plain", shape, 2, (AxisGroup("c", 2, prunable=False),), tensors, nodes)


def params(layer):
    return {"weight": f"{layer}.weight", "bias": f"{layer}.bias"}


def gated(groups=6, each=1, prunable=True, axis="a"):
    """conv 2 -> 6, a convolution in groups, hard swish, and the means' hard sigmoid times it, then a linear layer."""
    tensors = [
        *(
            TensorSpec("a.weight", (Axis("a"), Axis(inner=2), Axis(inner=3), Axis(inner=3))),
            TensorSpec("a.bias", (Axis("a"),)),
        ),
        TensorSpec("g.weight", (Axis(axis), Axis(inner=each), Axis(inner=3), Axis(inner=3))),
        TensorSpec("g.bias", (Axis(axis),)),
        *(TensorSpec("e.weight", (Axis("a"), Axis("a"), Axis(), Axis())), TensorSpec("e.bias", (Axis("a"),))),
        *(TensorSpec("o.weight", (Axis("classes"), Axis("a", 16))), TensorSpec("o.bias", (Axis("classes"),))),
    ]
    nodes = (
        Node("a", "conv2d", ("input",), params("a"), CONV),
        Node("g", "conv2d", ("a",), params("g"), {**CONV, "groups": groups}),
        Node("s", "hard_swish", ("g",)),
        Node("m", "avg_pool2d", ("s",), {}, {"kernel": 4, "stride": 4}),
        Node("e", "conv2d", ("m",), params("e"), {"kernel": 1, "stride": 1, "padding": 0}),
        Node("h", "hard_sigmoid", ("e",)),
        Node("t", "mul", ("s", "h")),
        Node("f", "flatten", ("t",)),
        Node("o", "linear", ("f",), params("o")),
    )
    group = [AxisGroup("a", 6, prunable=prunable), AxisGroup("classes", 3, prunable=False)]
    if axis != "a":
        group.append(AxisGroup(axis, 6, prunable=prunable))
    return ModelSpec("gated", (2, 4, 4), 3, tuple(group), tuple(tensors), nodes)


def convolved(x, weight, bias, groups):
    """A convolution with a border of one, a loop for everything."""
    count, (n, c, h, w), (o, each, _, _) = groups, x.shape, weight.shape
    padded = np.zeros((n, c, h + 2, w + 2))
    padded[:, :, 1:-1, 1:-1] = x
    y = np.zeros((n, o, h, w))
    for out in range(o):
        first = out // (o // count) * each
        for place in range(each):
            for row in range(3):
                for column in range(3):
                    part = padded[:, first + place, row : row + h, column : column + w]
                    y[:, out] += weight[out, place, row, column] * part
        y[:, out] += bias[out]
    return y


def share(x):
    return np.clip(x + 3, 0, 6) / 6


def forward(spec, arrays, x, groups):
    x = convolved(x, arrays["a.weight"], arrays["a.bias"], 1)
    x = convolved(x, arrays["g.weight"], arrays["g.bias"], groups)
    x = x * share(x)
    gate = x.mean((2, 3)) @ arrays["e.weight"][:, :, 0, 0].T + arrays["e.bias"]
    x = x * share(gate)[:, :, None, None]
    return x.reshape(len(x), -1) @ arrays["o.weight"].T + arrays["o.bias"]


@pytest.mark.parametrize(("op", "wanted"), [("hard_sigmoid", share), ("hard_swish", lambda x: x * share(x))])
def test_hard_ones_by_hand(op, wanted):
    engine = MAKE()
    weights = {"o.weight": np.eye(2, 4, dtype=np.float32), "o.bias": np.zeros(2, np.float32)}
    engine.load(check(plain(op)), WHOLE, weights)
    x = np.array([[-4, -1.5, 0, 0], [0, 1.5, 0, 0], [3, 7, 0, 0]], np.float32)
    np.testing.assert_allclose(engine.forward(x), wanted(x)[:, :2], atol=1e-6)
    by_hand = {"hard_sigmoid": [[0, 0.25], [0.5, 0.75], [1, 1]], "hard_swish": [[0, -0.375], [0, 1.125], [3, 7]]}
    np.testing.assert_allclose(engine.forward(x), by_hand[op], atol=1e-6)


def test_a_square_is_a_product_of_two_equal_shapes():
    engine = MAKE()
    engine.load(check(plain("mul", (2,), ("input", "input"))), WHOLE)
    engine.params["o.weight"][...] = np.eye(2)
    engine.params["o.bias"][...] = 0
    assert engine.forward(np.array([[3, -2]], np.float32)).tolist() == [[9, 4]]


@pytest.mark.parametrize(("groups", "each", "prunable"), [(6, 1, True), (6, 1, False), (3, 2, False), (2, 3, False)])
def test_groups_and_gates_are_the_formulas(groups, each, prunable):
    spec = check(gated(groups, each, prunable))
    assert decode(encode(spec)) == spec
    arrays = random_arrays(spec, WHOLE)
    engine = MAKE()
    engine.load(spec, WHOLE, arrays)
    x, y = batch(spec, 3)
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    np.testing.assert_allclose(engine.forward(x), forward(spec, exact, x, groups), atol=1e-5)
    engine.forward_backward(x, y, loss="sum")
    rng = np.random.default_rng(0)
    for name, grad in engine.grads.items():
        where = tuple(int(rng.integers(0, n)) for n in grad.shape)
        seen = []
        for step in (1e-5, -1e-5):
            bent = {**exact, name: exact[name].copy()}
            bent[name][where] += step
            seen.append(forward(spec, bent, x, groups).sum())
        assert (seen[0] - seen[1]) / 2e-5 == pytest.approx(grad[where], rel=1e-3, abs=1e-4), name


def test_a_filter_for_each_channel_is_cut_with_it():
    spec = check(gated())
    narrow = Structure(0, {"a": (4, 6)}, RANKING)
    assert tensor_shapes(spec, narrow)["g.weight"] == (4, 1, 3, 3)
    assert node_shapes(spec, narrow)["t"] == (4, 4, 4)
    wide, alone = MAKE(), MAKE()
    wide.load(spec, narrow.narrowed(1), random_arrays(spec, WHOLE))
    inner = wide.narrow(narrow)
    alone.load(spec, narrow, {name: array.copy() for name, array in inner.params.items()})
    x, y = batch(spec, 3)
    np.testing.assert_allclose(inner.forward(x), alone.forward(x), atol=1e-6)
    np.testing.assert_allclose(
        alone.forward(x), forward(spec, {n: a.astype(float) for n, a in alone.params.items()}, x, 4), atol=1e-5
    )
    inner.forward_backward(x, y)
    alone.forward_backward(x, y)
    for name, grad in alone.grads.items():
        np.testing.assert_allclose(inner.grads[name], grad, atol=1e-6)
    # Where channels stand does not matter.
    moved = {}
    for tensor in spec.tensors:
        array = random_arrays(spec, WHOLE)[tensor.name]
        for place, axis in enumerate(tensor.axes):
            if axis.group == "a":
                grid = np.arange(array.shape[place]).reshape(6, axis.inner)[[3, 1, 5, 0, 2, 4]]
                array = np.take(array, grid.ravel(), place)
        moved[tensor.name] = np.ascontiguousarray(array)
    other = MAKE()
    other.load(spec, WHOLE, moved)
    np.testing.assert_allclose(other.forward(x), wide.forward(x), atol=1e-5)


def test_absent_groups_are_one():
    spec = check(gated())
    plain_node = dataclasses.replace(spec.nodes[0], attrs={**CONV, "groups": 1})
    said = check(dataclasses.replace(spec, nodes=(plain_node, *spec.nodes[1:])))
    assert node_shapes(said, WHOLE) == node_shapes(spec, WHOLE)


def node(spec, name, **changes):
    return dataclasses.replace(
        spec, nodes=tuple(dataclasses.replace(n, **changes) if n.name == name else n for n in spec.nodes)
    )


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (gated(groups=3, each=2), "'g' .conv2d.: input channels"),
        (gated(groups=2), "do not meet 2 groups"),
        (gated(groups=4, each=2, prunable=False), "6 input channels do not meet 4 groups"),
        (gated(groups=0), "groups 0"),
        (gated(groups=70_000), "groups 70000"),
        (gated(axis="b"), "falls apart"),
        (gated(groups=3, each=2, prunable=False, axis="b"), None),
        (node(gated(), "g", attrs={**CONV, "groups": 6, "dilation": 2}), "attrs"),
        (node(gated(), "s", attrs={"groups": 1}), "attrs"),
        (node(gated(), "t", inputs=("s",)), "1 inputs"),
        (node(gated(), "t", inputs=("s", "h", "h")), "3 inputs"),
        (node(gated(), "t", inputs=("h", "s")), "factors"),
        (node(gated(), "t", inputs=("s", "input")), "factors"),
        (plain("mul", (4,)), "1 inputs"),
    ],
)
def test_what_cannot_run_or_be_cut_is_refused(spec, problem):
    if problem is None:
        assert check(spec) is spec
        return
    with pytest.raises(SpecError, match=problem):
        check(spec)


def test_outputs_that_do_not_fall_into_groups_are_refused():
    spec = gated(groups=3, each=2, prunable=False, axis="b")
    groups = tuple(dataclasses.replace(g, size=7) if g.name == "b" else g for g in spec.groups)
    with pytest.raises(SpecError, match="7 outputs do not meet 3 groups of 2"):
        check(dataclasses.replace(spec, groups=groups))


@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_masks_of_what_stands_around_groups_and_gates(way):
    spec = check(gated())
    arrays, rng = random_arrays(spec, WHOLE), np.random.default_rng(3)
    masks = {name: rng.random(arrays[name].shape) < 0.5 for name in ("a.weight", "e.weight", "o.weight")}
    engine, twin = MAKE(), MAKE()
    engine.load(spec, WHOLE, arrays, masks, Choice(ways={"": way}))
    twin.load(spec, WHOLE, {name: array * masks.get(name, np.float32(1)) for name, array in arrays.items()})
    for seed in range(2):
        x, y = batch(spec, 5, seed)
        lost = [e.forward_backward(x, y, update=Update(0.125)) for e in (engine, twin)]
        assert lost[0] == pytest.approx(lost[1], abs=1e-5)
        for name, mask in masks.items():
            twin.params[name] *= mask
    for name in arrays:
        wanted = twin.params[name][masks[name]] if name in masks else twin.params[name].ravel()
        np.testing.assert_allclose(engine.read(name), wanted, atol=1e-5, err_msg=name)
    with pytest.raises(SpecError, match=r"'g.weight', a convolution in groups: these stay dense"):
        MAKE().load(spec, WHOLE, arrays, {"g.weight": np.ones((6, 1, 3, 3), np.bool_)})


def test_the_walk_keeps_what_gates_read_again():
    # Instant 9, the loss: all that is read again lives; a flatten is a view of the product.
    spec, count = check(gated()), 1 << 12
    large, small = 4 * count * 6 * 16, 4 * count * 6
    saved = 2 * 4 * count * 32 + 4 * large + 2 * small + small  # the batch twice; a, g, s, t; m, e, h
    found = memory.predict(spec, WHOLE, Recipe(batch=count)).peak - memory.predict(spec, WHOLE, Recipe(batch=1)).peak
    assert saved < found < saved + 6 * large
