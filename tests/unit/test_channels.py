"""Channels as masks of tensors: against a loop over coordinates, against what a cut leaves, and there and back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import small_cnn
from wire import zoo
from wire.builders import resnet
from wire.channels import all_kept, channels_of, from_words, prunable, tensor_masks, to_words
from wire.errors import SpecError
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, parameter_count, tensor_shapes
from wire.structure import cut, to_wire, widths_of

SMALL = [name for name in zoo.MODELS if parameter_count(zoo.by_name(name), Structure()) < 2_000_000]
MODELS = {
    **{name: zoo.by_name(name) for name in SMALL if prunable(zoo.by_name(name))},
    "resnet": resnet("resnet", (3, 8, 8), 4, ((4, 1), (6, 1))),
}
GATED = ModelSpec(
    "gated",
    (3,),
    2,
    (AxisGroup("h", 4), AxisGroup("classes", 2, prunable=False)),
    (TensorSpec("w", (Axis("h", inner=2, outer=3), Axis("h"))), TensorSpec("o", (Axis("classes"), Axis("h", outer=2)))),
    (Node("o", "linear", ("input",), {"weight": "w", "bias": "o"}),),
)
"""Not a model that could run: axes that repeat a group before and behind its channels."""


def some(spec, seed, share=0.6):
    rng = np.random.default_rng(seed)
    kept = {group.name: rng.random(group.size) < share for group in prunable(spec)}
    for flags in kept.values():
        flags[rng.integers(len(flags))] = True
    return kept


def by_loop(spec, kept):
    """A coordinate stays when the channel of each of its dimensions does."""
    found = {}
    for tensor in spec.tensors:
        shape = tensor_shapes(spec, Structure())[tensor.name]
        mask = np.ones(shape, bool)
        for at in itertools.product(*map(range, shape)):
            for axis, place in zip(tensor.axes, at, strict=True):
                if axis.group in kept:
                    size = len(kept[axis.group])
                    mask[at] &= bool(kept[axis.group][place // axis.inner % size])
        found[tensor.name] = mask
    return found


@pytest.mark.parametrize("spec", [small_cnn(), GATED], ids=["small-cnn", "gated"])
def test_masks_are_those_of_a_loop_over_coordinates(spec):
    for seed in range(5):
        kept = some(spec, seed)
        masks, wanted = tensor_masks(spec, kept), by_loop(spec, kept)
        for name, mask in wanted.items():
            np.testing.assert_array_equal(masks.get(name, np.ones(mask.shape, bool)), mask)
            assert (name in masks) == (not mask.all())
    assert tensor_masks(spec, all_kept(spec)) == {}


@pytest.mark.parametrize("name", MODELS)
def test_what_masks_keep_is_what_a_cut_leaves(name):
    spec = MODELS[name]
    kept = some(spec, 3)
    levels = {group: np.where(flags, 0, 1).astype(np.uint8) for group, flags in kept.items()}
    places = {n: np.arange(np.prod(s)).reshape(s) for n, s in tensor_shapes(spec, Structure()).items()}
    narrow = Structure(0, widths_of(levels, 2), "ab" * 32)
    left = cut(spec, to_wire(spec, places, levels), narrow)
    masks = tensor_masks(spec, kept)
    for tensor, array in left.items():
        mask = masks.get(tensor)
        wanted = np.arange(places[tensor].size) if mask is None else np.flatnonzero(mask)
        np.testing.assert_array_equal(np.sort(array.ravel()), wanted, err_msg=tensor)


@pytest.mark.parametrize("spec", [small_cnn(), GATED, MODELS["resnet"]], ids=["small-cnn", "gated", "resnet"])
def test_masks_say_which_channels_they_are_of(spec):
    for seed in range(5):
        kept = some(spec, seed)
        found = channels_of(spec, tensor_masks(spec, kept))
        assert found is not None
        assert {name: flags.tolist() for name, flags in found.items()} == {n: f.tolist() for n, f in kept.items()}
    whole = channels_of(spec, {})
    assert whole is not None
    assert all(flags.all() for flags in whole.values())


def test_masks_of_no_channels_are_seen():
    spec = small_cnn()
    good = tensor_masks(spec, some(spec, 1))
    for name in good:
        torn = {key: mask.copy() for key, mask in good.items()}
        torn[name].reshape(-1)[np.flatnonzero(torn[name])[0]] ^= True
        assert channels_of(spec, torn) is None, name
        assert channels_of(spec, {key: mask for key, mask in good.items() if key != name}) is None, name
    assert channels_of(spec, {"o.bias": np.array([True, True, False, True])}) is None
    spelled = {name: np.ones(shape, bool) for name, shape in tensor_shapes(spec, Structure()).items()}
    assert channels_of(spec, spelled) is not None


@given(st.integers(1, 130), st.data())
@settings(max_examples=40, deadline=None)
def test_words_there_and_back(size, data):
    spec = small_cnn(channels=size, hidden=3)
    kept = {
        group.name: np.array(data.draw(st.lists(st.booleans(), min_size=group.size, max_size=group.size)), bool)
        for group in prunable(spec)
    }
    words = to_words(spec, kept)
    assert len(words) == -(-size // 48) + 1
    assert all(0 <= word < 2**48 and word == int(word) for word in words.values())
    for name, flags in from_words(spec, words).items():
        np.testing.assert_array_equal(flags, kept[name])


def test_words_by_hand_and_words_that_lie():
    spec = small_cnn(channels=3, hidden=2)
    words = to_words(spec, {"a": np.array([True, False, True]), "b": np.array([False, True])})
    assert words == {"0.0": 5.0, "1.0": 2.0}
    for lie in ({"0.0": 8.0}, {"0.0": -1.0}, {"0.0": 0.5}, {"0.0": float("inf")}, {"1.0": float("nan")}, {"2.0": 0.0}):
        with pytest.raises(SpecError, match="words" if "2.0" in lie else "word"):
            from_words(spec, {**words, **lie})
    with pytest.raises(SpecError, match="no word"):
        from_words(spec, {"0.0": 5.0})
