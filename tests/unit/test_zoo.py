"""Named models: sizes by hand, other inputs, files."""

from __future__ import annotations

from math import ceil, prod

import pytest

from wire import zoo
from wire.errors import ConfigError, SpecError
from wire.spec import Structure, encode, group_sizes, node_shapes, parameter_count, tensor_shape

COUNTS = {
    "linear": 64 * 10 + 10,
    "digits-mlp": 64 * 96 + 96 + 96 * 96 + 96 + 96 * 10 + 10,
    "digits-cnn": 9 * 32 + 32 + 32 * 9 * 64 + 64 + 1024 * 1536 + 1536 + 1536 * 10 + 10,
    "digits-cnn-bn": 9 * (16 + 16 * 32 + 32 * 32) + 5 * (16 + 32 + 32) + 128 * 10 + 10,  # biases and norms: 5
    "lenet-300-100": 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10,
    "lenet-5": 25 * 6 + 6 + 25 * 6 * 16 + 16 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10,
    "har-cnn": 5 * 9 * 32 + 32 + 5 * 32 * 64 + 64 + 512 * 128 + 128 + 128 * 6 + 6,
    "har-cnn-wide": 5 * 9 * 32 + 32 + 5 * 32 * 64 + 64 + 512 * 1024 + 1024 + 1024 * 6 + 6,
    "conv-2": 25 * 32 + 32 + 25 * 32 * 64 + 64 + 3136 * 2048 + 2048 + 2048 * 62 + 62,
    "vgg-11": 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 3 * 512 * 512)
    + (64 + 128 + 2 * 256 + 4 * 512)
    + 2 * (512 * 512 + 512)
    + 512 * 10
    + 10,
    "alexnet": 9 * (3 * 64 + 64 * 192 + 192 * 384 + 384 * 256 + 256 * 256)
    + (64 + 192 + 384 + 2 * 256)
    + 1024 * 4096
    + 4096 * 4096
    + 2 * 4096
    + 4096 * 10
    + 10,
    "mobilenet-v3-small": 927_008 + 592_898 + 6_056,  # test_zoo_models.py counts it
    "resnet-18": 9 * (3 * 64 + 4 * 64**2 + 64 * 128 + 3 * 128**2 + 128 * 256 + 3 * 256**2 + 256 * 512 + 3 * 512**2)
    + (64 * 128 + 128 * 256 + 256 * 512)
    # a bias, and a norm's weight and bias, behind each of 5 convolutions, then of 5 in every stage
    + 3 * 5 * (64 + 128 + 256 + 512)
    + 512 * 10
    + 10,
}


@pytest.mark.parametrize("name", zoo.MODELS)
def test_weights_are_as_counted_by_hand(name):
    assert parameter_count(zoo.by_name(name), Structure()) == COUNTS[name]


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_hidden_group_can_be_cut_to_one_channel(name):
    spec = zoo.by_name(name)
    hidden = {g.name: (1,) for g in spec.groups if g.prunable}
    assert [g.name for g in spec.groups if not g.prunable] == ["classes"]
    narrow = Structure(0, hidden)
    assert node_shapes(spec, narrow)["out"] == (spec.classes,)
    assert all(size == 1 for name, size in group_sizes(spec, narrow).items() if name != "classes")


def test_names_are_unknown_by_listing_the_known():
    with pytest.raises(ConfigError, match="digits-cnn, digits-cnn-bn, digits-mlp"):
        zoo.by_name("resnet-9000")
    with pytest.raises(ConfigError, match=r"neither a file nor a model's name.*lenet-5"):
        zoo.load("resnet-9000")


def test_other_inputs_and_classes():
    spec = zoo.by_name("conv-2", (3, 32, 32), 5)
    assert spec.input_shape == (3, 32, 32)
    assert node_shapes(spec, Structure())["flatten"] == (64 * 8 * 8,)
    flat = zoo.by_name("digits-mlp", (1, 8, 8))
    assert parameter_count(flat, Structure()) == COUNTS["digits-mlp"]
    with pytest.raises(SpecError, match="channels, height, width"):
        zoo.by_name("conv-2", (64,))
    with pytest.raises(SpecError):
        zoo.by_name("lenet-5", (1, 4, 4))


def test_a_resnet_halves_its_sides_and_shares_stages():
    spec = zoo.by_name("resnet-18")
    shapes = node_shapes(spec, Structure())
    assert [shapes[f"block{k}.2.add"] for k in (1, 2, 3, 4)] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]
    assert shapes["pool"] == (512, 1, 1)
    assert [n.name for n in spec.nodes if n.name.endswith("short")] == [f"block{k}.1.short" for k in (2, 3, 4)]
    assert sum(n.op == "conv2d" for n in spec.nodes) + sum(n.op == "linear" for n in spec.nodes) == 18 + 3
    assert {g.name: g.size for g in spec.groups}["stage3"] == 256
    assert node_shapes(zoo.by_name("resnet-18", (1, 28, 28), 5), Structure())["pool"] == (512, 1, 1)
    with pytest.raises(SpecError, match="square"):
        zoo.by_name("resnet-18", (3, 32, 16))


def test_load_reads_names_and_files(tmp_path):
    spec = zoo.by_name("digits-mlp")
    path = tmp_path / "model"
    path.write_bytes(encode(spec))
    assert zoo.load(path) == zoo.load(str(path)) == zoo.load("digits-mlp") == spec
    path.write_bytes(encode(spec)[:-1])
    with pytest.raises(ConfigError, match="is no model file"):
        zoo.load(path)
    path.write_bytes(bytes(2 << 20))
    with pytest.raises(ConfigError, match="the limit is"):
        zoo.load(path)
    with pytest.raises(ConfigError, match="directory"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_narrower_model_has_the_weights_of_that_width_and_begins_by_its_own_inputs(name):
    whole, narrow = zoo.by_name(name), zoo.load(f"{name}@0.5")
    widths = {g.name: (ceil(g.size / 2),) for g in whole.groups if g.prunable}
    assert parameter_count(narrow, Structure()) == parameter_count(whole, Structure(0, widths))
    assert narrow.name == f"{name}-0.5"
    for tensor in narrow.tensors:
        if tensor.init in ("kaiming", "fan"):
            shape = tensor_shape(tensor, group_sizes(narrow, Structure()))
            assert tensor.fan_in == prod(shape[1:])
    assert zoo.load(f"{name}@1").nodes == whole.nodes
    assert zoo.whole(f"{name}@0.5") == name
    assert zoo.whole("some/where@0.5") == "some/where@0.5"


@pytest.mark.parametrize("word", ["", "0", "1.5", "half", "nan"])
def test_a_narrower_model_of_no_fraction_is_refused(word):
    with pytest.raises(ConfigError, match="behind the @"):
        zoo.load(f"digits-mlp@{word}")


def test_a_model_that_would_be_too_narrow_is_refused_as_a_setting():
    """A filter for each of one channel is a convolution in one group, which cannot be cut."""
    with pytest.raises(ConfigError, match=r"mobilenet-v3-small@0\.01.*too narrow"):
        zoo.load("mobilenet-v3-small@0.01")
