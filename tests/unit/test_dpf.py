"""Federated DPF: against the paper's step on one machine, and the error that the coordinator keeps."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.algorithm import rng_of
from coordinator.algorithms import dpf
from coordinator.blocks.masks import masked_weights
from tests.support.models import batch, random_arrays
from tests.unit.test_feddip import DEVICES, MAKE, NAMES, SPEC, TOTAL, kept, rounds_of, trained
from wire.errors import ConfigError
from wire.spec import Structure


def start(**params):
    known = {"recipe.epochs": 1.0, "recipe.batch": 8.0, "horizon": 10.0, **params}
    return dpf.init(SPEC, random_arrays(SPEC, Structure(), 9), known)


def test_one_device_is_the_paper_on_one_machine():
    """One step per round: the dense weights follow equation 2, with decay, and the mask is that of the magnitudes."""
    rate, decay = 0.1, 0.2
    recipe = {"recipe.rate": rate, "recipe.decay": decay, "recipe.momentum": 0.0, "recipe.batch": 64.0}
    state = start(sparsity=0.9, sparsity_start=0.3, **recipe)
    w = {name: array.astype(np.float64) for name, array in state.weights.items()}
    masks = {}
    x, y = batch(SPEC, 20, seed=0)
    for number in range(1, 11):
        state, drafts = dpf.plan(state, number, DEVICES[:1], rng_of(5, number))
        state = dpf.close(state, [trained(state, draft, number) for draft in drafts])
        engine = MAKE()
        engine.load(SPEC, Structure(), {n: (a * masks.get(n, 1)).astype(np.float32) for n, a in w.items()})
        engine.forward_backward(x, y)
        w = {name: array - rate * (engine.grads[name] + decay * array) for name, array in w.items()}
        sparsity = 0.9 + (0.3 - 0.9) * (1 - number / 10) ** 3
        line = np.concatenate([np.abs(w[name]).ravel() for name in NAMES])
        least = np.sort(line)[::-1][round((1 - sparsity) * TOTAL) - 1]
        masks = {name: np.abs(w[name]) >= least for name in NAMES}
        for name, array in w.items():
            np.testing.assert_allclose(state.weights[name], array, atol=2e-6)
        assert all(np.array_equal(state.masks[name], mask) for name, mask in masks.items())


def test_the_error_is_nothing_where_weights_are_kept():
    for state in rounds_of(dpf, start(sparsity=0.9), 5):
        seen = masked_weights(state.weights, state.masks)
        for name, mask in state.masks.items():
            error = seen[name] - state.weights[name]
            assert not np.any(error[mask])
            assert np.any(error[~mask])


def test_sparsity_rises_to_its_end_and_the_mask_stays():
    counts = [kept(state) for state in rounds_of(dpf, start(sparsity=0.9), 12)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == round(TOTAL * (1 - 0.9 * (1 - 0.9**3)))
    assert counts[9] == counts[11] == round(0.1 * TOTAL)


def test_devices_receive_what_is_kept_and_answer_with_every_movement():
    *_, state = rounds_of(dpf, start(), 3)
    state, drafts = dpf.plan(state, 4, DEVICES, rng_of(5, 4))
    assert drafts[0].structure.kept == {name: int(mask.sum()) for name, mask in state.masks.items()}
    answer = trained(state, drafts[0], 4)
    assert not answer.sent
    assert all(np.any(answer.update[name][~mask]) for name, mask in state.masks.items())


@pytest.mark.parametrize("params", [{"sparsity": 1.0}, {"every": 0.0}, {"recipe.adam": 1.0}, {"mask": "dense"}])
def test_impossible_parameters(params):
    with pytest.raises(ConfigError, match=next(iter(params))):
        start(**params)
