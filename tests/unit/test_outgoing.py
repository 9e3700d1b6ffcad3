"""What a rule says is what the coordinator's algorithm reads: updates by place, extras, and what is refused of both."""

from __future__ import annotations

import dataclasses
import weakref
from pathlib import Path

import numpy as np
import pytest

from coordinator.answers import Answers, check_update
from edge_runtime import outgoing, personal, rules
from edge_runtime.outgoing import Outgoing
from edge_runtime.received import Received
from edge_runtime.rules import Extra, Trained
from edge_runtime.worker import perform
from tests.support import telling
from tests.support.models import random_arrays, small_cnn, widths
from tests.support.orders import RUN, dataset, job, masked_job, some_masks
from wire.errors import Malformed, MaskUnknown, NonFinite, SpecError
from wire.job import Failed
from wire.maskfile import WHOLE, Held, outline_of_model, read_masks
from wire.masks import mask_digest
from wire.messages import Recipe, Reply, Usage
from wire.spec import Structure, tensor_shapes
from wire.spool import Spool
from wire.structure import masked
from wire.tensor import Coding, open_blob, write_blob

SPEC = small_cnn()
DATA = dataset(SPEC)
RECIPE = Recipe(rule="telling", batch=8, rate=0.1, seed=5)
ARRAYS = random_arrays(SPEC, Structure())
NESTED = widths(a=(2, 4, 6), b=(3, 5, 12))


@pytest.fixture(autouse=True)
def _telling(monkeypatch):
    monkeypatch.setitem(rules.RULES, "telling", "tests.support.telling")


def answer_of(folder, path, structure, held=WHOLE):
    """Check an update as the server does and give the algorithm's view of it, twice the same."""
    check_update(Path(path), SPEC, structure, held)
    spool = Spool(Path(folder) / "spool")
    ref = spool.add_bytes(Path(path).read_bytes())
    answers = Answers(spool, SPEC, (Reply("0" * 16, "d", "0" * 16, structure, ref, "", 1, {}, Usage()),), held)
    (first,), (second,) = list(answers), list(answers)
    for name, array in first.update.items():
        np.testing.assert_array_equal(array, second.update[name])
    return first


def with_knobs(form="", **knobs):
    return dataclasses.replace(RECIPE, form=form, knobs=knobs)


@pytest.mark.parametrize("form", ["", "bfloat16", "int8"])
@pytest.mark.parametrize("density", [None, 0.2, 1.0])
def test_what_is_told_beside_an_update(tmp_path, form, density):
    masks = {} if density is None else some_masks(SPEC, density)
    if density is None:
        task, held = job(tmp_path, SPEC, ARRAYS, [Structure()], with_knobs(form, tell=1.0)), WHOLE
    else:
        task = masked_job(tmp_path, SPEC, ARRAYS, masks, with_knobs(form, tell=1.0))
        held = read_masks(task.masks, SPEC, masked(masks))
    done = perform(task, DATA, pinned=True)
    answer = answer_of(tmp_path, done.update, done.structure, held)
    kept = personal.read(Path(done.keep)).arrays
    assert set(answer.extras) == {*masks, "o.bias"}
    for name, (places, values) in answer.extras.items():
        np.testing.assert_array_equal(places, np.flatnonzero(masks.get(name, np.ones(4))))
        np.testing.assert_array_equal(values, kept[name].ravel()[places])  # in its own type, whatever the form
        assert (places.dtype, values.dtype) == (np.int64, np.float32)
    assert set(answer.update) == set(ARRAYS)
    assert set(answer.sent) == set(masks)
    for name, array in answer.update.items():
        before = ARRAYS[name] * masks.get(name, 1)
        np.testing.assert_allclose(array, kept[name] - before, atol=1e-6 if not form else 0.02)
    assert answer.metrics == {}


