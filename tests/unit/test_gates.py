"""Gates, heads and runs that a flatten makes: cut, narrowed and masked, they are one and the same network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.engines import make as MAKE
from tests.support.models import RANKING, batch, random_arrays
from tests.support.sequences import MODELS, STEPS, WIDTH, attended, recurrent
from wire import structure as cutting
from wire.errors import SpecError
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, group_sizes, tensor_shapes

pytestmark = pytest.mark.usefixtures("every_engine")
ALL = list(MODELS)


def loaded(spec, structure, arrays):
    engine = MAKE()
    engine.load(spec, structure, arrays)
    return engine


def widths_of(name, capacity=2):
    spec, widths = MODELS[name]
    return spec, Structure(capacity, widths, RANKING)


def kept(spec, structure):
    """Give which entries of every whole tensor belong to a width: channel c of every run, c below the width."""
    sizes, found = group_sizes(spec, structure), {}
    whole = {g.name: g.size for g in spec.groups}
    for tensor in spec.tensors:
        mask = np.ones(tensor_shapes(spec, Structure())[tensor.name], bool)
        for place, axis in enumerate(tensor.axes):
            if axis.group:
                channel = np.arange(mask.shape[place]) // axis.inner % whole[axis.group]
                one = [1] * mask.ndim
                one[place] = -1
                mask &= (channel < sizes[axis.group]).reshape(one)
        found[tensor.name] = mask
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("capacity", [0, 1, 2])
def test_a_cut_takes_the_same_channels_of_every_gate_and_head(name, capacity):
    spec, structure = widths_of(name, capacity)
    arrays, masks = random_arrays(spec, Structure()), kept(spec, structure)
    for tensor, part in cutting.cut(spec, arrays, structure).items():
        assert part.shape == tensor_shapes(spec, structure)[tensor]
        np.testing.assert_array_equal(part.ravel(), arrays[tensor][masks[tensor]])


def test_four_gates_of_three_units_cut_to_two_by_hand():
    spec = recurrent("lstm", 3, 1)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(spec, Structure()).items()}
    arrays["a.bih"] = np.arange(12, dtype=np.float32)
    structure = Structure(0, {"a": (2, 3), "b": (1, 1)}, RANKING)
    # i0 i1 i2, f0 f1 f2, g0 g1 g2, o0 o1 o2
    assert cutting.cut(spec, arrays, structure)["a.bih"].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert cutting.shell(spec, arrays, structure.narrowed(1))["a.bih"].tolist() == [2, 5, 8, 11]
    arrays["a.hh"] = np.arange(36, dtype=np.float32).reshape(12, 3)
    assert cutting.cut(spec, arrays, structure)["a.hh"][:3].tolist() == [[0, 1], [3, 4], [9, 10]]
    # New rows of all gates with all columns, then the old rows' new columns.
    new = [*range(6, 9), *range(15, 18), *range(24, 27), *range(33, 36), *(2, 5, 11, 14, 20, 23, 29, 32)]
    assert cutting.shell(spec, arrays, structure.narrowed(1))["a.hh"].tolist() == new


@pytest.mark.parametrize("name", ALL)
def test_shells_of_gates_make_every_width(name):
    spec, structure = widths_of(name)
    arrays = random_arrays(spec, Structure())
    shells = [cutting.shell(spec, arrays, structure.narrowed(k)) for k in range(3)]
    for capacity in range(3):
        made = cutting.assemble(spec, structure.narrowed(capacity), shells[: capacity + 1])
        for tensor, part in cutting.cut(spec, arrays, structure.narrowed(capacity)).items():
            np.testing.assert_array_equal(made[tensor], part)
    total = {tensor: np.zeros(array.shape) for tensor, array in arrays.items()}
    cutting.paste_add(spec, total, cutting.cut(spec, arrays, structure.narrowed(0)), structure.narrowed(0), 2.0)
    for tensor, mask in kept(spec, structure.narrowed(0)).items():
        np.testing.assert_allclose(total[tensor], 2 * arrays[tensor] * mask, rtol=1e-6)


@pytest.mark.parametrize("name", ["lstm", "gru", "attention"])
@pytest.mark.parametrize("capacity", [0, 1])
def test_compact_is_masked(name, capacity):
    spec, structure = widths_of(name, capacity)
    arrays, masks = random_arrays(spec, Structure()), kept(spec, structure)
    compact = loaded(spec, structure, cutting.cut(spec, arrays, structure))
    masked = loaded(spec, Structure(), {tensor: array * masks[tensor] for tensor, array in arrays.items()})
    x, y = batch(spec, 7)
    np.testing.assert_allclose(compact.forward(x), masked.forward(x), atol=1e-5)
    assert compact.forward_backward(x, y) == pytest.approx(masked.forward_backward(x, y), abs=1e-5)
    for tensor, grad in cutting.cut(spec, masked.grads, structure).items():
        np.testing.assert_allclose(compact.grads[tensor], grad, atol=1e-5, err_msg=tensor)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("capacity", [0, 1])
def test_a_narrower_width_adds_its_gradients_into_the_wide_ones(name, capacity):
    spec, structure = widths_of(name)
    arrays = random_arrays(spec, Structure())
    wide, small = loaded(spec, structure, arrays), structure.narrowed(capacity)
    alone = loaded(spec, small, cutting.cut(spec, arrays, small))
    narrow = wide.narrow(small)
    x, y = batch(spec, 7)
    np.testing.assert_allclose(narrow.forward(x), alone.forward(x), atol=1e-6)
    wide.forward_backward(x, y)
    before = {tensor: grad.copy() for tensor, grad in wide.grads.items()}
    for _ in range(2):
        narrow.forward_backward(x, y, scale=0.5)
    alone.forward_backward(x, y)
    for tensor, mask in kept(spec, small).items():
        added = wide.grads[tensor] - before[tensor]
        np.testing.assert_allclose(added[mask], alone.grads[tensor].ravel(), atol=1e-6)
        assert not added[~mask].any()
        assert np.shares_memory(narrow.params[tensor], wide.params[tensor])
        assert np.shares_memory(narrow.grads[tensor], wide.grads[tensor])


@pytest.mark.parametrize("name", ALL)
def test_a_narrower_cut_of_a_narrow_width(name):
    spec, structure = widths_of(name)
    wide = loaded(spec, structure, random_arrays(spec, Structure()))
    once, direct = wide.narrow(structure.narrowed(1)), wide.narrow(structure.narrowed(0))
    twice = once.narrow(structure.narrowed(0))
    x, y = batch(spec, 4)
    np.testing.assert_allclose(twice.forward(x), direct.forward(x), atol=1e-6)
    twice.forward_backward(x, y)
    added = {tensor: grad.copy() for tensor, grad in wide.grads.items()}
    direct.forward_backward(x, y)
    for tensor, grad in wide.grads.items():
        np.testing.assert_allclose(grad, 2 * added[tensor], atol=1e-6)
    with pytest.raises(SpecError, match="no prefix"):
        once.narrow(structure)


@pytest.mark.parametrize("name", ALL)
def test_where_channels_stand_does_not_matter(name):
    spec, structure = widths_of(name)
    arrays, rng = random_arrays(spec, Structure()), np.random.default_rng(0)
    levels = {g: rng.integers(0, 3, counts[-1]).astype(np.uint8) for g, counts in structure.widths.items()}
    moved = cutting.to_wire(spec, arrays, levels)
    assert any((moved[tensor] != arrays[tensor]).any() for tensor in arrays)
    x, _ = batch(spec, 4)
    here, there = loaded(spec, Structure(), arrays), loaded(spec, Structure(), moved)
    np.testing.assert_allclose(here.forward(x), there.forward(x), atol=1e-5)


def with_axes(spec, tensor, *axes):
    tensors = tuple(dataclasses.replace(t, axes=axes) if t.name == tensor else t for t in spec.tensors)
    return dataclasses.replace(spec, tensors=tensors)


LSTM, HEADS = recurrent("lstm"), attended(cut_width=True)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        # The right lengths, the wrong channels: gates by unit instead of units by gate.
        (with_axes(LSTM, "a.ih", Axis("a", inner=4), Axis(inner=WIDTH)), "'a' .lstm.: gates"),
        (with_axes(LSTM, "a.bhh", Axis("a", inner=2, outer=2)), "'a' .lstm.: gates"),
        (with_axes(HEADS, "m.in", Axis("heads", 9), Axis("e")), "'m' .attention.: heads"),
        (with_axes(HEADS, "o.weight", Axis("c"), Axis("e", STEPS)), "'o' .linear.: inputs"),
    ],
)
def test_axes_of_the_right_length_and_the_wrong_channels_are_refused(spec, problem):
    with pytest.raises(SpecError, match=problem):
        check(spec)


def test_heads_that_would_be_cut_apart_are_refused():
    nodes = tuple(dataclasses.replace(n, attrs={"head": 6}) if n.op == "attention" else n for n in HEADS.nodes)
    with pytest.raises(SpecError, match="cut heads of 6 apart"):
        check(dataclasses.replace(HEADS, nodes=nodes))


def convolved(*nodes, classes=8, shape=(2, 6), out=None):
    """conv1d 2 -> 4 channels that can be cut, then these nodes; `out` is the axis that a last linear layer reads."""
    tensors = [TensorSpec("a.weight", (Axis("a"), Axis(inner=2), Axis())), TensorSpec("a.bias", (Axis("a"),))]
    first = Node(
        "a", "conv1d", ("input",), {"weight": "a.weight", "bias": "a.bias"}, {"kernel": 1, "stride": 1, "padding": 0}
    )
    if out is not None:
        tensors += [TensorSpec("o.weight", (Axis(inner=classes), out)), TensorSpec("o.bias", (Axis(inner=classes),))]
        nodes = (*nodes, Node("o", "linear", (nodes[-1].name,), {"weight": "o.weight", "bias": "o.bias"}))
    return ModelSpec("convolved", shape, classes, (AxisGroup("a", 4),), tuple(tensors), (first, *nodes))


TURN = Node("t", "transpose", ("a",), {}, {"first": 0, "second": 1})


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (convolved(TURN, Node("f", "flatten", ("t",)), out=Axis("a", 1, 6)), None),
        (convolved(TURN, Node("f", "flatten", ("t",)), out=Axis("a", 6)), "'o' .linear.: inputs"),
        (convolved(Node("f", "flatten", ("a",)), out=Axis("a", 6)), None),
        (convolved(TURN, Node("l", "last", ("t",)), out=Axis("a")), None),
        (convolved(Node("l", "last", ("a",)), classes=6), "'l' .last.: steps"),
        # An average over channels has a length whatever is cut, but two of them depend on where channels stand.
        (
            convolved(
                TURN,
                Node("p", "adaptive_avg_pool1d", ("t",), {}, {"size": 2}),
                Node("f", "flatten", ("p",)),
                classes=12,
            ),
            "'p' .adaptive_avg_pool1d.: the sides of a pool",
        ),
        (
            convolved(Node("k", "concat", ("a", "a")), Node("f", "flatten", ("k",)), out=Axis(inner=48)),
            "falls apart|behind one",
        ),
        (convolved(Node("r", "reshape", ("a",), {}, {"d0": 24}), out=Axis(inner=24)), "falls apart"),
        (
            convolved(TURN, Node("k", "concat", ("t", "t")), Node("f", "flatten", ("k",)), out=Axis("a", 1, 12)),
            None,
        ),
        (convolved(Node("s", "softmax", ("a",)), Node("f", "flatten", ("s",)), out=Axis("a", 6)), None),
    ],
)
def test_channels_that_can_be_cut_go_where_their_place_does_not_matter(spec, problem):
    if problem is None:
        assert check(spec) is spec
        return
    with pytest.raises(SpecError, match=problem):
        check(spec)


def test_channels_behind_one_another_are_refused_by_name():
    nodes = (Node("k", "concat", ("a", "a")), Node("p", "adaptive_avg_pool1d", ("k",), {}, {"size": 1}))
    spec = convolved(*nodes, Node("f", "flatten", ("p",)), out=Axis("a", 1, 2))
    with pytest.raises(SpecError, match=r"'k' .concat.: what stands behind one another"):
        check(spec)


OPS_OF = sorted(
    {node.op for spec, _ in MODELS.values() for node in spec.nodes} | {"concat", "reshape", "softmax", "transpose"}
)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_graph_that_is_bent_anywhere_is_refused_by_name_or_cuts_as_it_says(data):
    """Whatever stands in a spec, `check` gives it back or raises SpecError; and what it gives back can be cut."""
    spec, widths = MODELS[data.draw(st.sampled_from(ALL))]
    nodes, tensors = list(spec.nodes), list(spec.tensors)
    place = data.draw(st.integers(0, len(nodes) - 1))
    names = ["input", *(node.name for node in nodes)]
    bent = {
        "op": st.sampled_from(OPS_OF),
        "inputs": st.lists(st.sampled_from(names), min_size=1, max_size=2).map(tuple),
        "params": st.dictionaries(
            st.sampled_from(["weight", "bias", "weight_ih"]), st.sampled_from([t.name for t in tensors])
        ),
        "attrs": st.dictionaries(
            st.sampled_from(["head", "d0", "d1", "first", "second"]), st.integers(0, 9), max_size=2
        ),
    }
    for field in data.draw(st.lists(st.sampled_from(sorted(bent)), max_size=2, unique=True)):
        nodes[place] = dataclasses.replace(nodes[place], **{field: data.draw(bent[field])})
    if data.draw(st.booleans()):
        which = data.draw(st.integers(0, len(tensors) - 1))
        axes = [
            Axis(data.draw(st.sampled_from(["", *widths])), *data.draw(st.tuples(*[st.integers(1, 4)] * 2)))
            for _ in range(2)
        ]
        tensors[which] = dataclasses.replace(tensors[which], axes=tuple(axes[: data.draw(st.integers(1, 2))]))
    made = dataclasses.replace(spec, nodes=tuple(nodes), tensors=tuple(tensors))
    try:
        check(made)
    except SpecError:
        return
    structure = Structure(0, widths, RANKING)
    engine = loaded(made, structure, cutting.cut(made, random_arrays(made, Structure()), structure))
    assert engine.forward(batch(made, 2)[0]).shape == (2, made.classes)
