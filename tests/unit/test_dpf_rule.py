"""Dense weights under a mask: against the loop of the paper, on a dense model of which a masked copy is made every step."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime import rules
from edge_runtime.engines import Choice
from edge_runtime.kernels.importance import Passed, gradient_blocks
from edge_runtime.rules import dpf, loop, sgd
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays
from tests.unit.test_masked_engine import deep, masks_of, times_mask
from wire import memory
from wire.errors import NonFinite, SpecError
from wire.messages import Recipe
from wire.spec import Structure
from wire.structure import masked

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = deep()
MASKS = masks_of(SPEC)
WHOLE = Structure()
COUNT = 22
NONE: dict[str, np.ndarray] = {}


def task(recipe, masks=MASKS, arrays=None, ways="sparse", micro=0):
    engine = MAKE()
    arrays = arrays or random_arrays(SPEC, WHOLE)
    structure = masked(masks) if masks else WHOLE
    engine.load(SPEC, structure, times_mask(arrays, masks), masks or None, Choice(ways={"": ways}))
    x, y = batch(SPEC, COUNT)
    return rules.Task(recipe, engine, x, y, 3, micro or recipe.batch, lambda *_: None, masks)


def gradient(arrays, x, y):
    """The dense gradient at some weights, and the loss there."""
    engine = MAKE()
    engine.load(SPEC, WHOLE, arrays)
    loss = engine.forward_backward(x, y)
    return loss, engine.grads


def penalty(recipe, name, w):
    """What the penalty adds to the gradient: of `lambda |w|^2`, or of `lambda |w|`."""
    strength = recipe.knobs.get("lambda", 0.0)
    if not name.endswith("weight") or not strength:
        return 0.0
    return strength * w / np.linalg.norm(w) if recipe.knobs.get("norm") else 2 * strength * w


def paper(recipe, masks, w, of):
    """Equation 2 of DPF: the gradient at `w * m` moves all of w; momentum and decay are those of w."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    v = {name: np.zeros_like(array) for name, array in w.items()}
    losses = []
    for rows in loop.batches(of):
        seen = {name: (array * masks.get(name, 1)).astype(np.float32) for name, array in w.items()}
        loss, g = gradient(seen, of.x[rows], of.y[rows])
        g = {name: array + penalty(recipe, name, seen[name]) for name, array in g.items()}
        kept = [array[masks[name]] if name in masks else array.ravel() for name, array in g.items()]
        length = np.linalg.norm(np.concatenate(kept))
        short = min(1.0, recipe.clip / length) if recipe.clip else 1.0
        for name in w:
            v[name] = recipe.momentum * v[name] + short * g[name] + recipe.decay * w[name]
            w[name] = w[name] - recipe.rate * v[name]
        losses.append(loss)
    return w, losses


RECIPES = [
    {},
    {"decay": 0.05},
    {"momentum": 0.8, "decay": 0.05},
    {"clip": 0.5, "decay": 0.05},
    {"clip": 0.5, "momentum": 0.8},
    {"knobs": {"lambda": 0.03}},
    {"knobs": {"lambda": 0.03, "norm": 1.0}, "momentum": 0.5, "clip": 1.0},
]


@pytest.mark.parametrize("ways", ["sparse", "dense"])
@pytest.mark.parametrize("micro", [0, 4])
@pytest.mark.parametrize("plain", RECIPES, ids=str)
def test_every_weight_moves_along_the_gradient_at_the_masked_weights(plain, micro, ways):
    recipe = Recipe("dpf", 2, 8, 0.1, **plain)
    before = random_arrays(SPEC, WHOLE)
    given = task(recipe, arrays=before, ways=ways, micro=micro)
    trained = dpf.train(given)
    wanted, losses = paper(recipe, MASKS, before, given)
    fade = trained.metrics["dpf.fade"]
    assert trained.update is not None
    assert trained.update.keys() == before.keys()
    for name, array in before.items():
        extra = trained.update[name]
        assert extra.places is None
        # What a device does not have fades with decay; who has it adds that.
        lost = (fade - 1) * array * ~MASKS[name] if name in MASKS else 0.0
        np.testing.assert_allclose(array + extra.values + lost, wanted[name], atol=2e-5, err_msg=name)
    assert np.mean(losses) == pytest.approx(np.mean(trained.losses), rel=0.05)
    assert not recipe.decay or fade < 1
    for name, mask in MASKS.items():
        moved = trained.update[name].values
        assert np.abs(moved[~mask]).max() > 1e-4
        start = before[name][mask]
        assert np.array_equal(given.engine.read(name) - start, moved[mask])


