"""`coordinator export`: what is written of a run that another has left, and that nothing is where nothing can be."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from coordinator.advance import save_state
from coordinator.algorithm import State
from coordinator.algorithms import by_name
from coordinator.blocks.initial import initial_weights
from coordinator.blocks.masks import kept_by, masked_weights
from coordinator.cli import main
from coordinator.export import JOURNAL, SPOOL, write_model
from coordinator.journal import Closed, Journal, RunStarted
from coordinator.shells import structures_of
from wire import zoo
from wire.schema import from_plain
from wire.spec import ModelSpec, Structure, encode, parameter_count, tensor_shapes
from wire.spool import Spool
from wire.structure import cut, to_wire

SPEC = zoo.load("digits-mlp")


def left(folder: Path, algo: str, **params: float | str) -> State:
    """Write what a run leaves behind in its folder."""
    state = by_name(algo).init(SPEC, initial_weights(SPEC, 0), params)
    spool = Spool(folder / SPOOL)
    about = {"spec": spool.add_bytes(encode(SPEC)).digest, "algo": algo}
    with Journal(folder / JOURNAL) as journal:
        journal.append([RunStarted("ab" * 8, about=about), Closed(1, save_state(spool, state).digest, ("d",))])
    return state


@pytest.mark.parametrize(
    ("algo", "params", "fraction"),
    [
        ("fedavg", {"width": 0.4}, 0.4),
        ("fedavg", {}, 1.0),
        ("heterofl", {"fractions": "0.2 1"}, 1.0),
        ("fiarse", {"sizes": "0.9 0.5", "fractions": "0.5 1", "by": "layer"}, 1.0),
        ("fiarse", {"sizes": "0.2 0.5", "by": "layer"}, 1.0),
        ("fedrolex", {"fractions": "0.2 1"}, 1.0),
        ("prunetrain", {}, 1.0),
    ],
)
def test_without_a_width_the_widest_that_is_trained_is_exported(tmp_path, capsys, algo, params, fraction):
    state, file = left(tmp_path / "run", algo, **params), tmp_path / "m.safetensors"
    assert main(["export", str(file), "--state", str(tmp_path / "run"), "--json"]) == 0
    facts, arrays = json.loads(capsys.readouterr().out), load_file(file)
    assert facts["width"] == pytest.approx(fraction, abs=0.02)
    widest = Structure() if fraction == 1.0 else structures_of(state)[-1]
    assert {name: array.shape for name, array in arrays.items()} == tensor_shapes(SPEC, widest)
    assert facts["parameters"] == sum(array.size for array in arrays.values()) == parameter_count(SPEC, widest)
    if fraction < 1.0:
        assert tensor_shapes(zoo.load(f"{SPEC.name}@{fraction}"), Structure()) == tensor_shapes(SPEC, widest)
    with safe_open(file, framework="numpy") as found:
        assert float(found.metadata()["width"]) == facts["width"]
        small = from_plain(ModelSpec, json.loads(found.metadata()["spec"]))
    assert tensor_shapes(small, Structure()) == tensor_shapes(SPEC, widest)
    kept = masked_weights(state.weights, kept_by(state))
    wanted = kept if fraction == 1.0 else cut(SPEC, to_wire(SPEC, kept, state.levels), widest)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name])
    assert write_model(tmp_path / "run", None)[1] == {name: facts[name] for name in facts if name != "file"}


@pytest.mark.parametrize("width", ["nan", "inf", "-1", "0", "0.7"])
def test_a_width_that_is_none_lists_those_that_are(tmp_path, capsys, width):
    left(tmp_path / "run", "fedavg", width=0.4)
    assert main(["export", str(tmp_path / "m"), "--state", str(tmp_path / "run"), f"--width={width}"]) == 2
    assert f"--width {float(width):g}: this run's nested widths are 0.4" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    left(tmp_path / "run", "fedavg")
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")  # stands for a device, which was replaced by a file
    before = sorted(tmp_path.iterdir())
    for file in (
        "/proc/new/m",
        "/proc/m",
        *(f"{tmp_path}{name}" for name in ("", "/file/m", "/fifo", "/" + "x" * 300)),
    ):
        assert main(["export", file, "--state", str(tmp_path / "run")]) == 5
        told = capsys.readouterr()
        assert f"coordinator: StoreError: {file}: cannot be written: " in told.err
        assert not told.out
    assert (tmp_path / "fifo").is_fifo()
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_what_was_there(tmp_path, capsys):
    left(tmp_path / "run", "fedavg")
    file = tmp_path / "model.safetensors"
    file.write_text("of before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        assert main(["export", str(file), "--state", str(tmp_path / "run")]) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert f"{file}: cannot be written: " in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [file, tmp_path / "run"]
    assert file.read_text() == "of before"


def test_an_export_is_written_through_a_link_and_others_may_read_it(tmp_path):
    left(tmp_path / "run", "fedavg")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    umask = os.umask(0o022)
    try:
        assert main(["export", str(tmp_path / "link"), "--state", str(tmp_path / "run")]) == 0
    finally:
        os.umask(umask)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o644
    assert load_file(tmp_path / "model")
