"""PruneTrain: which channels go, by hand and by loops; and that what is left travels, trains and joins as a smaller model."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, prunetrain
from coordinator.blocks.channels import largest_weights, narrowed, without
from coordinator.shells import encode_shells, structures_of
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import grouplasso
from tests.support.models import batch, linear, random_arrays, small_cnn
from wire.builders import resnet
from wire.errors import ConfigError, Malformed
from wire.memory import predict
from wire.messages import Recipe, Usage
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check, tensor_shapes
from wire.spool import Spool
from wire.structure import assemble, cut, to_wire
from wire.tensor import open_blob

MAKE = open_engine("torch")
SPEC = small_cnn()
GREAT = 1 << 40
ONE = (DeviceView("a", GREAT),)


def residual(channels=5, inner=4, classes=3, side=4):
    """conv -> relu, around it conv -> relu -> conv, added; flatten; linear. No norms."""
    conv = {"kernel": 3, "stride": 1, "padding": 1}

    def layer(name, out, source):
        axes = (Axis(out), Axis(source) if source else Axis(), Axis(inner=3), Axis(inner=3))
        tensors = (TensorSpec(f"{name}.weight", axes, "kaiming", 9), TensorSpec(f"{name}.bias", (Axis(out),)))
        return tensors, {"weight": f"{name}.weight", "bias": f"{name}.bias"}

    (stem, stem_at), (first, first_at), (second, second_at) = (
        layer(*names) for names in (("stem", "g", ""), ("one", "h", "g"), ("two", "g", "h"))
    )
    out = (
        TensorSpec("out.weight", (Axis("classes"), Axis("g", side * side)), "fan", channels * side * side),
        TensorSpec("out.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("stem", "conv2d", ("input",), stem_at, conv),
        Node("r0", "relu", ("stem",)),
        Node("one", "conv2d", ("r0",), first_at, conv),
        Node("r1", "relu", ("one",)),
        Node("two", "conv2d", ("r1",), second_at, conv),
        Node("sum", "add", ("two", "r0")),
        Node("flat", "flatten", ("sum",)),
        Node("out", "linear", ("flat",), {"weight": "out.weight", "bias": "out.bias"}),
    )
    groups = (AxisGroup("g", channels), AxisGroup("h", inner), AxisGroup("classes", classes, prunable=False))
    return check(ModelSpec("residual", (1, side, side), classes, groups, (*stem, *first, *second, *out), nodes))


def start(spec=SPEC, weights=None, **params):
    return prunetrain.init(spec, weights or random_arrays(spec, Structure()), params)


def structure_of(state):
    (structure,) = structures_of(state)
    return structure


def with_levels(state, **levels):
    return dataclasses.replace(
        state,
        levels={name: np.array(level, np.uint8) for name, level in levels.items()},
        widths={name: (level.count(0),) for name, level in levels.items()},
    )


def test_the_union_over_layers_that_meet_in_a_sum_by_hand():
    spec = resnet("r", (1, 8, 8), 3, ((4, 1), (6, 1)))
    shapes = tensor_shapes(spec, Structure())
    weights = {name: np.full(shape, 1e-6, np.float32) for name, shape in shapes.items()}
    touching = ["stem.weight", "block1.1.conv1.weight", "block1.1.conv2.weight"]
    touching += ["block2.1.conv1.weight", "block2.1.short.weight"]
    levels = {group.name: np.zeros(group.size, np.uint8) for group in spec.groups if group.prunable}
    # Of stage 1, channel 0 is needed by the stem alone, 1 by what a block adds to it, 2 by the shortcut of the next stage
    # alone, which reads it; 3 by a norm only.
    weights["stem.weight"][0, 0, 1, 1] = 0.5
    weights["block1.1.conv2.weight"][1, 3, 0, 2] = -0.5
    weights["block2.1.short.weight"][5, 2, 0, 0] = 0.5
    weights["norm.weight"][3] = 1.0
    assert {shapes[name][0] for name in touching[:3]} == {4}
    found = narrowed(levels, largest_weights(spec, weights), 1e-4)
    assert found["stage1"].tolist() == [0, 0, 0, 1]
    assert found["block1.1"].tolist() == [1, 1, 1, 0]  # read by the second convolution at its input 3
    assert found["stage2"].tolist() == [1, 1, 1, 1, 1, 0]
    assert found["block2.1"].tolist() == [0, 1, 1, 1, 1, 1]  # nothing needs it: one stays


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_largest_weights_meet_a_loop_over_coordinates(seed, plain):
    spec = small_cnn() if plain else residual()
    weights = random_arrays(spec, Structure(), seed)
    found = largest_weights(spec, weights)
    wanted = {group.name: [0.0] * group.size for group in spec.groups if group.prunable}
    for tensor in spec.tensors:
        if len(tensor.axes) == 1:
            continue
        for index, value in np.ndenumerate(weights[tensor.name]):
            for i, axis in zip(index, tensor.axes, strict=True):
                if axis.group in wanted:
                    channel = i // axis.inner
                    wanted[axis.group][channel] = max(wanted[axis.group][channel], abs(float(value)))
    assert {name: line.tolist() for name, line in found.items()} == wanted


def test_what_is_out_stays_out_and_one_stays_in():
    magnitudes = {"a": np.array([9.0, 0.5, 0.0, 0.7], np.float32)}
    assert narrowed({"a": np.array([1, 0, 0, 0])}, magnitudes, 0.6)["a"].tolist() == [1, 1, 1, 0]
    assert narrowed({"a": np.array([1, 0, 0, 0])}, magnitudes, 5.0)["a"].tolist() == [1, 1, 1, 0]
    assert narrowed({"a": np.array([1, 0, 0, 1])}, magnitudes, 0.5)["a"].tolist() == [1, 0, 1, 1]
    zeros = {"a": np.zeros(3, np.float32)}
    assert narrowed({"a": np.zeros(3, np.uint8)}, zeros, 1e-4)["a"].tolist() == [0, 1, 1]


@pytest.mark.parametrize("build", [small_cnn, residual])
def test_the_compact_model_computes_what_the_whole_one_does_with_zeros(build):
    spec = build()
    rng = np.random.default_rng(3)
    state = start(spec, random_arrays(spec, Structure(), 4))
    levels = {name: (rng.random(len(level)) < 0.5).astype(int).tolist() for name, level in state.levels.items()}
    levels = {name: [0, *level[1:]] for name, level in levels.items()}
    state = with_levels(state, **levels)
    zeroed = without(spec, state.weights, state.levels)
    engine, small = MAKE(), MAKE()
    engine.load(spec, Structure(), zeroed)
    structure = structure_of(state)
    small.load(spec, structure, cut(spec, to_wire(spec, state.weights, state.levels), structure))
    x, y = batch(spec, 9)
    np.testing.assert_allclose(small.forward(x), engine.forward(x), atol=1e-5)
    assert sum(a.size for a in small.params.values()) < sum(a.size for a in engine.params.values())
    # Gradients of what is left are the same as well; what is out has none but where its own zeros are read.
    losses = [e.forward_backward(x, y) for e in (small, engine)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    inside = cut(spec, to_wire(spec, engine.grads, state.levels), structure)
    for name, grad in small.grads.items():
        np.testing.assert_allclose(grad, inside[name], atol=1e-5, err_msg=name)


def test_a_shrunken_state_encodes_cuts_and_joins(tmp_path):
    state = with_levels(start(), a=[0, 1, 0, 1, 1, 0], b=[1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0])
    structure = structure_of(state)
    assert (structure.capacity, dict(structure.widths)) == (0, {"a": (3,), "b": (7,)})
    spool = Spool(tmp_path)
    refs, shell_of, structures = encode_shells(spool, SPEC, state)[:3]
    assert (len(refs), tuple(shell_of), tuple(structures)) == (1, (1,), (structure,))
    with open_blob(spool.path(refs[0].digest)) as blob:
        arrays = assemble(SPEC, structure, [{name: blob.tensor(name).copy() for name in blob.names}])
    inside, other = [0, 2, 5], [1, 2, 3, 7, 8, 9, 11]
    np.testing.assert_array_equal(arrays["c.weight"], state.weights["c.weight"][inside])
    columns = [9 * channel + place for channel in inside for place in range(9)]
    np.testing.assert_array_equal(arrays["f.weight"], state.weights["f.weight"][np.ix_(other, columns)])
    np.testing.assert_array_equal(arrays["o.weight"], state.weights["o.weight"][:, other])

    state, (draft,) = prunetrain.plan(state, 1, ONE, rng_of(0, 1))
    assert draft.structure == structure
    moves = [random_arrays(SPEC, structure, seed) for seed in (1, 2)]
    answers = [
        Answer(f"d{i}", n, structure, {}, Usage(), m) for i, (n, m) in enumerate(zip((1, 3), moves, strict=True))
    ]
    after = prunetrain.close(state, answers)
    again = cut(SPEC, to_wire(SPEC, after.weights, after.levels), structure)
    for name, array in arrays.items():
        np.testing.assert_allclose(again[name], array + 0.25 * moves[0][name] + 0.75 * moves[1][name], atol=1e-6)
    gone = [1, 3, 4]
    np.testing.assert_array_equal(after.weights["c.weight"][gone], state.weights["c.weight"][gone])


def test_the_strength_is_settled_once_as_the_mean():
    state = start(share=0.2)
    state, (draft,) = prunetrain.plan(state, 1, ONE, rng_of(0, 1))
    assert draft.recipe.knobs == {"lambda": 0.0, "share": 0.2}
    assert draft.recipe.rule == "grouplasso"
    none = {name: np.zeros_like(array) for name, array in state.weights.items()}
    whole = structure_of(state)
    told = [Answer(n, k, whole, {"lambda": v}, Usage(), none) for n, k, v in (("a", 3, 0.1), ("b", 1, 0.5))]
    state = prunetrain.close(prunetrain.close(state, ()), told)
    assert state.scalars["lambda"] == pytest.approx(0.2)
    state, (draft,) = prunetrain.plan(state, 2, ONE, rng_of(0, 2))
    assert draft.recipe.knobs == {"lambda": pytest.approx(0.2), "share": 0.0}
    assert prunetrain.close(state, told).scalars["lambda"] == pytest.approx(0.2)
    reward = [Answer("a", 3, whole, {"lambda": -1.0}, Usage(), none)]
    assert prunetrain.close(prunetrain.plan(start(), 1, (), rng_of(0, 1))[0], reward).scalars["lambda"] == 0.0


@pytest.mark.parametrize("lost", [(), (4,), (4, 5), (3,), (4, 5, 6, 7, 8)])
def test_a_round_that_nobody_answers_leaves_what_is_due_to_the_next(lost):
    weights = random_arrays(SPEC, Structure())
    weights["c.weight"][2] = weights["f.weight"][:, 18:27] = 5e-5
    state, found = start(SPEC, weights, interval=4.0), []
    for number in range(1, 10):
        state, (draft,) = prunetrain.plan(state, number, ONE, rng_of(0, number))
        if number in lost:  # the round is given up, and never closed
            continue
        before = state.widths
        still = {name: np.zeros(s, np.float32) for name, s in tensor_shapes(SPEC, draft.structure).items()}
        state = prunetrain.close(state, [Answer("a", 5, draft.structure, {"lambda": 0.1}, Usage(), still)])
        found += [number] if state.widths != before else []
    assert found == [min(number for number in range(4, 10) if number not in lost)]


def test_channels_go_at_the_interval_and_never_come_back():
    weights = random_arrays(SPEC, Structure())
    weights["c.weight"][2] = weights["f.weight"][:, 18:27] = 5e-5
    weights["c.bias"][2] = 3.0
    state = start(SPEC, weights, interval=2.0, **{"recipe.rate": 0.1})
    for number in (1, 2, 3, 4):
        state, (draft,) = prunetrain.plan(state, number, ONE, rng_of(0, number))
        still = {name: np.zeros(s, np.float32) for name, s in tensor_shapes(SPEC, draft.structure).items()}
        state = prunetrain.close(state, [Answer("a", 5, draft.structure, {"lambda": 0.1}, Usage(), still)])
        assert state.levels["a"].tolist() == ([0] * 6 if number < 2 else [0, 0, 1, 0, 0, 0])
    assert state.widths == {"a": (5,), "b": (12,)}
    assert not state.weights["c.weight"][2].any()
    assert not state.weights["f.weight"][:, 18:27].any()
    assert state.weights["c.bias"][2] == 0.0
    assert weights["c.bias"][2] == 3.0
    np.testing.assert_array_equal(state.weights["f.weight"][:, :18], weights["f.weight"][:, :18])


def test_before_anything_goes_it_is_fedavg_to_the_bit():
    weights = random_arrays(SPEC, Structure(), 9)
    state, whole = start(SPEC, weights), structure_of(start(SPEC, weights))
    moves = [random_arrays(SPEC, Structure(), seed) for seed in range(3)]
    found = prunetrain.close(state, [Answer(f"d{i}", i + 1, whole, {}, Usage(), m) for i, m in enumerate(moves)])
    plain = fedavg.init(SPEC, weights, {})
    plain = fedavg.close(plain, [Answer(f"d{i}", i + 1, Structure(), {}, Usage(), m) for i, m in enumerate(moves)])
    for name, array in plain.weights.items():
        np.testing.assert_array_equal(found.weights[name], array)


def test_a_federation_shrinks():
    params = {"share": 0.8, "threshold": 5e-2, "interval": 5.0, "recipe.rate": 0.1, "recipe.epochs": 5.0}
    state = start(SPEC, None, **{**params, "recipe.momentum": 0.0, "recipe.clip": 0.0})
    sizes = []
    for number in range(1, 41):
        state, drafts = prunetrain.plan(state, number, (*ONE, DeviceView("b", GREAT)), rng_of(0, number))
        answers = []
        for draft in drafts:
            before = cut(SPEC, to_wire(SPEC, state.weights, state.levels), draft.structure)
            engine = MAKE()
            engine.load(SPEC, draft.structure, before)
            task = rules.Task(draft.recipe, engine, *batch(SPEC, 32, ord(draft.device)), number, 32, lambda *_: None)
            trained = grouplasso.train(task)
            update = {name: engine.params[name] - array for name, array in before.items()}
            answers.append(Answer(draft.device, 32, draft.structure, trained.metrics, Usage(), update))
        state = prunetrain.close(state, answers)
        sizes.append(sum(widths[0] for widths in state.widths.values()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 18 > sizes[-1] >= 2


def test_a_batch_grows_into_what_is_freed():
    recipe = {"recipe.batch": 16.0, "recipe.rate": 0.1, "recipe.clip": 0.0}
    spec = small_cnn(channels=512, hidden=512)
    state = start(spec, None, enlarge=1.0, **recipe)
    _, (whole,) = prunetrain.plan(state, 1, ONE, rng_of(0, 1))
    levels = {
        name: [0] * (len(level) // 8) + [1] * (len(level) - len(level) // 8) for name, level in state.levels.items()
    }
    _, (draft,) = prunetrain.plan(with_levels(state, **levels), 1, ONE, rng_of(0, 1))
    assert (whole.recipe.batch, whole.recipe.rate) == (16, 0.1)
    assert draft.recipe.batch > 32
    assert draft.recipe.batch % 16 == 0
    assert draft.recipe.rate == pytest.approx(0.1 * draft.recipe.batch / 16)
    assert draft.bytes_peak <= whole.bytes_peak == predict(spec, Structure(), whole.recipe).bound
    plain = start(spec, None, **recipe)
    _, (draft,) = prunetrain.plan(with_levels(plain, **levels), 1, ONE, rng_of(0, 1))
    assert draft.recipe.batch == 16


def test_what_is_wrong_is_refused():
    state = start()
    with pytest.raises(Malformed, match="channels"):
        prunetrain.close(state, [Answer("a", 1, Structure(), {}, Usage(), {})])
    assert prunetrain.close(state, ()) is state
    for params, words in [
        ({"share": 1.0}, "share"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": float("inf")}, "threshold"),
        ({"enlarge": 0.5}, "enlarge"),
        ({"interval": 1.5}, "interval"),
        ({"interval": 0.0}, "interval"),
        ({"interval": float("inf")}, "interval"),
        ({"interval": float("nan")}, "interval"),
        ({"schedule": "steep"}, "schedule"),
    ]:
        with pytest.raises(ConfigError, match=words):
            start(**params)
    with pytest.raises(ConfigError, match="no prunable channels"):
        start(linear())
    assert isinstance(prunetrain.plan(state, 1, ONE, rng_of(0, 1))[1][0].recipe, Recipe)