def test_without_masks_it_is_the_ordinary_rule_to_the_bit():
    for plain in ({}, {"momentum": 0.9, "decay": 0.01}, {"clip": 0.3}):
        one, other = (task(Recipe(rule, 2, 8, 0.1, **plain), masks=NONE) for rule in ("dpf", "sgd"))
        a, b = dpf.train(one), sgd.train(other)
        assert a == b
        assert all(np.array_equal(array, other.engine.params[name]) for name, array in one.engine.params.items())


def test_a_mask_that_keeps_everything_is_plain_sgd():
    full = {name: np.ones_like(mask) for name, mask in MASKS.items()}
    one, other = task(Recipe("dpf", 1, 8, 0.1), full), task(Recipe("sgd", 1, 8, 0.1), NONE)
    update = dpf.train(one).update
    sgd.train(other)
    for name, before in random_arrays(SPEC, WHOLE).items():
        np.testing.assert_allclose(before + update[name].values, other.engine.params[name], atol=2e-6)


def test_a_round_that_needs_no_dense_weights_sends_what_is_kept():
    recipe = Recipe("dpf", 1, 8, 0.1, knobs={"dense": 0.0})
    one, other = task(recipe), task(Recipe("sgd", 1, 8, 0.1))
    a, b = dpf.train(one), sgd.train(other)
    assert a == b
    assert a.update is None
    assert all(np.array_equal(one.engine.read(name), other.engine.read(name)) for name in one.engine.params)


def test_the_penalty_works_without_masks_too():
    recipe = Recipe("dpf", 1, 8, 0.1, knobs={"lambda": 0.2})
    given = task(recipe, NONE)
    dpf.train(given)
    wanted, _ = paper(recipe, {}, random_arrays(SPEC, WHOLE), given)
    for name, array in wanted.items():
        np.testing.assert_allclose(given.engine.params[name], array, atol=1e-5)


def test_gradient_blocks_are_the_gradient_of_a_masked_copy():
    given = task(Recipe("dpf", batch=8), ways="sparse")
    nodes = {node.params["weight"]: node for node in SPEC.nodes if node.params}
    shown = {}

    def watch(name, x, dy):
        shown[name] = Passed.through(nodes[name], (x.copy(), dy.copy()))

    given.engine.forward_backward(given.x, given.y, watch=watch)
    _, wanted = gradient(times_mask(random_arrays(SPEC, WHOLE), MASKS), given.x, given.y)
    assert shown.keys() == MASKS.keys()
    for name, passed in shown.items():
        blocks = [(first, block.copy()) for first, block in gradient_blocks(passed, 200)]
        assert [first for first, _ in blocks] == np.cumsum([0, *(len(block) for _, block in blocks[:-1])]).tolist()
        np.testing.assert_allclose(np.concatenate([block for _, block in blocks]), wanted[name], atol=1e-6)


@pytest.mark.parametrize(
    "knobs", [{"dense": 0.5}, {"norm": 2.0}, {"lambda": -1.0}, {"lambda": float("nan")}, {"lambda": float("inf")}]
)
def test_knobs_that_make_no_sense(knobs):
    with pytest.raises(SpecError, match=next(iter(knobs))):
        dpf.train(task(Recipe("dpf", batch=8, knobs=knobs)))


def test_adam_is_refused():
    with pytest.raises(SpecError, match="adam"):
        dpf.train(task(Recipe("dpf", batch=8, knobs={"adam": 1.0})))


def test_what_runs_away_is_told():
    with pytest.raises(NonFinite):
        dpf.train(task(Recipe("dpf", 3, 8, 1e30)))


def test_memory_counts_the_dense_copies():
    structure, size = masked(MASKS), 4 * sum(array.size for array in random_arrays(SPEC, WHOLE).values())
    plain = memory.predict(SPEC, structure, Recipe("sgd", batch=8)).peak
    for extra, whole in (({}, 1), ({"momentum": 0.9}, 2), ({"momentum": 0.9, "clip": 1.0}, 3)):
        recipe = Recipe("dpf", batch=8, **extra)
        found = memory.predict(SPEC, structure, recipe).peak
        assert found - plain >= whole * size
        assert memory.whole_copies(recipe) == whole
    assert memory.whole_copies(Recipe("dpf", batch=8), 4) == 2
    assert memory.whole_copies(Recipe("dpf", batch=8), masked=False) == 0
    assert memory.whole_copies(Recipe("dpf", batch=8, knobs={"dense": 0.0})) == 0
