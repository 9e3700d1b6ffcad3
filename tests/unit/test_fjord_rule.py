"""Ordered dropout against torch's own layers, and against the singular directions that it finds in a linear model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_runtime import rules, shrink
from edge_runtime.rules import fjord
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn, widths
from wire import memory
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
NESTED = widths(a=(2, 3, 4, 6), b=(3, 5, 8, 12))


def trained(recipe, structure=NESTED, micro=None, count=21):
    engine = MAKE()
    engine.load(SPEC, structure, random_arrays(SPEC, structure))
    x, y = batch(SPEC, count)
    recipe = dataclasses.replace(recipe, rule="fjord")
    task = rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None)
    return task, fjord.train(task)


def logits_of(leaves, x, capacity):
    a, b = NESTED.widths["a"][capacity], NESTED.widths["b"][capacity]
    hidden = torch.relu(F.conv2d(x, leaves["c.weight"][:a], leaves["c.bias"][:a], padding=1))
    hidden = F.max_pool2d(hidden, 2).flatten(1)
    hidden = torch.tanh(F.linear(hidden, leaves["f.weight"][:b, : 9 * a], leaves["f.bias"][:b]))
    return F.linear(hidden, leaves["o.weight"][:, :b], leaves["o.bias"])


def move(leaves, velocity, recipe):
    """One step of SGD. Not by torch.optim, which takes 20 s to load."""
    with torch.no_grad():
        for name, leaf in leaves.items():
            velocity[name] = recipe.momentum * velocity[name] + leaf.grad + recipe.decay * leaf
            leaf.sub_(recipe.rate * velocity[name])


def oracle(task, own):
    """Train slices of whole leaves by torch; a width drawn after the batch's samples, from one source."""
    recipe, rng = task.recipe, np.random.default_rng([task.recipe.seed, task.round])
    start = random_arrays(SPEC, NESTED.narrowed(own))
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in start.items()}
    velocity = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    drawn = []
    for _ in range(recipe.epochs):
        order = rng.permutation(len(task.x))
        for first in range(0, len(order), recipe.batch):
            rows = order[first : first + recipe.batch]
            x, y = torch.from_numpy(task.x[rows]), torch.from_numpy(task.y[rows])
            drawn.append(int(rng.integers(own + 1)))
            for leaf in leaves.values():
                leaf.grad = torch.zeros_like(leaf)
            if recipe.knobs.get("distil"):
                full = logits_of(leaves, x, own)
                F.cross_entropy(full, y).backward()
                y = full.detach().softmax(1)
            F.cross_entropy(logits_of(leaves, x, drawn[-1]), y).backward()
            if recipe.clip:
                torch.nn.utils.clip_grad_norm_(leaves.values(), recipe.clip)
            move(leaves, velocity, recipe)
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}, drawn


@pytest.mark.parametrize("distil", [0.0, 1.0])
@pytest.mark.parametrize("own", [0, 2, 3])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=3, batch=8, rate=0.1),
        Recipe(epochs=3, batch=8, rate=0.1, clip=0.3, momentum=0.9, decay=0.01, seed=5),
    ],
)
def test_ordered_dropout_is_torchs(recipe, own, distil):
    task, result = trained(dataclasses.replace(recipe, knobs={"distil": distil}), NESTED.narrowed(own))
    wanted, drawn = oracle(task, own)
    for name, array in wanted.items():
        np.testing.assert_allclose(task.engine.params[name], array, atol=5e-6, err_msg=name)
    assert result.steps == len(drawn) == 9
    assert len(set(drawn)) > 1 or own == 0
    assert len(result.losses) == 3


@pytest.mark.parametrize("distil", [0.0, 1.0])
def test_micro_batches_train_the_same(distil):
    recipe = Recipe(epochs=2, batch=8, rate=0.1, clip=0.5, momentum=0.9, knobs={"distil": distil})
    whole, _ = trained(recipe)
    for micro in (1, 3):
        small, _ = trained(recipe, micro=micro)
        for name, array in whole.engine.params.items():
            np.testing.assert_allclose(small.engine.params[name], array, atol=5e-6)


def test_a_step_of_a_narrow_width_moves_nothing_else():
    for seed in range(20):
        recipe = Recipe(epochs=1, batch=32, rate=0.1, seed=seed)
        task, _ = trained(recipe)
        _, (capacity,) = oracle(task, 3)
        kept = {name: a.shape for name, a in random_arrays(SPEC, NESTED.narrowed(capacity)).items()}
        for name, before in random_arrays(SPEC, NESTED).items():
            moved = task.engine.params[name] != before
            outside = np.ones(before.shape, bool)
            outside[tuple(slice(length) for length in kept[name])] = False
            assert moved.any()
            assert not moved[outside].any()


