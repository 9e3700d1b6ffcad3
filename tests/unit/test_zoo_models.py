"""Models of the papers: their layers' shapes, and their numbers of weights."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest

from coordinator.blocks.initial import initial_weights
from edge_runtime.engines import Choice, Update, open_engine
from wire import memory, zoo
from wire.masked import maskable
from wire.messages import Recipe
from wire.spec import Structure, check, decode, encode, node_shapes, parameter_count, tensor_shapes

WHOLE = Structure()
TABLE = (
    # kernel, widened, out, squeezed to (0: no gate), activation, stride: table 2 of Howard et al. (ICCV 2019)
    (3, 16, 16, 8, "relu", 2),
    (3, 72, 24, 0, "relu", 2),
    (3, 88, 24, 0, "relu", 1),
    (5, 96, 40, 24, "hard_swish", 2),
    (5, 240, 40, 64, "hard_swish", 1),
    (5, 240, 40, 64, "hard_swish", 1),
    (5, 120, 48, 32, "hard_swish", 1),
    (5, 144, 48, 40, "hard_swish", 1),
    (5, 288, 96, 72, "hard_swish", 2),
    (5, 576, 96, 144, "hard_swish", 1),
    (5, 576, 96, 144, "hard_swish", 1),
)


def weights_of(spec, *ops):
    """Count the weights of the nodes of some ops."""
    shapes = tensor_shapes(spec, WHOLE)
    return sum(prod(shapes[name]) for node in spec.nodes if node.op in ops for name in node.params.values())


def extra(spec):
    """Count the biases of convolutions before a norm, which papers and their codes leave out."""
    shapes, normed = tensor_shapes(spec, WHOLE), {n.inputs[0] for n in spec.nodes if n.op == "group_norm"}
    return sum(shapes[n.params["bias"]][0] for n in spec.nodes if n.op == "conv2d" and n.name in normed)


@pytest.mark.parametrize(
    ("name", "count"),
    [("lenet-300-100", 266_610), ("lenet-5", 61_706), ("conv-2", 6_603_710), ("alexnet", 23_272_266)],
)
def test_models_without_norms_have_the_papers_count_exactly(name, count):
    assert parameter_count(zoo.by_name(name), WHOLE) == count


def test_convolutions_and_linear_layers_are_counted_apart_as_prunefl_does():
    conv_2, vgg = zoo.by_name("conv-2"), zoo.by_name("vgg-11")
    assert weights_of(conv_2, "conv2d") == 52_096  # 52.1K
    assert (weights_of(vgg, "conv2d"), weights_of(vgg, "linear")) == (9_220_480, 530_442)  # 9.2M + 530.4K


def test_resnet_has_the_papers_count_but_for_biases():
    spec = zoo.by_name("resnet-18")
    assert extra(spec) == 4_800
    assert parameter_count(spec, WHOLE) - extra(spec) == 11_173_962
    assert weights_of(zoo.by_name("resnet-18", classes=200), "linear") == 102_600  # 11.2M + 102.6K
    assert weights_of(spec, "conv2d", "group_norm") - extra(spec) == 11_168_832


def test_alexnet_halves_its_sides_four_times():
    shapes = node_shapes(zoo.by_name("alexnet"), WHOLE)
    convs = [shapes[f"conv{place}"] for place in range(1, 6)]
    assert convs == [(64, 16, 16), (192, 8, 8), (384, 4, 4), (256, 4, 4), (256, 4, 4)]
    assert (shapes["pool5"], shapes["flatten"]) == ((256, 2, 2), (1024,))
    assert [shapes[f"fc{place}"] for place in (6, 7)] == [(4096,), (4096,)]


def test_mobilenet_has_the_papers_count_but_for_biases():
    spec = zoo.by_name("mobilenet-v3-small")
    linear = weights_of(spec, "linear")
    assert linear == 576 * 1024 + 1024 + 1024 * 2 + 2 == 592_898  # PruneFL counts 592.9K
    by_hand = 27 * 16 + 2 * 16 + 96 * 576 + 2 * 576
    before, biases = 16, 16 + 576
    for kernel, wide, out, squeezed, _, _ in TABLE:
        widens = wide != before
        by_hand += widens * (before * wide + 2 * wide) + kernel**2 * wide + 2 * wide + wide * out + 2 * out
        by_hand += bool(squeezed) * (2 * wide * squeezed + wide + squeezed)
        biases += widens * wide + wide + out
        before = out
    assert by_hand == 927_008  # and 927.0K
    assert extra(spec) == biases == 6_056
    assert parameter_count(spec, WHOLE) == by_hand + linear + biases
    assert parameter_count(zoo.by_name("mobilenet-v3-small", (3, 224, 224), 1000), WHOLE) - biases == 2_542_856


def test_mobilenet_is_the_papers_table():
    spec = zoo.by_name("mobilenet-v3-small", (3, 224, 224), 1000)
    shapes, nodes = node_shapes(spec, WHOLE), {node.name: node for node in spec.nodes}
    assert (shapes["stem"], nodes["act"].op) == ((16, 112, 112), "hard_swish")
    side, before = 112, 16
    for place, (kernel, wide, out, squeezed, act, stride) in enumerate(TABLE, 1):
        side //= stride
        block = f"block{place}"
        filters = nodes[f"{block}.filter"].attrs
        assert (filters["kernel"], filters["stride"], filters["groups"]) == (kernel, stride, wide)
        assert (shapes[f"{block}.filter"], shapes[f"{block}.narrow"]) == ((wide, side, side), (out, side, side))
        assert nodes[f"{block}.act2"].op == act
        assert (f"{block}.widen" in nodes) == (wide != before)
        assert shapes.get(f"{block}.gate.squeeze", (0,))[0] == squeezed
        assert (f"{block}.add" in nodes) == (stride == 1 and before == out)
        before = out
    assert (shapes["last"], shapes["pool"], shapes["fc1"]) == ((576, 7, 7), (576, 1, 1), (1024,))
    assert node_shapes(zoo.by_name("mobilenet-v3-small"), WHOLE)["last"] == (576, 3, 3)


def test_mobilenet_travels_and_is_cut_and_masked():
    spec = zoo.by_name("mobilenet-v3-small", (3, 32, 32), 3)
    assert decode(encode(spec)) == check(spec)
    filters = {node.params["weight"] for node in spec.nodes if node.attrs.get("groups", 1) > 1 and node.op == "conv2d"}
    names = maskable(spec)
    assert len(filters) == 11
    assert len(names) == 52 - 11 + 2
    assert not filters.intersection(names)
    weights, rng = initial_weights(spec, 1), np.random.default_rng(1)
    x, y = rng.standard_normal((4, 3, 32, 32)).astype(np.float32), np.array([0, 1, 2, 0])
    engine = open_engine("torch")()
    engine.load(spec, WHOLE, weights)
    widths = {g.name: (max(1, g.size // 3), g.size) for g in spec.groups if g.prunable}
    assert engine.narrow(Structure(0, widths, "ab" * 32)).forward(x).shape == (4, 3)
    masks = {name: rng.random(weights[name].shape) < 0.3 for name in names}
    engine.load(spec, WHOLE, weights, masks, Choice(ways={"": "sparse"}))
    losses = [engine.forward_backward(x, y, update=Update(0.02)) for _ in range(8)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["alexnet", "mobilenet-v3-small"])
def test_memory_is_foreseen(name):
    spec, recipe = zoo.by_name(name), Recipe(batch=8)
    whole = memory.predict(spec, WHOLE, recipe)
    assert memory.predict(spec, memory.uniform(spec, 0.5), recipe).peak < whole.peak
    assert memory.predict_evaluation(spec, WHOLE, 8).peak < whole.peak


def test_few_weights_take_less_where_weights_are_most_of_it():
    spec = zoo.by_name("alexnet")
    shapes = tensor_shapes(spec, WHOLE)
    kept = Structure(kept={name: prod(shapes[name]) // 10 for name in maskable(spec)})
    dense, sparse = (memory.predict(spec, one, Recipe(batch=8)).peak for one in (WHOLE, kept))
    assert sparse < 0.6 * dense
