"""Hostile .npz files: each is refused as data, and none makes a reader take memory for what is not in it."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.data import Source, load
from edge_runtime.data.resolve import detect
from wire.errors import DataError

X, Y = np.ones((6, 2), np.float32), np.array([0, 1, 0, 1, 0, 1])


def stored(array: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def headed(text: str, version: int = 1) -> bytes:
    """Give the bytes of an array that has this header and no values."""
    head = text.encode("latin-1")
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(head)) + head


def archive(path: Path, method: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "(((",
        "'''",
        "\n  a\n b",
        "{[]: 1}",
        "{1: 2, 'a': 3}",
        "-" * 9000 + "1",
        "(" * 5000,
        "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 99999999999999999999)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (2,)}",
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_header_that_is_none_is_refused(tmp_path, header, version):
    path = archive(tmp_path / "bad.npz", x=headed(header, version), y=stored(Y))
    with pytest.raises(DataError, match=r"bad\.npz"):
        load(Source("npz", str(path)))


def test_a_header_that_would_not_end_is_not_read(tmp_path):
    bomb = b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 26) + bytes(1 << 26)
    path = archive(tmp_path / "bad.npz", zipfile.ZIP_DEFLATED, x=bomb, y=stored(Y))
    assert path.stat().st_size < 1 << 18
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="header"):
            load(Source("npz", str(path)))
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_header_of_version_2_is_read(tmp_path):
    one = stored(X)
    (length,) = struct.unpack("<H", one[8:10])
    two = b"\x93NUMPY\x02\x00" + struct.pack("<I", length) + one[10:]
    data = load(Source("npz", str(archive(tmp_path / "good.npz", x=two, y=stored(Y))), validation=0.0, test=0.0))
    np.testing.assert_array_equal(data.train[0], X)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_in_any_packing_is_refused(tmp_path, method):
    noise = np.random.default_rng(0).random((100, 10))
    path = archive(tmp_path / "bad.npz", method, x=stored(noise), y=stored(np.zeros(100, np.int64)))
    data = bytearray(path.read_bytes())
    place = data.find(b"x.npy")
    for i in range(place + 15, place + 65):
        data[i] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bad\.npz"):
        load(Source("npz", str(path)))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"classes": np.array(2**40)}, "classes"),
        ({"ids": np.full(6, np.nan)}, "ids"),
        ({"ids": np.full(6, 0.5)}, "ids"),
        ({"ids": np.full(6, 2**64 - 1, np.uint64)}, "ids"),
    ],
)
def test_numbers_that_no_device_could_mean_are_refused(tmp_path, members, words):
    path = tmp_path / "bad.npz"
    np.savez(path, x=X, y=Y, **members)
    with pytest.raises(DataError, match=words):
        load(Source("npz", str(path)))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        # Lengths that make up 400 rows only modulo 2 ** 64.
        ([[0, 1, 0, 2**62]] * 4 + [[0, 1, 0, 200], [1, 11, 0, 200]], "make up"),
        ([[0, 1, 0, 2**64 - 200], [1, 11, 0, 600]], "make up"),
        # A class of a recording that is too short for a window.
        ([[2**40, 1, 0, 10], [0, 1, 0, 190], [1, 11, 0, 200]], "class"),
        ([[0, 1, 2**64 - 1, 200], [1, 11, 0, 200]], "ids"),
    ],
)
def test_tables_of_recordings_that_overflow_are_refused(tmp_path, table, words):
    path = tmp_path / "bad.npz"
    np.savez(path, signal=np.zeros((400, 2), np.float32), recording=np.array(table, np.uint64))
    with pytest.raises(DataError, match=words):
        load(Source("recordings", str(path)))


@pytest.mark.parametrize(("place", "value"), [(6, 99), (46, 0xFF)])
def test_an_archive_whose_list_cannot_be_read_is_told_of_by_its_reader(tmp_path, place, value):
    """A later version of the format, and a name that is no text."""
    path = archive(tmp_path / "bad.npz", **dict.fromkeys(("x\u00e9",), stored(X)))
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\x01\x02") + place] = value
    path.write_bytes(data)
    assert detect(path) == "npz"
    with pytest.raises(DataError, match=r"bad\.npz"):
        load(Source("npz", str(path)))
