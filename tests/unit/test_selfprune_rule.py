"""The rule selfprune: which channels a cut takes, what training leaves alone, what is sent and what comes back."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.rules import selfprune, sgd
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from wire.channels import all_kept, tensor_masks, to_words
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Structure, tensor_shapes

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
WEIGHTS = random_arrays(SPEC, Structure())
SHAPES = tensor_shapes(SPEC, Structure())
CUT = {"threshold": 0.0, "target": 0.5, "prune": 0.2}
NEVER = {"threshold": 0.0, "target": 0.0}
STILL = Recipe(rule="selfprune", batch=8, rate=0.0, seed=3)


def order(recipe, own=None, weights=WEIGHTS, count=40, rule=selfprune, **more):
    engine = MAKE()
    engine.load(SPEC, Structure(), weights)
    x, y = batch(SPEC, count)
    task = rules.Task(recipe, engine, x, y, 1, more.pop("micro", 8), lambda *_: None, own=own or {}, **more)
    return engine, rule.train(task)


def with_knobs(recipe, **knobs):
    return dataclasses.replace(recipe, knobs=knobs)


def shared(kept):
    return {f"shared.{name}": word for name, word in to_words(SPEC, kept).items()}


def kept_of(own):
    return {name: own[f"kept/{name}"] != 0 for name in ("a", "b")}


def whole_masks(kept):
    masks = tensor_masks(SPEC, kept)
    return {name: masks.get(name, np.ones(shape, bool)) for name, shape in SHAPES.items()}


def test_a_cut_by_hand():
    spec = small_cnn(channels=4, hidden=5)
    weights = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(spec, Structure()).items()}
    weights["c.weight"][:, 0, 0, 0] = [3.0, -1.0, 1.0, -2.0]
    weights["c.weight"][2, 0, 1, 1] = -0.5
    weights["f.weight"][:, 0] = [5.0, 4.0, -3.0, 4.0, 9.0]
    weights["c.bias"][1] = 100.0  # says nothing of what the channel carries
    norms = selfprune.channel_norms(spec, weights)
    assert norms["a"].tolist() == [3.0, 1.0, 1.5, 2.0]
    assert norms["b"].tolist() == [5.0, 4.0, 3.0, 4.0, 9.0]
    first = selfprune.cut(spec, weights, all_kept(spec), prune=0.25, target=0.5)
    assert first["a"].tolist() == [True, False, True, True]
    assert first["b"].tolist() == [True, True, False, False, True]  # two of five; of the equal ones the first stays
    second = selfprune.cut(spec, weights, first, prune=0.5, target=0.5)
    assert second["a"].tolist() == [True, False, False, True]  # half of three, rounded up, would be past the target
    assert second["b"].tolist() == first["b"].tolist()
    none = selfprune.cut(spec, weights, all_kept(spec), prune=1.0, target=1.0)
    assert [flags.sum() for flags in none.values()] == [1, 1]


def test_what_is_gone_stays_gone_and_the_rest_is_sent():
    recipe = with_knobs(
        Recipe(rule="selfprune", batch=8, rate=0.1, epochs=2, momentum=0.9, decay=0.01, clip=0.5), **CUT
    )
    engine, trained = order(recipe)
    assert trained.metrics["pruned"] == 1.0
    kept = kept_of(trained.own)
    assert [int(flags.sum()) for flags in kept.values()] == [4, 9]
    assert trained.metrics["channels"] == pytest.approx(13 / 18)
    for name, mask in whole_masks(kept).items():
        array = engine.params[name]
        assert not array[~mask].any()
        assert array[mask].any()
        extra = trained.update[name]
        places = np.arange(array.size) if extra.places is None else extra.places
        assert places.tolist() == np.flatnonzero(mask).tolist()
        np.testing.assert_array_equal(np.ravel(extra.values), (array - WEIGHTS[name]).ravel()[places])
        np.testing.assert_array_equal(trained.own[f"own/{name}"], array)


def test_own_weights_come_back_where_they_are_not_shared():
    _, first = order(with_knobs(STILL, **CUT))
    own = {name: array + np.float32(1) if name.startswith("own/") else array for name, array in first.own.items()}
    kept = kept_of(own)
    common = {name: flags & (np.arange(flags.size) % 2 == 0) for name, flags in kept.items()}
    received = random_arrays(SPEC, Structure(), 5)
    before = {name: array.copy() for name, array in own.items()}
    engine, second = order(with_knobs(STILL, **NEVER, **shared(common)), own, received)
    for name, mask in whole_masks(kept).items():
        wanted = np.where(whole_masks(common)[name], received[name], before[f"own/{name}"]) * mask
        np.testing.assert_array_equal(engine.params[name], wanted)
        extra = second.update[name]
        places = np.arange(mask.size) if extra.places is None else extra.places
        np.testing.assert_array_equal(np.ravel(extra.values), (wanted - received[name]).ravel()[places])
    assert {name: flags.tolist() for name, flags in kept_of(second.own).items()} == {
        name: flags.tolist() for name, flags in kept.items()
    }


def test_who_is_told_nothing_or_remembers_nothing_starts_with_what_comes():
    _, first = order(with_knobs(STILL, **CUT))
    received = random_arrays(SPEC, Structure(), 5)
    torn = {name: array for name, array in first.own.items() if name != "own/f.bias"}
    for own, knobs in ((first.own, {}), ({}, shared(all_kept(SPEC))), (torn, shared(all_kept(SPEC)))):
        engine, again = order(with_knobs(STILL, **NEVER, **knobs), own, received)
        for name, array in received.items():
            np.testing.assert_array_equal(engine.params[name], array)
        assert again.metrics["channels"] == 1.0


def by_hand(recipe, weights, masks, strength):
    """Steps of SGD on cross-entropy and group lasso, of what masks keep, in float64 beside the engine's gradients."""
    twin = MAKE()
    twin.load(SPEC, Structure(), {name: array * masks[name] for name, array in weights.items()})
    x, y = batch(SPEC, 40)
    rng = np.random.default_rng([recipe.seed, 1])
    velocity = {name: np.zeros(array.shape) for name, array in weights.items()}
    for _ in range(recipe.epochs):
        order_of = rng.permutation(40)
        for rows in (order_of[i : i + 8] for i in range(0, 40, 8)):
            for grad in twin.grads.values():
                grad.fill(0)
            twin.forward_backward(x[rows], y[rows])
            moves = {}
            for name, param in twin.params.items():
                grad = twin.grads[name].astype(np.float64)
                if param.ndim > 1:
                    cube = param.astype(np.float64).reshape(*param.shape[:2], -1)
                    pull = np.zeros_like(cube)
                    for j in range(cube.shape[0]) if name != "o.weight" else ():
                        if (length := np.linalg.norm(cube[j])) > 0:
                            pull[j] += cube[j] / length
                    for i in range(cube.shape[1]) if name != "c.weight" else ():
                        if (length := np.linalg.norm(cube[:, i])) > 0:
                            pull[:, i] += cube[:, i] / length
                    grad += strength * pull.reshape(param.shape)
                moves[name] = grad * masks[name]
            length = np.sqrt(sum(float((move**2).sum()) for move in moves.values()))
            for name, param in twin.params.items():
                move = moves[name] * min(1.0, recipe.clip / length) + recipe.decay * param
                velocity[name] = recipe.momentum * velocity[name] + move
                param[...] = param - recipe.rate * velocity[name]
    return twin.params


