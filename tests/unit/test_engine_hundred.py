"""A hundred steps of SGD with momentum, and dropout where a model has a place for it: every engine ends at the same loss."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from coordinator.blocks.initial import initial_weights
from edge_runtime.data import load, parse
from edge_runtime.engines import Update, open_engine
from tests.support.engines import NAMES
from tests.support.orders import dataset
from tests.support.sequences import recurrent
from wire import spec as specs
from wire import zoo
from wire.builders import resnet
from wire.spec import Node, Structure

STEPS, BATCH = 100, 20
WHOLE = Structure()
MODELS = {
    "perceptron": (zoo.by_name("digits-mlp"), 0.01),
    "batch norms": (zoo.load("digits-cnn-bn@0.5"), 0.01),
    "group norms": (resnet("blocks", (1, 8, 8), 4, ((6, 2), (8, 2))), 0.01),
    "sensors": (zoo.load("har-cnn@0.3"), 0.01),
    "lstm": (recurrent("lstm"), 0.1),
}
"""And the learning rate of each."""


def dropping(spec, permille=200):
    """Put a dropout before the last layer."""
    *others, last = spec.nodes
    between = Node("dropped", "dropout", last.inputs, {}, {"permille": permille})
    return specs.check(replace(spec, nodes=(*others, between, replace(last, inputs=("dropped",)))))


def samples(spec):
    """Give digits where the model reads them, else classes that can be told apart."""
    found = load(parse("digits")) if spec.name.startswith("digits") else dataset(spec, train=400, seed=2)
    x, y = found.train
    return x[:400].reshape(-1, *spec.input_shape), y[:400]


def trained(name, spec, rate):
    """Give the mean loss before the first step, and that after the last."""
    engine, (x, y) = open_engine(name)(), samples(spec)
    engine.load(spec, WHOLE, initial_weights(spec, 1))
    engine.seed(1, 2)
    before = engine.evaluate(x, y)[0] / len(x)
    velocity = {tensor: np.zeros_like(array) for tensor, array in engine.params.items()}
    update, rng = Update(rate, 0.9, 1e-4, velocity=velocity), np.random.default_rng(3)
    for _ in range(STEPS):
        rows = rng.permutation(len(x))[:BATCH]
        engine.forward_backward(x[rows], y[rows], update=update)
    return before, engine.evaluate(x, y)[0] / len(x)


@pytest.mark.parametrize("model", MODELS)
def test_a_hundred_steps_end_at_the_same_loss(model):
    spec, rate = MODELS[model]
    (before, first), *others = [trained(name, dropping(spec), rate) for name in NAMES]
    assert first < 0.9 * before, "it has learnt something"
    for _, other in others:
        assert other == pytest.approx(first, rel=0.01)
