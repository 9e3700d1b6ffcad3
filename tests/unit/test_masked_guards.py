"""A mask's name in a liar's hands, what is let go of between orders, and what must not come back in another place."""

from __future__ import annotations

import dataclasses
import os
import tracemalloc
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file

from coordinator import export
from coordinator.advance import save_state
from coordinator.algorithm import State
from coordinator.algorithms import fiarse
from coordinator.answers import check_update
from coordinator.blocks.masks import held_at, masks_at, structure_at
from coordinator.journal import RunStarted
from coordinator.standing import Standing
from edge_runtime import personal, rules
from edge_runtime.engines import Choice
from edge_runtime.kernels.importance import LARGEST_BYTES, largest_of
from edge_runtime.worker import perform
from tests.golden.attacks import container
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn
from tests.support.orders import RUN, dataset, job, some_masks
from wire import zoo
from wire.errors import Malformed
from wire.job import Done
from wire.maskfile import Held, outline_of_model, read_masks, write_masks
from wire.masks import mask_digest, packed
from wire.messages import Recipe
from wire.spec import Structure, encode
from wire.spool import Spool
from wire.structure import cut, masked, to_wire

SPEC, WHOLE = small_cnn(), Structure()
pytestmark = pytest.mark.usefixtures("every_engine")


@pytest.mark.parametrize("kept", [1, 5])
def test_an_update_that_names_the_right_mask_and_brings_another_number_of_values(tmp_path, kept):
    masks = some_masks(SPEC)
    mask = masks["f.weight"]
    entry = {"name": "f.weight", "dtype": "float32", "shape": list(mask.shape), "encoding": "values", "parts": [0]}
    entry |= {"kept": kept, "mask": mask_digest(mask)}
    head = {"v": 1, "kind": "update", "meta": {}, "tensors": [entry]}
    (tmp_path / "x").write_bytes(container(head, [np.ones(kept, np.float32).tobytes()]))
    with pytest.raises(Malformed, match="values for mask"):
        check_update(tmp_path / "x", SPEC, masked(masks), Held(masks, outline_of_model(SPEC, masks)))


def test_masks_are_read_once_whatever_the_times_of_their_file(tmp_path):
    masks, other = some_masks(SPEC), some_masks(SPEC, seed=9)
    for name, some in (("a", masks), ("b", other)):
        write_masks(tmp_path / name, some)
    spool_like = tmp_path / "a"
    held = read_masks(str(spool_like), SPEC, masked(masks))
    os.utime(spool_like, (1.0, 1.0))  # as a bounded spool does with what is in use
    assert read_masks(str(spool_like), SPEC, masked(masks)) is held
    gone = [weakref.ref(mask.line) for mask in held.masks.values()]
    del held
    read_masks(str(tmp_path / "b"), SPEC, masked(other))
    assert not any(mask() is not None for mask in gone), "those of the order before are let go of"
    again = read_masks(str(spool_like), SPEC, masked(masks))
    gone = [weakref.ref(mask.line) for mask in again.masks.values()]
    del again
    read_masks("", SPEC, WHOLE)
    assert not any(mask() is not None for mask in gone), "an order without masks needs none"


def test_what_was_made_of_masks_goes_with_them():
    masks = {name: packed(mask) for name, mask in some_masks(SPEC).items()}
    gone = [weakref.ref(mask.line) for mask in masks.values()]
    MAKE().load(SPEC, WHOLE, random_arrays(SPEC, WHOLE), masks, Choice(ways={"": "sparse"}))
    del masks
    assert all(mask() is not None for mask in gone), "the next order may have the same"
    MAKE().load(SPEC, WHOLE, random_arrays(SPEC, WHOLE))
    assert not any(mask() is not None for mask in gone)


def test_a_layout_is_that_of_the_model_that_is_loaded():
    """The next order is for another model with the same shapes and masks, whose strides are the other way round."""
    first, other = (
        zoo.cnn("m", (1, 12, 12), 3, [zoo.Conv(4, stride=s), zoo.Conv(4, stride=3 - s)], ()) for s in (1, 2)
    )
    arrays, engine, made = random_arrays(other, WHOLE), MAKE(), []
    masks = {name: packed(mask) for name, mask in some_masks(first).items()}
    for spec in (first, first, other):
        engine.load(spec, WHOLE, arrays, masks, Choice(ways={"": "sparse"}))
        made.append(engine._held.layouts.get("conv1.weight"))
    assert made[0] is made[1]
    found = engine.forward_backward(*batch(other, 4))
    engine.load(other, WHOLE, arrays, masks, Choice(ways={"": "dense"}))
    assert found == pytest.approx(engine.forward_backward(*batch(other, 4)), rel=1e-5)


