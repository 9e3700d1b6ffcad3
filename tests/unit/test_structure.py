"""Cut, paste and shells: by hand, against naive oracles, and their laws over random models and rankings."""

from __future__ import annotations

import hashlib
import itertools

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import models
from wire import structure as cutting
from wire.errors import Malformed, SpecError
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, group_sizes, tensor_shape, tensor_shapes


def bare(groups, tensors):
    """A spec whose graph is never walked, so that any axes can be tried, gates and repeats as well."""
    specs = tuple(TensorSpec(name, tuple(axes)) for name, axes in tensors.items())
    found = tuple(AxisGroup(name, size) for name, size in groups.items())
    return ModelSpec("bare", (1,), 1, found, specs, (Node("n", "relu", ("input",)),))


axes_of = st.builds(Axis, st.sampled_from(["a", "b", ""]), st.integers(1, 3), st.integers(1, 2))


@st.composite
def worlds(draw):
    """A spec, levels for its two groups, canonical arrays and the widest structure."""
    capacities = draw(st.integers(1, 4))
    sizes = {name: draw(st.integers(1, 6)) for name in "ab"}
    tensors = {f"t{i}": draw(st.lists(axes_of, min_size=1, max_size=3)) for i in range(draw(st.integers(1, 3)))}
    spec = bare(sizes, tensors)
    levels = {}
    for name, size in sizes.items():
        level = draw(st.lists(st.integers(0, capacities - 1), min_size=size, max_size=size))
        level[draw(st.integers(0, size - 1))] = 0
        levels[name] = np.array(level, np.uint8)
    arrays = models.random_arrays(spec, Structure(), draw(st.integers(0, 99)))
    widths = cutting.widths_of(levels, capacities)
    return spec, levels, arrays, Structure(capacities - 1, widths, cutting.ranking_digest(levels))


def naive_entries(axis, size, channels):
    """Positions along one dimension of the whole array that belong to these channels, in the order of `channels`."""
    size, channels = (size, channels) if axis.group else (1, [0])
    return [(o * size + c) * axis.inner + i for o in range(axis.outer) for c in channels for i in range(axis.inner)]


def naive_cut(spec, arrays, levels, capacity):
    """Cut straight from canonical order with lists of channels."""
    sizes = {g.name: g.size for g in spec.groups}
    kept = {
        name: sorted((c for c in range(len(level)) if level[c] <= capacity), key=lambda c, level=level: (level[c], c))
        for name, level in levels.items()
    }
    result = {}
    for tensor in spec.tensors:
        grid = [naive_entries(a, sizes.get(a.group, 1), kept.get(a.group, [0])) for a in tensor.axes]
        result[tensor.name] = arrays[tensor.name][np.ix_(*grid)]
    return result


def same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_order_and_widths_by_hand():
    levels = np.array([2, 0, 1, 0], np.uint8)
    assert cutting.order_of(levels).tolist() == [1, 3, 2, 0]
    assert cutting.widths_of({"a": levels}, 3) == {"a": (2, 3, 4)}
    assert cutting.widths_of({"a": levels}, 2) == {"a": (2, 3)}, "a channel of a level beyond is in no width"
    assert cutting.widths_of({"a": levels}, 5) == {"a": (2, 3, 4, 4, 4)}
    with pytest.raises(SpecError, match="'a' keeps no channel"):
        cutting.widths_of({"a": np.array([1, 1], np.uint8)}, 2)


def test_ranking_digest_by_hand():
    levels = {"b": np.array([1], np.uint8), "a": np.array([0, 2], np.uint8)}
    assert cutting.ranking_digest(levels) == hashlib.sha256(msgpack.packb([["a", b"\0\2"], ["b", b"\1"]])).hexdigest()
    assert cutting.ranking_digest({}) == ""


