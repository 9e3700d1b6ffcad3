"""One counter of operations, held against the closed forms and against a loop over every multiplication."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.blocks.initial import initial_weights
from coordinator.simulate import flops
from edge_runtime import rules
from edge_runtime.engines import open_engine
from edge_runtime.rules import maml
from tests.support import sequences
from tests.support.messages import an_order
from wire import work, zoo
from wire.messages import Recipe
from wire.spec import Structure, node_shapes, tensor_shapes

NI, NO, BATCH = 30, 20, 8
ORDER = an_order("d1", 1)
HIDDEN = zoo.mlp("two", (12,), NO, (NI,))
"""A layer of 12 x 30 that nothing stands before, then the layer under test: 30 inputs, 20 outputs."""


def masked(kept: dict[str, int]) -> Structure:
    return Structure(masks="ab" * 32, kept=kept)


def second(structure: Structure) -> work.Layer:
    return work.layers(HIDDEN, structure)[1]


def test_dense_is_six_and_the_first_layer_four():
    layer = second(Structure())
    assert BATCH * layer.flops(backward=True, dense_gradient=False) == 6 * BATCH * NI * NO
    first = work.layers(HIDDEN, Structure())[0]
    assert first.first
    assert first.flops(backward=True, dense_gradient=False) == 4 * 12 * NI
    assert first.flops(backward=False, dense_gradient=False) == 2 * 12 * NI


@given(st.integers(0, NI * NO))
def test_masked_is_six_d_and_with_a_dense_gradient_two_and_four_d(kept):
    layer, density = second(masked({"out.weight": kept})), kept / (NI * NO)
    assert layer.flops(backward=True, dense_gradient=False) == pytest.approx(6 * density * NI * NO)
    assert layer.flops(backward=True, dense_gradient=True) == pytest.approx((2 + 4 * density) * NI * NO)
    assert layer.flops(backward=False, dense_gradient=True) == pytest.approx(2 * density * NI * NO)


def test_every_multiplication_of_a_convolution_is_counted_once():
    spec = zoo.cnn("small", (2, 5, 6), 3, (zoo.Conv(4, 3, 1), zoo.Conv(2, 3, 0)), ())
    shapes, tensors = node_shapes(spec, Structure()), tensor_shapes(spec, Structure())
    counted = {"forward": 0, "inputs": 0}
    for node in ("conv1", "conv2"):
        out, rows, columns = shapes[node]
        _, channels, kernel, _ = tensors[f"{node}.weight"]
        for _ in range(out * rows * columns * channels * kernel * kernel):
            counted["forward"] += 2
            counted["inputs"] += 0 if node == "conv1" else 2
    linear = 2 * shapes["flatten"][0] * 3
    assert work.per_sample(spec, Structure(), backward=False) == counted["forward"] + linear
    assert work.per_sample(spec, Structure()) == 2 * counted["forward"] + counted["inputs"] + 3 * linear


def test_conv_2_is_two_gigaflops_a_step():
    assert 20 * work.per_sample(zoo.by_name("conv-2"), Structure()) == pytest.approx(2.04e9, rel=0.02)


def test_a_width_counts_what_it_has():
    spec = zoo.mlp("wide", (10,), 4, (8,))
    narrow = Structure(0, {"fc1": (2, 8)}, "ab" * 32)
    assert work.per_sample(spec, narrow, backward=False) == 2 * (10 * 2 + 2 * 4)


def naive_passes(recipe: Recipe, samples: int, last: int = 0) -> int:
    """Go through the batches as `edge_runtime.rules.loop.batches` makes them; through the last ones alone if asked."""
    sizes = [len(range(samples)[i : i + recipe.batch]) for i in range(0, samples, recipe.batch)]
    count = recipe.steps or recipe.epochs * len(sizes)
    return sum(sizes[i % len(sizes)] for i in range(max(0, count - last) if last else 0, count)) if sizes else 0


@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 30), st.integers(1, 3), st.integers(0, 9))
def test_samples_that_pass_through(samples, batch, steps, epochs, last):
    recipe = Recipe(batch=batch, steps=steps, epochs=epochs)
    assert flops.passes(recipe, samples) == naive_passes(recipe, samples)
    assert flops.passes_with_all_gradients(recipe, samples) == 0
    told = replace(recipe, rule="importance", knobs={"window": 1.0, "last": float(last)})
    assert flops.passes_with_all_gradients(told, samples) == naive_passes(recipe, samples, last)
    always = replace(told, knobs={"window": 0.0, "last": float(last)})
    assert flops.passes_with_all_gradients(always, samples) == naive_passes(recipe, samples)
    some = replace(always, knobs={"samples": 7.0})
    assert flops.passes(some, samples) == naive_passes(recipe, min(samples, 7))
    assert flops.passes_with_all_gradients(some, samples) == naive_passes(recipe, min(samples, 7))


def order_of(recipe: Recipe, **changes):
    return replace(ORDER, structures=(masked({"out.weight": 60}),), recipe=recipe, **changes)


def test_an_order_is_passes_times_a_sample_and_a_rule_says_what_it_reads():
    first, sparse, dense = 4 * 12 * NI, 6 * 60, 2 * NI * NO + 4 * 60
    for rule, knobs, with_all in (
        ("sgd", {}, 0),
        ("dpf", {}, 100),
        ("dpf", {"dense": 0.0}, 0),
        ("importance", {"window": 1.0, "last": 2.0}, 40),
        ("importance", {}, 100),
    ):
        order = order_of(Recipe(rule=rule, batch=20, steps=5, knobs=knobs))
        assert flops.flops(HIDDEN, order, 200) == 100 * first + (100 - with_all) * sparse + with_all * dense
    order = order_of(Recipe(rule="score", knobs={"synflow": 100.0}), verb="score")
    assert flops.flops(HIDDEN, order, 200) == 100 * (first + sparse)
    assert flops.flops(HIDDEN, order_of(Recipe(epochs=9), verb="evaluate"), 10) == 10 * 2 * (12 * NI + 60)


def test_recurrent_layers_and_attention_by_hand():
    lstm = sequences.recurrent("lstm", 8, 6)
    weights = [4 * 8 * 6, 4 * 8 * 8, 4 * 6 * 8, 4 * 6 * 6]
    forward = 5 * sum(weights) + 6 * 3
    assert work.per_sample(lstm, Structure(), backward=False) == 2 * forward
    # Nobody asks for the gradient of the samples; that of each step's state is asked for in the first layer too.
    assert work.per_sample(lstm, Structure()) == 2 * (3 * forward - 5 * weights[0])
    narrow = Structure(0, {"a": (2,), "b": (3,)}, "ab" * 32)
    cut = 5 * (8 * 6 + 8 * 2 + 12 * 2 + 12 * 3) + 3 * 3
    assert work.per_sample(lstm, narrow, backward=False) == 2 * cut
    # Five steps of 8 values, 4 heads of 3: in, out, and 25 pairs for queries with keys and odds with values.
    attended = 5 * 6 * 8 + 5 * (36 * 8 + 8 * 12) + 2 * 25 * 12 + 40 * 3
    assert work.per_sample(sequences.attended(), Structure(), backward=False) == 2 * attended
    assert work.per_sample(sequences.attended(), Structure()) == 2 * (3 * attended - 5 * 6 * 8)


def test_widths_of_a_step_are_counted_as_often_as_they_are_drawn():
    spec = zoo.by_name("digits-mlp")
    groups = {group.name: (10, 30, 60, 96) for group in spec.groups if group.prunable}
    nested = Structure(3, groups, "ab" * 32)
    each = [work.per_sample(spec, nested.narrowed(k)) for k in range(4)]

    def of(capacity, **how):
        order = replace(ORDER, recipe=Recipe(batch=10, **how), structures=(nested.narrowed(capacity),))
        return flops.flops(spec, order, 40)

    assert of(3) == 40 * each[3]
    assert of(3, knobs={"widths": 1.0}) == 40 * (each[3] + each[0]) + 20 * (each[1] + each[2])
    assert of(3, knobs={"widths": 9.0}) == 40 * sum(each)
    assert of(1, knobs={"widths": 1.0}) == 40 * (each[1] + each[0])
    assert of(0, knobs={"widths": 1.0}) == of(0, knobs={"widths": 1.0, "mutual": 1.0}) == 40 * each[0]
    assert of(1, knobs={"widths": 1.0, "mutual": 1.0}) == 40 * (each[1] + 2 * each[0])
    assert of(3, rule="fjord") == 10 * sum(each)
    assert of(3, rule="fjord", knobs={"distil": 1.0}) == 40 * each[3] + 10 * sum(each[:3])


@pytest.mark.parametrize("knobs", [{}, {"hf": 1.0}, {"tune": 3.0}, {"tune": 0.0}, {"alpha": 0.0}])
@pytest.mark.parametrize("how", [{"epochs": 2}, {"steps": 7}, {"epochs": 1, "batch": 64}])
def test_every_pass_of_a_meta_gradient_is_counted(monkeypatch, knobs, how):
    """Per-FedAvg's rule itself is run, and the samples of its passes are counted."""
    seen, add = [], maml._add

    def counted(task, x, y, factor):
        seen.append(len(x))
        return add(task, x, y, factor)

    monkeypatch.setattr(maml, "_add", counted)
    recipe = Recipe(rule="maml", rate=0.01, knobs=knobs, **{"batch": 10, **how})
    engine, spec = open_engine("torch")(), zoo.by_name("digits-mlp")
    engine.load(spec, Structure(), initial_weights(spec, 0))
    x, y = np.random.default_rng(0).random((23, *spec.input_shape), np.float32), np.arange(23) % spec.classes
    maml.train(rules.Task(recipe, engine, x, y, 1, 10, lambda *_: None, {}))
    assert flops.passes(recipe, 23) == sum(seen)
    assert flops.passes(recipe, 0) == 0
