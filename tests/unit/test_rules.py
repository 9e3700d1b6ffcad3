"""Rules against loops written from their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.rules import sgd
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn, widths
from wire import memory
from wire.errors import NonFinite, SpecError, Unsupported
from wire.messages import Recipe
from wire.spec import Structure

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
NESTED = widths(a=(2, 3, 4, 6), b=(3, 5, 8, 12))


def trained(recipe, structure=NESTED, micro=None, count=21, number=1):
    engine = MAKE()
    engine.load(SPEC, structure, random_arrays(SPEC, structure))
    x, y = batch(SPEC, count)
    told = []
    task = rules.Task(recipe, engine, x, y, number, micro or recipe.batch, lambda *a: told.append(a))
    return engine, sgd.train(task), told


def same(a, b, atol=1e-6):
    for name, param in a.params.items():
        np.testing.assert_allclose(b.params[name], param, atol=atol, err_msg=name)


def differs(a, b):
    return any(not np.array_equal(param, b.params[name]) for name, param in a.params.items())


def oracle(recipe, count=21, number=1, turns=lambda _: [3]):
    """Each move written out with an engine of its own per width and dense gradients; the full width may teach the others."""
    x, y = batch(SPEC, count)
    rng = np.random.default_rng([recipe.seed, number])
    params = random_arrays(SPEC, NESTED)
    velocity = {n: np.zeros_like(p) for n, p in params.items()}
    soft = recipe.knobs.get("distil", 0.0)
    for _ in range(recipe.epochs):
        order = rng.permutation(count)
        for start in range(0, count, recipe.batch):
            rows = order[start : start + recipe.batch]
            target = y[rows]
            for k in turns(rng):
                engine = MAKE()
                engine.load(SPEC, NESTED.narrowed(k), cut(params, k))
                engine.forward_backward(x[rows], target)
                if k == 3 and soft:
                    odds = np.exp(engine.logits) / np.exp(engine.logits).sum(1, keepdims=True)
                    target = ((1 - soft) * np.eye(SPEC.classes)[y[rows]] + soft * odds).astype(np.float32)
                length = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in engine.grads.values()))
                factor = min(1.0, recipe.clip / length) if recipe.clip else 1.0
                for n, p in list(params.items()):
                    whole = np.zeros_like(p)
                    whole[tuple(slice(s) for s in engine.grads[n].shape)] = factor * engine.grads[n]
                    velocity[n] = recipe.momentum * velocity[n] + whole + recipe.decay * p
                    params[n] = p - (recipe.rate * velocity[n]).astype(np.float32)
    return params


def cut(params, capacity):
    shapes = {n: p.shape for n, p in random_arrays(SPEC, NESTED.narrowed(capacity)).items()}
    return {n: p[tuple(slice(s) for s in shapes[n])] for n, p in params.items()}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_sgd_meets_its_oracle(momentum, clip):
    recipe = Recipe(epochs=2, batch=8, rate=0.1, momentum=momentum, decay=0.01, clip=clip, seed=3)
    engine, result, told = trained(recipe)
    for name, param in oracle(recipe).items():
        np.testing.assert_allclose(engine.params[name], param, atol=2e-6, err_msg=name)
    assert result.steps == 6
    assert len(result.losses) == 2
    assert [done for done, _ in told] == pytest.approx([k / 6 for k in range(1, 7)])


@pytest.mark.parametrize(("number", "distil"), [(1, 0.0), (1, 0.5), (2, 0.5), (9, 1.0)])
def test_each_width_of_a_step_moves_in_its_turn(number, distil):
    knobs = {"widths": float(number), "distil": distil}
    recipe = Recipe(epochs=2, batch=8, rate=0.1, momentum=0.9, decay=0.01, clip=0.3, seed=3, knobs=knobs)

    def turns(rng):
        return [3, *sorted(rng.permutation(np.arange(1, 3))[:number], reverse=True), 0]

    engine, result, _ = trained(recipe)
    for name, param in oracle(recipe, turns=turns).items():
        np.testing.assert_allclose(engine.params[name], param, atol=5e-6, err_msg=name)
    assert result.steps == 6  # batches, whatever the widths that learnt from each


@pytest.mark.parametrize("knobs", [{}, {"widths": 1.0, "distil": 0.5}])
def test_micro_batches_train_the_same(knobs):
    recipe = Recipe(epochs=2, batch=8, rate=0.1, clip=0.5, knobs=knobs)
    whole, _, _ = trained(recipe)
    for micro in (1, 3):
        same(whole, trained(recipe, micro=micro)[0], atol=3e-6)


def test_the_narrowest_width_has_no_narrower_one():
    recipe = Recipe(batch=8, clip=1.0, knobs={"widths": 2.0})
    plain = Recipe(batch=8, clip=1.0)
    same(trained(recipe, NESTED.narrowed(0))[0], trained(plain, NESTED.narrowed(0))[0])
    same(trained(recipe, Structure())[0], trained(plain, Structure())[0])


def test_same_seed_and_round_give_the_same_bits_and_others_do_not():
    recipe = Recipe(epochs=2, batch=8, rate=0.1, momentum=0.9, clip=1.0, knobs={"widths": 1.0})
    first = trained(recipe)[0]
    assert not differs(first, trained(recipe)[0])
    assert differs(first, trained(recipe, number=2)[0])
    assert differs(first, trained(Recipe(**{**_fields(recipe), "seed": 1}))[0])


def test_divergence_is_named():
    with pytest.raises(NonFinite):
        trained(Recipe(epochs=3, batch=8, rate=1e18, decay=1e18))
    with pytest.raises(NonFinite):
        trained(Recipe(epochs=3, batch=8, rate=1e18, decay=1e18, clip=1e9))


def test_knobs_are_checked():
    for knobs, name in itertools.product([{"widths": 0.5}, {"widths": -1.0}, {"distil": 2.0}], [1]):
        with pytest.raises(SpecError, match="knob"):
            trained(Recipe(knobs=knobs), number=name)


@pytest.mark.parametrize("name", ["distil", "mutual"])
def test_soft_targets_are_those_of_a_softmax(name):
    with pytest.raises(SpecError, match="binary_cross_entropy"):
        trained(Recipe(loss="binary_cross_entropy", knobs={"widths": 1.0, name: 0.5}))


def test_no_samples_is_no_step():
    assert trained(Recipe(), count=0)[1] == rules.Trained((), 0)


@pytest.mark.parametrize("name", list(rules.RULES))
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(momentum=0.9), Recipe(clip=1.0)])
def test_rules_declare_what_the_planner_counts(name, recipe):
    rule = rules.find(name)
    assert rule.copies(recipe) == memory.copies(Recipe(**{**_fields(recipe), "rule": name}))


def test_registry():
    assert rules.find("sgd").NEEDS_ENGINE
    assert not rules.find("still").NEEDS_ENGINE
    with pytest.raises(Unsupported, match="sgd"):
        rules.find("magic")


def _fields(recipe):
    return {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
