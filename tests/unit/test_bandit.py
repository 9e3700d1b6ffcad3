"""E-UCB against sums and a textbook bandit written from the papers, and what it must keep whatever it is told."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.blocks import bandit
from coordinator.blocks.bandit import Bandit, Terms

PLAYS = st.lists(st.tuples(st.floats(0.0, 0.7999), st.floats(-1e6, 1e6)), max_size=40)


def played(terms, plays, start=None):
    found = start or bandit.fresh(terms)
    for ratio, reward in plays:
        found = bandit.learnt(found, terms, ratio, reward)
    return found


@given(PLAYS, st.floats(0.01, 0.5))
def test_leaves_tile_the_interval_whatever_is_played(plays, granularity):
    terms = Terms(0.0, 0.8, granularity)
    found = played(terms, plays)
    assert found.edges[0] == 0.0
    assert found.edges[-1] == 0.8
    assert all(low < high for low, high in zip(found.edges, found.edges[1:], strict=False))
    inner = set(found.edges[1:-1])
    assert inner <= {ratio for ratio, _ in plays}, "a leaf is split where it was played"


def test_a_leaf_splits_where_it_was_played_and_not_below_the_granularity():
    terms = Terms(0.0, 0.8, 0.2)
    found = bandit.learnt(bandit.fresh(terms), terms, 0.15, 1.0)
    assert list(found.edges) == [0.0, 0.15, 0.8]
    assert list(bandit.learnt(found, terms, 0.1, 1.0).edges) == [0.0, 0.15, 0.8], "0.15 wide is not above 0.2"
    assert list(bandit.learnt(found, terms, 0.5, 1.0).edges) == [0.0, 0.15, 0.5, 0.8]
    exact = dataclasses.replace(terms, granularity=0.8)
    assert list(bandit.learnt(bandit.fresh(exact), exact, 0.4, 1.0).edges) == [0.0, 0.8], "as wide is not wider"
    assert list(bandit.learnt(found, terms, 0.15, 1.0).edges) == [0.0, 0.15, 0.8], "no empty leaf"
    assert list(bandit.learnt(found, terms, 0.9, 1.0).edges) == [0.0, 0.15, 0.8], (
        "memory asked for more than the highest"
    )


@given(PLAYS, st.floats(0.5, 1.0))
def test_discounted_counts_are_the_direct_sum_and_the_recursion(plays, discount):
    terms = Terms(0.0, 0.8, 0.1, discount, clip=0.0)
    plays = plays[: terms.window]
    found = played(terms, plays)
    number, total = bandit.counts(found, terms)
    leaves = list(zip(found.edges, found.edges[1:], strict=False))
    for place, (low, high) in enumerate(leaves):
        direct = recursive = earned = 0.0
        for age, (ratio, reward) in enumerate(reversed(plays)):
            hit = low <= ratio < high
            direct += discount**age * hit
            earned += discount**age * hit * reward
        for ratio, _ in plays:
            recursive = discount * recursive + (low <= ratio < high)
        assert number[place] == pytest.approx(direct, abs=1e-9)
        assert number[place] == pytest.approx(recursive, abs=1e-9)
        assert total[place] == pytest.approx(earned, rel=1e-9, abs=1e-6)


def test_what_is_forgotten_counted_for_little():
    terms = Terms(discount=0.9)
    found = played(terms, [(0.1, 1.0)] * 200)
    assert len(found.ratios) == terms.window == 50
    assert 0.9**terms.window < 0.01


def naive_ucb1(arms, rewards, rounds):
    """UCB1 as Auer, Cesa-Bianchi and Fischer (2002) give it: each arm once, then the highest mean plus confidence."""
    counts, sums, sequence = [0] * arms, [0.0] * arms, []
    for number in range(rounds):
        if 0 in counts:
            arm = counts.index(0)
        else:
            arm = max(range(arms), key=lambda i: sums[i] / counts[i] + math.sqrt(2 * math.log(number) / counts[i]))
        counts[arm] += 1
        sums[arm] += rewards(arm, number)
        sequence.append(arm)
    return sequence


def test_without_discount_on_fixed_leaves_it_is_ucb1():
    edges = (0.0, 0.2, 0.4, 0.6, 0.8)
    noise = np.random.default_rng(3).random((4, 300))

    def reward(arm, number):
        return 0.5 * noise[arm, number] + 0.1 * arm

    terms = Terms(0.0, 0.8, granularity=1.0, discount=1.0, padding=1.0, clip=0.0)
    found, sequence, rng = Bandit(edges), [], np.random.default_rng(0)
    for number in range(300):
        indices = bandit.indices(found, terms)
        unplayed = np.flatnonzero(np.isinf(indices))
        # The order among leaves that were never played is random here and by number there; follow there.
        ratio = edges[unplayed[0]] + 0.05 if len(unplayed) else bandit.choose(found, terms, rng)
        arm = int(np.searchsorted(edges, ratio, side="right")) - 1
        sequence.append(arm)
        found = bandit.learnt(found, terms, ratio, reward(arm, number))
    assert sequence == naive_ucb1(4, reward, 300)
    assert len(set(sequence[-50:])) > 1, "it goes on exploring"


def test_leaves_that_were_never_played_come_first_and_in_any_order():
    terms = Terms(granularity=1.0)
    found = played(terms, [(0.1, 5.0)], Bandit((0.0, 0.2, 0.5, 0.8)))
    drawn = {bandit.choose(found, terms, np.random.default_rng(seed)) // 0.01 for seed in range(60)}
    assert min(drawn) >= 20
    assert min(drawn) < 50 < max(drawn)


@settings(max_examples=50)
@given(PLAYS, st.integers(0, 1000), st.floats(0.0, 0.4))
def test_a_chosen_ratio_is_inside_the_interval(plays, seed, low):
    terms = Terms(low, 0.8, 0.05)
    found = played(terms, [(ratio, reward) for ratio, reward in plays if ratio >= low])
    rng = np.random.default_rng(seed)
    for _ in range(5):
        assert low <= bandit.choose(found, terms, rng) < 0.8


@settings(max_examples=50)
@given(PLAYS, st.integers(0, 1000), st.floats(0.0, 0.79))
def test_a_device_that_cannot_go_below_a_ratio_is_never_sent_there(plays, seed, least):
    terms = Terms(0.0, 0.8, 0.05)
    found, rng = played(terms, plays), np.random.default_rng(seed)
    for _ in range(5):
        assert least <= bandit.choose(found, terms, rng, least) < 0.8
    same = [bandit.choose(found, terms, np.random.default_rng(seed), *more) for more in ((), (0.0,))]
    assert same[0] == same[1]


def test_a_leaf_is_as_wide_as_what_can_be_played_of_it():
    terms = Terms(0.0, 0.8, 0.1)
    found = bandit.learnt(bandit.fresh(terms), terms, 0.6, 1.0, 0.5)
    assert found.edges == (0.0, 0.6, 0.8)
    assert bandit.learnt(found, terms, 0.55, 1.0, 0.5).edges == (0.0, 0.6, 0.8), "of the first leaf a tenth is left"
    assert bandit.learnt(found, terms, 0.55, 1.0, 0.45).edges == (0.0, 0.55, 0.6, 0.8)
    assert bandit.learnt(found, terms, 0.45, 1.0, 0.45).edges == (0.0, 0.6, 0.8), "nothing can be played below"


@pytest.mark.parametrize("least", [0.8, 0.9])
def test_where_nothing_is_left_to_choose_it_is_the_very_top(least):
    found = played(Terms(), [(0.1, 5.0), (0.5, 1.0)])
    ratio = bandit.choose(found, Terms(), np.random.default_rng(0), least)
    assert ratio < 0.8
    assert ratio == pytest.approx(0.8)


def test_a_draw_at_the_very_top_stays_below_the_edge():
    class Top:
        def choice(self, leaves):
            return leaves[0]

        def random(self):
            return 1.0

    assert bandit.choose(bandit.fresh(Terms()), Terms(), Top()) < 0.8


def test_the_same_seed_gives_the_same_sequence_and_another_one_another():
    def sequence(seed):
        terms, rng = Terms(), np.random.default_rng(seed)
        found, drawn = bandit.fresh(terms), []
        for _ in range(30):
            drawn.append(bandit.choose(found, terms, rng))
            found = bandit.learnt(found, terms, drawn[-1], 1.0 - drawn[-1])
        return drawn

    assert sequence(1) == sequence(1)
    assert sequence(1) != sequence(2)


def test_it_finds_the_best_leaf():
    terms, rng = Terms(0.0, 0.8, 0.1, 1.0, 0.1), np.random.default_rng(0)
    found, drawn = bandit.fresh(terms), []
    for _ in range(300):
        drawn.append(bandit.choose(found, terms, rng))
        found = bandit.learnt(found, terms, drawn[-1], 1.0 - (drawn[-1] - 0.6) ** 2 + 0.05 * rng.standard_normal())
    assert np.mean(np.abs(np.array(drawn[-100:]) - 0.6) < 0.2) > 0.7


def test_the_gap_reward_by_hand():
    assert bandit.gap_reward(0.6, 5.0, 3.0, 0.1) == pytest.approx(0.3)
    assert bandit.gap_reward(-0.6, 1.0, 3.0, 0.1) == pytest.approx(-0.3)
    assert bandit.gap_reward(0.6, 3.0, 3.0, 0.1) == pytest.approx(2.0), "equal times earn a finite reward"


def test_rewards_are_cut_to_0_and_1_by_their_own_quantile():
    line = bandit.scaled([-5.0, 0.0, *([1.0] * 97), 100.0], 0.5)
    assert list(line[:3]) == [0.0, 0.0, 1.0]
    assert line[-1] == 1.0
    assert list(bandit.scaled([-5.0, 2.0], 0.0)) == [-5.0, 2.0]
    assert list(bandit.scaled([0.0, 0.0], 0.95)) == [0.0, 0.0]


def test_the_speed_reward_is_bounded_and_prefers_the_faster_round():
    assert bandit.speed_reward(0.5, 2.0) == 0.25
    assert bandit.speed_reward(7.0, 2.0) == 0.5
    assert bandit.speed_reward(-7.0, 2.0) == 0.0
    assert bandit.speed_reward(0.3, 1.0) > bandit.speed_reward(0.3, 2.0)


def test_a_reward_far_beyond_the_others_is_cut_and_not_divided():
    assert bandit.scaled((1e308, *(30 * [1e-300])), 0.95).tolist() == [1.0] * 31
    assert bandit.scaled((-1e308, 0.5, 2.0), 0.5).tolist() == [0.0, 0.25, 1.0]
