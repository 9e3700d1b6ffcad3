"""`perform`: an order and its files in, a result and its files out, in this very process."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import personal, received, rules, worker
from edge_runtime.engines import available
from edge_runtime.outgoing import Outgoing
from edge_runtime.worker import perform
from tests.support.engines import make, predicted
from tests.support.models import random_arrays, small_cnn, widths
from tests.support.orders import RUN, dataset, job
from wire import maskfile, memory, zoo
from wire import structure as cutting
from wire.errors import Malformed
from wire.job import Done, Failed
from wire.messages import Recipe
from wire.spec import Structure
from wire.tensor import open_blob, write_blob

pytestmark = pytest.mark.usefixtures("every_engine")

SPEC = small_cnn()
NESTED = widths(a=(2, 4, 6), b=(3, 5, 12))
WHOLE = Structure()
RECIPE = Recipe(epochs=3, batch=8, rate=0.1, clip=1.0, seed=5)


def read(path):
    with open_blob(Path(path)) as blob:
        assert blob.kind == "update"
        return {name: blob.tensor(name).copy() for name in blob.names}


@pytest.mark.parametrize("structure", [WHOLE, NESTED, NESTED.narrowed(1), NESTED.narrowed(0)])
def test_train_gives_trained_minus_received(tmp_path, structure):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    done = perform(job(tmp_path, SPEC, arrays, [structure], RECIPE), data)
    assert isinstance(done, Done)
    before = cutting.cut(SPEC, arrays, structure)
    engine = make()
    engine.load(SPEC, structure, before)
    x, y = data.train
    rules.find("sgd").train(rules.Task(RECIPE, engine, x, y, 1, 8, lambda *_: None))
    update = read(done.update)
    assert set(update) == set(before)
    for name, array in before.items():
        np.testing.assert_array_equal(update[name], engine.params[name] - array)
    kept = personal.read(Path(done.keep))
    assert (kept.spec, kept.structure) == (SPEC, structure)
    for name, array in kept.arrays.items():
        np.testing.assert_array_equal(array, engine.params[name])


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8"])
def test_what_a_form_loses_comes_with_the_next_update(tmp_path, form):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    recipe = dataclasses.replace(RECIPE, form=form)
    meant = read(perform(job(tmp_path / "meant", SPEC, arrays, [NESTED], RECIPE), data).update)
    said = dict.fromkeys(meant, 0.0)
    keep = ""
    for turn in range(4):  # always the same weights, so that every update means the same
        task = dataclasses.replace(job(tmp_path / str(turn), SPEC, arrays, [NESTED], recipe), keep=keep)
        done = perform(task, data)
        assert isinstance(done, Done)
        keep = done.keep
        said = {name: said[name] + array for name, array in read(done.update).items()}
        assert done.update_ref.size < 0.75 * Path(done.keep).stat().st_size / 2
        for name, array in personal.read(Path(keep)).arrays.items():
            before = cutting.cut(SPEC, arrays, NESTED)[name]
            np.testing.assert_allclose(array, before + meant[name], rtol=0, atol=1e-6)
        step = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 127}[form]
        for name, array in meant.items():
            off = np.abs(said[name] - (turn + 1) * array).max()
            assert off <= 1.6 * step * np.abs(array).max() + 1e-6, "the error of one update, however many there were"


@pytest.mark.parametrize("form", ["", "bfloat16", "float16", "int8"])
def test_writing_an_answer_takes_what_is_predicted(tmp_path, form):
    spec, recipe = zoo.by_name("lenet-300-100"), Recipe(form=form)
    keep = ""
    for turn in range(2):  # the second time there is something to carry over, mapped from its file
        arrays = random_arrays(spec, WHOLE)
        work = dataclasses.replace(job(tmp_path / str(turn), spec, arrays, [WHOLE], recipe), keep=keep)
        held = received.Received(spec, WHOLE, work.shells)
        weights = sum(array.nbytes for array in arrays.values())
        keep = str(tmp_path / f"{turn}.keep")
        tracemalloc.start()
        said = Outgoing(RUN, spec, WHOLE, maskfile.WHOLE, arrays, rules.Trained((), 0), form)
        said.write(work.keep, held, tmp_path / "update", Path(keep))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert weights + peak <= memory.predict(spec, WHOLE, recipe, 1).peak


def test_what_was_lost_of_another_width_is_not_added(tmp_path):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    recipe = dataclasses.replace(RECIPE, form="int8")
    first = perform(job(tmp_path / "1", SPEC, arrays, [NESTED], recipe), data)
    plain = perform(job(tmp_path / "2", SPEC, arrays, [NESTED.narrowed(1)], recipe), data)
    for keep in (first.keep, str(tmp_path / "nothing"), str(tmp_path / "2" / "spec")):
        task = dataclasses.replace(job(tmp_path / "3", SPEC, arrays, [NESTED.narrowed(1)], recipe), keep=keep)
        assert perform(task, data).update_ref == plain.update_ref


def test_what_a_result_says(tmp_path):
    told = []
    data = dataset(SPEC)
    done = perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [NESTED], RECIPE), data, told.append)
    assert isinstance(done, Done)
    assert done.structure == NESTED
    assert done.samples == 40
    assert set(done.metrics) == {
        "loss", "loss.first", "loss.before", "loss.after", "accuracy.before", "accuracy.after",
    }  # fmt: skip
    assert done.metrics["loss"] < done.metrics["loss.first"]
    assert done.metrics["accuracy.after"] > 0.5
    assert (done.usage.engine, done.usage.micro_batch) == (available()[0], 8)
    assert done.usage.bytes_peak == predicted(SPEC, NESTED, RECIPE).peak
    assert done.update_ref is not None
    assert done.update_ref.size == Path(done.update).stat().st_size
    assert len(done.keep_digest) == 64


def test_same_job_gives_the_same_bytes(tmp_path):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    digests = set()
    for attempt in ("a", "b", "c"):
        done = perform(job(tmp_path / attempt, SPEC, arrays, [NESTED], RECIPE), data)
        assert isinstance(done, Done)
        digests.add((done.update_ref.digest, done.keep_digest))
    assert len(digests) == 1


def test_evaluate_measures_every_width(tmp_path):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    structures = [NESTED.narrowed(k) for k in (2, 0, 1)]
    done = perform(job(tmp_path, SPEC, arrays, structures, verb="evaluate"), data)
    assert isinstance(done, Done)
    assert (done.update, done.update_ref, done.keep, done.samples) == ("", None, "", 16)
    x, y = data.test
    for structure in structures:
        engine = make()
        engine.load(SPEC, structure, cutting.cut(SPEC, arrays, structure))
        loss, correct = engine.evaluate(x, y)
        assert done.metrics[f"accuracy.{structure.capacity}"] == correct / 16
        assert done.metrics[f"loss.{structure.capacity}"] == pytest.approx(loss / 16, rel=1e-5)


def test_still_answers_with_zeros_and_no_engine(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "warm", None)
    still = Recipe(rule="still")
    done = perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [NESTED.narrowed(1)], still), dataset(SPEC))
    assert isinstance(done, Done)
    assert {name: array.shape for name, array in read(done.update).items()} == {
        name: array.shape for name, array in random_arrays(SPEC, NESTED.narrowed(1)).items()
    }
    assert not any(array.any() for array in read(done.update).values())
    assert done.keep == ""


def test_no_test_part_means_no_accuracy(tmp_path):
    done = perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE], RECIPE), dataset(SPEC, test=0))
    assert isinstance(done, Done)
    assert set(done.metrics) == {"loss", "loss.first"}


def test_a_flat_data_set_is_given_the_models_shape(tmp_path):
    done = perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE]), dataset(SPEC, shape=(36,)))
    assert isinstance(done, Done)


def test_worker_chooses_a_micro_batch_that_fits(tmp_path):
    big = small_cnn(channels=8, hidden=512, side=40)
    structure = WHOLE
    recipe = Recipe(batch=512, clip=1.0)
    budget = predicted(big, structure, recipe, 200).bound
    done = perform(job(tmp_path, big, random_arrays(big, WHOLE), [structure], recipe, budget=budget), dataset(big))
    assert isinstance(done, Done)
    assert done.usage.micro_batch == 128


def test_refusals_by_reason(tmp_path):
    arrays, data = random_arrays(SPEC, WHOLE), dataset(SPEC)
    good = job(tmp_path, SPEC, arrays, [NESTED], RECIPE)

    def fails(reason, text, job=good, data=data):
        failed = perform(job, data)
        assert isinstance(failed, Failed)
        assert (failed.reason, text in failed.detail) == (reason, True), failed
        return failed

    failed = fails("memory", "needs at least", dataclasses.replace(good, bytes_budget=1 << 20))
    assert failed.bytes_needed > 1 << 20
    fails("data", "train part is empty", data=dataset(SPEC, train=0))
    fails("data", "wants", data=dataset(SPEC, shape=(1, 5, 5)))
    fails("data", "classes", data=dataclasses.replace(data, classes=9))
    recipe = dataclasses.replace(RECIPE, rule="magic")
    fails("unsupported", "magic", dataclasses.replace(good, order=dataclasses.replace(good.order, recipe=recipe)))
    fails("unsupported", "score", dataclasses.replace(good, order=dataclasses.replace(good.order, verb="score")))
    recipe = dataclasses.replace(RECIPE, knobs={"distil": 7.0})
    fails("unsupported", "distil", dataclasses.replace(good, order=dataclasses.replace(good.order, recipe=recipe)))
    recipe = dataclasses.replace(RECIPE, rate=1e18, decay=1e18)
    fails("nonfinite", "", dataclasses.replace(good, order=dataclasses.replace(good.order, recipe=recipe)))
    missing = dataclasses.replace(good, shells=good.shells[:2])
    fails("data", "shell", missing)
    Path(good.spec).write_bytes(b"junk")
    fails("data", "", good)


def test_nan_weights_are_refused(tmp_path):
    arrays = random_arrays(SPEC, WHOLE)
    arrays["f.bias"][3] = np.nan
    failed = perform(job(tmp_path, SPEC, arrays, [NESTED]), dataset(SPEC))
    assert isinstance(failed, Failed)
    assert failed.reason == "nonfinite"


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_a_test_loss_that_is_no_number_is_named_and_never_sent(tmp_path, verb):
    """Every weight is a number still, but what they make of the test data is none; a frame with that could not be read."""
    arrays = random_arrays(SPEC, WHOLE)
    recipe = dataclasses.replace(RECIPE, rate=1e38, clip=0.0, steps=1)
    if verb == "evaluate":
        arrays["o.weight"][...] = 3e38
    failed = perform(job(tmp_path, SPEC, arrays, [WHOLE], recipe, verb=verb), dataset(SPEC))
    assert isinstance(failed, Failed)
    assert (failed.reason, "test" in failed.detail) == ("nonfinite", True)


def test_a_disk_that_is_full_is_told_as_that_and_is_no_crash(tmp_path):
    """After a crash the whole order is trained again on another engine, and this one is not used any more."""
    asked = job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE])
    (Path(asked.out) / f"{asked.order.id}.update").symlink_to("/dev/full")
    failed = perform(asked, dataset(SPEC))
    assert isinstance(failed, Failed)
    assert (failed.reason, "space" in failed.detail) == ("data", True)


def test_no_partial_result_is_left_under_its_name_when_training_fails(tmp_path):
    recipe = dataclasses.replace(RECIPE, rate=1e18, decay=1e18)
    perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE], recipe), dataset(SPEC))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("mapped", [1, 1 << 30])
def test_received_puts_any_nested_width_together(tmp_path, monkeypatch, mapped):
    monkeypatch.setattr(received, "BYTES_MAPPED", mapped)
    arrays = random_arrays(SPEC, WHOLE)
    made = job(tmp_path, SPEC, arrays, [NESTED])
    for capacity in range(3):
        weights = received.Received(SPEC, NESTED.narrowed(capacity), made.shells)
        wanted = cutting.cut(SPEC, arrays, NESTED.narrowed(capacity))
        filled = {name: np.full(array.shape, 7, np.float32) for name, array in wanted.items()}
        weights.fill(filled)
        for name, array in wanted.items():
            np.testing.assert_array_equal(filled[name], array)
        weights.subtract_from(filled)
        assert not any(array.any() for array in filled.values())


def test_an_empty_shell_may_be_left_out(tmp_path):
    same = widths(a=(2, 2, 6), b=(3, 3, 12))
    arrays = random_arrays(SPEC, WHOLE)
    made = job(tmp_path, SPEC, arrays, [same])
    assert len(made.shells) == 2
    filled = random_arrays(SPEC, same, seed=2)
    received.Received(SPEC, same, made.shells).fill(filled)
    for name, array in arrays.items():
        np.testing.assert_array_equal(filled[name], array)


def test_shells_that_lie_are_malformed(tmp_path):
    made = job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [NESTED])
    filled = random_arrays(SPEC, NESTED)
    with pytest.raises(Malformed, match="two shells"):
        received.Received(SPEC, NESTED, [*made.shells, made.shells[0]])
    for odd in (made.shells[:2], made.shells[1:]):
        with pytest.raises(Malformed, match=r"expected float32"):
            received.Received(SPEC, NESTED, odd).fill(filled)
    with pytest.raises(Malformed, match=r"expected float32"):
        received.Received(SPEC, widths(a=(2, 4, 6), b=(3, 6, 12)), made.shells).fill(filled)
    for capacity in (-1, "1", 99, True):
        path = tmp_path / "odd"
        write_blob(path, "shell", {"f.bias": np.zeros(3, np.float32)}, meta={"capacity": capacity})
        with pytest.raises(Malformed, match="capacity"):
            received.Received(SPEC, NESTED, [str(path)])


def test_personal_refuses_what_is_none(tmp_path):
    made = job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE])
    with pytest.raises(Malformed, match="personal"):
        personal.read(Path(made.shells[0]))
    personal.write(tmp_path / "p", personal.Personal(SPEC, WHOLE, random_arrays(SPEC, NESTED.narrowed(0))), RUN)
    with pytest.raises(Malformed, match="its spec says"):
        personal.read(tmp_path / "p")


def test_classes_that_a_device_numbers_by_itself_must_be_all_of_them(tmp_path):
    """Another device that lacks others would give the same number to another class, and nobody would see it."""
    task = job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE], RECIPE)
    few = dataclasses.replace(dataset(SPEC), classes=SPEC.classes - 1, labels=("a", "b", "c"), guessed=True)
    failed = perform(task, few)
    assert isinstance(failed, Failed)
    assert failed.reason == "data"
    assert "write [data] labels" in failed.detail
    for data in (dataclasses.replace(few, guessed=False), dataclasses.replace(few, classes=SPEC.classes)):
        assert isinstance(perform(task, data), Done)
    assert isinstance(
        perform(dataclasses.replace(task, order=dataclasses.replace(task.order, verb="evaluate")), few), Done
    )


@pytest.mark.parametrize(("labels", "kept"), [(("cat", "dog"), ("cat", "dog")), (("x" * 256,) * 300, ())])
def test_a_personal_model_knows_the_names_of_its_classes(tmp_path, labels, kept):
    """Unless they would not fit a header: then they are numbers, and the training is not lost."""
    data = dataclasses.replace(dataset(SPEC), labels=labels)
    done = perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE], RECIPE), data)
    assert isinstance(done, Done)
    assert personal.read(Path(done.keep)).labels == kept


def test_progress_is_throttled(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_REPORTS", 0.0)
    perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE], RECIPE), dataset(SPEC), told.append)
    assert len(told) == 1 + 15
    assert (told[0].done, told[-1].done) == (0.0, 1.0)
    monkeypatch.setattr(worker, "SECONDS_BETWEEN_REPORTS", 1e9)
    perform(job(tmp_path, SPEC, random_arrays(SPEC, WHOLE), [WHOLE], RECIPE), dataset(SPEC), told.append)
    assert len(told) == 1 + 15 + 1
