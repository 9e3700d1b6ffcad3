"""The rule lottery: what a cut leaves, what a rewind restores, what is sent and what is kept for the next order."""

import dataclasses

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.rules import lottery, sgd
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Structure

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
WEIGHTS = random_arrays(SPEC, Structure())
MASKED = ("c.weight", "f.weight", "o.weight")
STILL = Recipe(rule="lottery", batch=8, rate=0.0, seed=3)
CUT = {"threshold": 0.0, "target": 0.0, "prune": 0.2}
NEVER = {"threshold": 1.0}


def order(recipe, own=None, weights=WEIGHTS, count=40, rule=lottery, **more):
    engine = MAKE()
    engine.load(SPEC, Structure(), weights)
    x, y = batch(SPEC, count)
    task = rules.Task(recipe, engine, x, y, 1, more.pop("micro", 8), lambda *_: None, own=own or {}, **more)
    return engine, rule.train(task)


def with_knobs(recipe, **knobs):
    return dataclasses.replace(recipe, knobs=knobs)


def masks_of(own):
    return {name: own[f"mask/{name}"] != 0 for name in MASKED}


def test_a_cut_by_hand():
    weights = np.array([[0.5, -0.1, 0.3], [-0.2, 0.1, 9.0]], np.float32)
    mask = np.array([[True, True, True], [True, True, False]])
    assert lottery.pruned(weights, mask, 0.4).tolist() == [[True, False, True], [True, False, False]]
    assert lottery.pruned(weights, mask, 0.2).tolist() == [[True, False, True], [True, True, False]]  # the first of 0.1
    assert lottery.pruned(weights, mask, 0.19).tolist() == mask.tolist()
    assert not lottery.pruned(weights, mask, 1.0).any()


def test_density_by_hand():
    assert lottery.density({"a": np.array([True, False]), "b": np.array([True, True])}) == 0.75
    assert lottery.density({}) == 1.0


def test_a_cut_rewinds_to_the_ticket_exactly():
    # The second order brings other weights; what is left after its cut is the first order's, to the bit.
    _, first = order(with_knobs(STILL, **NEVER))
    moved = random_arrays(SPEC, Structure(), 5)
    engine, second = order(with_knobs(STILL, **CUT), first.own, moved)
    masks = masks_of(second.own)
    for name, array in engine.params.items():
        wanted = WEIGHTS[name] * masks[name] if name in masks else WEIGHTS[name]
        np.testing.assert_array_equal(array, wanted)
        np.testing.assert_array_equal(second.own[f"ticket/{name}"], WEIGHTS[name])
    for name, mask in masks.items():  # the smallest of what came, tensor by tensor
        flat = np.abs(moved[name]).ravel()
        gone = sorted(range(flat.size), key=lambda j: (flat[j], j))[: int(0.2 * flat.size)]
        assert np.flatnonzero(~mask).tolist() == sorted(gone)
    assert second.metrics["pruned"] == 1.0
    assert second.metrics["density"] == pytest.approx(0.8, abs=0.01)


def test_what_is_sent_is_what_is_kept():
    _, first = order(with_knobs(STILL, **CUT))
    recipe = with_knobs(Recipe(rule="lottery", batch=8, rate=0.1, epochs=2, momentum=0.5, seed=3), **NEVER)
    received = random_arrays(SPEC, Structure(), 5)
    engine, second = order(recipe, first.own, received)
    masks = masks_of(second.own)
    assert set(second.update) == set(WEIGHTS)
    for name, extra in second.update.items():
        moved = engine.params[name] - received[name]
        if name in MASKED:
            assert extra.places.tolist() == np.flatnonzero(masks[name]).tolist()
            np.testing.assert_array_equal(extra.values, moved.ravel()[extra.places])
            assert not engine.params[name][~masks[name]].any()
        else:
            assert extra.places is None
            np.testing.assert_array_equal(extra.values, moved)
        assert first.own.get(f"mask/{name}") is None or (first.own[f"mask/{name}"] == second.own[f"mask/{name}"]).all()
    assert second.metrics["pruned"] == 0.0


@pytest.mark.parametrize("micro", [8, 3])
def test_training_keeps_to_the_mask_step_by_step(micro):
    _, first = order(with_knobs(STILL, **CUT))
    recipe = with_knobs(Recipe(rule="lottery", batch=8, rate=0.1, epochs=2, momentum=0.9, decay=0.01), **NEVER)
    engine, _ = order(recipe, first.own, micro=micro)
    masks = masks_of(first.own)
    twin = MAKE()
    twin.load(SPEC, Structure(), {n: a * masks.get(n, np.float32(1)) for n, a in WEIGHTS.items()})
    x, y = batch(SPEC, 40)
    rng = np.random.default_rng([0, 1])
    velocity = {n: np.zeros_like(a) for n, a in WEIGHTS.items()}
    for _ in range(2):
        passed = rng.permutation(40)
        for start in range(0, 40, 8):
            rows = passed[start : start + 8]
            for grad in twin.grads.values():
                grad.fill(0)
            twin.forward_backward(x[rows], y[rows])
            for n, p in twin.params.items():
                masked = (twin.grads[n] + 0.01 * p) * masks.get(n, 1)
                velocity[n] = 0.9 * velocity[n] + masked
                p[...] = p - (0.1 * velocity[n]).astype(np.float32)
    for name, param in twin.params.items():
        np.testing.assert_allclose(engine.params[name], param, atol=3e-6, err_msg=name)


def test_a_device_that_never_cuts_is_plain_sgd():
    recipe = Recipe(batch=8, rate=0.1, epochs=2, momentum=0.5, seed=3)
    engine, trained = order(with_knobs(dataclasses.replace(recipe, rule="lottery"), **NEVER))
    plain, _ = order(recipe, rule=sgd)
    for name, param in plain.params.items():
        np.testing.assert_array_equal(engine.params[name], param)
        assert trained.update[name].places is None
        np.testing.assert_array_equal(trained.update[name].values, param - WEIGHTS[name])


def test_cuts_wait_for_accuracy_and_stop_at_the_target():
    x, y = batch(SPEC, 40)
    engine = MAKE()
    engine.load(SPEC, Structure(), WEIGHTS)
    right = engine.evaluate(x, y)[1] / 40
    _, same = order(with_knobs(STILL, threshold=right, target=0.0))
    assert (same.metrics["accuracy.ticket"], same.metrics["pruned"]) == (
        right,
        0.0,
    )  # more than the threshold is asked for
    _, cut = order(with_knobs(STILL, threshold=right - 0.01, target=0.0))
    assert cut.metrics["pruned"] == 1.0
    own, densities = {}, []
    for _ in range(12):
        _, trained = order(with_knobs(STILL, threshold=0.0, target=0.5), own)
        own = trained.own
        densities.append(trained.metrics["density"])
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == densities[-2] <= 0.5 < densities[-1] / 0.8 + 0.02


def test_no_samples_change_nothing():
    _, first = order(with_knobs(STILL, **CUT))
    _, second = order(with_knobs(STILL, **CUT), first.own, count=0)
    assert (second.steps, second.metrics["pruned"]) == (0, 0.0)
    assert second.metrics["density"] == first.metrics["density"]


def test_what_it_cannot_do_is_named():
    for name in CUT:
        with pytest.raises(SpecError, match=f"knob {name}"):
            order(with_knobs(STILL, **{name: 1.5}))
    with pytest.raises(SpecError, match="mask of this device"):
        order(STILL, masks={"f.weight": np.ones((12, 54), bool)})
