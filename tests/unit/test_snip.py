"""SNIP's rounds: whose scores decide, which weights stay, and what is trained from then on."""

import dataclasses

import numpy as np
import pytest

from coordinator.algorithm import Answer, DeviceView, rng_of
from coordinator.algorithms import by_name, snip
from coordinator.blocks.masks import density
from tests.support.models import random_arrays, small_cnn
from wire.errors import ConfigError, Malformed, NonFinite
from wire.memory import predict
from wire.messages import Usage
from wire.spec import Structure
from wire.structure import masked

SPEC = small_cnn()
NAMES = ("c.weight", "f.weight", "o.weight")
SIZE = 54 + 648 + 48
GREAT = 1 << 40
ALL = (DeviceView("b", GREAT), DeviceView("a", GREAT), DeviceView("c", GREAT))


def start(**params):
    return snip.init(SPEC, random_arrays(SPEC, Structure(), 9), params)


def told(device, samples, seed, places=None):
    """An answer of the score round: scores of all weights, or of some."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.random(a.size).astype(np.float32) for name, a in random_arrays(SPEC, Structure()).items()}
    chosen = {name: np.arange(arrays[name].size) if places is None else places for name in NAMES}
    extras = {name: (chosen[name], arrays[name][chosen[name]]) for name in NAMES}
    return Answer(device, samples, Structure(), {}, Usage(), {}, extras=extras)


def trained(state, device, samples, seed):
    update = random_arrays(SPEC, Structure(), seed)
    update = {name: np.where(state.masks.get(name, True), a, 0).astype(np.float32) for name, a in update.items()}
    return Answer(device, samples, masked(state.masks), {}, Usage(), update, sent=state.masks)


def line(arrays):
    return np.concatenate([np.ravel(arrays[name]) for name in NAMES])


def test_the_first_round_asks_for_scores():
    recipe = {"recipe.loss": "binary_cross_entropy"}
    state, drafts = snip.plan(start(**recipe, batches=2.0, score_batch=50.0, told=99.0), 1, ALL, rng_of(0, 1))
    assert state.round == 1
    assert [d.device for d in drafts] == ["a", "b", "c"]
    for draft in drafts:
        assert draft.structure == Structure()
        found = draft.recipe
        assert (found.rule, found.steps, found.batch, found.loss) == ("score", 2, 50, "binary_cross_entropy")
        assert found.knobs == {"top": 99.0}
    _, (draft,) = snip.plan(start(saliency="one"), 1, ALL, rng_of(0, 1))
    assert draft.device == "a"


def test_one_is_the_first_that_can_hold_the_dense_model():
    (draft,) = snip.plan(start(saliency="one"), 1, ALL, rng_of(0, 1))[1]
    small = predict(SPEC, Structure(), draft.recipe, 1).bound - 1
    (draft,) = snip.plan(start(saliency="one"), 1, (DeviceView("a", small), DeviceView("b", GREAT)), rng_of(0, 1))[1]
    assert draft.device == "b"


def test_one_that_does_not_answer_is_followed_by_the_next():
    plans = [snip.plan(start(saliency="one"), number, ALL, rng_of(0, number))[1] for number in range(1, 5)]
    assert [draft.device for (draft,) in plans] == ["a", "b", "c", "a"]
    assert snip.plan(start(saliency="one"), 2, (), rng_of(0, 2))[1] == ()


def test_who_tells_no_score_has_no_say():
    silent = dataclasses.replace(told("a", 7, 1), extras={})
    state = start(density=0.2)
    assert snip.close(state, (silent,)) is state
    joined, alone = snip.close(state, (silent, told("b", 2, 2))), snip.close(state, (told("b", 2, 2),))
    assert all((joined.masks[name] == mask).all() for name, mask in alone.masks.items())


def test_masks_are_the_largest_mean_scores():
    answers = (told("a", 1, 1), told("b", 5, 2), told("c", 2, 3))
    after = snip.close(start(density=0.13), answers)
    mean = np.zeros(SIZE)
    for answer in answers:
        mean += answer.samples / 8 * line({name: values for name, (_, values) in answer.extras.items()})
    wanted = np.sort(np.argsort(-mean, kind="stable")[: round(0.13 * SIZE)])
    assert np.flatnonzero(line(after.masks)).tolist() == wanted.tolist()
    assert set(after.masks) == set(NAMES)
    for name, array in random_arrays(SPEC, Structure(), 9).items():
        np.testing.assert_array_equal(after.weights[name], array)


def test_the_largest_scores_of_one_device_are_enough():
    whole = told("a", 3, 1)
    count = round(0.1 * SIZE)
    scores = line({name: values for name, (_, values) in whole.extras.items()})
    best = np.zeros(SIZE, bool)
    best[np.argsort(-scores, kind="stable")[:count]] = True
    extras, begin = {}, 0
    for name in NAMES:
        places, values = whole.extras[name]
        mine = best[begin : begin + len(places)]
        extras[name] = (places[mine], values[mine])
        begin += len(places)
    state = start(density=0.1, told=float(count), saliency="one")
    some = snip.close(state, (dataclasses.replace(whole, extras=extras),))
    for name, mask in snip.close(state, (whole,)).masks.items():
        np.testing.assert_array_equal(some.masks[name], mask)


def test_the_guard_keeps_something_of_every_layer():
    answer = told("a", 1, 1)
    places, values = answer.extras["f.weight"]
    lopsided = dataclasses.replace(answer, extras={**answer.extras, "f.weight": (places, values * np.float32(1e-6))})
    assert not snip.close(start(density=0.01), (lopsided,)).masks["f.weight"].any()
    guarded = snip.close(start(density=0.01, guard="layer"), (lopsided,)).masks
    assert {name: int(mask.sum()) for name, mask in guarded.items()}["f.weight"] == 1
    assert guarded["f.weight"].flat[np.argmax(values)]
    assert sum(mask.sum() for mask in guarded.values()) == round(0.01 * SIZE)


def test_then_every_device_trains_what_is_kept():
    state = snip.close(start(density=0.2), (told("a", 1, 1),))
    assert density(state.masks) == pytest.approx(0.2, abs=0.001)
    state, drafts = snip.plan(state, 2, ALL, rng_of(0, 2))
    assert [d.device for d in drafts] == ["a", "b", "c"]
    assert all(d.structure == masked(state.masks) and d.recipe.rule == "sgd" for d in drafts)
    assert len({d.recipe.seed for d in drafts}) == 3
    after = snip.close(state, (trained(state, "a", 1, 4), trained(state, "b", 3, 5)))
    one, other = trained(state, "a", 1, 4).update, trained(state, "b", 3, 5).update
    for name, array in state.weights.items():
        np.testing.assert_allclose(after.weights[name], array + 0.25 * one[name] + 0.75 * other[name], atol=1e-6)
    assert after.masks is state.masks
    with pytest.raises(Malformed, match="masks"):
        snip.close(state, (dataclasses.replace(trained(state, "a", 1, 4), structure=Structure()),))


def test_scores_are_asked_for_again_until_there_are_some():
    state, _ = snip.plan(start(), 1, ALL, rng_of(0, 1))
    assert snip.close(state, ()) is state
    assert snip.close(state, (dataclasses.replace(told("a", 1, 1), samples=0),)) is state
    assert snip.plan(state, 2, ALL, rng_of(0, 2))[1][0].recipe.rule == "score"
    places, values = told("a", 1, 1).extras["f.weight"]
    broken = dataclasses.replace(told("a", 1, 1), extras={"f.weight": (places, values * np.float32("nan"))})
    with pytest.raises(NonFinite, match="score"):
        snip.close(state, (broken,))


@pytest.mark.parametrize(
    "params",
    [
        {"density": 0.0},
        {"density": 1.5},
        {"saliency": "two"},
        {"guard": "some"},
        {"batches": -1.0},
        {"score_batch": 0.0},
        {"told": 0.5},
        {"told": 10.0},
        {"schedule": "never"},
        {"recipe.rate": -1.0},
        {"angle": 1.0},
    ],
)
def test_parameters_are_checked(params):
    with pytest.raises(ConfigError):
        start(**params)


def test_registry():
    assert by_name("snip") is snip