def test_what_is_told_of_a_few_places(tmp_path):
    masks = some_masks(SPEC, 0.1)
    for folder, task in (
        ("a", job(tmp_path / "a", SPEC, ARRAYS, [NESTED.narrowed(1)], with_knobs(few=1.0))),
        ("b", masked_job(tmp_path / "b", SPEC, ARRAYS, masks, with_knobs(few=1.0))),
    ):
        done = perform(task, DATA, pinned=True)
        held = read_masks(task.masks, SPEC, done.structure)
        ((name, (places, values)),) = answer_of(tmp_path / folder, done.update, done.structure, held).extras.items()
        assert (name, places.tolist(), values.tolist()) == ("f.weight", [0, 40], [0.25, -7.0])


@pytest.mark.parametrize("masks", [{}, some_masks(SPEC, 0.2)])
def test_an_update_that_the_rule_says_itself(tmp_path, masks):
    knobs = with_knobs(say=1.0, few=1.0)
    task = (
        masked_job(tmp_path, SPEC, ARRAYS, masks, knobs) if masks else job(tmp_path, SPEC, ARRAYS, [Structure()], knobs)
    )
    done = perform(task, DATA, pinned=True)
    held = read_masks(task.masks, SPEC, done.structure)
    answer = answer_of(tmp_path, done.update, done.structure, held)
    assert set(answer.update) == {"f.weight"}, "what is not named does not move"
    wanted = np.zeros((12, 54), np.float32)
    wanted.reshape(-1)[telling.PLACES] = [1, 2, -3]
    np.testing.assert_array_equal(answer.update["f.weight"], wanted)
    np.testing.assert_array_equal(answer.sent["f.weight"], wanted != 0)
    assert answer.extras["f.weight"][1].tolist() == [0.25, -7.0]
    assert done.update_ref.size < 400
    moved = personal.read(Path(done.keep)).arrays["f.weight"] - ARRAYS["f.weight"] * masks.get("f.weight", 1)
    assert np.abs(moved).max() < 1, "the device keeps what it trained, not what it said"


def test_a_whole_tensor_may_be_said_and_an_empty_update_too(tmp_path):
    plain = job(tmp_path, SPEC, ARRAYS, [Structure()], RECIPE)
    received = Received(SPEC, Structure(), plain.shells)
    for said in (
        {},
        {"o.bias": Extra(np.arange(4, dtype=np.float32))},
        {"f.weight": Extra(np.empty(0), np.empty(0, int))},
    ):
        names, trained = set(said), Trained((), 0, update=said)
        going = Outgoing(RUN, SPEC, Structure(), WHOLE, ARRAYS, trained, "float16")
        going.write("", received, tmp_path / "update", tmp_path / "keep")
        answer = answer_of(tmp_path, tmp_path / "update", Structure())
        assert set(answer.update) == names
        assert [array.ravel().tolist() for array in answer.update.values()] in ([], [[0, 1, 2, 3]], [[0.0] * 648])


def floats(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("x", Extra(floats(2))),
        ("z/o.bias", Extra(floats(4))),
        ("o.bias", Extra(floats(5))),
        ("f.weight", Extra(floats(648))),
        ("f.weight", Extra(floats(3), np.array([1, 2]))),
        ("f.weight", Extra(floats(2, 1), np.array([1, 2]))),
        ("f.weight", Extra(floats(2), np.array([2, 1]))),
        ("f.weight", Extra(floats(2), np.array([2, 2]))),
        ("f.weight", Extra(floats(2), np.array([-1, 2]))),
        ("f.weight", Extra(floats(2), np.array([2, 648]))),
    ],
)
def test_a_rule_that_tells_of_what_is_not_there_fails_its_order(tmp_path, monkeypatch, name, extra):
    plain = job(tmp_path, SPEC, ARRAYS, [Structure()], RECIPE)
    for trained in (Trained((), 0, extras={name: extra}), Trained((), 0, update={name: extra})):
        outgoing = Outgoing(RUN, SPEC, Structure(), WHOLE, {n: a.copy() for n, a in ARRAYS.items()}, trained)
        with pytest.raises(SpecError, match=r"a rule|places"):
            outgoing.write("", Received(SPEC, Structure(), plain.shells), tmp_path / "u", tmp_path / "k")
        monkeypatch.setattr(telling, "train", lambda _, said=trained: said)
        failed = perform(plain, DATA)
        assert isinstance(failed, Failed)
        assert failed.reason == "unsupported"


