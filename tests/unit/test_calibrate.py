"""Orders to calibrate: the cumulative mean and variance of a width's own batches, by hand, and nothing else moves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime import calibrate
from edge_runtime.engines import open_engine
from edge_runtime.worker import perform
from tests.support.models import RANKING, random_arrays, small_cnn
from tests.support.orders import dataset, job
from tests.support.sequences import normed
from wire.job import Done, Failed
from wire.messages import Recipe
from wire.spec import Structure
from wire.tensor import open_blob

SPEC = normed(permille=500)
WIDE = Structure(1, {"a": (2, 4)}, RANKING)
RECIPE = Recipe(batch=6, seed=3)


def arrays_of():
    arrays = random_arrays(SPEC, Structure())
    return arrays | {"n.mean": np.full(4, 3.0, np.float32), "n.variance": np.full(4, 5.0, np.float32)}


def calibrated(tmp_path, structures, recipe=RECIPE, data=None, **limits):
    return perform(job(tmp_path, SPEC, arrays_of(), structures, recipe, "calibrate", **limits), data or dataset(SPEC))


@pytest.mark.parametrize("capacity", [0, 1])
def test_cumulative_statistics_by_hand(tmp_path, capacity):
    data, arrays, kept = dataset(SPEC), arrays_of(), (2, 4)[capacity]
    x = data.train[0]
    done = calibrated(tmp_path, [WIDE.narrowed(capacity)], data=data)
    assert isinstance(done, Done)
    assert (done.structure, done.keep, done.samples) == (WIDE.narrowed(capacity), "", len(x))
    z = x.astype(np.float64) @ arrays["a.weight"][:kept].T + arrays["a.bias"][:kept]
    order = np.random.default_rng([3, 1]).permutation(len(x))
    batches = [z[order[start : start + 6]] for start in range(0, len(x), 6)]
    sizes = np.array([len(rows) for rows in batches])
    assert sizes[-1] != sizes[0], "a short batch weighs less"
    mean = np.average([rows.mean(0) for rows in batches], 0, sizes)
    variance = np.average([rows.var(0, ddof=1) for rows in batches], 0, sizes)
    with open_blob(Path(done.update)) as blob:
        assert blob.kind == "update"
        assert sorted(blob.names) == ["n.mean", "n.variance"], "nothing else moved, though dropout stands behind"
        np.testing.assert_allclose(blob.tensor("n.mean"), mean - 3, atol=1e-5)
        np.testing.assert_allclose(blob.tensor("n.variance"), variance - 5, atol=1e-5)
    np.testing.assert_allclose(mean, z.mean(0), atol=1e-6)


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
    assert (two.reason, "one for each" in two.detail) == ("unsupported", True)
    spec = small_cnn()
    plain = perform(
        job(tmp_path / "plain", spec, random_arrays(spec, Structure()), [Structure()], RECIPE, "calibrate"),
        dataset(spec),
    )
    assert isinstance(plain, Failed)
    assert "no batch norm" in plain.detail


def test_one_sample_says_nothing():
    engine = open_engine("torch")()
    engine.load(SPEC, WIDE, arrays_of())
    x = np.ones((1, 3), np.float32)
    moves = calibrate.observed(engine, x, 6, np.random.default_rng(0), lambda *_: None)
    assert not any(array.any() for array in moves.values())
    before = engine.forward(x)
    engine.observe(np.random.default_rng(0).random((9, 3), np.float32), 1.0)
    assert (engine.forward(x) != before).any()