def test_a_linear_layer_by_hand():
    spec = bare({"a": 3, "b": 2}, {"w": [Axis("a"), Axis("b")]})
    w = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
    levels = {"a": np.array([1, 0, 0], np.uint8), "b": np.array([1, 0], np.uint8)}
    wire = cutting.to_wire(spec, {"w": w}, levels)
    assert wire["w"].tolist() == [[4, 3], [6, 5], [2, 1]]
    widest = Structure(1, cutting.widths_of(levels, 2), "")
    assert cutting.cut(spec, wire, widest.narrowed(0))["w"].tolist() == [[4], [6]]
    assert cutting.shell(spec, wire, widest.narrowed(0))["w"].tolist() == [4, 6]
    # Box 0: new rows, all columns. Box 1: old rows, new columns.
    assert cutting.shell(spec, wire, widest)["w"].tolist() == [2, 1, 3, 5]
    total = {"w": np.zeros((3, 2))}
    cutting.paste_add(spec, total, {"w": np.array([[1], [2]], np.float32)}, widest.narrowed(0), 0.5)
    assert total["w"].tolist() == [[0.5, 0], [1.0, 0], [0, 0]]


@settings(deadline=None)
@given(worlds())
def test_wire_order_is_undone_and_cuts_as_channel_lists_do(world):
    spec, levels, arrays, widest = world
    wire = cutting.to_wire(spec, arrays, levels)
    same(cutting.to_canonical(spec, wire, levels), arrays)
    for capacity in range(widest.capacity + 1):
        same(cutting.cut(spec, wire, widest.narrowed(capacity)), naive_cut(spec, arrays, levels, capacity))


@settings(deadline=None)
@given(worlds())
def test_shells_tile_exactly_and_assemble_every_width(world):
    spec, levels, arrays, widest = world
    wire = cutting.to_wire(spec, arrays, levels)
    shells = []
    for capacity in range(widest.capacity + 1):
        at = widest.narrowed(capacity)
        shells.append(cutting.shell(spec, wire, at))
        cut = cutting.cut(spec, wire, at)
        same(cutting.assemble(spec, at, shells), cut)
        assert sum(line.size for shell in shells for line in shell.values()) == sum(a.size for a in cut.values())
        # A shell of a compact array is the shell of the whole one.
        same(cutting.shell(spec, cut, at), shells[-1])


@settings(deadline=None)
@given(worlds())
def test_boxes_are_disjoint_few_and_complete(world):
    spec, _, _, widest = world
    for capacity in range(widest.capacity + 1):
        outer = group_sizes(spec, widest.narrowed(capacity))
        inner = group_sizes(spec, widest.narrowed(capacity - 1)) if capacity else None
        for tensor in spec.tensors:
            boxes = cutting.shell_blocks(tensor, inner, outer)
            assert len(boxes) <= len(tensor.axes)
            hits = np.zeros([n for a in tensor.axes for n in (a.outer, outer.get(a.group, 1), a.inner)], int)
            for box in boxes:
                hits[box] += 1
            if inner is not None:
                old = tuple(s for a in tensor.axes for s in (slice(None), slice(inner.get(a.group, 1)), slice(None)))
                assert not hits[old].any()
                hits[old] += 1
            assert (hits == 1).all()


@settings(deadline=None)
@given(worlds(), st.integers(0, 9))
def test_paste_is_the_adjoint_of_cut(world, seed):
    spec, _, x, widest = world
    for capacity in range(widest.capacity + 1):
        at = widest.narrowed(capacity)
        y = models.random_arrays(spec, at, seed)
        total = {name: np.zeros(shape) for name, shape in tensor_shapes(spec, Structure()).items()}
        cutting.paste_add(spec, total, y, at, 2.0)
        cut = cutting.cut(spec, x, at)
        left = sum(np.vdot(cut[name].astype(float), y[name]) for name in y)
        right = sum(np.vdot(x[name].astype(float), total[name]) for name in y)
        assert right == pytest.approx(2 * left, rel=1e-5, abs=1e-5)


@settings(deadline=None)
@given(worlds())
def test_a_narrower_cut_of_a_cut_is_the_narrower_cut(world):
    spec, _, arrays, widest = world
    for wide, narrow in itertools.combinations_with_replacement(range(widest.capacity, -1, -1), 2):
        cut = cutting.cut(spec, arrays, widest.narrowed(wide))
        same(cutting.cut(spec, cut, widest.narrowed(narrow)), cutting.cut(spec, arrays, widest.narrowed(narrow)))


def test_cuts_are_views_and_permuted_arrays_are_copies():
    spec = models.small_cnn()
    arrays = models.random_arrays(spec, Structure())
    at = Structure(0, {"a": (2, 6), "b": (3, 12)}, models.RANKING)
    for name, part in cutting.cut(spec, arrays, at).items():
        assert np.shares_memory(part, arrays[name])
    for moved in (cutting.to_wire(spec, arrays, {}), cutting.to_canonical(spec, arrays, {})):
        same(moved, arrays)
        assert not any(np.shares_memory(moved[name], arrays[name]) for name in arrays)


