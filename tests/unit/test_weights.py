"""Weights to start from: what an export writes is what a run begins with; everything else is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from coordinator import start
from coordinator.advance import Task, advance, load_state, stored
from coordinator.algorithms import ALGORITHMS
from coordinator.config import load
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config, build
from coordinator.weights import read, started
from tests.support.models import random_arrays, small_cnn
from tests.support.sequences import normed
from wire import zoo
from wire.errors import ConfigError, Malformed
from wire.head import head_of
from wire.spec import Structure, encode
from wire.spool import Spool

SPEC = small_cnn()


@pytest.fixture
def arrays():
    return random_arrays(SPEC, Structure(), 5)


def saved(path, arrays):
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(path))
    return path


@pytest.mark.parametrize("algo", ["fedavg", "nestfl", "taper", "prunefl", "fiarse"])
def test_a_run_begins_with_these_weights(algo, arrays, tmp_path):
    assert algo in ALGORITHMS
    spool = Spool(tmp_path / "spool")
    digest = stored(spool, read(saved(tmp_path / "w", arrays), SPEC))
    task = Task(str(spool.root), spool.add_bytes(encode(SPEC)).digest, algo, {}, {}, 3, "", (), 1, (), digest)
    state = load_state(spool, advance(task).state, SPEC)
    kept = state.masks.get
    for name, array in arrays.items():
        mask = kept(name)
        assert np.array_equal(state.weights[name], array if mask is None else np.where(mask, array, 0))


def test_half_and_double_precision_are_taken(arrays, tmp_path):
    for kind in (np.float16, np.float64):
        found = read(saved(tmp_path / "w", {name: a.astype(kind) for name, a in arrays.items()}), SPEC)
        for name, array in arrays.items():
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], array.astype(kind).astype(np.float32))


def test_what_does_not_fit_is_refused_by_name(arrays, tmp_path):
    less = {name: array for name, array in arrays.items() if name != "o.bias"}
    some = next(iter(less))
    wrong = {
        "lacks o.bias": less,
        "has, beside it, extra": {**arrays, "extra": np.zeros(1, np.float32)},
        rf"{some} is \(1, 1\)": {**arrays, some: np.zeros((1, 1), np.float32)},
        f"{some} has values": {**arrays, some: np.full_like(arrays[some], np.nan)},
        f"{some} is int64; write float64": {**arrays, some: np.zeros(arrays[some].shape, np.int64)},
        f"{some} has values that": {**arrays, some: np.full(arrays[some].shape, 1e300)},
    }
    for text, given in wrong.items():
        with pytest.raises(ConfigError, match=text):
            read(saved(tmp_path / "w", given), SPEC)


def test_a_negative_variance_is_refused(tmp_path):
    spec = normed()
    with pytest.raises(ConfigError, match=r"n\.variance has negative"):
        read(saved(tmp_path / "w", random_arrays(spec, Structure()) | {"n.variance": -np.ones(4, np.float32)}), spec)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 a zip of pickles", (1 << 60).to_bytes(8, "little") + b"{}"])
def test_what_is_no_such_file_is_refused(data, tmp_path):
    path = tmp_path / "w"
    for match in ("safetensors", "directory|device|No such"):
        if match == "safetensors":
            path.write_bytes(data)
        else:
            path.unlink()
            path.mkdir()
        with pytest.raises(ConfigError, match=match):
            read(path, SPEC)


def test_bfloat16_is_refused_with_what_can_be_read(tmp_path):
    head = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w").write_bytes(len(head).to_bytes(8, "little") + head + b"abcd")
    with pytest.raises(ConfigError, match="float16"):
        read(tmp_path / "w", SPEC)


def test_another_blob_is_not_weights(tmp_path):
    from coordinator.shells import write

    spool = Spool(tmp_path)
    with pytest.raises(Malformed, match="expected weights"):
        started(spool, write(spool, "update", {"a": np.zeros(1, np.float32)}, {}).digest)


def test_a_run_is_known_by_the_content_of_its_weights(tmp_path):
    spec = zoo.load("digits-mlp")
    first, second = (random_arrays(spec, Structure(), seed) for seed in (1, 2))
    file = saved(tmp_path / "w", first)
    config = load(None, {"algo": "fedavg", "model": "digits-mlp", "weights": str(file), "state": str(tmp_path / "s")})
    store, standing = start.prepare(config, tmp_path / "s")
    assert standing.started is not None
    assert store.weights in store.lasting
    store.journal.close()
    again, _ = start.prepare(config, tmp_path / "s")
    assert again.weights == store.weights
    again.journal.close()
    file.unlink()
    gone, _ = start.prepare(config, tmp_path / "s")
    assert gone.weights == store.weights
    gone.journal.close()
    saved(file, second)
    with pytest.raises(ConfigError, match="other settings"):
        start.prepare(config, tmp_path / "s")


def test_a_simulation_starts_from_them(tmp_path):
    """A model that says one class to everything, and hardly learns, is right as often as that class is there."""
    params = {"recipe.rate": 1e-9, "recipe.epochs": 1.0}
    config = Config(algo="fedavg", model="digits-mlp", partition="iid", devices=2, rounds=1, params=params)
    world = build(config, tmp_path / "world")
    for label in (3, 8):
        only = {name: np.zeros_like(array) for name, array in random_arrays(world.spec, Structure()).items()}
        only[head_of(world.spec).params["bias"]][label] = 5.0
        found = simulate(config, weights=saved(tmp_path / "w", only))["accuracy"]["full"]
        assert found == pytest.approx(np.mean(world.test.test[1] == label))
