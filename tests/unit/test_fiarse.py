"""FIARSE: nested sizes by magnitude, the mean over masks against a loop, and rounds of several sizes, whole."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, State, rng_of
from coordinator.algorithms import fedavg, fiarse
from coordinator.blocks.masks import (
    NEVER,
    capacities_of,
    held_at,
    masks_at,
    nested_levels,
    structure_at,
    top_global,
)
from coordinator.blocks.nesting import levels_of
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config
from tests.support import coordinates
from tests.support.models import linear, random_arrays, small_cnn
from tests.support.sequences import normed
from wire import zoo
from wire.errors import ConfigError, Malformed
from wire.masked import maskable
from wire.memory import predict
from wire.messages import Usage
from wire.spec import Structure, group_sizes, tensor_shapes

SPEC = small_cnn()
NAMES = ("c.weight", "f.weight", "o.weight")
GREAT = 1 << 40
SIZES = {"sizes": "0.1 0.4 1"}


def begun(params=None, seed=0, spec=SPEC):
    return fiarse.init(spec, random_arrays(spec, Structure(), seed), {**SIZES, **(params or {})})


def answer(state, device, capacity, update, samples=7):
    structure = structure_at(state, capacity)
    masks = masks_at(state.mask_levels, capacity)
    update = {name: array * masks.get(name, np.float32(1)) for name, array in update.items()}
    return Answer(device, samples, structure, {}, Usage(), update, masks)


def answer_of(state, device, capacity, update):
    masks = held_at(state, capacity)
    update = {name: array * masks.get(name, np.float32(1)) for name, array in update.items()}
    return Answer(device, 7, structure_at(state, capacity), {}, Usage(), update, masks)


def leveled(levels):
    return State(SPEC, 0, {}, mask_levels=levels)


# --- the sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["model", "layer"])
@pytest.mark.parametrize("spec", [SPEC, zoo.by_name("digits-mlp")], ids=["small-cnn", "digits-mlp"])
def test_a_size_keeps_the_largest_weights_and_the_smaller_size(by, spec):
    sizes = (0.05, 0.3, 0.31, 0.9)
    state = begun({"sizes": " ".join(map(str, sizes)), "by": by}, 3, spec)
    weights = {name: np.abs(state.weights[name].astype(np.float64)) for name in maskable(spec)}
    for capacity, size in enumerate(sizes):
        masks = masks_at(state.mask_levels, capacity)
        pools = [list(weights)] if by == "model" else [[name] for name in weights]
        least = np.inf
        for pool in pools:
            line = np.concatenate([weights[name].ravel() for name in pool])
            kept = np.concatenate([masks[name].ravel() for name in pool])
            assert kept.sum() == int(np.ceil(size * line.size - 1e-9))
            assert line[kept].min() >= line[~kept].max()
            least = min(least, line[kept].min())
        assert fiarse.thresholds(state)[capacity] == pytest.approx(least)
        if capacity:
            before = masks_at(state.mask_levels, capacity - 1)
            assert all((masks[name] | ~mask).all() for name, mask in before.items())
    assert capacities_of(state) == 4
    assert any((level == NEVER).any() for level in state.mask_levels.values())


@pytest.mark.parametrize("by", ["model", "layer"])
def test_a_size_lacks_channels_and_weights_of_the_others(by):
    """Against a loop: weights by falling magnitude, out of those that the next larger size keeps."""
    sizes, fractions = (0.9, 0.7, 0.5), (0.3, 0.6, 1.0)
    spec = zoo.by_name("digits-mlp")
    words = {"sizes": " ".join(map(str, sizes)), "fractions": " ".join(map(str, fractions)), "by": by}
    state = begun(words, 3, spec)
    assert state.levels.keys() == state.widths.keys() == {g.name for g in spec.groups if g.prunable}
    tensors = {tensor.name: tensor for tensor in spec.tensors}

    def has(name, index, capacity):
        axes = zip(tensors[name].axes, index, strict=True)
        return all(state.levels[a.group][i // a.inner] <= capacity for a, i in axes if a.group in state.levels)

    kept = every = {(name, index) for name in maskable(spec) for index in np.ndindex(state.weights[name].shape)}
    for capacity in (2, 1, 0):
        had = {(name, index) for name, index in every if has(name, index, capacity)}
        wanted = set()
        for pool in [maskable(spec)] if by == "model" else [(name,) for name in maskable(spec)]:
            own = sorted((-abs(state.weights[n][i]), pool.index(n), i, n) for n, i in had & kept if n in pool)
            count = math.ceil(sizes[capacity] * sum(name in pool for name, _ in had) - 1e-9)
            wanted |= {(name, index) for _, _, index, name in own[:count]}
        kept = wanted
        found = masks_at(state.mask_levels, capacity)
        assert kept == {
            (name, index) for name, mask in found.items() for index in map(tuple, np.argwhere(mask).tolist())
        }
        structure = structure_at(state, capacity)
        assert sum(structure.kept.values()) == len(kept)
        assert group_sizes(spec, structure) == group_sizes(spec, Structure(capacity, state.widths))
        held = held_at(state, capacity)
        assert {name: mask.shape for name, mask in held.items()} == {
            name: shape for name, shape in tensor_shapes(spec, structure).items() if name in held
        }


def inward(scale, seed=0):
    """Weights of which those of the narrower of two widths are the smaller ones, by a factor."""
    state = begun({"sizes": "0.9 0.2", "fractions": "0.7 1", "by": "layer"}, seed)
    outer = {t.name: levels_of(t, state.levels) == 1 for t in SPEC.tensors}
    return {
        name: np.where(outer[name], array, array * np.float32(scale)) for name, array in state.weights.items()
    }, state


@pytest.mark.parametrize("by", ["model", "layer"])
def test_two_sizes_may_come_to_keep_the_same_weights(by):
    weights, state = inward(1e3)
    known = {**state.scalars["params"], "by": by}
    state = dataclasses.replace(state, weights=weights, scalars={"params": known})
    after, drafts = fiarse.plan(state, 1, (DeviceView("a", GREAT), DeviceView("b", GREAT)), rng_of(0, 1))
    assert [draft.structure.capacity for draft in drafts] == [1, 1]
    assert capacities_of(after) == len(fiarse.thresholds(after)) == 2
    kept = [sum(structure_at(after, k).kept.values()) for k in range(2)]
    assert kept[0] == kept[1] if by == "model" else kept[0] <= kept[1]
    answers = [answer_of(after, f"d{k}", k, random_arrays(SPEC, structure_at(after, k), k)) for k in range(2)]
    wanted = coordinates.looped(after, answers, coordinates.by_count(answers))
    for name, array in fiarse.close(after, answers).weights.items():
        np.testing.assert_allclose(array, wanted[name], atol=1e-4)


def test_a_size_that_keeps_all_that_it_has_leaves_gradients_alone():
    state = begun({"sizes": "1 1 0.9", "fractions": "0.3 0.6 1", "by": "layer"})
    assert fiarse.thresholds(begun({"sizes": "1 1", "fractions": "0.5 1"})) == [0.0, 0.0]
    assert all(0 < one < math.inf for one in fiarse.thresholds(state))
    assert structure_at(begun({"sizes": "1 1", "fractions": "0.5 1"}), 1).kept == {
        name: math.prod(shape) for name, shape in tensor_shapes(SPEC, Structure()).items() if name in NAMES
    }


def test_a_device_without_room_for_all_channels_takes_part():
    spec = zoo.by_name("digits-cnn")
    whole = begun({"sizes": "0.02 0.3 1", "recipe.batch": 64.0}, 1, spec)
    narrow = begun({"sizes": "0.9 0.6 0.5", "fractions": "0.2 0.5 1", "by": "layer", "recipe.batch": 64.0}, 1, spec)
    _, (great,) = fiarse.plan(whole, 1, (DeviceView("great", GREAT),), rng_of(0, 1))
    least = [predict(spec, structure_at(state, 0), great.recipe, 1).bound for state in (whole, narrow)]
    view = DeviceView("small", (least[0] + least[1]) // 2)
    assert fiarse.plan(whole, 1, (view,), rng_of(0, 1))[1] == ()
    _, (draft,) = fiarse.plan(narrow, 1, (view,), rng_of(0, 1))
    assert draft.structure == structure_at(narrow, 0)
    assert draft.recipe.knobs["threshold"] == fiarse.thresholds(narrow)[0] > 0


@given(st.lists(st.integers(-3, 3), min_size=3, max_size=40), st.data())
@settings(deadline=None)
def test_levels_and_masks_are_the_same_thing(values, data):
    scores = {"a": np.abs(np.array(values[:2], np.float32)), "b": np.abs(np.array(values[2:], np.float32))}
    counts = sorted(data.draw(st.sets(st.integers(1, len(values)), min_size=1, max_size=4)))
    sizes = [top_global(scores, count) for count in counts]
    levels = nested_levels(sizes)
    assert capacities_of(leveled(levels)) == len(counts)
    for capacity, masks in enumerate(sizes):
        found = masks_at(levels, capacity)
        if counts[capacity] == len(values):
            assert found == {}
            assert structure_at(leveled(levels), capacity) == Structure(capacity)
        else:
            assert {name: mask.tolist() for name, mask in found.items()} == {n: m.tolist() for n, m in masks.items()}
            structure = structure_at(leveled(levels), capacity)
            assert (structure.capacity, sum(structure.kept.values())) == (capacity, counts[capacity])
    if len(sizes) > 1:
        with pytest.raises(ValueError, match="capacity"):
            nested_levels(sizes[::-1])
    assert capacities_of(leveled({})) == 0


def test_each_device_gets_the_widest_size_that_it_holds_with_its_threshold():
    spec = zoo.by_name("digits-cnn")
    state = begun({"sizes": "0.02 0.3 1", "recipe.steps": 5.0}, 1, spec)
    _, (great,) = fiarse.plan(state, 1, (DeviceView("great", GREAT),), rng_of(0, 1))
    recipe = dataclasses.replace(great.recipe, epochs=1)
    bounds = [predict(spec, structure_at(state, k), recipe, recipe.batch).bound for k in range(3)]
    assert bounds == sorted(bounds)
    views = (*(DeviceView(f"d{k}", bound) for k, bound in enumerate(bounds)), DeviceView("none", 1 << 20))
    after, drafts = fiarse.plan(state, 1, views, rng_of(0, 1))
    assert [(draft.device, draft.structure) for draft in drafts] == [
        (f"d{k}", structure_at(after, k)) for k in range(3)
    ]
    least = [draft.recipe.knobs["threshold"] for draft in drafts]
    assert least == fiarse.thresholds(after)
    assert least[0] > least[1] > least[2] == 0.0
    assert drafts[2].structure == Structure(2)
    assert len({draft.recipe.seed for draft in drafts}) == 3


# --- the mean ----------------------------------------------------------------------------------------------------------


def test_the_mean_counts_masks_as_a_loop_over_weights_does():
    params = {"server": 0.5, "sizes": "0.1 0.4 0.8"}
    state, _ = fiarse.plan(begun(params, 2), 1, (), rng_of(0, 1))
    updates = [random_arrays(SPEC, Structure(), seed) for seed in range(4)]
    updates[1]["f.weight"][...] = 0.0  # one that did not move there counts all the same
    answers = [answer(state, f"d{i}", k, updates[i]) for i, k in enumerate((0, 2, 1, 1))]
    after = fiarse.close(state, answers)
    for name, array in state.weights.items():
        wanted = array.astype(np.float64)
        for place in range(array.size):
            moves = [
                float(one.update[name].ravel()[place])
                for one in answers
                if name not in one.sent or one.sent[name].ravel()[place]
            ]
            if moves:
                wanted.ravel()[place] += 0.5 * sum(moves) / len(moves)
        np.testing.assert_allclose(after.weights[name], wanted, atol=1e-6, err_msg=name)
        if name in NAMES:
            never = state.mask_levels[name] == NEVER
            np.testing.assert_array_equal(after.weights[name][never], array[never])
    again = fiarse.close(state, answers[::-1])
    for name, array in after.weights.items():
        np.testing.assert_allclose(again.weights[name], array, atol=1e-6)


def test_what_stands_outside_of_its_masks_is_not_taken():
    state, _ = fiarse.plan(begun(), 1, (), rng_of(0, 1))
    honest = answer(state, "a", 0, random_arrays(SPEC, Structure(), 5))
    lies = {name: np.where(honest.sent.get(name, True), array, np.float32(9)) for name, array in honest.update.items()}
    lies = dataclasses.replace(honest, update=lies)
    one, other = fiarse.close(state, [honest]), fiarse.close(state, [lies])
    for name, array in one.weights.items():
        np.testing.assert_array_equal(other.weights[name], array)


def test_one_size_that_keeps_all_is_fedavg_of_equal_samples():
    state, updates = begun({"sizes": "1"}), [random_arrays(SPEC, Structure(), seed) for seed in range(3)]
    answers = [Answer(f"d{i}", 7, Structure(), {}, Usage(), update) for i, update in enumerate(updates)]
    plain = fedavg.close(fedavg.init(SPEC, state.weights, {}), answers)
    found = fiarse.close(state, answers)
    for name, array in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], array, atol=1e-6)


def test_who_has_no_samples_counts_for_nothing_and_other_masks_are_refused():
    state, _ = fiarse.plan(begun(), 1, (), rng_of(0, 1))
    good = answer(state, "a", 1, random_arrays(SPEC, Structure(), 5))
    none = answer(state, "b", 0, random_arrays(SPEC, Structure(), 6), samples=0)
    one, other = fiarse.close(state, [good]), fiarse.close(state, [good, none])
    for name, array in one.weights.items():
        np.testing.assert_array_equal(other.weights[name], array)
    assert fiarse.close(state, [none]) is state
    for wrong in (Structure(), good.structure.narrowed(0), Structure(9), structure_at(begun(seed=9), 1)):
        with pytest.raises(Malformed, match="other masks"):
            fiarse.close(state, [dataclasses.replace(good, structure=wrong)])


def test_parameters_that_make_no_sense_are_named():
    for name, value in (
        ("sizes", "0.5 0.4"),
        ("sizes", "0 1"),
        ("sizes", "0.5 2"),
        ("sizes", ""),
        ("sizes", "half"),
        ("sizes", "0.5001 0.5002"),
        ("by", "tensor"),
        ("server", 0.0),
        ("fractions", "0.5 1"),
        ("fractions", "0.2 0.4 0.9"),
        ("fractions", "1 0.5 1"),
    ):
        with pytest.raises(ConfigError, match=name):
            begun({name: value})
    tied = linear()
    tied = dataclasses.replace(tied, nodes=(*tied.nodes, dataclasses.replace(tied.nodes[0], name="p")))
    with pytest.raises(ConfigError, match="masked"):
        fiarse.init(tied, random_arrays(tied, Structure()), {})
    with pytest.raises(ConfigError, match="no prunable channels"):
        fiarse.init(linear(), random_arrays(linear(), Structure()), {"sizes": "0.5 1", "fractions": "0.5 1"})
    faint = {name: array * np.float32(1e-6 if name == "o.weight" else 1) for name, array in begun().weights.items()}
    with pytest.raises(ConfigError, match="size 1 keeps no weight of 'o"):
        fiarse.init(SPEC, faint, {"sizes": "0.1 0.4"})
    with pytest.raises(ConfigError, match="batch norms"):
        fiarse.init(normed(), random_arrays(normed(), Structure()), {"sizes": "0.5 1", "fractions": "0.5 1"})
    assert fiarse.init(SPEC, faint, {"sizes": "0.1 0.4", "by": "layer"}).mask_levels


@pytest.mark.parametrize(
    "sizes", [{"sizes": "0.05 0.3 1"}, {"sizes": "0.8 0.7 0.6", "fractions": "0.3 0.6 1", "by": "layer"}]
)
def test_a_simulated_run_can_be_repeated_and_measures_every_size(sizes):
    params = {**sizes, "recipe.steps": 20.0}
    config = Config(model="digits-cnn", algo="fiarse", partition="iid", devices=4, rounds=3, params=params)
    one, two = simulate(config), simulate(config)
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert set(one["accuracy"]["by_width"]) == {"0", "1", "2"}
    widths = {device["width"] for device in one["devices"]}
    assert len(widths) > 1, "devices of several sizes"
    assert one["accuracy"]["full"] == one["accuracy"]["by_width"]["2"] > 0.3
