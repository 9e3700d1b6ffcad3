"""`coordinator export`: what is written of a run that another has left, and that nothing is where nothing can be."""

from __future__ import annotations

import os
import resource
import signal
import stat
from pathlib import Path

from safetensors.numpy import load_file

from coordinator.advance import save_state
from coordinator.algorithm import State
from coordinator.algorithms import by_name
from coordinator.blocks.initial import initial_weights
from coordinator.cli import main
from coordinator.export import JOURNAL, SPOOL
from coordinator.journal import Closed, Journal, RunStarted
from wire import zoo
from wire.spec import encode
from wire.spool import Spool

SPEC = zoo.load("digits-mlp")


def left(folder: Path, algo: str, **params: float | str) -> State:
    """Write what a run leaves behind in its folder."""
    state = by_name(algo).init(SPEC, initial_weights(SPEC, 0), params)
    spool = Spool(folder / SPOOL)
    about = {"spec": spool.add_bytes(encode(SPEC)).digest, "algo": algo}
    with Journal(folder / JOURNAL) as journal:
        journal.append([RunStarted("ab" * 8, about=about), Closed(1, save_state(spool, state).digest, ("d",))])
    return state


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