def test_the_narrowest_width_has_no_narrower_one_and_is_sgd():
    recipe = Recipe(epochs=2, batch=8, rate=0.1, clip=1.0)
    for structure in (NESTED.narrowed(0), Structure()):
        task, _ = trained(dataclasses.replace(recipe, knobs={"distil": 1.0}), structure)
        other, _ = trained(recipe, structure)
        for name, array in other.engine.params.items():
            assert np.array_equal(task.engine.params[name], array)


def autoencoder(inputs, hidden):
    """inputs -> hidden -> inputs, without anything between."""
    tensors = (
        TensorSpec("down.weight", (Axis("h"), Axis(inner=inputs))),
        TensorSpec("down.bias", (Axis("h"),)),
        TensorSpec("up.weight", (Axis("out"), Axis("h"))),
        TensorSpec("up.bias", (Axis("out"),)),
    )
    nodes = (
        Node("down", "linear", ("input",), {"weight": "down.weight", "bias": "down.bias"}),
        Node("up", "linear", ("down",), {"weight": "up.weight", "bias": "up.bias"}),
    )
    groups = (AxisGroup("h", hidden), AxisGroup("out", inputs, prunable=False))
    return check(ModelSpec("autoencoder", (inputs,), inputs, groups, tensors, nodes))


def test_on_a_linear_autoencoder_width_k_is_the_projection_to_the_first_k_singular_directions():
    """The paper's theorem on linear maps. The engine knows no squares, but near even odds cross-entropy is one.

    For targets ``(1 + x) / n`` with ``x`` small and adding up to 0 it is ``|z - x|^2 / 2n`` plus a constant and terms of
    higher order, for the logits ``z`` less their mean.
    """
    inputs, small = 4, 0.02
    rng = np.random.default_rng(4)
    even = np.linalg.qr(np.column_stack([np.ones(inputs), rng.standard_normal((inputs, inputs - 1))]))[0][:, 1:]
    place = np.linalg.qr(rng.standard_normal((16, inputs - 1)))[0] * 4.0
    x = (place * [4.0, 3.0, 0.3]) @ even.T
    x = np.concatenate([x, -x]).astype(np.float32)  # so that what is odd cancels, and no bias moves
    spec, structure = autoencoder(inputs, 2), widths(h=(1, 2))
    start = random_arrays(spec, structure, 7, scale=0.05)
    centred = np.eye(inputs) - 1 / inputs  # the data have nothing along the line of ones, nor has the softmax
    gaps = {}
    for name in ("fjord", "sgd"):
        engine = MAKE()
        engine.load(spec, structure, {name: a * np.float32(a.ndim > 1) for name, a in start.items()})
        recipe = Recipe(rule=name, epochs=150, batch=32, rate=4.0, momentum=0.8)
        targets = ((1 + small * x) / inputs).astype(np.float32)
        rules.find(name).train(rules.Task(recipe, engine, x, targets, 1, 32, lambda *_: None))
        up, down = (engine.params[f"{layer}.weight"].astype(np.float64) for layer in ("up", "down"))
        found = [centred @ up[:, :k] @ down[:k] @ centred / small for k in (1, 2)]
        gaps[name] = [float(np.abs(f - even[:, :k] @ even[:, :k].T).max()) for k, f in enumerate(found, 1)]
    assert max(gaps["fjord"]) < 0.01
    assert gaps["sgd"][1] < 0.01, "the whole model finds the same plane, and its first unit something else in it"
    assert gaps["sgd"][0] > 0.1


def test_what_it_cannot_do_is_said():
    with pytest.raises(SpecError, match="distil"):
        trained(Recipe(knobs={"distil": 0.5}))
    with pytest.raises(SpecError, match="cross_entropy"):
        trained(Recipe(loss="binary_cross_entropy", knobs={"distil": 1.0}))
    assert trained(Recipe(), count=0)[1] == rules.Trained((), 0)
    assert memory.holds_gradients(Recipe(rule="fjord", batch=8), 8)


def test_an_order_that_is_cut_goes_on_among_the_widths_that_are_left():
    def squeeze(done, held):
        if done >= 0.5 and task.engine.structure.capacity == 3:
            shrink.narrow(task.engine, NESTED.narrowed(1), held)

    recipe = Recipe(rule="fjord", epochs=4, batch=8, rate=0.1, momentum=0.9, knobs={"distil": 1.0})
    engine = MAKE()
    engine.load(SPEC, NESTED, random_arrays(SPEC, NESTED))
    x, y = batch(SPEC, 21)
    task = rules.Task(recipe, engine, x, y, 1, 8, lambda *_: None, squeeze=squeeze)
    assert fjord.train(task).steps == 12
    assert {name: a.shape for name, a in engine.params.items()} == {
        name: a.shape for name, a in random_arrays(SPEC, NESTED.narrowed(1)).items()
    }
