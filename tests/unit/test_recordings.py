"""Sensor recordings: which windows there are, who made them, which are the test part, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.simulate.partitions import partition
from edge_runtime.data import Source, load, parse
from edge_runtime.data.resolve import detect
from wire.errors import DataError

TABLE = np.array([[0, 1, 1, 9], [1, 12, 1, 6], [1, 2, 7, 4], [0, 11, 7, 3], [1, 15, 7, 5], [0, 1, 3, 6]], np.int32)
"""Class, trial, person and rows of six recordings; the fourth is shorter than a window of four rows."""
ROWS = int(TABLE[:, 3].sum())
SIGNAL = np.stack([np.arange(ROWS), -np.arange(ROWS)], 1).astype(np.float16)
SHAPE = (2, 4)


def saved(path: Path, **changes: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{"signal": SIGNAL, "recording": TABLE, "activities": np.array(["sit", "run"]), **changes})
    return path


def test_windows_overlap_by_half_and_never_cross_a_recordings_end(tmp_path):
    path = saved(tmp_path / "walks.npz")
    data = load(Source("recordings", str(path), validation=0.0, shape=SHAPE))
    # The naive way: every recording on its own, from its first row on, as long as four rows are left.
    wanted: dict[bool, list[tuple[list[float], int, int]]] = {False: [], True: []}
    begin = 0
    for activity, trial, person, rows in TABLE.tolist():
        for first in range(0, rows - 3, 2):
            wanted[trial >= 11].append(([begin + first + i for i in range(4)], activity, person))
        begin += rows
    assert [len(part) for part in wanted.values()] == [6, 3]
    for (x, y), part in ((data.train, wanted[False]), (data.test, wanted[True])):
        assert x.dtype == np.float32
        assert x[:, 0].tolist() == [window for window, _, _ in part]
        assert (x[:, 1] == -x[:, 0]).all()
        assert y.tolist() == [activity for _, activity, _ in part]
    assert data.ids is not None
    assert data.ids.tolist() == [person for _, _, person in wanted[False]]
    assert (data.classes, data.input_shape, data.name) == (2, SHAPE, "walks")


def test_a_window_is_of_128_rows_unless_it_is_asked_for_otherwise(tmp_path):
    table = np.array([[0, 1, 1, 300], [1, 11, 1, 128]])
    path = saved(tmp_path / "a.npz", signal=np.zeros((428, 9), np.float16), recording=table)
    data = load(Source("recordings", str(path), validation=0.0))
    assert (data.train[0].shape, data.test[0].shape) == ((3, 9, 128), (1, 9, 128))


def test_a_folder_with_the_one_file_is_found_by_its_name_and_told_by_what_the_file_holds(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGE_DATA", str(tmp_path))
    path = saved(
        tmp_path / "walks" / "at_50hz.npz", signal=np.zeros((600, 9)), recording=[[0, 1, 1, 300], [1, 11, 1, 300]]
    )
    (tmp_path / "walks" / "LICENSE").write_text("as you like")
    assert detect(path) == "recordings"
    assert load(parse("walks")).name == "at_50hz"
    plain = tmp_path / "plain.npz"
    np.savez(plain, x=np.zeros((4, 2)), y=[0, 1, 0, 1])
    assert detect(plain) == "npz"
    plain.write_bytes(b"no archive")
    assert detect(plain) == "npz"


def test_people_are_clients(tmp_path):
    data = load(Source("recordings", str(saved(tmp_path / "w.npz")), validation=0.0, shape=SHAPE))
    split = partition("people", data.train[1], 3, seed=0, ids=data.ids)
    assert sorted(sorted({int(data.ids[i]) for i in part}) for part in split.parts) == [[1], [3], [7]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signal": SIGNAL[:-1]}, "make up the 32 rows"),
        ({"signal": SIGNAL.ravel()}, "wanted are"),
        ({"recording": TABLE[:, :3]}, "wanted are"),
        ({"recording": TABLE.astype(np.float32)}, "wanted are"),
        ({"recording": np.where(TABLE == 9, -9, TABLE)}, "make up"),
        ({"recording": np.where(TABLE == 12, 10, np.where(TABLE == 15, 1, TABLE))}, "a part is empty"),
        ({"signal": np.where(SIGNAL == 3, np.nan, SIGNAL)}, "not a finite number"),
    ],
)
def test_what_is_no_set_of_recordings_is_refused_by_name(tmp_path, changes, words):
    path = saved(tmp_path / "bad.npz", **changes)
    with pytest.raises(DataError, match=words) as caught:
        load(Source("recordings", str(path), shape=SHAPE))
    assert "bad" in str(caught.value)


def test_a_missing_array_and_too_many_windows_are_refused(tmp_path):
    np.savez(tmp_path / "half.npz", signal=SIGNAL)
    with pytest.raises(DataError, match="no array 'recording'"):
        load(Source("recordings", str(tmp_path / "half.npz")))
    path = saved(tmp_path / "w.npz")
    with pytest.raises(DataError, match="bytes_max"):
        load(Source("recordings", str(path), shape=SHAPE, bytes_max=8 * 4 * 5))
