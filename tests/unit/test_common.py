"""One bandit for the whole fleet: whether it finds what pays; what it earns, by hand, stands in test_fedmp.py."""

import math

import numpy as np
import pytest

from coordinator.blocks import bandit, common, ratios


def test_one_bandit_finds_the_deadline_that_pays_most():
    terms, rng = bandit.Terms(), np.random.default_rng(0)
    known, shares = common.fresh(terms), []
    for number in range(1, 301):
        known = common.played(known, number, terms, rng)
        shares.append(known["played"][1])
        lost = 0.2 * math.exp(-((shares[-1] - 0.3) ** 2) / 0.02)
        known = common.settled(known, [ratios.Due(number, 0.5, lost, took=1.0)], terms)
    assert len(known["ratios"]) == terms.window
    assert np.mean(np.abs(np.array(shares[-100:]) - 0.3) < 0.1) > 0.5, "by chance a fifth"


def test_a_round_of_which_nothing_is_known_is_forgotten():
    terms, rng = bandit.Terms(), np.random.default_rng(0)
    known = common.played(common.fresh(terms), 7, terms, rng)
    other, silent, untimed = ratios.Due(6, 0.5, 0.1, took=1.0), ratios.Due(7, 0.5, took=1.0), ratios.Due(7, 0.5, 0.1)
    for turns in ([], [other], [silent], [untimed]):
        after = common.settled(known, turns, terms)
        assert (after["rewards"], after["played"]) == ([], [])


def test_one_devices_word_does_not_decide_what_a_round_earned():
    terms, rng = bandit.Terms(), np.random.default_rng(0)
    known = common.played(common.fresh(terms), 1, terms, rng)
    turns = [ratios.Due(1, 0.5, 0.2, took=1.0)] * 9 + [ratios.Due(1, 0.5, -1e9, 1e-300, took=2.0)]
    (earned,) = common.settled(known, turns, terms)["rewards"]
    assert earned == pytest.approx((9 * 0.2 - 1.0) / 10 / 2.0)
