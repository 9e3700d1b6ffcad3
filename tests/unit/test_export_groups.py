"""Convolutions and norms in groups: these are cut whole, and what is joined with them in the runs that they have in common."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coordinator.simulate.flops import per_sample
from edge_runtime.engines import open_engine
from edge_runtime.models.export import export
from edge_runtime.models.spaces import Dim, Spaces
from tests.support.engines import in_double
from tests.support.masked_module import check_narrow, random_widths
from tests.support.models import RANKING, random_arrays
from tests.support.torch_models import ResNeXt, ShuffleUnit
from wire import memory, zoo
from wire.axes import check_axes
from wire.effort import effort
from wire.errors import SpecError
from wire.messages import Recipe
from wire.native.plan import Asked, plan
from wire.spec import (
    Axis,
    AxisGroup,
    ModelSpec,
    Node,
    Structure,
    TensorSpec,
    check,
    node_shapes,
    nodes_within,
    parameter_count,
    tensor_shapes,
)

NEAR = 1e-5
WHOLE = Structure()
MODELS = {"resnext": (ResNeXt, (2, 6, 6)), "shuffle-unit": (ShuffleUnit, (1, 6, 6))}
MAKES = {"torch": open_engine("torch"), "native": open_engine("native"), "native in double": in_double("native")}


def made(name, seed=0):
    """Give a module of which no norm has ones and zeros, and what it is exported as."""
    torch.manual_seed(seed)
    (make, shape) = MODELS[name]
    module = make()
    with torch.no_grad():
        for array in module.parameters():
            array.add_(0.2 * torch.randn_like(array))
        module.train()(torch.randn(8, *shape))
    return module, export(module, shape), shape


RESNEXT, UNIT = (made(name)[1] for name in MODELS)


def sizes(exported):
    return {group.name: group.size for group in exported.spec.groups if group.prunable}


def test_groups_are_cut_whole():
    # Of 12 channels norms have 3 and 6 groups, so that 3 runs of 4 live and die; of the middle's 8 and 16 there are 4 runs.
    assert (sizes(RESNEXT), RESNEXT.fixed) == ({"stem": 3, "reduce": 4}, {})
    assert (sizes(UNIT), UNIT.fixed) == ({"stem": 3, "mix": 5}, {})
    structure = Structure(0, {"stem": (2, 3), "reduce": (3, 4)}, RANKING)
    tensors, values = tensor_shapes(RESNEXT.spec, structure), node_shapes(RESNEXT.spec, structure)
    assert (tensors["stem.weight"], tensors["norm.weight"]) == ((8, 2, 3, 3), (8,))
    assert (tensors["reduce.weight"], tensors["middle.weight"]) == ((6, 8, 1, 1), (12, 2, 3, 3))
    assert (tensors["widen.weight"], tensors["fc.weight"]) == ((8, 12, 1, 1), (4, 72))
    assert (values["reduce"], values["middle"], values["widen"]) == ((6, 6, 6), (12, 6, 6), (8, 6, 6))
    groups = {
        node.name: node.attrs["groups"] for node in nodes_within(RESNEXT.spec, structure) if node.op == "group_norm"
    }
    assert groups == {"norm": 2, "norm2": 3, "norm3": 4}
    assert nodes_within(RESNEXT.spec, WHOLE) == RESNEXT.spec.nodes


@given(s=st.integers(1, 3), m=st.integers(1, 4))
def test_weights_of_a_cut_block_are_as_counted_by_hand(s, m):
    stem, inner, outer = 4 * s, 2 * m, 4 * m
    closed = (18 * stem + stem) + 2 * stem + (stem * inner + inner) + 4 * inner + (18 * outer + outer) + 2 * outer
    closed += (outer * stem + stem) + 2 * stem + (36 * s * 4 + 4)
    structure = Structure(0, {"stem": (s,), "reduce": (m,)}, RANKING)
    assert parameter_count(RESNEXT.spec, structure) == closed
    convolutions = 36 * (18 * stem + stem * inner + 18 * outer + outer * stem)
    assert per_sample(RESNEXT.spec, structure, backward=False) == 2 * (convolutions + 36 * s * 4)


@pytest.mark.parametrize("told", MAKES)
@pytest.mark.parametrize("name", MODELS)
def test_compact_is_masked_in_every_engine(name, told):
    module, exported, shape = made(name)
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(3):
        for narrow in random_widths(exported.spec, rng):
            x, y = rng.standard_normal((5, *shape)).astype(np.float32), rng.integers(4, size=5)
            found = check_narrow(module, exported, narrow, x, y, MAKES[told])
            assert max(found.outputs, found.gradients) < NEAR, narrow.structure
            seen.add(tuple(counts[narrow.structure.capacity] for counts in narrow.structure.widths.values()))
    assert len(seen) > 3


@pytest.mark.parametrize("told", MAKES)
@pytest.mark.parametrize("name", MODELS)
def test_a_width_inside_a_wider_one_is_the_width_by_itself(name, told):
    spec, rng = made(name)[1].spec, np.random.default_rng(5)
    widths = {group.name: (group.size - 1, group.size) for group in spec.groups if group.prunable}
    structure, arrays = Structure(0, widths, RANKING), random_arrays(spec, WHOLE)
    wide, alone = MAKES[told](), MAKES[told]()
    wide.load(spec, structure.narrowed(1), {key: np.abs(array) for key, array in arrays.items()})
    inner = wide.narrow(structure)
    shapes = tensor_shapes(spec, structure)
    alone.load(spec, structure, {key: array.reshape(shapes[key]) for key, array in inner.params.items()})
    x, y = rng.standard_normal((4, *spec.input_shape)).astype(np.float32), rng.integers(4, size=4)
    np.testing.assert_allclose(inner.forward(x), alone.forward(x), atol=1e-6)
    inner.forward_backward(x, y)
    alone.forward_backward(x, y)
    for key, grad in alone.grads.items():
        np.testing.assert_allclose(np.reshape(inner.grads[key], grad.shape), grad, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_a_width_takes_what_a_model_of_its_own_of_that_size_takes(name):
    spec, recipe = made(name)[1].spec, Recipe(batch=4)
    own = zoo.narrow(spec, 0.6)
    structure = Structure(0, {group.name: (group.size,) for group in own.groups if group.prunable}, RANKING)
    assert {node.attrs["groups"] for node in own.nodes if node.name in ("middle", "second")} <= {2, 3}
    assert tensor_shapes(own, WHOLE) == tensor_shapes(spec, structure)
    assert node_shapes(own, WHOLE) == node_shapes(spec, structure)
    for backward in (False, True):
        asked = Asked(4, backward=backward)
        assert plan(spec, structure, asked).length == plan(own, WHOLE, asked).length
    assert memory.predict(spec, structure, recipe).peak == memory.predict(own, WHOLE, recipe).peak
    assert per_sample(spec, structure) == per_sample(own, WHOLE)
    assert effort(spec, structure) == effort(own, WHOLE)


class Sum(nn.Module):
    """What a first layer gives goes two ways, whose sum a linear layer reads."""

    def __init__(self, one, other):
        super().__init__()
        self.first, self.one, self.other, self.fc = nn.Conv2d(2, 12, 1), one, other, nn.Linear(12 * 4, 3)

    def forward(self, x):
        x = self.first(x)
        return self.fc((self.one(x) + self.other(x)).flatten(1))


def grouped(count):
    return nn.Conv2d(12, 12, 1, groups=count)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        (grouped(6), nn.Conv2d(12, 12, 1), {"first": 6}),
        (grouped(6), grouped(4), {"first": 2}),
        (grouped(12), grouped(4), {"first": 4}),
        (grouped(6), nn.GroupNorm(4, 12), {"first": 2}),
        (nn.Conv2d(12, 12, 1), nn.Sequential(nn.Conv2d(12, 12, 1), grouped(3)), {"first": 12, "one": 3}),
        (grouped(3), nn.Sequential(grouped(3), nn.GroupNorm(3, 12)), {"first": 3}),
    ],
)
def test_what_is_joined_is_cut_in_runs_that_both_have(one, other, wanted):
    exported = export(Sum(one, other), (2, 2, 2))
    assert ({g.name: g.size for g in exported.spec.groups if g.prunable}, exported.fixed) == (wanted, {})


def reasons(module, shape):
    return {name: (reason.path, reason.why) for name, reason in export(module, shape).fixed.items()}


def test_what_remains_fixed_says_why():
    other = "meets channels that stand in other groups, and no end of theirs is one of these"
    found = reasons(Sum(grouped(4), grouped(3)), (2, 2, 2))
    assert set(found.values()) == {("other", other)}
    assert "first" in found
    picture = nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.Flatten(), nn.Linear(32, 3))
    assert reasons(picture, (4, 2, 2)) == {"0": ("0", "meets an axis that is never cut, such as the input's")}
    picture = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 8, 1), nn.Flatten(), nn.Linear(32, 3))
    assert reasons(picture, (4, 2, 2)) == {}
    # What a shuffle mixes cannot go in whole groups: each group behind it reads every group before it.
    found = reasons(ShuffleUnit(shuffles=True), (1, 6, 6))
    assert found == {"stem": ("", "is brought into the literal shape (3, 2, 6, 6)")}


def test_a_shuffled_unit_runs_and_what_is_behind_it_is_cut():
    torch.manual_seed(1)
    module, rng = ShuffleUnit(shuffles=True), np.random.default_rng(1)
    exported = export(module, (1, 6, 6))
    assert sizes(exported) == {"mix": 5}
    for narrow in random_widths(exported.spec, rng):
        x, y = rng.standard_normal((5, 1, 6, 6)).astype(np.float32), rng.integers(4, size=5)
        found = check_narrow(module, exported, narrow, x, y)
        assert max(found.outputs, found.gradients) < NEAR


@given(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=2, max_size=5))
def test_units_are_the_runs_that_all_have_in_common(counts):
    spaces, dims = Spaces(), []
    for place, count in enumerate(counts):
        dims.append(Dim(12, spaces.open(count, str(place)), 12 // count))
        spaces.join(dims[0], dims[-1], "")
    ends = set.intersection(*({12 // count * end for end in range(1, count + 1)} for count in counts))
    if len(ends) > 1 or set(counts) == {1}:
        assert not spaces.fixed
        assert {spaces.units[spaces.root(dim.space)] for dim in dims} == {len(ends)}
    else:
        assert spaces.fixed


def one(axis, out, groups, each=2):
    """A convolution of 6 channels, one in groups, and a linear layer, the channels of both following what is told."""
    params = {key: {"weight": f"{key}.weight", "bias": f"{key}.bias"} for key in "ago"}
    flat = {"kernel": 1, "stride": 1, "padding": 0}
    tensors = (
        TensorSpec("a.weight", (axis, Axis(inner=2), Axis(), Axis())),
        TensorSpec("a.bias", (axis,)),
        TensorSpec("g.weight", (out, Axis(inner=each), Axis(), Axis())),
        TensorSpec("g.bias", (out,)),
        TensorSpec("o.weight", (Axis("classes"), out)),
        TensorSpec("o.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("a", "conv2d", ("input",), params["a"], flat),
        Node("g", "conv2d", ("a",), params["g"], flat | {"groups": groups}),
        Node("f", "flatten", ("g",)),
        Node("o", "linear", ("f",), params["o"]),
    )
    group = (AxisGroup("classes", 3, prunable=False), AxisGroup("c", 6), AxisGroup("r", 3), AxisGroup("q", 3))
    return ModelSpec("one", (2, 1, 1), 3, group, tensors, nodes)


RUNS = Axis("r", 2)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (one(RUNS, RUNS, 3), None),
        (one(RUNS, Axis("r", 5), 3), None),
        (one(RUNS, Axis("r", 2), 6, each=1), None),
        (one(Axis("r", 2, 2), Axis("r", 3, 2), 6), None),
        (one(Axis("c"), Axis("c"), 3), "'g' .conv2d.: 1 times group 'c' by 1 cuts groups of 2 channels apart"),
        (one(Axis("r", 2, 2), Axis("r", 6), 6), "'g' .conv2d.: the groups' channels: .* does not meet"),
        (one(RUNS, Axis("q", 2), 3), "'g' .conv2d.: "),
        (one(RUNS, Axis(inner=6), 3), "'g' .conv2d.: "),
        (one(Axis(inner=6), RUNS, 3), "'g' .conv2d.: "),
        (one(RUNS, RUNS, 2, each=3), "'g' .conv2d.: "),
    ],
)
def test_specs_whose_groups_would_be_cut_apart_are_refused(spec, problem):
    if problem is None:
        assert check(spec) is spec
        return
    with pytest.raises(SpecError, match=problem):
        check(spec)
    with pytest.raises(SpecError, match=r"'g' .conv2d.: "):
        check_axes(spec, node_shapes(spec, WHOLE))
