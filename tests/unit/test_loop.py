"""The loop that rules share: how many batches, of what, in which order; losses by pass; who finds what runs away."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime import rules
from edge_runtime.rules import loop
from tests.support.by_torch import small_cnn_forward
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from tests.support.orders import some_masks
from wire.errors import NonFinite
from wire.memory import holds_gradients
from wire.messages import Recipe
from wire.spec import Structure

SPEC = small_cnn()
pytestmark = pytest.mark.usefixtures("every_engine")


def task(recipe, count=21, *, micro=None, number=1, masks=None, told=None):
    engine = MAKE()
    engine.load(SPEC, Structure(), random_arrays(SPEC, Structure()), masks or {})
    x, y = batch(SPEC, count)
    tell = (lambda *said: None) if told is None else (lambda *said: told.append(said))
    return rules.Task(recipe, engine, x, y, number, micro or recipe.batch, tell, masks or {})


def bare(recipe, count, number=1):
    """A task of a rule that looks at no weight."""
    return rules.Task(recipe, None, np.zeros((count, 1), np.float32), np.zeros(count, np.int64), number, 1, None)


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 30))
def test_batches_are_shuffled_passes_until_there_are_enough(count, size, epochs, steps):
    made = bare(Recipe(batch=size, epochs=epochs, steps=steps, seed=3), count)
    found = [rows.tolist() for rows in loop.batches(made)]
    each = -(-count // size)
    assert len(found) == loop.count_steps(made) == (0 if not count else steps or epochs * each)
    rng = np.random.default_rng([3, 1])
    line = []
    for _ in range(0, len(found), each or 1):
        order = rng.permutation(count).tolist()
        line += [order[i : i + size] for i in range(0, count, size)]
    assert found == line[: len(found)], "passes to their end, whatever the number of updates"
    for start in range(0, len(found) - each + 1, each or 1):
        assert sorted(itertools.chain(*found[start : start + each])) == list(range(count))


def test_batches_follow_seed_and_round_alone():
    def first(**how):
        number = how.pop("number", 1)
        return np.concatenate(list(loop.batches(bare(Recipe(batch=4, **how), 21, number)))).tolist()

    assert first(seed=1) == first(seed=1, rate=0.7, clip=1.0, knobs={"a": 1.0})
    assert first(seed=1) != first(seed=2)
    assert first(seed=1) != first(seed=1, number=2)
    assert first(seed=1, epochs=2) == first(seed=1, steps=12)
    assert first(seed=1, epochs=2, steps=7) == first(seed=1, epochs=2)[: 21 + 4]


def test_losses_are_means_of_passes_and_the_last_may_be_short():
    told = []
    made = task(Recipe(batch=8, steps=5), told=told)  # passes of 8, 8 and 5 samples
    losses = iter([1.0, 2.0, 4.0, 10.0, 20.0])
    trained = loop.run(made, lambda x, y: next(losses))
    assert trained.losses == pytest.approx(((8 * 1 + 8 * 2 + 5 * 4) / 21, (8 * 10 + 8 * 20) / 16))
    assert trained.steps == 5
    assert told == [(0.2, 1.0), (0.4, 2.0), (0.6, 4.0), (0.8, 10.0), (1.0, 20.0)]


def test_no_samples_no_steps():
    made = task(Recipe(batch=8, steps=5), count=0)
    assert loop.run(made, lambda x, y: 1 / 0) == rules.Trained((), 0)


def test_what_runs_away_is_found():
    losses = iter([1.0, float("nan")])
    with pytest.raises(NonFinite, match="step 2"):
        loop.run(task(Recipe(batch=8)), lambda x, y: next(losses))
    made = task(Recipe(batch=8, epochs=1))

    def spoil(x, y):
        made.engine.params["o.bias"][0] = np.nan
        return 0.5

    with pytest.raises(NonFinite, match="weight"):
        loop.run(made, spoil)
    with pytest.raises(NonFinite):
        loop.clip({"w": np.array([np.inf], np.float32)}, 1.0)


def test_a_source_of_randomness_may_be_shared_with_the_step():
    made = task(Recipe(batch=8, epochs=2, seed=9))
    rng = loop.rng_of(made)
    drawn = []
    loop.run(made, lambda x, y: drawn.append(int(rng.integers(100))) or 1.0, rng)
    again = np.random.default_rng([9, 1])
    wanted = []
    for _ in range(2):
        again.permutation(21)
        wanted += [int(again.integers(100)) for _ in range(3)]
    assert drawn == wanted


# --- ordinary updates ------------------------------------------------------------------------------------------------


def by_torch(recipe, masks, count=21):
    """Train with torch's own optimizers; a masked weight is the product of a parameter and its mask."""
    keep = {name: torch.tensor(masks.get(name, np.True_)) for name in random_arrays(SPEC, Structure())}
    params = {n: torch.nn.Parameter(torch.tensor(a) * keep[n]) for n, a in random_arrays(SPEC, Structure()).items()}
    if recipe.knobs:
        maker = torch.optim.Adam(params.values(), lr=recipe.rate, weight_decay=recipe.decay)
    else:
        maker = torch.optim.SGD(params.values(), recipe.rate, recipe.momentum, weight_decay=recipe.decay)
    x, y = (torch.tensor(part) for part in batch(SPEC, count))
    for rows in loop.batches(bare(recipe, count)):
        maker.zero_grad()
        output = small_cnn_forward({name: param * keep[name] for name, param in params.items()}, x[rows])
        if recipe.loss == "cross_entropy":
            loss = torch.nn.functional.cross_entropy(output, y[rows])
        else:
            hot = torch.nn.functional.one_hot(y[rows], 4).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(output, hot)
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(params.values(), recipe.clip)
        maker.step()
    return {name: (param * keep[name]).detach().numpy() for name, param in params.items()}, loss.item()


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(batch=8, epochs=2, rate=0.1),
        Recipe(batch=8, steps=7, rate=0.1, momentum=0.9, decay=0.01, clip=0.5),
        Recipe(batch=8, steps=7, rate=0.1, loss="binary_cross_entropy", momentum=0.5),
        Recipe(batch=8, steps=7, rate=0.01, knobs={"adam": 1.0}),
        Recipe(batch=8, epochs=2, rate=0.01, knobs={"adam": 1.0}, decay=0.1, clip=0.5, momentum=0.9),
    ],
)
def test_ordinary_updates_are_those_of_torch(recipe, density, micro):
    masks = {} if density is None else some_masks(SPEC, density)
    made = task(recipe, masks=masks, micro=micro)
    mover = loop.Mover(made)
    losses = []
    trained = loop.run(made, lambda x, y: losses.append(mover.step(x, y)) or losses[-1])
    wanted, last = by_torch(recipe, masks)
    assert losses[-1] == pytest.approx(last, rel=1e-4)
    assert trained.steps == loop.count_steps(made)
    for name, array in wanted.items():
        kept = array[masks[name]] if name in masks else array.ravel()
        np.testing.assert_allclose(made.engine.read(name), kept, atol=2e-5, err_msg=name)


def test_adam_keeps_its_gradients_and_starts_anew_in_every_order():
    recipe = Recipe(batch=8, knobs={"adam": 1.0}, rate=0.01, momentum=0.9)
    assert holds_gradients(recipe, 8)
    made = task(recipe)
    assert loop.Mover(made).update.velocity is None, "momentum is not used"
    before = {name: array.copy() for name, array in made.engine.params.items()}
    x, y = batch(SPEC, 8)
    moves = []
    for _ in range(2):
        for name, array in before.items():
            made.engine.params[name][...] = array
        loop.Mover(made).step(x, y)
        moves.append({name: array - before[name] for name, array in made.engine.params.items()})
    for name, first in moves[0].items():
        np.testing.assert_array_equal(first, moves[1][name])
    assert np.abs(moves[0]["f.weight"]).max() == pytest.approx(0.01, rel=1e-3), "the first step is the rate, by sign"
