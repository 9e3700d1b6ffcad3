"""What benchmarks of the kernels reckon with: curves, turns, models in plain torch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from edge_runtime.engines import Update, open_engine
from tests.bench import _models, _noise, _plot
from tests.bench._layers import BATCH, LAYERS, Layer, Task, dense
from tests.bench._paired import faster, take_turns
from tests.bench.kernels import even
from wire import zoo
from wire.spec import Structure


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({0.1: 4.0, 0.4: 1.0, 1.0: 0.5}, 0.4),
        ({0.25: 2.0, 1.0: 0.5}, 0.5),
        ({0.01: 9.0, 0.1: 3.0, 1.0: 1.5}, 1.0),
        ({0.01: 0.9, 0.1: 0.3}, 0.0),
        ({0.01: 2.0, 0.04: 0.5, 0.1: 3.0}, 0.02),
    ],
)
def test_break_even(speeds, expected):
    assert even(speeds) == pytest.approx(expected)


def test_candidates_take_turns_and_ratios_are_within_a_round():
    clock = itertools.count().__next__  # a second passes between two looks
    seen = []
    times = take_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 3, 0.5, lambda: float(clock()))
    assert "".join(seen) == "aabb" + "ab" * 3
    assert times == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert faster({"a": [1.0, 2.0, 9.0], "b": [2.0, 6.0, 9.0]}, "a", "b") == 2.0


@pytest.mark.parametrize("layer", [Layer(5, 7), Layer(3, 2, 3, 4)])
def test_the_dense_side_of_a_layer_is_the_layer(layer):
    task = Task.of(layer, 0.4)
    assert task.mask.sum() == round(0.4 * task.mask.size)
    w, b, x = (torch.from_numpy(a).requires_grad_() for a in (task.weight, task.bias, task.x))
    function = torch.nn.functional.conv2d if layer.kernel else torch.nn.functional.linear
    y = function(x, w, b, padding=layer.kernel // 2) if layer.kernel else function(x, w, b)
    y.backward(torch.from_numpy(task.dy))
    run, results = dense(task)
    run()
    found = results()
    np.testing.assert_allclose(found.y, y.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found.dx, x.grad.numpy(), atol=1e-5)
    np.testing.assert_allclose(found.dw, w.grad.numpy() * task.mask, atol=1e-4)
    np.testing.assert_allclose(found.db, b.grad.numpy(), atol=1e-4)
    assert found.y.shape == (BATCH, *layer.output_shape)


def test_the_nine_layers():
    assert len({layer.name for layer in LAYERS}) == 9
    assert LAYERS[6].name == "conv 32->64 5x5@14"
    assert LAYERS[0].name == "linear 3136->2048"


@pytest.mark.parametrize(
    "spec", [zoo.by_name("lenet-5"), zoo.resnet("tiny", (3, 8, 8), 10, ((4, 1), (6, 2)))], ids=lambda spec: spec.name
)
def test_plain_models_train_as_the_engine_does(spec):
    arrays, (x, y) = _noise.weights(spec), _noise.batch(spec)
    engine = open_engine("torch")()
    engine.load(spec, Structure(), arrays)
    plain = _models.Plain(spec, arrays)
    loss = _models.training(plain, x, y)()
    assert engine.forward_backward(x, y, update=Update(_models.RATE)) == pytest.approx(loss, rel=1e-5)
    for name in arrays:
        np.testing.assert_allclose(engine.params[name], plain.weight(name), atol=1e-6)


def test_masked_models_do_not_see_or_move_what_is_not_kept():
    spec = zoo.by_name("lenet-300-100")
    arrays, masks = _noise.weights(spec), _noise.masks(spec, 0.1, first=False)
    assert sorted(masks) == ["fc2.weight", "out.weight"]
    assert masks["fc2.weight"].mean() == pytest.approx(0.1, abs=0.01)
    loud = {name: np.where(masks.get(name, True), a, np.float32(9)) for name, a in arrays.items()}
    losses = []
    for weights in (arrays, loud):
        plain = _models.Plain(spec, weights, masks)
        losses.append(_models.training(plain, *_noise.batch(spec))())
    assert losses[0] == losses[1]
    lost = ~masks["fc2.weight"]
    assert (plain.weight("fc2.weight")[lost] == 9).all()
    assert (plain.weight("fc2.weight")[~lost] != loud["fc2.weight"][~lost]).any()


def test_the_plot_reads_the_rows():
    rows = [
        {"case": "linear 3->4, density 0.1", "measure": "times dense, whole", "value": 2.0},
        {"case": "linear 3->4, density 0.1", "measure": "times dense, chain", "value": 3.0},
        {"case": "linear 3->4, density 0.1, both AVX2", "measure": "times dense, whole", "value": 4.0},
        {"case": "linear 3->4, density 0.1", "measure": "times PruneFL, chain", "value": 9.0},
        {"case": "2 layers and densities", "measure": "times PruneFL, least", "value": 8.0},
    ]
    assert _plot.curves(rows, "") == {"linear 3->4": {0.1: 2.0}}
    assert _plot.curves(rows, ", both AVX2") == {"linear 3->4": {0.1: 4.0}}
    assert _plot.peers(rows) == {"PruneFL": [9.0]}
