"""Data sources: what they read, what they refuse and what they say, and the parts that training never sees."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edge_runtime.data import SOURCES, Source, load, parse
from edge_runtime.data.parts import hold_out
from edge_runtime.data.resolve import detect, resolve
from wire.errors import ConfigError, DataError, Malformed
from wire.schema import from_plain, to_plain

X = np.arange(20, dtype=np.float32).reshape(10, 2)
Y = np.array([0, 1] * 5)


def idx(values: np.ndarray, code: int) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, code, values.ndim, *values.shape) + values.tobytes()


def mnist(folder: Path, count: int = 12, *, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir()
    x = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
    y = np.arange(count, dtype=np.uint8) % 3
    for part, k in (("train", 0), ("t10k", 1)):
        for name, values in (("images-idx3", x + k), ("labels-idx1", y)):
            body = idx(values, 8)
            path = folder / f"{part}-{name}-ubyte{'.gz' * packed}"
            path.write_bytes(gzip.compress(body) if packed else body)
    return x, y


def refused(source: Source, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        load(source)
    for word in words:
        assert word in str(caught.value)


# --- the parts -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), max_size=120), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_held_out_parts_cover_everything_once_and_each_class_gives_its_share(labels, test, validation, seed):
    y = np.array(labels, np.int64)
    parts = hold_out(y, test, validation, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))
    assert len(parts[0]) == round(len(y) * test)
    classes = set(labels)
    for k in classes:
        samples = (y == k).sum()
        bound = 0.5 + samples * (len(classes) + 1) / (2 * len(y))  # half a sample at the cut, and where the cut lies
        assert abs((y[parts[0]] == k).sum() - test * samples) <= bound + 1e-9
    again = hold_out(y, test, validation, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_the_seed_decides_who_is_held_out():
    y = np.zeros(100, np.int64)
    first, other = (hold_out(y, 0.2, 0.1, seed)[0].tolist() for seed in (0, 1))
    assert first != other
    assert hold_out(y, 0.2, 0.3, 0)[0].tolist() == first  # the validation share does not move the test part


def test_two_shares_above_everything_are_refused_with_the_two_keys():
    with pytest.raises(ConfigError, match=r"data\.validation 0\.5 and data\.test 0\.6"):
        Source(validation=0.5, test=0.6)


# --- digits --------------------------------------------------------------------------------------------------------


def test_digits_are_whole_and_in_zero_to_one():
    data = load(Source())
    assert (data.classes, data.input_shape, data.name) == (10, (1, 8, 8), "digits")
    sizes = [len(part[1]) for part in (data.train, data.validation, data.test)]
    assert sizes == [1797 - 359 - 180, 180, 359]
    x = np.concatenate([part[0] for part in (data.train, data.validation, data.test)])
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (0.0, 1.0)
    assert x.sum() * 16 == pytest.approx(561718)
    assert data.train[1].dtype == np.int64


def test_digits_come_with_their_attribution():
    text = (Path(sys.modules["edge_runtime.data"].__file__).parent / "digits8x8.md").read_text("utf-8")
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text


def test_everything_can_be_for_testing_and_a_shape_can_be_asked():
    data = load(Source(validation=0.0, test=1.0, shape=(64,)))
    assert [len(part[1]) for part in (data.train, data.validation, data.test)] == [0, 0, 1797]
    assert data.test[0].shape == (1797, 64)
    refused(Source(shape=(65,)), "digits", "data.shape")


def test_digits_take_no_path():
    refused(Source(path="somewhere"), "leave its path out")


def test_reading_a_source_loads_no_numpy():
    code = "import sys, edge_runtime.data as d; d.Source(); assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_a_source_survives_the_way_through_plain_data():
    source = Source("csv", "a.csv", shape=(1, 2), labels=("no", "yes"))
    assert from_plain(Source, to_plain(source), strict=True) == source
    with pytest.raises(Malformed, match=r"value 1\.5 is above 1"):
        from_plain(Source, {"test": 1.5}, strict=True)


# --- npz -----------------------------------------------------------------------------------------------------------


def test_npz_round_trip(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y, classes=np.array(4), labels=np.array(["a", "b", "c", "d"]), ids=Y + 7)
    data = load(Source("npz", str(tmp_path / "a.npz"), validation=0.0, test=0.2))
    assert (data.classes, data.labels, data.input_shape, len(data.test[1])) == (4, ("a", "b", "c", "d"), (2,), 2)
    assert not data.guessed, "the file says it"
    assert set(data.ids) == {7, 8}
    assert set(map(tuple, np.concatenate([data.train[0], data.test[0]]))) == set(map(tuple, X))
    assert all(y == int(x[0] / 2) % 2 for x, y in zip(*data.train, strict=True))


def test_npz_keeps_its_own_test_part_and_scales_bytes(tmp_path):
    np.savez(
        tmp_path / "a.npz", x=np.full((6, 2), 255, np.uint8), y=Y[:6], x_test=np.zeros((3, 2), np.uint8), y_test=Y[:3]
    )
    data = load(Source("npz", str(tmp_path / "a.npz"), validation=0.5, test=0.1))
    assert (len(data.train[1]), len(data.validation[1]), len(data.test[1])) == (3, 3, 3)
    assert data.train[0].tolist() == [[1.0, 1.0]] * 3
    only = load(Source("npz", str(tmp_path / "a.npz"), validation=0.0, test=1.0))
    assert (len(only.train[1]), len(only.test[1])) == (0, 3)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": X}, ["no array 'y'", "numpy.savez"]),
        ({"x": X, "y": Y[:9]}, ["(10, 2)", "(9,)"]),
        ({"x": X, "y": Y - 1}, ["classes run from -1"]),
        ({"x": X, "y": Y + 0.5}, ["whole numbers"]),
        ({"x": X * np.nan, "y": Y}, ["not a finite number"]),
        ({"x": X, "y": Y, "classes": np.array(1)}, ["class 1 occurs"]),
        ({"x": X, "y": Y, "x_test": X}, ["x_test and y_test"]),
        ({"x": X.astype(complex), "y": Y}, ["complex128"]),
        ({"x": X.astype(object), "y": Y}, ["object"]),
        ({"x": X, "y": Y, "classes": np.array([1, 2])}, ["one whole number"]),
        ({"x": X, "y": Y, "ids": Y[:2]}, ["ids"]),
    ],
)
def test_npz_that_is_wrong_is_named(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    refused(Source("npz", str(tmp_path / "bad.npz")), "bad.npz", *words)


def test_npz_of_hostile_bytes_is_refused_before_anything_is_allocated(tmp_path):
    path = tmp_path / "bad.npz"
    good = io.BytesIO()
    np.save(good, X)
    for shape in ("(4294967296, 4294967296)", "(-1, 2)", "(1099511627776,)"):
        head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117).encode() + b"\n"
        body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", body)
            archive.writestr("y.npy", good.getvalue())
        refused(Source("npz", str(path)), "bad.npz")
    whole = path.read_bytes()
    for cut in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:cut])
        refused(Source("npz", str(path)), "bad.npz")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", good.getvalue()[:-4])
        archive.writestr("y.npy", b"\x93NUMPY\x07\x00")
    refused(Source("npz", str(path)), "bad.npz")


def test_npz_beyond_the_bound_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 100)), y=np.zeros(1000, int))
    refused(Source("npz", str(tmp_path / "a.npz"), bytes_max=399_999), "data.bytes_max")
    assert len(load(Source("npz", str(tmp_path / "a.npz"), bytes_max=400_000)).train[1]) == 700


# --- idx -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folder(tmp_path, packed):
    x, y = mnist(tmp_path / "m", packed=packed)
    data = load(Source("idx", str(tmp_path / "m"), validation=0.25))
    assert (data.input_shape, data.classes, len(data.train[1]), len(data.validation[1])) == ((1, 2, 3), 3, 9, 3)
    assert np.array_equal(data.test[0] * 255, (x + 1)[:, None])
    assert np.array_equal(data.test[1], y)


def test_idx_writers_come_from_extended_labels(tmp_path):
    mnist(tmp_path / "m")
    table = np.zeros((12, 8), ">i4")
    table[:, 2] = np.arange(12) // 4
    (tmp_path / "m" / "qmnist-train-labels-idx2-int.gz").write_bytes(gzip.compress(idx(table, 12)))
    data = load(Source("idx", str(tmp_path / "m"), validation=0.0))
    assert data.ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda b: b[:-1], "does not fit the shape"),
        (lambda b: b + b"x", "does not fit the shape"),
        (lambda b: b"\0\0\x07" + b[3:], "not an IDX file"),
        (lambda b: b[:6], "cut short"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "data.bytes_max"),
        (lambda _: b"", "not an IDX file"),
    ],
)
def test_idx_that_is_wrong_is_named(tmp_path, change, word):
    mnist(tmp_path / "m")
    path = tmp_path / "m" / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))
    refused(Source("idx", str(tmp_path / "m")), "train-images-idx3-ubyte", word)


def test_idx_without_labels_or_with_a_broken_gzip(tmp_path):
    mnist(tmp_path / "m", packed=True)
    images = tmp_path / "m" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:20])
    refused(Source("idx", str(tmp_path / "m")), "get the file again")
    (tmp_path / "m" / "train-labels-idx1-ubyte.gz").unlink()
    refused(Source("idx", str(tmp_path / "m")), "train-labels-idx1-ubyte.gz is missing")


# --- csv -----------------------------------------------------------------------------------------------------------


def table(tmp_path: Path, text: str, **options: object) -> Source:
    (tmp_path / "t.csv").write_text(text, "utf-8")
    return Source("csv", str(tmp_path / "t.csv"), validation=0.0, test=0.0, **options)


def test_csv_with_and_without_header(tmp_path):
    for text in ("1,2,0\n3,4,1\n", "a,b,class\n1,2,0\n3,4,1\n", "1;2;0\n\n3;4;1\n", "a\tb\tc\n1\t2\t0\n3\t4\t1.0\n"):
        data = load(table(tmp_path, text))
        assert data.train[0].tolist() == [[1, 2], [3, 4]]
        assert data.train[1].tolist() == [0, 1]
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf1,2,0\n3,4,1\n"))
    assert load(Source("csv", str(tmp_path / "t.csv.gz"), validation=0.0, test=0.0)).train[0].shape == (2, 2)


def test_csv_class_column_by_name_and_names_of_classes(tmp_path):
    text = "kind,a,b\ndog,1,2\ncat,3,4\n"
    data = load(table(tmp_path, text, label="kind"))
    assert (data.labels, data.train[1].tolist(), data.guessed) == (("cat", "dog"), [1, 0], True)
    data = load(table(tmp_path, text, label="0", labels=("dog", "emu", "cat"), shape=(1, 2)))
    assert not data.guessed
    assert (data.classes, data.train[1].tolist(), data.train[0].shape) == (3, [0, 2], (2, 1, 2))


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("1,2,0\n1,2\n", {}, ["line 2 has 2 columns"]),
        ("1,2,0\n1,x,0\n", {}, ["line 2, column 1", "'x'"]),
        ("1,2,0\n1,,0\n", {}, ["line 2, column 1"]),
        ("1,2,0\n1,inf,0\n", {}, ["line 2, column 1"]),
        ("1,2,0\n1,2,\n", {}, ["line 2 has no class"]),
        ("a,b,c\n", {}, ["no row of samples"]),
        ("", {}, ["0 columns"]),
        ("1\n2\n", {}, ["1 columns"]),
        ("a,b,c\n1,2,0\n", {"label": "kind"}, ["no column 'kind'", "['a', 'b', 'c']"]),
        ("1,2,cat\n", {"labels": ("dog",)}, ["'cat' is not among"]),
        ("1,2,0\n" * 10, {"bytes_max": 64}, ["data.bytes_max"]),
        ("1" * 2**20, {}, ["a line is longer"]),
    ],
)
def test_csv_that_is_wrong_is_named(tmp_path, text, options, words):
    refused(table(tmp_path, text, **options), "t.csv", *words)


def test_csv_of_binary_junk(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\0\x01")
    refused(Source("csv", str(tmp_path / "t.csv")), "t.csv", "UTF-8")
    (tmp_path / "t.csv.gz").write_bytes(b"no gzip")
    refused(Source("csv", str(tmp_path / "t.csv.gz")), "t.csv.gz")


# --- images --------------------------------------------------------------------------------------------------------


def pictures(root: Path, classes: tuple[str, ...] = ("cat", "dog"), *, mode: str = "RGB", size: int = 4) -> Path:
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(3):
            colour = 40 * k + i if mode == "L" else (40 * k, i, 255)
            Image.new(mode, (size, size + 1), colour).save(root / name / f"{i}.png")
    return root


def test_images_one_folder_per_class(tmp_path):
    pictures(tmp_path / "pets")
    (tmp_path / "pets" / "emu").mkdir()  # an empty folder is a class too
    data = load(Source("images", str(tmp_path / "pets"), validation=0.0, test=0.0))
    assert (data.labels, data.classes, data.input_shape) == (("cat", "dog", "emu"), 3, (3, 5, 4))
    assert data.guessed, "another device's folders may be others"
    assert not load(Source("images", str(tmp_path / "pets"), labels=("dog", "cat"))).guessed
    assert data.train[0][4, :, 0, 0] * 255 == pytest.approx([40, 1, 255])
    assert data.train[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_images_are_brought_to_a_shape_and_number_folders_are_classes(tmp_path):
    pictures(tmp_path / "train", ("2", "10"), mode="L")
    pictures(tmp_path / "test", ("2", "10"), mode="L", size=8)
    data = load(Source("images", str(tmp_path), validation=0.0, shape=(1, 6, 6)))
    assert (data.labels, data.classes, data.input_shape, len(data.test[1])) == ((), 11, (1, 6, 6), 6)
    assert sorted(set(data.train[1].tolist())) == [2, 10]


def test_images_that_are_wrong_are_named(tmp_path):
    refused(Source("images", str(tmp_path)), "no sub-folder")
    pictures(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "dog" / "9.png")
    refused(Source("images", str(tmp_path)), "9.png", "data.shape")
    (tmp_path / "dog" / "9.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    refused(Source("images", str(tmp_path), shape=(3, 4, 4)), "9.png", "not a readable picture")
    refused(Source("images", str(tmp_path), shape=(2, 4, 4)), "1 or 3 channels")
    refused(Source("images", str(tmp_path), bytes_max=100), "data.bytes_max")
    (tmp_path / "file").write_text("x")
    refused(Source("images", str(tmp_path / "file")), "not a folder")
    refused(Source("images", str(tmp_path), labels=("horse",)), "no picture", "horse")


def test_images_with_too_many_pixels_are_refused_by_their_header(tmp_path):
    pictures(tmp_path)
    Image.new("1", (8192, 8192)).save(tmp_path / "cat" / "big.png")
    refused(Source("images", str(tmp_path), shape=(1, 4, 4)), "big.png", "8192 x 8192")


# --- where data are looked for ----------------------------------------------------------------------------------------


def test_a_name_is_looked_up_in_order_and_the_error_says_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_DATA", str(tmp_path / "env"))
    with pytest.raises(DataError) as caught:
        load(Source("pets"))
    looked = [str(tmp_path / "env" / "pets"), str(tmp_path / "data" / "pets"), "/usr/share/datasets/pets"]
    places = [str(caught.value).index(place) for place in looked]
    assert places == sorted(places)
    (tmp_path / "data").mkdir()
    mnist(tmp_path / "data" / "pets")
    assert load(Source("pets")).name == "pets"
    (tmp_path / "env").mkdir()
    np.savez(tmp_path / "env" / "pets.npz", x=X, y=Y)
    assert load(Source("pets")).name == "pets.npz"
    np.savez(tmp_path / "mine.npz", x=X, y=Y)
    assert load(parse("pets=mine.npz")).name == "mine.npz"
    with pytest.raises(DataError, match="does not start with a dot"):
        resolve("..", "")


def test_what_lies_there_is_told_by_its_files(tmp_path):
    pictures(tmp_path / "a")
    mnist(tmp_path / "b")
    found = [detect(tmp_path / name) for name in ("a", "b", "b/train-images-idx3-ubyte", "c.npz", "d.csv", "e.csv.gz")]
    assert found == ["images", "idx", "idx", "npz", "csv", "csv"]
    with pytest.raises(DataError, match=r"an \.npz or \.csv file, a folder of IDX"):
        detect(tmp_path / "nothing.bin")


@pytest.mark.parametrize("kind", [name for name, reader in SOURCES.items() if reader.needs_path])
def test_a_source_without_its_file_says_so(tmp_path, kind):
    refused(Source(kind), "needs a path")
    refused(Source(kind, str(tmp_path / "gone")), "gone", "no such file")