def test_changes_of_a_mask_are_read_where_it_is_held(tmp_path):
    """No device of ours writes them, but they may come: a closing that stumbles over one would stop the run."""
    masks = some_masks(SPEC, 0.3)
    held = Held(masks, outline_of_model(SPEC, masks))
    moved = masks["f.weight"].copy()
    moved.flat[[0, 100]] ^= True
    values = np.arange(np.count_nonzero(moved), dtype=np.float32)
    how = Coding(bases={"f.weight": masks["f.weight"]})
    write_blob(tmp_path / "x", "update", {"f.weight": values}, masks={"f.weight": moved}, coding=how)
    with open_blob(tmp_path / "x") as blob:
        assert blob.entry("f.weight").encoding == "delta"
    answer = answer_of(tmp_path, tmp_path / "x", masked(masks), held)
    np.testing.assert_array_equal(answer.sent["f.weight"], moved)
    np.testing.assert_array_equal(answer.update["f.weight"][moved], values)
    with pytest.raises(MaskUnknown):
        check_update(tmp_path / "x", SPEC, Structure(), WHOLE)


def test_updates_that_must_not_be_counted(tmp_path):
    path = tmp_path / "x"
    shapes = tensor_shapes(SPEC, Structure())
    mask = np.zeros(shapes["f.weight"], np.bool_)
    mask.flat[3] = True

    def refused(error, tensors, masks=None, kind="update", **how):
        write_blob(path, kind, tensors, masks=masks, coding=Coding(**how))
        with pytest.raises(error):
            check_update(path, SPEC, Structure())

    nan = np.full(4, np.nan, np.float32)
    refused(NonFinite, {"o.bias": nan})
    refused(NonFinite, {"z/o.bias": nan})
    refused(Malformed, {"o.bias": np.zeros(4, np.float64)})
    refused(Malformed, {"z/o.bias": np.zeros(4, np.int64)})
    refused(Malformed, {"o.bias": floats(5)})
    refused(Malformed, {"z/x": floats(4)})
    refused(Malformed, {"z/z/o.bias": floats(4)})
    refused(Malformed, {"carried/o.bias": floats(4)})
    refused(Malformed, {"o.bias": floats(4)}, kind="keep")
    refused(MaskUnknown, {"f.weight": floats(1)}, {"f.weight": mask}, known={"f.weight": mask_digest(mask)})
    refused(MaskUnknown, {"z/f.weight": floats(1)}, {"z/f.weight": mask}, known={"z/f.weight": mask_digest(mask)})
    write_blob(path, "update", {"o.bias": floats(4), "z/o.bias": floats(4)})
    check_update(path, SPEC, Structure())


def test_places_are_let_go_before_the_file_is_written(tmp_path, monkeypatch):
    """They take more than the weights that they are about, and are a mask by then."""
    shapes, alive = tensor_shapes(SPEC, Structure()), []
    said = {name: Extra(np.zeros(1, np.float32), np.zeros(1, np.int64)) for name in shapes}
    watched = [weakref.ref(extra.places) for extra in said.values()]
    real = outgoing.write_blob

    def write(*how, **more):
        alive.append(sum(ref() is not None for ref in watched))
        return real(*how, **more)

    monkeypatch.setattr(outgoing, "write_blob", write)
    made = job(tmp_path, SPEC, ARRAYS, [Structure()])
    going = Outgoing(RUN, SPEC, Structure(), WHOLE, dict(ARRAYS), Trained((), 1, update=said))
    going.write("", Received(SPEC, Structure(), made.shells), tmp_path / "update", tmp_path / "keep")
    assert alive == [0]
    with open_blob(tmp_path / "update") as blob:
        assert list(blob.names) == list(shapes)