def test_read_only_arrays_can_be_sent():
    spec = models.small_cnn()
    arrays = models.random_arrays(spec, Structure())
    for array in arrays.values():
        array.flags.writeable = False
    levels = {"a": np.array([0, 1] * 3, np.uint8)}
    wire = cutting.to_wire(spec, arrays, levels)
    shells = [cutting.shell(spec, wire, Structure(k, {"a": (3, 6)}, "")) for k in range(2)]
    for array in cutting.assemble(spec, Structure(1, {"a": (3, 6)}, ""), shells).values():
        assert array.flags.writeable


def test_the_whole_model_is_one_shell():
    spec = models.small_cnn()
    arrays = models.random_arrays(spec, Structure())
    shell = cutting.shell(spec, arrays, Structure())
    assert {name: line.shape for name, line in shell.items()} == {name: (a.size,) for name, a in arrays.items()}
    same(cutting.assemble(spec, Structure(), [shell]), arrays)


def test_an_empty_shell_has_no_tensor():
    spec = models.small_cnn()
    arrays = models.random_arrays(spec, Structure())
    same_twice = Structure(1, {"a": (4, 4), "b": (5, 5)}, "")
    shells = [cutting.shell(spec, arrays, same_twice.narrowed(k)) for k in range(2)]
    assert shells[1] == {}
    same(cutting.assemble(spec, same_twice, shells), cutting.cut(spec, arrays, same_twice))


def test_shells_that_lie_are_malformed():
    spec = models.small_cnn()
    arrays = models.random_arrays(spec, Structure())
    at = Structure(1, {"a": (2, 6), "b": (3, 12)}, "")
    good = [cutting.shell(spec, arrays, at.narrowed(k)) for k in range(2)]
    without = {name: line for name, line in good[1].items() if name != "f.bias"}
    bad = {
        "shells for capacity": good[:1],
        "that the model lacks": [good[0] | {"foreign": good[0]["f.bias"]}, good[1]],
        "expected float32": [good[0], without],
        r"expected float32\(9,\)": [good[0], good[1] | {"f.bias": good[1]["f.bias"][:-1]}],
        "is float64": [good[0], good[1] | {"f.bias": good[1]["f.bias"].astype(float)}],
        r"expected float32\(0,\)": [good[0], good[1] | {"o.bias": good[0]["o.bias"]}],
    }
    for problem, shells in bad.items():
        with pytest.raises(Malformed, match=problem):
            cutting.assemble(spec, at, shells)


def test_arrays_that_do_not_fit_are_refused():
    spec = models.small_cnn()
    at = Structure(0, {"a": (4,), "b": (5,)}, "")
    small = models.random_arrays(spec, Structure(0, {"a": (2,), "b": (3,)}, ""))
    with pytest.raises(ValueError, match="smaller than the structure"):
        cutting.cut(spec, small, at)
    total = models.random_arrays(spec, Structure())
    with pytest.raises(ValueError, match="expected"):
        cutting.paste_add(spec, total, small, at)
    with pytest.raises(SpecError, match="levels for 2 channels"):
        cutting.to_wire(spec, total, {"a": np.zeros(2, np.uint8)})


def test_gates_and_ties_are_pasted_in_place_even_into_strided_arrays():
    spec = bare({"a": 2}, {"w": [Axis("a", 1, 2), Axis("a")]})
    total = np.zeros((2, 8)).T[::2]
    cutting.paste_add(spec, {"w": total}, {"w": np.array([[3.0], [5.0]], np.float32)}, Structure(0, {"a": (1,)}, ""))
    assert total.tolist() == [[3, 0], [0, 0], [5, 0], [0, 0]]


def test_a_part_may_leave_tensors_out():
    spec = models.small_cnn()
    total = {name: np.zeros(shape) for name, shape in tensor_shapes(spec, Structure()).items()}
    cutting.paste_add(spec, total, {"o.bias": np.ones(4, np.float32)}, Structure())
    assert {name for name, array in total.items() if array.any()} == {"o.bias"}
    assert tensor_shape(spec.tensors[5], {"classes": 4}) == (4,)