@pytest.mark.parametrize("micro", [8, 3])
def test_training_is_group_lasso_on_what_is_left(micro):
    _, first = order(with_knobs(STILL, **CUT))
    masks = whole_masks(kept_of(first.own))
    recipe = Recipe(rule="selfprune", batch=8, rate=0.1, epochs=2, momentum=0.9, decay=0.01, clip=0.5, seed=3)
    knobs = {"lambda": 0.05, **NEVER, **shared(kept_of(first.own))}
    engine, _ = order(with_knobs(recipe, **knobs), first.own, micro=micro)
    for name, param in by_hand(recipe, WEIGHTS, masks, 0.05).items():
        np.testing.assert_allclose(engine.params[name], param, atol=5e-6, err_msg=name)


def test_a_device_that_never_cuts_and_pulls_nothing_is_plain_sgd():
    recipe = Recipe(batch=8, rate=0.1, epochs=2, momentum=0.5, clip=1.0, seed=3)
    knobs = {**NEVER, "lambda": 0.0}
    engine, trained = order(with_knobs(dataclasses.replace(recipe, rule="selfprune"), **knobs))
    plain, _ = order(recipe, rule=sgd)
    for name, param in plain.params.items():
        np.testing.assert_array_equal(engine.params[name], param)
        assert trained.update[name].places is None
        np.testing.assert_array_equal(trained.update[name].values, param - WEIGHTS[name])


