"""The rule fiarse: the gradient's factor by its formula, steps by hand however weights are held, plain SGD at 0."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edge_runtime import rules
from edge_runtime.engines import Choice
from edge_runtime.rules import fiarse, sgd
from tests.support.by_torch import small_cnn_forward
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from wire.errors import SpecError
from wire.messages import Recipe
from wire.spec import Structure
from wire.structure import masked

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
WEIGHTS = random_arrays(SPEC, Structure())
MASKED = ("c.weight", "f.weight", "o.weight")
LEAST = 0.25
MASKS = {name: np.abs(WEIGHTS[name]) >= LEAST for name in MASKED}
RECIPE = Recipe(rule="fiarse", batch=8, rate=0.1, epochs=2, momentum=0.9, decay=0.01, clip=0.5, seed=3)


def trained(recipe, rule=fiarse, way="sparse", micro=8, masks=MASKS):
    engine = MAKE()
    ways = Choice(8, dict.fromkeys(masks, way))
    engine.load(SPEC, masked(masks), WEIGHTS, masks, ways)
    x, y = batch(SPEC, 40)
    rule.train(rules.Task(recipe, engine, x, y, 1, micro, lambda *_: None, masks))
    found = {}
    for name, array in WEIGHTS.items():
        found[name] = np.zeros(array.shape, np.float32)
        found[name][masks.get(name, ...)] = engine.read(name).reshape(-1 if name in masks else array.shape)
    return found


def told(threshold, recipe=RECIPE):
    return dataclasses.replace(recipe, knobs={"threshold": threshold})


def by_hand(threshold):
    """The same steps with torch's own gradients in float64."""
    keep = {name: torch.tensor(MASKS.get(name, np.True_)) for name in WEIGHTS}
    params = {name: (torch.tensor(array).double() * keep[name]).requires_grad_() for name, array in WEIGHTS.items()}
    velocity = {name: torch.zeros_like(param) for name, param in params.items()}
    x, y = batch(SPEC, 40)
    rng = np.random.default_rng([RECIPE.seed, 1])
    for _ in range(RECIPE.epochs):
        order = rng.permutation(40)
        for rows in (order[i : i + 8] for i in range(0, 40, 8)):
            output = small_cnn_forward(params, torch.tensor(x[rows]).double())
            loss = torch.nn.functional.cross_entropy(output, torch.tensor(y[rows]))
            grads = dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True))
            with torch.no_grad():
                for name in MASKED:
                    size = params[name].abs()
                    grads[name] = keep[name] * grads[name] * (1 + size * 2 * threshold / (size + threshold) ** 2)
                length = torch.sqrt(sum((grad**2).sum() for grad in grads.values()))
                for name, param in params.items():
                    move = grads[name] * min(1.0, RECIPE.clip / float(length)) + RECIPE.decay * param
                    velocity[name] = RECIPE.momentum * velocity[name] + move
                    param.sub_(RECIPE.rate * velocity[name])
    return {name: param.detach().numpy() for name, param in params.items()}


def test_the_factor_by_hand():
    params = {"w": np.array([[0.0, 0.5], [-0.5, 1.5]], np.float32), "b": np.ones(2, np.float32)}
    grads = {"w": np.array([[1.0, 2.0], [-4.0, 1.0]], np.float32), "b": np.ones(2, np.float32)}
    fiarse.scale(params, grads, {"w": None}, 0.5)
    np.testing.assert_allclose(grads["w"], [[1.0, 3.0], [-6.0, 1.375]], rtol=1e-6)  # 1 at 0, 1.5 at the threshold
    assert grads["b"].tolist() == [1.0, 1.0]


def test_the_factor_in_blocks_and_with_tiny_numbers():
    rng = np.random.default_rng(4)
    for size in (1e-30, 1.0, 1e20):
        weights = (size * rng.standard_normal(40_000)).astype(np.float32)
        gradient = rng.standard_normal(40_000).astype(np.float32)
        grads = {"w": gradient.copy()}
        fiarse.scale({"w": weights}, grads, {"w": None}, 0.7 * size)
        exact, least = np.abs(weights.astype(np.float64)), 0.7 * size
        np.testing.assert_allclose(grads["w"], gradient * (1 + 2 * least * exact / (exact + least) ** 2), rtol=1e-5)


@pytest.mark.parametrize("way", ["sparse", "dense"])
@pytest.mark.parametrize("micro", [8, 3])
def test_training_is_that_of_torch_with_the_factor(way, micro):
    wanted, found = by_hand(LEAST), trained(told(LEAST), way=way, micro=micro)
    plain = trained(told(0.0), way=way, micro=micro)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=5e-6, err_msg=name)
        assert not found[name][~np.broadcast_to(MASKS.get(name, np.True_), array.shape)].any()
        assert np.abs(plain[name] - array).max() > 1e-4, "the factor is seen"


def test_threshold_0_or_no_masks_is_plain_sgd():
    for masks in (MASKS, {}):
        plain = trained(dataclasses.replace(RECIPE, rule="sgd"), sgd, masks=masks)
        for name, array in trained(told(0.0 if masks else LEAST), masks=masks).items():
            np.testing.assert_array_equal(array, plain[name])


def test_a_threshold_that_is_none_is_refused():
    for threshold in (-1.0, float("inf"), float("nan")):
        with pytest.raises(SpecError, match="knob threshold"):
            trained(told(threshold))
