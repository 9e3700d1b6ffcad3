"""One bandit for the whole fleet: whether it finds what pays; what it earns, by hand, stands in test_fedmp.py."""

import math

import numpy as np

from coordinator.algorithm import DeviceView
from coordinator.blocks import bandit, common, ratios


def test_one_bandit_finds_the_deadline_that_pays_most():
    terms, rng = bandit.Terms(), np.random.default_rng(0)
    known, shares = common.fresh(terms), []
    device = (DeviceView("d", 1 << 40, 10, seconds_turn=1.0),)
    for number in range(1, 301):
        known = common.played(known, number, terms, rng)
        shares.append(known["played"][1])
        lost = 0.2 * math.exp(-((shares[-1] - 0.3) ** 2) / 0.02)
        client = ratios.Client((0.0, 0.8), due=ratios.Due(number, 0.5, lost, 1.0, 1.0))
        known = common.settled(known, {"d": client}, device, terms)
    assert len(known["ratios"]) == terms.window
    assert np.mean(np.abs(np.array(shares[-100:]) - 0.3) < 0.1) > 0.5, "by chance a fifth"


def test_a_round_of_which_nothing_is_known_is_forgotten():
    terms, rng = bandit.Terms(), np.random.default_rng(0)
    known = common.played(common.fresh(terms), 7, terms, rng)
    device = (DeviceView("d", 1 << 40, 10, seconds_turn=1.0),)
    answered = ratios.Client((0.0, 0.8), due=ratios.Due(6, 0.5, 0.1, 1.0, 1.0))
    silent = ratios.Client((0.0, 0.8), due=ratios.Due(7, 0.5))
    for clients in ({}, {"d": answered}, {"d": silent}):
        after = common.settled(known, clients, device, terms)
        assert (after["rewards"], after["played"]) == ([], [])