def test_cuts_wait_for_accuracy_and_stop_at_the_target():
    engine = MAKE()
    engine.load(SPEC, Structure(), WEIGHTS)
    right = engine.evaluate(*batch(SPEC, 40))[1] / 40
    _, cut = order(with_knobs(STILL, threshold=right, target=0.5))
    assert (cut.metrics["accuracy.own"], cut.metrics["pruned"]) == (right, 1.0)
    _, same = order(with_knobs(STILL, threshold=right + 0.01, target=0.5))
    assert same.metrics["pruned"] == 0.0
    own, shares = {}, []
    for _ in range(8):
        _, trained = order(with_knobs(STILL, **CUT, **shared(all_kept(SPEC))), own)
        own = trained.own
        shares.append((trained.metrics["channels"], trained.metrics["pruned"]))
    assert [share for share, _ in shares] == sorted((share for share, _ in shares), reverse=True)
    assert shares[-1] == (0.5, 0.0)


def test_a_cut_that_takes_nothing_is_none():
    """Of 6 and 12 channels a target of 0.05 leaves all but a part of one: nothing goes, though the target is never met."""
    for knobs in ({"target": 0.05}, {"prune": 0.0}):
        _, trained = order(with_knobs(STILL, **{**CUT, **knobs}))
        assert (trained.metrics["pruned"], trained.metrics["channels"]) == (0.0, 1.0)


def test_what_is_sent_takes_no_more_memory_than_is_planned_for():
    """12 bytes per weight beside the received ones: a tensor may be nearly all of the model."""
    size = 1 << 20
    array, received = (np.full(size, value, np.float32) for value in (3.0, 1.0))
    mask = np.ones(size, bool)
    mask[7] = False
    tracemalloc.start()
    try:
        said = selfprune._moved(array, received, mask)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert said.places.tolist() == [*range(7), *range(8, size)]
    assert (said.values == 2.0).all()
    assert most < 12.1 * size


def test_no_samples_change_nothing():
    _, first = order(with_knobs(STILL, **CUT))
    _, second = order(with_knobs(STILL, **CUT, **shared(kept_of(first.own))), first.own, count=0)
    assert (second.steps, second.metrics["pruned"]) == (0, 0.0)
    assert second.metrics["channels"] == first.metrics["channels"]


def test_what_it_cannot_do_is_named():
    for name in CUT:
        with pytest.raises(SpecError, match=f"knob {name}"):
            order(with_knobs(STILL, **{name: 1.5}))
    with pytest.raises(SpecError, match="knob lambda"):
        order(with_knobs(STILL, **{"lambda": -1.0}))
    with pytest.raises(SpecError, match="part of it"):
        order(STILL, masks={"f.weight": np.ones((12, 54), bool)})
    _, first = order(with_knobs(STILL, **CUT))
    with pytest.raises(SpecError, match="word"):
        order(with_knobs(STILL, **{"shared.0.0": 0.5}), first.own)


def test_what_is_gone_stays_gone_where_nothing_in_gives_something_out():
    # A sigmoid of 0 is 0.5: the columns that read a channel that is gone have a gradient, which must not reach them.
    nodes = tuple(dataclasses.replace(node, op="sigmoid") if node.op == "tanh" else node for node in SPEC.nodes)
    spec = dataclasses.replace(SPEC, nodes=nodes)
    for knobs in ({}, {"lambda": 0.0}, {"adam": 1.0}):
        engine = MAKE()
        engine.load(spec, Structure(), WEIGHTS)
        recipe = with_knobs(Recipe(rule="selfprune", batch=8, rate=0.1, epochs=2, momentum=0.9), **CUT, **knobs)
        trained = selfprune.train(rules.Task(recipe, engine, *batch(spec, 40), 1, 8, lambda *_: None))
        for name, mask in whole_masks(kept_of(trained.own)).items():
            assert not engine.params[name][~mask].any(), (name, knobs)
