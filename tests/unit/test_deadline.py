"""Times by ratio, the worth of ratios, and the deadline against a search through everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks import deadline, worth
from coordinator.blocks.deadline import GRID, RATIOS, Load
from coordinator.blocks.nesting import widths_of
from coordinator.blocks.worth import Said
from coordinator.fitting import Means, fit
from tests.support.models import small_cnn
from wire.memory import predict, uniform
from wire.messages import Recipe
from wire.spec import Structure, parameter_count

WORK = tuple(round(1e6 * (1.0 - r) ** 2) for r in RATIOS)
SIZE = tuple(round(1e5 * (1.0 - r)) for r in RATIOS)
LOAD = Load(WORK, SIZE)


def test_the_load_by_hand():
    load = deadline.load_of(small_cnn())
    # conv: 6 channels of 9 weights at 36 places; linear 54 -> 12 and 12 -> 4. Biases multiply nothing.
    assert load.work[0] == 6 * 9 * 36 + 54 * 12 + 12 * 4
    assert load.size[0] == parameter_count(small_cnn(), Structure())
    assert load.work[50] == 3 * 9 * 36 + 27 * 6 + 6 * 4
    assert list(load.work) == sorted(load.work, reverse=True)
    assert load.at(0.5) == (load.work[50], load.size[50])


def truth(constant, work, size):
    return np.array([constant + work * w / WORK[0] + size * s / SIZE[0] for w, s in zip(WORK, SIZE, strict=True)])


def test_three_turns_tell_a_devices_times_at_all_ratios():
    wanted = truth(0.5, 3.0, 1.0)
    turns = [(ratio, wanted[round(ratio * GRID)]) for ratio in (0.9, 0.5, 0.2)]
    np.testing.assert_allclose(deadline.seconds_of(LOAD, turns, 1e-9), wanted, rtol=1e-3)


def test_one_turn_at_a_high_ratio_makes_lower_ones_look_dear():
    wanted = truth(0.5, 3.0, 1.0)
    found = deadline.seconds_of(LOAD, [(0.9, wanted[90])], 0.05)
    assert found[90] == pytest.approx(wanted[90], rel=0.01)
    assert (found[:85] > wanted[:85]).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5), st.integers(0, 100))
def test_times_do_not_grow_with_the_ratio_whatever_was_measured(took, seed):
    rng = np.random.default_rng(seed)
    found = deadline.seconds_of(LOAD, [(float(rng.random() * 0.99), seconds) for seconds in took], 0.05)
    assert (np.diff(found) <= 1e-12).all()
    assert (found >= 0.0).all()


def progress_per_second(seconds, places, value):
    rows = range(len(places))
    return sum(value[p] for p in places) / 3 / max(seconds[row][p] for row, p in zip(rows, places, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_deadline_is_as_good_as_any_choice_of_ratios(seed):
    rng = np.random.default_rng(seed)
    speeds = rng.uniform(1.0, 5.0, 3)
    seconds = np.array([0.2 + k * (1.0 - RATIOS) ** 2 for k in speeds])
    value = np.clip(1.0 - rng.uniform(0.8, 1.2) * RATIOS ** rng.uniform(1.5, 3.0), 0.0, 1.0)
    found = deadline.equalised(seconds, [0.0, 0.0, 0.2], 0.8, value)
    got = progress_per_second(seconds, [round(r * GRID) for r in found], value)
    places = range(0, 81, 8)
    best = max(
        progress_per_second(seconds, choice, value)
        for choice in itertools.product(places, places, [p for p in places if p >= 20])
    )
    assert got >= 0.99 * best
    assert found[2] >= 0.2
    assert (found <= 0.8).all()


def test_a_device_whose_memory_holds_little_does_not_make_others_smaller_than_its_time_asks():
    seconds = np.array([1.0 + (1.0 - RATIOS), 1.0 + (1.0 - RATIOS)])
    found = deadline.equalised(seconds, [0.0, 0.95], 0.8, 1.0 - RATIOS)
    assert found[1] == 0.95, "memory goes before the highest ratio"
    assert found[0] <= 0.8


def test_alike_devices_get_alike_ratios_and_slower_ones_higher():
    seconds = np.array([k * (0.05 + (1.0 - RATIOS) ** 2) for k in (1.0, 1.0, 4.0)])
    found = deadline.equalised(seconds, [0.0] * 3, 0.9, 1.0 - RATIOS**2)
    assert found[0] == found[1] < found[2]


@pytest.mark.parametrize("times", [1.0, 1.5, 4.0])
def test_a_stretched_deadline_is_met_by_the_least_ratios_that_do(times):
    seconds = np.array([k * (0.05 + (1.0 - RATIOS) ** 2) for k in (1.0, 2.0, 4.0)])
    value = 1.0 - RATIOS**2
    rows, before = np.arange(3), deadline.equalised(seconds, [0.0] * 3, 0.9, value)
    longest = times * seconds[rows, np.rint(before * GRID).astype(int)].max()
    after = deadline.equalised(seconds, [0.0, 0.0, 0.7], 0.9, value, times)
    for row, ratio in enumerate(after):
        allowed = [r for r in RATIOS[:91] if seconds[row, round(r * GRID)] <= longest * (1.0 + 1e-9)]
        assert ratio == max(min(allowed), 0.7 if row == 2 else 0.0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_way_between_two_deadlines_is_met_by_the_least_ratios_that_do(share):
    seconds = np.array([k * (0.05 + (1.0 - RATIOS) ** 2) for k in (1.0, 2.0, 4.0)])
    shortest, longest = seconds[2, 90], seconds[1, 0]  # the slowest at its largest ratio, and who is last at its least
    found = deadline.at(seconds, [0.0, 0.0, 0.7], 0.9, share)
    for row, ratio in enumerate(found):
        allowed = [
            r for r in RATIOS[:91] if seconds[row, round(r * GRID)] <= shortest ** (1 - share) * longest**share + 1e-9
        ]
        assert ratio == max(min(allowed), 0.7 if row == 2 else 0.0)


def test_the_deadline_grows_as_the_losses_fall_by_hand():
    assert deadline.stretch([], 0.5, 0.5) == 1.0
    assert deadline.stretch([2.0, 0.6, 0.5], 0.5, 0.5) == 1.0, "not before it has learnt"
    assert deadline.stretch([0.125, 0.1, 9.0], 0.5, 0.5) == 2.0
    assert deadline.stretch([0.125, 0.1, 1e-9], 0.5, 1.0) == 5.0, "one device's word is not the fleet's"
    assert deadline.stretch([1e-300], 0.5, 1.0) == 500.0
    assert deadline.stretch([1e-3], 0.5, 0.0) == 1.0


@pytest.mark.parametrize(("size", "wanted"), [(6, 0.83), (2, 0.49), (20, 0.94), (60, 0.98), (1, 0.98)])
def test_no_layer_is_cut_to_a_single_channel(size, wanted):
    spec = small_cnn(channels=size, hidden=60)
    found = deadline.most(spec)
    assert found == wanted, "sixty neurons alone allow for .98"
    kept, fewer = (widths_of(spec, [1.0 - ratio])["a"][0] for ratio in (found, found + 0.01))
    assert kept == min(2, size)
    assert fewer == 1


def test_the_least_ratio_is_the_least_that_fits():
    spec, recipe = small_cnn(channels=40, hidden=80), Recipe(batch=8)
    budget = predict(spec, uniform(spec, 0.4), recipe, 1).bound
    ratio = deadline.least_ratio(spec, recipe, Means(budget))
    assert ratio is not None
    assert fit(spec, (uniform(spec, 1.0 - ratio),), recipe, Means(budget)) is not None
    assert ratio == 0.0 or fit(spec, (uniform(spec, 1.0 - ratio + 0.01),), recipe, Means(budget)) is None
    assert deadline.least_ratio(spec, recipe, Means(1)) is None
    assert deadline.least_ratio(spec, recipe, Means(1 << 40)) == 0.0


def told(cost, rounds=6, noise=0.0, seed=0, level=lambda number: 2.0 / number, ratios=(0.1, 0.4, 0.6, 0.8, 0.9)):
    """Losses of devices that take turns with ratios, each with a level of its own."""
    rng = np.random.default_rng(seed)
    return [
        Said(
            f"d{i}", number, ratio, level(number) * (1 + 0.1 * i) * np.exp(cost(ratio) + noise * rng.standard_normal())
        )
        for number in range(1, rounds + 1)
        for i in range(5)
        for ratio in [ratios[(i + number) % len(ratios)]]
    ]


def bend(ratio):
    return 3.0 * max(0.0, ratio - 0.6)


def test_what_ratios_cost_is_learnt_from_losses():
    found = worth.worth(told(bend, 20), RATIOS, 1e-6)
    for ratio in (0.1, 0.4, 0.6, 0.8, 0.9):
        assert found[round(ratio * GRID)] == pytest.approx(np.exp(-bend(ratio)), abs=0.02)


def test_noise_and_few_rounds_leave_it_near():
    found = worth.worth(told(bend, 10, noise=0.3), RATIOS, 2.0)
    for ratio in (0.4, 0.8, 0.9):
        assert found[round(ratio * GRID)] == pytest.approx(np.exp(-bend(ratio)), abs=0.15)


def test_without_a_word_it_is_what_is_believed():
    found = worth.worth([], RATIOS, 2.0)
    assert found[[0, 40, 50, 70, 90]] == pytest.approx([1.0, 1.0, np.exp(-0.2), np.exp(-0.6), np.exp(-1.0)])
    one_ratio = worth.worth(told(bend, 6, ratios=(0.7,)), RATIOS, 2.0)
    assert one_ratio == pytest.approx(found, abs=1e-6), "what never changes cannot tell what a change costs"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10.0))
def test_worth_is_from_0_to_1_and_falls_whatever_is_said(seed, trust):
    rng = np.random.default_rng(seed)
    said = [
        Said(f"d{rng.integers(4)}", int(rng.integers(1, 5)), float(rng.random()), float(np.exp(rng.normal(0, 100.0))))
        for _ in range(rng.integers(0, 30))
    ]
    found = worth.worth([one for one in said if np.isfinite(one.loss)], RATIOS, trust)
    assert (np.diff(found) <= 1e-12).all()
    assert (found >= 0.0).all()
    assert found[0] == pytest.approx(1.0)


def test_one_device_cannot_make_a_ratio_worth_nothing():
    said = [Said(f"d{d}", r, ratio, 2.0) for r in range(24) for d in range(9) for ratio in (0.3, 0.7, 0.95)]
    lies = [Said("liar", r, ratio, 1e308 if ratio > 0.9 else 1e-300) for r in range(24) for ratio in (0.3, 0.95)]
    found, great = (worth.worth([*said, *lies[:count]], RATIOS, 2.0) for count in (0, len(lies)))
    assert (great > 0.05).all()
    bounded = [Said(one.device, one.round, one.ratio, min(100.0, max(1e-3, one.loss))) for one in lies]
    assert np.array_equal(great, worth.worth([*said, *bounded], RATIOS, 2.0))
    assert (found >= great).all()
