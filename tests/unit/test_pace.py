"""Widths by time: by hand, and that a device is asked for what its own turns say."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import nestfl
from coordinator.blocks import pace
from coordinator.blocks.widths import structures_of
from tests.support.models import random_arrays, small_cnn
from wire.errors import ConfigError
from wire.messages import Usage
from wire.spec import Structure, tensor_shapes

SPEC = small_cnn()
GREAT = 1 << 40


def start(**params):
    return nestfl.init(SPEC, random_arrays(SPEC, Structure()), {"fractions": "0.3 0.6 1", **params})


def view(name, turn=0.0, budget=GREAT):
    return DeviceView(name, budget, seconds_turn=turn)


def capacities(drafts):
    return {draft.device: draft.structure.capacity for draft in drafts}


def answered(state, drafts, capacity=None):
    for seed, draft in enumerate(drafts):
        structure = draft.structure if capacity is None else draft.structure.narrowed(capacity)
        yield Answer(draft.device, 10, structure, {}, Usage(), random_arrays(SPEC, structure, seed))


def test_work_is_that_of_a_sample_by_hand():
    whole = structures_of(start())
    for structure, (conv, hidden) in zip(whole, ((2, 4), (4, 8), (6, 12)), strict=True):
        found = pace.loads(SPEC, [structure])[0]
        assert found == 36 * (conv * 9) + hidden * conv * 9 + 4 * hidden


def test_narrower_widths_of_a_step_are_counted():
    structures = structures_of(start())
    narrow, between, wide = pace.loads(SPEC, structures)
    assert pace.loads(SPEC, structures, {"widths": 1.0}) == (narrow, between + narrow, wide + narrow + between)
    assert pace.loads(SPEC, structures, {"widths": 9.0}) == pace.loads(SPEC, structures, {"widths": 1.0})
    heard = pace.loads(SPEC, structures, {"widths": 1.0, "mutual": 1.0})
    assert heard == (narrow, between + 2 * narrow, wide + 2 * narrow + between)
    four = tuple(Structure(k, {"a": (1, 2, 4, 6), "b": (3, 6, 9, 12)}, "r") for k in range(4))
    a, b, c, d = pace.loads(SPEC, four)
    assert pace.loads(SPEC, four, {"widths": 1.0})[3] == d + a + (b + c) / 2, "one of two, on average"


def test_seconds_by_hand():
    load = (1.0, 2.0, 4.0)
    assert pace.seconds_at([[1, 6.0]], load) == (3.0, 6.0, 12.0)
    assert pace.seconds_at([[2, 8.0], [1, 6.0]], load) == (3.0, 6.0, 8.0), "what was measured is not scaled"
    assert pace.seconds_at([[2, 5.0], [1, 6.0]], load) == (3.0, 6.0, 6.0), "no less than a narrower width"
    assert pace.seconds_at([[1, 1.0], [1, 6.0]], load) == (3.0, 6.0, 12.0), "the newest counts"


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 1e6)), min_size=1, max_size=8),
    st.lists(st.floats(1.0, 1e9), min_size=4, max_size=4).map(sorted),
    st.floats(0.01, 1e6),
)
def test_the_widest_in_time_is_the_last_that_meets_the_deadline(turns, load, deadline):
    seconds = pace.seconds_at(turns, load)
    assert list(seconds) == sorted(seconds)
    found = pace.widest_in_time(turns, load, deadline)
    assert all(took <= deadline for took in seconds[: found + 1]) or found == 0
    assert all(took > deadline for took in seconds[found + 1 :])


def test_without_a_turn_memory_decides():
    assert pace.widest_in_time((), (1.0, 2.0), 0.001) == 1
    assert capacities(nestfl.plan(start(deadline=0.001), 1, (view("a"),), rng_of(0, 1))[1]) == {"a": 2}


def test_a_slow_device_is_given_a_narrower_width_and_a_fast_one_is_not():
    state, drafts = nestfl.plan(start(deadline=4.0), 1, (view("fast"), view("slow")), rng_of(0, 1))
    state = nestfl.close(state, tuple(answered(state, drafts)))
    load = pace.loads(SPEC, structures_of(state), {"widths": 1.0})
    slow = 4.0 * load[2] / load[1] * 1.01  # so that not even the one between is in time
    state, drafts = nestfl.plan(state, 2, (view("fast", 4.0), view("slow", slow)), rng_of(0, 2))
    assert capacities(drafts) == {"fast": 2, "slow": 0}
    assert state.scalars["turns"] == {"fast": [[2, 4.0]], "slow": [[2, slow]]}
    state = nestfl.close(state, tuple(answered(state, drafts)))
    _, drafts = nestfl.plan(state, 3, (view("fast", 4.1), view("slow", 9.0)), rng_of(0, 3))
    assert capacities(drafts) == {"fast": 1, "slow": 0}, "even where nothing is in time the narrowest is trained"


def test_the_end_of_a_turn_by_hand():
    assert pace.end_of({"deadline": 0.0, "slack": 0.0}, [1.0]) == float("inf")
    assert pace.end_of({"deadline": 5.0, "slack": 0.0}, [1.0]) == 5.0
    assert pace.end_of({"deadline": 0.0, "slack": 2.0}, [9.0, 1.0, 2.0]) == 4.0, "twice the median"
    assert pace.end_of({"deadline": 3.0, "slack": 2.0}, [9.0, 1.0, 2.0]) == 3.0, "the shorter of both"
    assert pace.end_of({"deadline": 0.0, "slack": 2.0}, [9.0, 1.0]) == 2.0, "of two, the faster one"
    assert pace.end_of({"deadline": 0.0, "slack": 2.0}, []) == float("inf"), "nobody was measured"


def test_a_device_that_is_slow_beside_the_others_is_given_a_narrower_width():
    names = ("a", "b", "slow")
    state, drafts = nestfl.plan(start(slack=2.0), 1, tuple(map(view, names)), rng_of(0, 1))
    state = nestfl.close(state, tuple(answered(state, drafts)))
    load = pace.loads(SPEC, structures_of(state), {"widths": 1.0})
    slow = 8.0 * load[2] / load[1] * 0.99  # the width between is over just in time
    fleet = (view("a", 3.0), view("b", 4.0), view("slow", slow))
    state, drafts = nestfl.plan(state, 2, fleet, rng_of(0, 2))
    assert capacities(drafts) == {"a": 2, "b": 2, "slow": 1}
    state = nestfl.close(state, tuple(answered(state, drafts)))
    fleet = (view("a", 3.0), view("b", 4.0), view("new"), view("slow", 7.92), DeviceView("none", 0, seconds_turn=1.0))
    _, drafts = nestfl.plan(state, 3, fleet, rng_of(0, 3))
    assert capacities(drafts) == {"a": 2, "b": 2, "new": 2, "slow": 1}, "of a new device nothing is known"


def test_devices_are_compared_at_the_widest_width_that_memory_holds():
    """Two have dropped to the narrowest; by what they took there, the third would be several times as slow as they are."""
    state, drafts = nestfl.plan(start(slack=1.5), 1, tuple(map(view, "abc")), rng_of(0, 1))
    load = pace.loads(SPEC, structures_of(state), {"widths": 1.0})
    said = [*answered(state, drafts[:2], capacity=0), *answered(state, drafts[2:])]
    state = nestfl.close(state, tuple(said))
    fleet = (view("a", 1.0), view("b", 1.0), view("c", 1.4 * load[2] / load[0]))
    assert load[2] / load[0] > 3.0
    _, drafts = nestfl.plan(state, 2, fleet, rng_of(0, 2))
    assert capacities(drafts) == {"a": 2, "b": 2, "c": 2}


def test_turns_without_samples_are_no_measure_for_anybody():
    """Of two devices the faster one is the measure; one that has nothing to train is over at once."""
    state, drafts = nestfl.plan(start(slack=2.0), 1, tuple(map(view, "ab")), rng_of(0, 1))
    a, b = answered(state, drafts)
    state = nestfl.close(state, (dataclasses.replace(a, samples=0), b))
    assert state.scalars["due"] == {"b": 2}
    state, drafts = nestfl.plan(state, 2, (view("a", 0.1), view("b", 10.0)), rng_of(0, 2))
    assert capacities(drafts) == {"a": 2, "b": 2}
    unsettled = dataclasses.replace(state, scalars={**state.scalars, "due": {"a": 1}})
    a, b = answered(state, drafts)
    assert nestfl.close(unsettled, (dataclasses.replace(a, samples=0), b)).scalars["due"] == {"b": 2}


def test_a_run_that_knows_no_slack_goes_on():
    state = start(deadline=4.0)
    old = {name: value for name, value in state.scalars["params"].items() if name != "slack"}
    state = dataclasses.replace(state, scalars={**state.scalars, "params": old})
    for number in (1, 2):
        state, drafts = nestfl.plan(state, number, (view("a", 9.0),), rng_of(0, number))
        state = nestfl.close(state, tuple(answered(state, drafts)))
    assert capacities(drafts) == {"a": 0}


def test_without_a_deadline_time_is_no_matter():
    state, drafts = nestfl.plan(start(), 1, (view("slow"),), rng_of(0, 1))
    state = nestfl.close(state, tuple(answered(state, drafts)))
    after, drafts = nestfl.plan(state, 2, (view("slow", 1e9),), rng_of(0, 2))
    assert capacities(drafts) == {"slow": 2}
    assert not {"turns", "due"} & after.scalars.keys()


def test_a_time_is_taken_in_once_and_is_of_the_width_that_was_trained():
    state, drafts = nestfl.plan(start(deadline=9.0), 1, (view("a"), view("b")), rng_of(0, 1))
    state = nestfl.close(state, tuple(answered(state, drafts, capacity=1)))
    state, _ = nestfl.plan(state, 2, (view("a", 3.0),), rng_of(0, 2))
    assert state.scalars["turns"] == {"a": [[1, 3.0]]}
    assert state.scalars["due"] == {"b": 1}
    state, _ = nestfl.plan(state, 3, (view("a", 3.0), view("b", 2.0)), rng_of(0, 3))
    assert state.scalars["turns"] == {"a": [[1, 3.0]], "b": [[1, 2.0]]}


def test_old_turns_are_forgotten():
    scalars = {}
    for number in range(pace.TURNS + 3):
        scalars = pace.settled({**scalars, "due": {"a": 1}}, (view("a", 1.0 + number),))
    assert [seconds for _, seconds in scalars["turns"]["a"]] == [4.0 + n for n in range(pace.TURNS)]


def test_memory_and_time_both_bind():
    state, (draft,) = nestfl.plan(start(deadline=5.0), 1, (view("a"),), rng_of(0, 1))
    poor = DeviceView("a", draft.bytes_peak, seconds_turn=100.0)
    state = nestfl.close(state, tuple(answered(state, (draft,))))
    assert capacities(nestfl.plan(state, 2, (poor,), rng_of(0, 2))[1]) == {"a": 0}
    assert nestfl.plan(state, 2, (DeviceView("a", 0),), rng_of(0, 2))[1] == ()
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="deadline"):
            start(deadline=wrong)
    for wrong in (-1.0, 0.5, float("nan")):
        with pytest.raises(ConfigError, match="slack"):
            start(slack=wrong)


def test_a_device_that_dropped_is_joined_on_what_it_covers():
    """As a device whose memory shrank mid-round answers: narrower than it was asked."""
    state, drafts = nestfl.plan(start(), 1, (view("a"), view("b")), rng_of(0, 1))
    assert capacities(drafts) == {"a": 2, "b": 2}
    dropped, whole = drafts[0].structure.narrowed(0), drafts[1].structure
    update = {name: np.ones(shape, np.float32) for name, shape in tensor_shapes(SPEC, dropped).items()}
    other = {name: np.ones(shape, np.float32) for name, shape in tensor_shapes(SPEC, whole).items()}
    one = Answer("a", 10, dropped, {}, Usage(), update)
    two = Answer("b", 10, whole, {}, Usage(), other)
    after = nestfl.close(state, (one, two))
    for name, array in state.weights.items():
        np.testing.assert_allclose(after.weights[name], array + 1.0, atol=1e-6)
    alone = nestfl.close(state, (one, dataclasses.replace(two, samples=0)))
    kept = state.levels["a"] == 0
    np.testing.assert_allclose(alone.weights["c.bias"], state.weights["c.bias"] + kept, atol=1e-6)


def test_a_device_that_sits_a_round_out_is_heard_of_when_it_is_back():
    state, drafts = nestfl.plan(start(deadline=9.0), 1, (view("a"), view("b")), rng_of(0, 1))
    state = nestfl.close(state, tuple(answered(state, drafts)))
    state, drafts = nestfl.plan(state, 2, (view("b", 4.0),), rng_of(0, 2))
    state = nestfl.close(state, tuple(answered(state, drafts)))
    state, _ = nestfl.plan(state, 3, (view("a", 3.0), view("b", 5.0)), rng_of(0, 3))
    assert state.scalars["turns"] == {"b": [[2, 4.0], [2, 5.0]], "a": [[2, 3.0]]}
