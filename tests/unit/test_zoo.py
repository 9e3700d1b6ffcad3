"""Named models: sizes by hand, other inputs, files."""

from __future__ import annotations

import pytest

from wire import zoo
from wire.errors import ConfigError, SpecError
from wire.spec import Structure, encode, group_sizes, node_shapes, parameter_count

COUNTS = {
    "linear": 64 * 10 + 10,
    "digits-mlp": 64 * 96 + 96 + 96 * 96 + 96 + 96 * 10 + 10,
    "digits-cnn": 9 * 32 + 32 + 32 * 9 * 64 + 64 + 1024 * 1536 + 1536 + 1536 * 10 + 10,
    "lenet-300-100": 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10,
    "lenet-5": 25 * 6 + 6 + 25 * 6 * 16 + 16 + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10,
    "conv-2": 25 * 32 + 32 + 25 * 32 * 64 + 64 + 3136 * 2048 + 2048 + 2048 * 62 + 62,
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
    with pytest.raises(ConfigError, match="digits-cnn, digits-mlp"):
        zoo.by_name("resnet")
    with pytest.raises(ConfigError, match=r"neither a file nor a model's name.*lenet-5"):
        zoo.load("resnet")


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
