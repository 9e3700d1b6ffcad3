"""Tables with something missing, classes as they are written, and samples that nothing could be told of."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.data import Source, load
from wire.errors import ConfigError, DataError


def table(tmp_path, text, **options):
    (tmp_path / "t.csv").write_text(text, "utf-8")
    return Source("csv", str(tmp_path / "t.csv"), validation=0.0, test=0.0, **options)


@pytest.mark.parametrize("cell", ["NA", "", "null", "?"])
def test_a_first_row_with_a_missing_number_is_no_header(tmp_path, cell):
    with pytest.raises(DataError, match="line 1, column 0"):
        load(table(tmp_path, f"{cell},2,0\n3,4,1\n"))
    data = load(table(tmp_path, f"{cell},width,kind\n1,2,0\n3,4,1\n"))  # such as an index without a name
    assert data.train[0].tolist() == [[1, 2], [3, 4]]


def test_a_missing_class_is_no_class(tmp_path):
    with pytest.raises(DataError, match="line 2 has no class"):
        load(table(tmp_path, "1,2,0\n3,4,nan\n"))
    assert load(table(tmp_path, "1,2,x\n3,4,nan\n", labels=("x", "nan"))).train[1].tolist() == [0, 1]


def test_classes_are_written_as_the_labels_write_them(tmp_path):
    assert load(table(tmp_path, "1,2,01\n3,4,02\n", labels=("02", "01"))).train[1].tolist() == [1, 0]
    assert load(table(tmp_path, "1,2,1.0\n3,4,2.0\n", labels=("1.0", "2.0"))).train[1].tolist() == [0, 1]
    assert load(table(tmp_path, "1,2,1.0\n3,4,0\n", labels=("0", "1"))).train[1].tolist() == [1, 0]


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path):
    for text in ('1,2,"cat\n3,4,dog\n5,6,cat\n', '1,2,"cat\n3,4,dog"\n5,6,cat\n'):
        with pytest.raises(DataError, match=r"t\.csv: a quote that begins in line 1 does not end there"):
            load(table(tmp_path, text))
    spaced = load(table(tmp_path, '"1" ,"2" ,"cat"\n"3" ,"4" ,"dog"\n'))
    assert (spaced.train[0].tolist(), spaced.labels) == ([[1, 2], [3, 4]], ("cat", "dog"))


@pytest.mark.parametrize("shape", [(3, 0), (3, 1, 2, 2, 2, 2)])
def test_samples_of_no_numbers_or_of_too_many_axes_are_refused(tmp_path, shape):
    np.savez(tmp_path / "a.npz", x=np.zeros(shape), y=[0, 1, 0])
    with pytest.raises(DataError, match=r"1 to 4 axes, none of them empty: change data\.shape"):
        load(Source("npz", str(tmp_path / "a.npz")))


def test_infinite_classes_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 2)), y=[0.0, np.inf])
    with pytest.raises(DataError, match="classes must be whole numbers"):
        load(Source("npz", str(tmp_path / "a.npz")))


def test_a_class_has_its_name_once():
    with pytest.raises(ConfigError, match=r"data\.labels names 'dog' twice"):
        Source(labels=("dog", "cat", "dog"))
