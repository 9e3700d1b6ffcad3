"""Orders to calibrate: mean and variance of a width's own batches, pooled, by hand, for it and for every narrower one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator.answers import check_update
from edge_runtime import calibrate
from edge_runtime.worker import perform
from tests.support.engines import make
from tests.support.models import RANKING, random_arrays, small_cnn
from tests.support.orders import dataset, job
from tests.support.sequences import normed
from wire.job import Done, Failed
from wire.messages import Recipe
from wire.spec import Structure
from wire.tensor import open_blob

pytestmark = pytest.mark.usefixtures("every_engine")

SPEC = normed(permille=500)
WIDE = Structure(1, {"a": (2, 4)}, RANKING)
RECIPE = Recipe(batch=6, seed=3)


def arrays_of():
    arrays = random_arrays(SPEC, Structure())
    return arrays | {"n.mean": np.full(4, 3.0, np.float32), "n.variance": np.full(4, 5.0, np.float32)}


def calibrated(tmp_path, structures, recipe=RECIPE, data=None, **limits):
    return perform(job(tmp_path, SPEC, arrays_of(), structures, recipe, "calibrate", **limits), data or dataset(SPEC))


def by_hand(x, kept, batch=6):
    """Pool the batches of the order in float64."""
    arrays = arrays_of()
    z = x.astype(np.float64) @ arrays["a.weight"][:kept].T + arrays["a.bias"][:kept]
    order = np.random.default_rng([3, 1]).permutation(len(x))
    batches = [z[order[start : start + batch]] for start in range(0, len(x), batch)]
    sizes = np.array([len(rows) for rows in batches])
    assert sizes[-1] != sizes[0], "a short batch weighs less"
    mean = np.average([rows.mean(0) for rows in batches], 0, sizes)
    square = np.average([rows.var(0, ddof=1) + rows.mean(0) ** 2 for rows in batches], 0, sizes)
    np.testing.assert_allclose(mean, z.mean(0), atol=1e-6)
    return mean, square - mean**2


@pytest.mark.parametrize("capacity", [0, 1])
def test_pooled_statistics_by_hand(tmp_path, capacity):
    data = dataset(SPEC)
    done = calibrated(tmp_path, [WIDE.narrowed(capacity)], data=data)
    assert isinstance(done, Done)
    assert (done.structure, done.keep, done.samples) == (WIDE.narrowed(capacity), "", len(data.train[0]))
    with open_blob(Path(done.update)) as blob:
        assert blob.kind == "update"
        wanted = [f"n/{k}/n.{role}" for k in range(capacity + 1) for role in ("mean", "variance")]
        assert sorted(blob.names) == wanted, "nothing else moved, though dropout stands behind"
        for k in range(capacity + 1):
            mean, variance = by_hand(data.train[0], (2, 4)[k])
            np.testing.assert_allclose(blob.tensor(f"n/{k}/n.mean"), mean, atol=1e-5)
            np.testing.assert_allclose(blob.tensor(f"n/{k}/n.variance"), variance, atol=1e-5)
    check_update(Path(done.update), SPEC, done.structure)


def test_the_batches_own_means_count_in_the_variance(tmp_path):
    data = dataset(SPEC)
    done = calibrated(tmp_path, [WIDE], Recipe(batch=2, seed=3), data)
    arrays, x = arrays_of(), data.train[0].astype(np.float64)
    spread = (x @ arrays["a.weight"].T + arrays["a.bias"]).var(0)
    with open_blob(Path(done.update)) as blob:
        found = blob.tensor("n/1/n.variance")
    assert (found > spread).all(), "variances of batches are over n - 1"
    assert (found < 1.6 * spread).all()


def test_the_same_order_is_the_same_bytes_and_fits_its_budget(tmp_path):
    found = [calibrated(tmp_path / str(i), [WIDE], budget=64 << 20) for i in range(2)]
    assert all(isinstance(done, Done) for done in found)
    first, again = (Path(done.update).read_bytes() for done in found)
    assert first == again
    refused = calibrated(tmp_path / "none", [WIDE], budget=1 << 20)
    assert isinstance(refused, Failed)
    assert refused.reason == "memory"


def test_what_cannot_be_calibrated_is_refused(tmp_path):
    two = calibrated(tmp_path / "two", [WIDE, WIDE.narrowed(0)])
    assert isinstance(two, Failed)
    assert (two.reason, "the widest alone" in two.detail) == ("unsupported", True)
    spec = small_cnn()
    plain = perform(
        job(tmp_path / "plain", spec, random_arrays(spec, Structure()), [Structure()], RECIPE, "calibrate"),
        dataset(spec),
    )
    assert isinstance(plain, Failed)
    assert "no batch norm" in plain.detail


def nothing(_):
    return {}


def test_one_sample_says_nothing():
    engine = make()
    engine.load(SPEC, WIDE, arrays_of())
    x = np.ones((1, 3), np.float32)
    own = {0: {"n.mean": np.full(2, 7.0, np.float32)}}
    seen = calibrate.observed(engine, lambda k: own.get(k, {}), x, 6, seeds=(0,), tell=lambda *_: None)
    wanted = {
        "n/0/n.mean": [7.0] * 2,
        "n/0/n.variance": [5.0] * 2,
        "n/1/n.mean": [3.0] * 4,
        "n/1/n.variance": [5.0] * 4,
    }
    assert {name: array.tolist() for name, array in seen.items()} == wanted
    before = engine.forward(x)
    engine.observe(np.random.default_rng(0).random((9, 3), np.float32), 1.0)
    assert (engine.forward(x) != before).any()


def test_a_last_batch_of_one_does_not_count():
    x = np.random.default_rng(1).random((13, 3), np.float32)
    engine = make()
    engine.load(SPEC, WIDE, arrays_of())
    told = []
    seen = calibrate.observed(engine, nothing, x, 6, seeds=(5,), tell=lambda done, _: told.append(done))
    rows = np.random.default_rng((5,)).permutation(13)[:12]
    again = make()
    again.load(SPEC, WIDE, arrays_of())
    order = np.argsort(np.random.default_rng((5,)).permutation(12))
    wanted = calibrate.observed(again, nothing, x[rows][order], 6, seeds=(5,), tell=lambda *_: None)
    for name, array in wanted.items():
        np.testing.assert_allclose(seen[name], array, rtol=1e-5, atol=1e-6)
    assert told == pytest.approx([k / 2 + done / 2 for k in range(2) for done in (6 / 13, 12 / 13, 1)])