def test_what_a_rule_keeps_of_one_width_is_not_given_to_another(tmp_path):
    widths = {group.name: (group.size // 2, group.size) for group in SPEC.groups if group.prunable}
    wide, data = Structure(1, widths, "ab" * 32), dataset(SPEC, 24, 8, seed=1)
    recipe, arrays = Recipe(rule="topk", batch=8, knobs={"k": 5.0}), random_arrays(SPEC, WHOLE)
    keep = perform(job(tmp_path / "wide", SPEC, arrays, [wide], recipe), data).keep
    assert set(personal.own(keep, RUN, SPEC, wide)) == set(arrays)
    assert personal.own(keep, RUN, SPEC, dataclasses.replace(wide, masks="ab" * 32, kept={"f.weight": 1}))
    for other in (wide.narrowed(0), dataclasses.replace(wide, ranking="cd" * 32), WHOLE):
        assert personal.own(keep, RUN, SPEC, other) == {}
    narrow = job(tmp_path / "narrow", SPEC, arrays, [wide.narrowed(0)], recipe)
    assert isinstance(perform(dataclasses.replace(narrow, keep=keep), data), Done)


def test_a_large_state_of_a_rule_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(personal, "VALUES_MAPPED", 100)
    own = {
        "z": np.arange(648, dtype=np.float32).reshape(12, 54),
        "one": np.ones(1, np.float32),
        "none": np.zeros((0, 3)),
    }
    own["none"] = own["none"].astype(np.float32)
    personal.write(tmp_path / "keep", personal.Personal(SPEC, WHOLE, random_arrays(SPEC, WHOLE)), RUN, own=own)
    found = personal.own(str(tmp_path / "keep"), RUN, SPEC)
    assert {name: array.tolist() for name, array in found.items()} == {n: a.tolist() for n, a in own.items()}
    assert found["z"].shape == (12, 54)


@pytest.mark.parametrize("rule", ["sgd", "grouplasso", "score"])
def test_a_sum_over_samples_is_the_same_in_micro_batches(rule):
    found = []
    for micro in (8, 3):
        engine = MAKE()
        engine.load(SPEC, WHOLE, random_arrays(SPEC, WHOLE))
        recipe = Recipe(rule=rule, batch=8, rate=1e-3, loss="sum")
        trained = rules.find(rule).train(rules.Task(recipe, engine, *batch(SPEC, 16), 1, micro, lambda *_: None))
        found.append((trained, {name: array.copy() for name, array in engine.params.items()}))
    (whole, weights), (parts, same) = found
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)
    for name, array in weights.items():
        np.testing.assert_allclose(same[name], array, atol=1e-6)


def test_the_largest_of_many_take_what_is_said():
    values = np.random.default_rng(0).random((1024, 1024), np.float32)
    count = 600_000
    tracemalloc.start()
    places, found = largest_of(((row, values[row : row + 64]) for row in range(0, 1024, 64)), count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LARGEST_BYTES * count
    wanted = np.sort(np.argsort(-values.ravel(), kind="stable")[:count])
    assert np.array_equal(places, wanted)
    assert np.array_equal(found, values.ravel()[wanted])


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Export a state, and give the file's arrays."""

    def export_of(state, width):
        spool = Spool(tmp_path / "spool")
        ref = spool.add_bytes(encode(SPEC))
        standing = Standing(RunStarted("ab" * 8, about={"spec": ref.digest}), save_state(spool, state).digest, done=3)
        monkeypatch.setattr(export, "standing_of", lambda _: standing)
        return load_file(export.write_model(tmp_path, width)[0])

    return export_of


@pytest.mark.parametrize("width", [None, 1.0])
def test_what_is_not_kept_is_not_exported(exported, width):
    weights, masks = random_arrays(SPEC, WHOLE), some_masks(SPEC)
    for name, array in exported(State(SPEC, 3, weights, masks=masks), width).items():
        np.testing.assert_array_equal(array, weights[name] * masks.get(name, np.True_))


def test_a_size_is_exported_as_it_is_measured(exported):
    weights = random_arrays(SPEC, WHOLE)
    state = fiarse.init(SPEC, weights, {"sizes": "0.9 0.5", "fractions": "0.5 1", "by": "layer"})
    for name, array in exported(state, None).items():
        np.testing.assert_array_equal(array, weights[name] * masks_at(state.mask_levels, 1).get(name, np.True_))
    half, structure = exported(state, 0.5), structure_at(state, 0)
    held = held_at(state, 0)
    compact = cut(SPEC, to_wire(SPEC, weights, state.levels), structure)
    assert {name: int(np.count_nonzero(half[name])) for name in held} == structure.kept
    for name, array in half.items():
        np.testing.assert_array_equal(array, compact[name] * held.get(name, np.True_))
    for name, array in exported(fiarse.init(SPEC, weights, {"sizes": "0.2 0.5"}), 1.0).items():
        assert not name.endswith("weight") or np.count_nonzero(array) < array.size
