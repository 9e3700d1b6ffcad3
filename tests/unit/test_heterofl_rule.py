"""HeteroFL's local training against torch's own layers, loss, clipping and optimiser, with logits masked as the paper does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_runtime import rules, shrink
from edge_runtime.rules import heterofl, loop
from tests.support.engines import make as MAKE
from tests.support.models import batch, linear, random_arrays, small_cnn, widths
from wire import memory, zoo
from wire.errors import SpecError
from wire.head import head_of
from wire.messages import Recipe
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, check

pytestmark = pytest.mark.usefixtures("every_engine")
SPEC = small_cnn()
NESTED = widths(a=(2, 3, 6), b=(3, 6, 12))
HEAD = ("o.weight", "o.bias")


def task_of(recipe, structure=NESTED, labels=(0, 2), micro=None, count=21, spec=SPEC):
    engine = MAKE()
    engine.load(spec, structure, random_arrays(spec, structure))
    x, y = batch(spec, count)
    y = np.array(labels, np.int64)[y % len(labels)]
    return rules.Task(recipe, engine, x, y, 1, micro or recipe.batch, lambda *_: None)


def trained(recipe, **others):
    task = task_of(dataclasses.replace(recipe, rule="heterofl"), **others)
    return task, heterofl.train(task)


def logits_of(leaves, x, rate):
    hidden = torch.relu(F.conv2d(x, leaves["c.weight"], leaves["c.bias"], padding=1) / rate)
    hidden = F.max_pool2d(hidden, 2).flatten(1)
    hidden = torch.tanh(F.linear(hidden, leaves["f.weight"], leaves["f.bias"]) / rate)
    return F.linear(hidden, leaves["o.weight"], leaves["o.bias"])


def move(leaves, velocity, recipe):
    """One step of SGD. Not by torch.optim, which takes 20 s to load."""
    with torch.no_grad():
        for name, leaf in leaves.items():
            velocity[name] = recipe.momentum * velocity[name] + leaf.grad + recipe.decay * leaf
            leaf.sub_(recipe.rate * velocity[name])


def oracle(task, *, mask=True, rate=1.0):
    """Train by torch alone; give weights and mean loss of each pass."""
    recipe = task.recipe
    start = random_arrays(SPEC, task.engine.structure)
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in start.items()}
    velocity = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    absent = torch.ones(SPEC.classes, dtype=torch.bool)
    absent[torch.from_numpy(np.unique(task.y))] = False
    losses, seen = [], []
    for rows in loop.batches(task):
        for leaf in leaves.values():
            leaf.grad = torch.zeros_like(leaf)
        logits = logits_of(leaves, torch.from_numpy(task.x[rows]), rate)
        logits = logits.masked_fill(absent, 0.0) if mask else logits
        loss = F.cross_entropy(logits, torch.from_numpy(task.y[rows]))
        loss.backward()
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(leaves.values(), recipe.clip)
        move(leaves, velocity, recipe)
        seen.append((loss.item(), len(rows)))
        if sum(n for _, n in seen) == len(task.x):
            losses.append(sum(value * n for value, n in seen) / len(task.x))
            seen = []
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}, losses


@pytest.mark.parametrize("labels", [(1,), (0, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(epochs=2, batch=8, rate=0.1),
        Recipe(epochs=2, batch=8, rate=0.1, clip=0.3),
        Recipe(epochs=2, batch=8, rate=0.1, clip=0.3, momentum=0.9, decay=0.01),
    ],
)
def test_masked_training_is_torchs(recipe, labels):
    task, result = trained(recipe, labels=labels)
    wanted, losses = oracle(task)
    absent = np.setdiff1d(np.arange(SPEC.classes), labels)
    before = random_arrays(SPEC, NESTED)
    for name, array in wanted.items():
        rest = np.setdiff1d(np.arange(len(array)), absent) if name in HEAD else np.arange(len(array))
        np.testing.assert_allclose(task.engine.params[name][rest], array[rest], atol=3e-6, err_msg=name)
        if name in HEAD:  # torch's decay moves these rows too, but nobody reads them there either
            assert np.array_equal(task.engine.params[name][absent], before[name][absent])
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert result.extras["o.bias"].places.tolist() == list(labels)
    assert result.extras["o.bias"].values.tolist() == [1.0] * len(labels)
    assert set(result.extras) == {"o.bias"}


def test_the_mask_matters():
    recipe = Recipe(epochs=1, batch=8, rate=0.1, knobs={"mask": 0.0})
    task, result = trained(recipe)
    wanted, _ = oracle(task, mask=False)
    for name, array in wanted.items():
        np.testing.assert_allclose(task.engine.params[name], array, atol=3e-6, err_msg=name)
    assert not result.extras
    masked, _ = trained(Recipe(epochs=1, batch=8, rate=0.1))
    assert not np.allclose(masked.engine.params["f.weight"], task.engine.params["f.weight"], atol=1e-4)


def test_one_sample_by_hand():
    """Labels 0 and 2 of three are here. Of logits (l, -, m), the softmax is of (l, 0, m), and row 1 has no gradient."""
    spec = linear(2, 3)
    engine = MAKE()
    w, b = np.array([[0.5, -1.0], [2.0, 3.0], [0.25, 1.0]], np.float32), np.array([0.1, 7.0, -0.2], np.float32)
    engine.load(spec, Structure(), {"o.weight": w, "o.bias": b})
    x, y = np.array([[1.0, 2.0], [-1.0, 0.5]], np.float32), np.array([2, 0], np.int64)
    recipe = Recipe(rule="heterofl", epochs=1, batch=2, rate=1.0)
    result = heterofl.train(rules.Task(recipe, engine, x, y, 1, 2, lambda *_: None))
    grad_w, grad_b, loss = np.zeros((3, 2)), np.zeros(3), 0.0
    for sample, label in zip(x.astype(np.float64), y, strict=True):
        logits = w.astype(np.float64) @ sample + b
        logits[1] = 0.0
        odds = np.exp(logits) / np.exp(logits).sum()
        loss -= np.log(odds[label]) / 2
        for row in (0, 2):
            grad_w[row] += (odds[row] - (row == label)) * sample / 2
            grad_b[row] += (odds[row] - (row == label)) / 2
    np.testing.assert_allclose(engine.params["o.weight"], w - grad_w, atol=1e-6)
    np.testing.assert_allclose(engine.params["o.bias"], b - grad_b, atol=1e-6)
    assert result.losses == pytest.approx((loss,), rel=1e-6)


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.2])
@pytest.mark.parametrize("mask", [1.0, 0.0])
def test_the_scaler_divides_what_hidden_layers_give(scale, mask):
    recipe = Recipe(epochs=2, batch=8, rate=0.05, clip=0.4, momentum=0.9, decay=0.01)
    task, _ = trained(dataclasses.replace(recipe, knobs={"scale": scale, "mask": mask}), structure=NESTED.narrowed(1))
    wanted, _ = oracle(task, mask=bool(mask), rate=scale)
    plain, _ = oracle(task, mask=bool(mask))
    present = np.unique(task.y) if mask else np.arange(SPEC.classes)
    for name, array in wanted.items():
        rows = present if name in HEAD else np.arange(len(array))
        np.testing.assert_allclose(task.engine.params[name][rows], array[rows], atol=1e-5, err_msg=name)
    assert not np.allclose(plain["f.weight"], wanted["f.weight"], atol=1e-3)


@pytest.mark.parametrize("scale", [0.5, 0.0625])
def test_a_power_of_two_leaves_weights_that_do_not_move_bit_for_bit(scale):
    task, _ = trained(Recipe(epochs=2, batch=8, rate=0.0, knobs={"scale": scale}))
    for name, array in random_arrays(SPEC, NESTED).items():
        assert np.array_equal(task.engine.params[name], array)


@pytest.mark.parametrize("knobs", [{}, {"scale": 0.5}])
def test_micro_batches_train_the_same(knobs):
    recipe = Recipe(epochs=2, batch=8, rate=0.1, clip=0.5, momentum=0.9, knobs=knobs)
    whole, _ = trained(recipe)
    for micro in (1, 3):
        small, _ = trained(recipe, micro=micro)
        for name, array in whole.engine.params.items():
            np.testing.assert_allclose(small.engine.params[name], array, atol=5e-6)


def test_with_all_labels_here_it_is_sgd_bit_for_bit():
    recipe = Recipe(epochs=2, batch=8, rate=0.1, clip=0.3, momentum=0.9)
    task, result = trained(recipe, labels=(0, 1, 2, 3))
    plain = task_of(recipe, labels=(0, 1, 2, 3))
    assert rules.find("sgd").train(plain).losses == result.losses
    for name, array in plain.engine.params.items():
        assert np.array_equal(task.engine.params[name], array)


def test_adam_leaves_absent_rows_alone():
    task, _ = trained(Recipe(epochs=1, batch=8, rate=0.01, knobs={"adam": 1.0}))
    before = random_arrays(SPEC, NESTED)
    for name in HEAD:
        assert np.array_equal(task.engine.params[name][[1, 3]], before[name][[1, 3]])
        assert not np.isclose(task.engine.params[name][[0, 2]], before[name][[0, 2]]).all()


def test_no_samples_is_no_step_and_tells_nothing():
    task, result = trained(Recipe(), count=0)
    assert result == rules.Trained((), 0)
    for name, array in random_arrays(SPEC, NESTED).items():
        assert np.array_equal(task.engine.params[name], array)


def test_which_layers_are_scaled():
    names = heterofl.scaled_tensors(zoo.by_name("digits-cnn"))
    spec = zoo.by_name("digits-cnn")
    assert set(names) == {t.name for t in spec.tensors} - set(head_of(spec).params.values())
    assert heterofl.scaled_tensors(zoo.by_name("resnet-18")) == (), "norms and sums follow every convolution"
    assert heterofl.scaled_tensors(linear()) == ()


def residual(shared):
    """input 2 -> a, relu, -> a (the same weights if `shared`), added to the first one's relu, -> classes."""
    second = "one" if shared else "two"
    sizes = {"one": Axis("" if not shared else "a", 4 if not shared else 1), "two": Axis("a")}
    tensors = [
        TensorSpec("one.weight", (Axis("a"), sizes["one"])),
        TensorSpec("one.bias", (Axis("a"),)),
        TensorSpec("two.weight", (Axis("a"), Axis("a"))),
        TensorSpec("two.bias", (Axis("a"),)),
        TensorSpec("o.weight", (Axis("classes"), Axis("a"))),
        TensorSpec("o.bias", (Axis("classes"),)),
    ]
    nodes = (
        Node("one", "linear", ("input",), {"weight": "one.weight", "bias": "one.bias"}),
        Node("r", "relu", ("one",)),
        Node("two", "linear", ("r",), {"weight": f"{second}.weight", "bias": f"{second}.bias"}),
        Node("sum", "add", ("two", "r")),
        Node("o", "linear", ("sum",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("a", 4, prunable=not shared), AxisGroup("classes", 3, prunable=False))
    kept = tuple(t for t in tensors if not (shared and t.name.startswith("two")))
    return check(ModelSpec("residual", (4,), 3, groups, kept, nodes))


def test_a_layer_before_a_sum_is_left_out_and_weights_of_both_kinds_are_refused():
    assert heterofl.scaled_tensors(residual(shared=False)) == ("one.weight", "one.bias")
    with pytest.raises(SpecError, match=r"one\.bias"):
        heterofl.scaled_tensors(residual(shared=True))


def test_what_it_cannot_do_is_said():
    for knobs in ({"mask": 0.5}, {"scale": 0.0}, {"scale": 1.5}):
        with pytest.raises(SpecError, match="knob"):
            trained(Recipe(knobs=knobs))
    with pytest.raises(SpecError, match="cross_entropy"):
        trained(Recipe(loss="binary_cross_entropy"))
    masked = dataclasses.replace(task_of(Recipe()), masks={"f.weight": np.ones((12, 54), bool)})
    with pytest.raises(SpecError, match="masked"):
        heterofl.train(masked)


def test_the_head_is_the_last_linear_layer_and_nobody_elses():
    assert head_of(SPEC).name == "o"
    with pytest.raises(SpecError, match="sigmoid"):
        head_of(dataclasses.replace(SPEC, nodes=(*SPEC.nodes, Node("end", "sigmoid", ("o",)))))
    twice = dataclasses.replace(SPEC.nodes[4], params={"weight": "o.weight", "bias": "f.bias"})
    with pytest.raises(SpecError, match=r"o\.weight"):
        head_of(dataclasses.replace(SPEC, nodes=(*SPEC.nodes[:4], twice, *SPEC.nodes[5:])))


def test_what_it_sets_aside_is_in_the_prediction():
    recipe = Recipe(rule="heterofl", batch=4)
    spec = zoo.by_name("digits-cnn")
    masked, plain = (
        memory.predict(spec, Structure(), dataclasses.replace(recipe, knobs={"mask": mask})).peak for mask in (1.0, 0.0)
    )
    assert masked - plain == 4 * (10 * 1536 + 10) + 12 * 10
    assert memory.holds_gradients(recipe, 4)


def test_an_order_that_is_cut_gives_back_the_rows_of_the_narrower_width():
    seen = []

    def squeeze(done, held):
        seen.append((done, held))
        if done >= 0.5 and task.engine.structure.capacity:
            shrink.narrow(task.engine, NESTED.narrowed(0), held)

    recipe = Recipe(rule="heterofl", epochs=2, batch=8, rate=0.1, clip=0.3, momentum=0.9)
    task = dataclasses.replace(task_of(recipe), squeeze=squeeze)
    result = heterofl.train(task)
    before = random_arrays(SPEC, NESTED)
    assert task.engine.params["o.weight"].shape == (4, 3)
    assert np.array_equal(task.engine.params["o.weight"][[1, 3]], before["o.weight"][[1, 3], :3])
    assert np.array_equal(task.engine.params["o.bias"][[1, 3]], before["o.bias"][[1, 3]])
    assert not np.isclose(task.engine.params["o.weight"][[0, 2]], before["o.weight"][[0, 2], :3]).all()
    assert result.steps == 6
    scaled = dataclasses.replace(task_of(dataclasses.replace(recipe, knobs={"scale": 0.5})), squeeze=squeeze)
    seen.clear()
    heterofl.train(scaled)
    assert not seen, "the rate belongs to the width, so that an order with a scaler stays as it is"


def test_rows_that_read_several_runs_of_channels_come_back_from_each_run():
    """Columns of two runs (steps of a sequence, say): the narrower width is a part of either run, not a prefix."""
    tensors = (
        TensorSpec("f.weight", (Axis("a", outer=2), Axis(inner=3)), "fan", 3),
        TensorSpec("f.bias", (Axis("a", outer=2),)),
        TensorSpec("o.weight", (Axis("classes"), Axis("a", outer=2)), "fan", 8),
        TensorSpec("o.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("f", "linear", ("input",), {"weight": "f.weight", "bias": "f.bias"}),
        Node("o", "linear", ("f",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("a", 4), AxisGroup("classes", 4, prunable=False))
    spec, wide = check(ModelSpec("runs", (3,), 4, groups, tensors, nodes)), widths(a=(2, 4))

    def squeeze(done, held):
        if done >= 0.5 and task.engine.structure.capacity:
            shrink.narrow(task.engine, wide.narrowed(0), held)

    task = dataclasses.replace(task_of(Recipe(rule="heterofl", batch=8), wide, spec=spec), squeeze=squeeze)
    heterofl.train(task)
    before = random_arrays(spec, wide)["o.weight"]
    assert np.array_equal(task.engine.params["o.weight"][[1, 3]], before[[1, 3]][:, [0, 1, 4, 5]])
