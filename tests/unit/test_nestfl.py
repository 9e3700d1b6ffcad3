"""NestFL against a loop over single coordinates, and the invariants that the method must keep."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import fedavg, nestfl
from tests.support.models import linear, random_arrays, small_cnn
from wire.errors import ConfigError, Malformed, NonFinite
from wire.memory import predict
from wire.messages import Usage
from wire.spec import Structure, tensor_shapes
from wire.structure import cut, order_of, ranking_digest, to_wire

SPEC = small_cnn()
TOP = 2


def start(seed=0, **params):
    return nestfl.init(SPEC, random_arrays(SPEC, Structure(), seed), {"fractions": "0.3 0.6 1", **params})


def whole_of(state):
    return Structure(TOP, state.widths, ranking_digest(state.levels))


def answer(state, device, capacity, samples=10, seed=0, update=None):
    structure = whole_of(state).narrowed(capacity)
    update = random_arrays(SPEC, structure, seed) if update is None else update
    return Answer(device, samples, structure, {}, Usage(), update)


def mixed(state, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(
        answer(state, f"d{i}", int(rng.integers(0, TOP + 1)), int(rng.integers(1, 50)), seed * 10 + i) for i in range(5)
    )


def coordinates(state, item):
    """Give (tensor name, canonical index) -> value of one compact update in wire order, one coordinate at a time."""
    values = {}
    orders = {g: order_of(levels) for g, levels in state.levels.items()}
    for tensor in SPEC.tensors:
        for index, value in np.ndenumerate(item.update[tensor.name]):
            place = []
            for i, axis in zip(index, tensor.axes, strict=True):
                channel, inner = divmod(i, axis.inner)
                place.append(
                    (int(orders[axis.group][channel]) if axis.group in orders else channel) * axis.inner + inner
                )
            values[tensor.name, tuple(place)] = float(value)
    return values


def partition_of(state, name, index):
    tensor = next(t for t in SPEC.tensors if t.name == name)
    levels = [
        state.levels[a.group][i // a.inner] for i, a in zip(index, tensor.axes, strict=True) if a.group in state.levels
    ]
    return max((int(level) for level in levels), default=0)


def naive_close(state, answers, memory, alpha=5.0):
    """The poster and FedAdp in plain Python; `memory` is (device, partition) -> angles seen so far."""
    spread = {a.device: coordinates(state, a) for a in answers}
    samples = {a.device: a.samples for a in answers}
    members = [{} for _ in range(TOP + 1)]
    for device, values in spread.items():
        for key in values:
            members[partition_of(state, *key)].setdefault(key, []).append(device)
    new = {name: array.astype(np.float64) for name, array in state.weights.items()}
    for j, keys in enumerate(members):
        cover = sorted({d for devices in keys.values() for d in devices})
        assert all(sorted(devices) == cover for devices in keys.values())
        if not cover:
            continue
        count = sum(samples[d] for d in cover)
        mean = {key: sum(samples[d] / count * spread[d][key] for d in cover) for key in keys}
        factor = {}
        for d in cover:
            dot = sum(mean[key] * spread[d][key] for key in keys)
            lengths = math.sqrt(sum(v * v for v in mean.values())) * math.sqrt(sum(spread[d][k] ** 2 for k in keys))
            if len(cover) > 1:
                memory.setdefault((d, j), []).append(math.acos(max(-1.0, min(1.0, dot / lengths))))
            seen = memory.get((d, j), [0.0])
            theta = sum(seen) / len(seen)
            factor[d] = samples[d] * math.exp(alpha * (1 - math.exp(-math.exp(-alpha * (theta - 1)))))
        for (name, index), devices in keys.items():
            new[name][index] += sum(factor[d] * spread[d][name, index] for d in devices) / sum(factor.values())
    return new


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_three_rounds_agree_with_a_loop_over_coordinates(seed):
    state, memory = start(seed), {}
    for number in (1, 2, 3):
        state, _ = nestfl.plan(state, number, (), rng_of(seed, number))
        answers = mixed(state, seed + number)
        wanted = naive_close(state, answers, memory)
        state = nestfl.close(state, answers)
        largest = max(np.abs(array).max() for array in wanted.values())
        for name, array in wanted.items():
            np.testing.assert_allclose(state.weights[name], array, rtol=0, atol=1e-6 * largest)


def test_all_whole_and_of_one_direction_is_fedavg():
    state = start()
    update = random_arrays(SPEC, Structure(), 7)
    wired = to_wire(SPEC, update, state.levels)
    answers = tuple(
        answer(state, f"d{i}", TOP, n, update={k: np.float32(s) * v for k, v in wired.items()})
        for i, (n, s) in enumerate([(5, 1.0), (20, 0.5), (9, 3.0)])
    )
    plain = fedavg.init(SPEC, state.weights, {})
    others = tuple(
        dataclasses.replace(a, structure=Structure(), update={k: np.float32(s) * v for k, v in update.items()})
        for a, s in zip(answers, (1.0, 0.5, 3.0), strict=True)
    )
    ours, theirs = nestfl.close(state, answers), fedavg.close(plain, others)
    for name in state.weights:
        np.testing.assert_allclose(ours.weights[name], theirs.weights[name], rtol=1e-5, atol=1e-6)


def test_what_nobody_trained_stays_bit_for_bit():
    state = start()
    after = nestfl.close(state, (answer(state, "a", 0, seed=1), answer(state, "b", 1, seed=2)))
    touched = to_wire(SPEC, after.weights, state.levels)
    before = to_wire(SPEC, state.weights, state.levels)
    inner = tensor_shapes(SPEC, whole_of(state).narrowed(1))
    for name, shape in inner.items():
        mask = np.ones(before[name].shape, bool)
        mask[tuple(slice(n) for n in shape)] = False
        assert np.array_equal(touched[name][mask], before[name][mask])
        assert not np.array_equal(touched[name], before[name])


def test_a_device_alone_has_full_say_and_its_angle_is_not_remembered():
    state = start()
    only = answer(state, "big", TOP, 1, seed=3)
    after = nestfl.close(state, (only, answer(state, "small", 0, 1000, seed=4)))
    moved = {
        n: a - b
        for n, (a, b) in zipped(to_wire(SPEC, after.weights, state.levels), to_wire(SPEC, state.weights, state.levels))
    }
    np.testing.assert_allclose(moved["f.bias"][4:], only.update["f.bias"][4:], rtol=0, atol=1e-6)
    assert after.scalars["clients"] == ["big", "small"]
    assert after.arrays["rounds"].tolist() == [[1, 0, 0], [1, 0, 0]]


def zipped(a, b):
    return {name: (a[name], b[name]) for name in a}.items()


def test_angles_of_a_device_are_averaged_over_its_own_rounds():
    state, angles = start(), []
    for number, names in enumerate([("a", "b"), ("b", "c"), ("a", "c")], 1):
        state, _ = nestfl.plan(state, number, (), rng_of(0, number))
        answers = tuple(answer(state, n, 0, 10, seed=number * 10 + i) for i, n in enumerate(names))
        before = state
        state = nestfl.close(state, answers)
        if "a" in names:
            fresh = nestfl.close(
                dataclasses.replace(before, scalars={**before.scalars, "clients": []}, arrays={}), answers
            )
            angles.append(float(fresh.arrays["angles"][0, 0]))
    assert state.scalars["clients"] == ["b", "a", "c"], "who was heard of last is the last"
    assert state.arrays["rounds"][:, 0].tolist() == [2, 2, 2]
    assert state.arrays["angles"][1, 0] == pytest.approx(sum(angles) / 2)


def test_a_device_twice_is_a_device_with_twice_the_samples():
    state = start()
    others = (answer(state, "x", 1, 7, seed=5), answer(state, "y", 2, 9, seed=6))
    one = answer(state, "a", 2, 20, seed=8)
    twins = tuple(dataclasses.replace(one, device=name, samples=10) for name in ("a", "b"))
    single, split = nestfl.close(state, (one, *others)), nestfl.close(state, (*twins, *others))
    for name in state.weights:
        np.testing.assert_allclose(single.weights[name], split.weights[name], rtol=1e-5, atol=1e-6)


def test_order_of_answers_and_common_scale_do_not_matter():
    state = start()
    answers = mixed(state, 3)
    straight, reverse = nestfl.close(state, answers), nestfl.close(state, answers[::-1])
    tiny = tuple(dataclasses.replace(a, update={k: v / 1024 for k, v in a.update.items()}) for a in answers)
    small = nestfl.close(state, tiny)
    for name, array in state.weights.items():
        np.testing.assert_allclose(straight.weights[name], reverse.weights[name], rtol=1e-5, atol=1e-6)
        step, step_small = straight.weights[name] - array, small.weights[name] - array
        np.testing.assert_allclose(step_small * 1024, step, rtol=0.05, atol=1e-3)
    assert np.allclose(small.arrays["angles"], straight.arrays["angles"])


def test_the_same_answers_give_the_same_bytes():
    state = start()
    first, again = (nestfl.close(state, mixed(state, 4)) for _ in range(2))
    for name in state.weights:
        assert first.weights[name].tobytes() == again.weights[name].tobytes()


def test_nobody_changes_nothing():
    state = start()
    assert nestfl.close(state, ()) is state
    assert nestfl.close(state, (answer(state, "a", 1, samples=0),)) is state


def test_another_rounds_ranking_is_refused():
    state = start()
    foreign = dataclasses.replace(answer(state, "dev", 1), structure=Structure(1, state.widths, "0" * 64))
    with pytest.raises(Malformed, match="dev"):
        nestfl.close(state, (foreign,))


def test_plan_gives_each_device_the_widest_that_fits():
    state = start()
    (draft,) = nestfl.plan(state, 1, (DeviceView("a", 1 << 40),), rng_of(0, 1))[1]
    needs = [predict(SPEC, whole_of(state).narrowed(k), draft.recipe, 1).bound for k in range(3)]
    assert needs == sorted(needs)
    devices = tuple(
        DeviceView(f"d{i}", b) for i, b in enumerate([needs[2], needs[0], needs[0] - 1, needs[1], needs[2] - 1])
    )
    after, drafts = nestfl.plan(state, 1, devices, rng_of(0, 1))
    assert [(d.device, d.structure.capacity) for d in drafts] == [("d0", 2), ("d1", 0), ("d3", 1), ("d4", 1)]
    assert all(d.bytes_peak <= v.bytes_budget for d in drafts for v in devices if v.name == d.device)
    assert all(d.structure == whole_of(after).narrowed(d.structure.capacity) for d in drafts)
    taught = nestfl.plan(state, 1, (DeviceView("d0", needs[2], memory_scale=2.0),), rng_of(0, 1))[1]
    assert not taught or taught[0].structure.capacity < 2


def test_ranking_is_renewed_and_then_stays():
    state = start(ranking_rounds=2.0)
    other = dataclasses.replace(state, weights=random_arrays(SPEC, Structure(), 99))
    renewed, _ = nestfl.plan(other, 2, (), rng_of(0, 2))
    kept, _ = nestfl.plan(other, 3, (), rng_of(0, 3))
    assert ranking_digest(renewed.levels) != ranking_digest(state.levels)
    assert ranking_digest(kept.levels) == ranking_digest(state.levels)
    assert (renewed.round, kept.round) == (2, 3)


def test_ranking_changes_which_channels_but_not_what_the_model_computes():
    state = start()
    wired = to_wire(SPEC, state.weights, state.levels)
    assert {n: a.shape for n, a in cut(SPEC, wired, whole_of(state)).items()} == tensor_shapes(SPEC, Structure())
    narrow = cut(SPEC, wired, whole_of(state).narrowed(0))
    assert np.array_equal(narrow["f.bias"], state.weights["f.bias"][state.levels["b"] == 0])


def test_wrong_parameters_are_explained():
    for text in ("", "0.5", "1 0.5", "0.5 x 1", "0 1", "0.5 0.5 1", "-1 1", "nan 1"):
        with pytest.raises(ConfigError, match="fractions"):
            start(fractions=text)
    with pytest.raises(ConfigError, match="fedavg"):
        nestfl.init(linear(), random_arrays(linear(), Structure()), {})
    broken = random_arrays(SPEC, Structure())
    broken["c.weight"][0] = np.inf
    with pytest.raises(NonFinite, match=r"c\.weight"):
        nestfl.init(SPEC, broken, {})


@pytest.mark.parametrize("angle", [-1.0, 1e3, math.nan, math.inf])
def test_an_angle_that_has_no_weights_is_refused(angle):
    with pytest.raises(ConfigError, match="angle"):
        start(angle=angle)


def test_the_steepest_angle_still_has_weights():
    state = start(angle=100.0)
    after = nestfl.close(state, mixed(state, 3))
    assert all(np.isfinite(array).all() for array in after.weights.values())
