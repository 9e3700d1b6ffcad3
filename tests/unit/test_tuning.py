"""The model that a device keeps: made from what it trained, by its own class shares and some passes; nothing of it is sent."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator.simulate.flops import flops
from edge_runtime import personal
from edge_runtime.tuning import passes, shares
from edge_runtime.worker import perform
from tests.support.engines import make, predicted
from tests.support.models import random_arrays
from tests.support.norms import SPEC, floats
from tests.support.orders import dataset, job, masked_job, some_masks
from wire.errors import SpecError
from wire.job import Failed
from wire.memory import predict
from wire.messages import Recipe
from wire.spec import Structure
from wire.tensor import open_blob
from wire.work import per_sample
from wire.zoo import by_name

pytestmark = pytest.mark.usefixtures("every_engine")

THREE = Structure(2, {"a": (1, 2, 4)}, "ab" * 32)
PLAIN = Recipe(rate=0.1, batch=40, epochs=2, momentum=0.5, decay=0.01, clip=1.0, seed=3)


def uneven():
    """Thirty samples of class 0 and ten of class 1."""
    x, y = dataset(SPEC, 200).train
    rows = np.concatenate([np.flatnonzero(y == 0)[:30], np.flatnonzero(y == 1)[:10]])
    return dataclasses.replace(dataset(SPEC), train=(x[rows], y[rows]))


def tensors(path):
    with open_blob(Path(path)) as blob:
        return {name: blob.tensor(name).copy() for name in blob.names}


def with_knobs(recipe, **knobs):
    return dataclasses.replace(recipe, knobs={**recipe.knobs, **knobs})


@pytest.fixture
def arrays():
    return random_arrays(SPEC, Structure(), 1) | {"n.variance": floats(1, 2, 3, 4)}


def test_shares_of_classes_by_hand():
    wanted = np.log([3 * 3.5 / 6.5, 3 * 2.5 / 6.5, 3 * 0.5 / 6.5])
    np.testing.assert_allclose(shares(np.array([0, 0, 0, 1, 1]), 3), wanted, rtol=1e-6)
    assert not shares(np.array([0, 1, 2, 1, 0, 2]), 3).any()
    assert np.isfinite(shares(np.zeros(0, np.int64), 3)).all()


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        dataclasses.replace(PLAIN, clip=0.0, momentum=0.0),
        dataclasses.replace(PLAIN, batch=16, knobs={"widths": 1.0, "mutual": 0.5}),
        dataclasses.replace(PLAIN, knobs={"widths": 1.0, "norms": 1.0, "adam": 1.0}, rate=0.01),
        dataclasses.replace(PLAIN, rule="fjord", knobs={"distil": 1.0}),
        dataclasses.replace(PLAIN, form="bfloat16"),
    ],
)
def test_the_update_is_the_same_and_what_is_kept_goes_on_from_it(tmp_path, arrays, recipe):
    data = uneven()
    plain = perform(job(tmp_path / "a", SPEC, arrays, [THREE], recipe), data)
    tuned = perform(job(tmp_path / "b", SPEC, arrays, [THREE], with_knobs(recipe, personal=2.0)), data)
    assert tuned.update_ref.digest == plain.update_ref.digest, "nothing of it is sent"
    before, after = (personal.read(Path(done.keep)).arrays for done in (plain, tuned))
    assert all(not np.array_equal(before[name], after[name]) for name in ("a.weight", "n.weight", "o.bias"))
    again = perform(job(tmp_path / "c", SPEC, arrays, [THREE], with_knobs(recipe, personal=2.0)), data)
    assert (again.update_ref.digest, again.keep_digest) == (tuned.update_ref.digest, tuned.keep_digest)
    assert {"accuracy.before", "accuracy.after", "loss.after"} <= tuned.metrics.keys()
    engine = make()
    engine.load(SPEC, THREE, after)
    loss, right = engine.evaluate(*data.test)
    assert tuned.metrics["loss.after"] == pytest.approx(loss / 16, rel=1e-5)
    assert tuned.metrics["accuracy.after"] == right / 16


def test_passes_that_diverge_leave_what_was_trained(tmp_path, arrays):
    """A decay of a hundred times each weight per step: one step is finite, twenty more are not."""
    data, wild = uneven(), Recipe(rate=1e4, batch=40, steps=1, momentum=0.0, decay=0.01, clip=0.0, seed=3)
    plain = perform(job(tmp_path / "a", SPEC, arrays, [THREE], wild), data)
    tuned = perform(job(tmp_path / "b", SPEC, arrays, [THREE], with_knobs(wild, personal=40.0)), data)
    assert tuned.update_ref.digest == plain.update_ref.digest
    assert tuned.metrics["personal.diverged"] == 1.0
    kept, trained = (personal.read(Path(done.keep)).arrays for done in (tuned, plain))
    trained["o.bias"] = trained["o.bias"] + shares(data.train[1], 2)
    for name, array in kept.items():
        np.testing.assert_allclose(array, trained[name], rtol=1e-6, err_msg=name)
    assert np.isfinite(tuned.metrics["accuracy.after"])


def test_the_passes_are_plain_steps_of_the_width_alone(tmp_path, arrays):
    data, recipe = uneven(), with_knobs(PLAIN, widths=1.0, personal=3.0)
    done = perform(job(tmp_path, SPEC, arrays, [THREE], recipe), data)
    start = {name: arrays[name] + move for name, move in tensors(done.update).items()}
    start["o.bias"] = start["o.bias"] + np.log([2 * 30.5 / 41, 2 * 10.5 / 41])
    leaves = {
        name: torch.tensor(start[name], dtype=torch.float64) for name in start if name[-4:] not in ("mean", "ance")
    }
    x, y = torch.tensor(data.train[0], dtype=torch.float64), torch.tensor(data.train[1])
    speed = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for _ in range(3):  # all samples are one batch
        for leaf in leaves.values():
            leaf.requires_grad_().grad = None
        z = x @ leaves["a.weight"].T + leaves["a.bias"]
        z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() * leaves["n.weight"] + leaves["n.bias"]
        torch.nn.functional.cross_entropy(z.relu() @ leaves["o.weight"].T + leaves["o.bias"], y).backward()
        length = float(sum((leaf.grad**2).sum() for leaf in leaves.values()) ** 0.5)
        with torch.no_grad():
            for name, leaf in leaves.items():
                speed[name] = 0.5 * speed[name] + leaf.grad * min(1.0, 1.0 / length) + 0.01 * leaf
                leaf.sub_(0.1 * speed[name])
    kept = personal.read(Path(done.keep)).arrays
    for name, leaf in leaves.items():
        np.testing.assert_allclose(kept[name], leaf.detach(), atol=2e-6)


def test_what_a_form_lost_is_carried_on_beside_the_devices_own_model(tmp_path, arrays):
    recipe = dataclasses.replace(PLAIN, form="int8")
    plain = perform(job(tmp_path / "a", SPEC, arrays, [THREE], recipe), uneven())
    tuned = perform(job(tmp_path / "b", SPEC, arrays, [THREE], with_knobs(recipe, personal=1.0)), uneven())
    carried = [{n: a for n, a in tensors(done.keep).items() if n.startswith("carried/")} for done in (plain, tuned)]
    assert carried[0].keys() == carried[1].keys() != set()
    assert all(np.array_equal(carried[0][name], carried[1][name]) for name in carried[0])
    assert any(array.any() for array in carried[0].values())


def test_an_order_that_was_cut_keeps_a_model_of_the_narrower_width(tmp_path, arrays):
    made = job(tmp_path, SPEC, arrays, [THREE], with_knobs(PLAIN, widths=1.0, norms=1.0, personal=1.0), micro=40)
    room = predicted(SPEC, THREE.narrowed(0), made.order.recipe, 40).bound
    made = dataclasses.replace(made, bytes_budget=1 << 30)
    done = perform(made, uneven(), room=lambda share: room if share >= 0.5 else 0)
    assert done.structure.capacity == 0
    kept = personal.read(Path(done.keep))
    assert kept.structure == done.structure
    assert kept.arrays["a.weight"].shape == (1, 3)


def test_a_device_without_test_data_keeps_its_own_model_too(tmp_path, arrays):
    data = uneven()
    data = dataclasses.replace(data, test=(data.test[0][:0], data.test[1][:0]))
    done = perform(job(tmp_path, SPEC, arrays, [THREE], with_knobs(PLAIN, personal=1.0)), data)
    assert "accuracy.after" not in done.metrics
    moved = tensors(done.update)
    assert (personal.read(Path(done.keep)).arrays["o.bias"] != arrays["o.bias"] + moved["o.bias"]).all()


def test_a_rule_that_says_itself_what_is_sent_has_its_own_idea(tmp_path, arrays):
    recipe = dataclasses.replace(PLAIN, rule="maml")
    plain, tuned = (
        perform(job(tmp_path / str(n), SPEC, arrays, [THREE], with_knobs(recipe, personal=float(n))), uneven())
        for n in (0, 1)
    )
    assert tuned.keep_digest == plain.keep_digest
    assert tuned.metrics["accuracy.after"] == plain.metrics["accuracy.after"]


@pytest.mark.parametrize("knobs", [{}, {"widths": 1.0}])
def test_its_passes_are_counted_as_work_and_its_gradients_as_memory(tmp_path, arrays, knobs):
    plain = dataclasses.replace(PLAIN, knobs=knobs)
    orders = [job(tmp_path / str(n), SPEC, arrays, [THREE], with_knobs(plain, personal=float(n))).order for n in (0, 3)]
    without, beside = (flops(SPEC, order, 40) for order in orders)
    assert beside - without == 3 * 40 * per_sample(SPEC, THREE)
    large = by_name("digits-cnn")
    needs = [predict(large, Structure(), dataclasses.replace(order.recipe, momentum=0.0), 1).peak for order in orders]
    assert needs[0] <= needs[1] <= needs[0] + 4 * 1_600_000 * 1.1


def test_what_cannot_be_is_refused(tmp_path):
    for knob in (-1.0, 0.5, 1001.0):
        with pytest.raises(SpecError, match="whole number"):
            passes(with_knobs(PLAIN, personal=knob), SPEC)
    with pytest.raises(SpecError, match="cross_entropy"):
        passes(dataclasses.replace(with_knobs(PLAIN, personal=1.0), loss="binary_cross_entropy"), SPEC)
    spec = by_name("digits-mlp")
    masks = some_masks(spec)
    made = masked_job(tmp_path, spec, random_arrays(spec, Structure()), masks, with_knobs(PLAIN, personal=1.0))
    done = perform(made, dataset(spec))
    assert isinstance(done, Failed)
    assert done.reason == "unsupported"
    assert passes(PLAIN, SPEC) == 0
