"""Tables: one row per sample, one column holds the class, all others are numbers. Comma, semicolon or tab; gzip or not."""

from __future__ import annotations

import array
import contextlib
import csv
import gzip
import itertools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from edge_runtime.data import Source
from edge_runtime.data.parts import Raw, bounded, numbered
from wire.errors import DataError

_LINE_MAX = 2**20
_CELLS_MAX = 65536
_MISSING = ("", "?", "-", "na", "n/a", "null", "none")
"""What stands, in small letters, where a number is missing: in the first row too it is no name of a column."""


def read(path: Path, source: Source) -> Raw:
    """Read a table, row by row. Cost: 4 bytes per number, and the class names.

    Raises:
        DataError: A row cannot be read; the text names its line and what to do.
    """
    values = array.array("f")
    words: list[str] = []
    with _complaints(path), _text(path) as stream:
        rows = _rows(path, stream)
        top = next(rows, (1, []))
        layout = _Layout.of(path, top[1], source)
        for line, row in rows if layout.header else itertools.chain([top], rows):
            if not row:
                continue
            word, numbers = _cells(path, line, row, layout)
            words.append(word)
            values.extend(numbers)
            bounded(str(path), (len(values),), source)
    if not words:
        raise DataError(f"{path}: has no row of samples")
    y, labels = numbered(str(path), words, source.labels)
    x = np.frombuffer(values, np.float32).reshape(len(words), layout.columns - 1)
    return Raw(path.name, x, y, labels=labels, guessed=bool(labels) and not source.labels)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which column is the class, how many there are, whether the first row is a header, and how classes are written."""

    label: int
    columns: int
    header: bool
    labels: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, row: list[str], source: Source) -> _Layout:
        """Read the first row."""
        columns = len(row)
        if not 2 <= columns <= _CELLS_MAX:
            raise DataError(f"{path}: the first row has {columns} columns; wanted are 2 to {_CELLS_MAX}")
        wanted = source.label or str(columns - 1)
        names = [name.strip() for name in row]
        if wanted in names and not wanted.isdecimal():
            return cls(names.index(wanted), columns, True, source.labels)
        if not (wanted.isdecimal() and int(wanted) < columns):
            raise DataError(f"{path}: no column {wanted!r} for data.label; its columns are {names[:20]}")
        label = int(wanted)
        others = [name.lower() for i, name in enumerate(names) if i != label]
        header = any(_number(cell) is None and cell not in _MISSING for cell in others)
        return cls(label, columns, header, source.labels)


def _cells(path: Path, line: int, row: list[str], layout: _Layout) -> tuple[str, list[float]]:
    if len(row) != layout.columns:
        raise DataError(f"{path}: line {line} has {len(row)} columns, the first row has {layout.columns}")
    numbers = []
    for i, cell in enumerate(row):
        if i == layout.label:
            continue
        number = _number(cell)
        if number is None or not math.isfinite(number):
            raise DataError(f"{path}: line {line}, column {i}: {cell[:40]!r} is not a number: fill it or drop the row")
        numbers.append(number)
    return _word(path, line, row[layout.label], layout.labels), numbers


def _word(path: Path, line: int, cell: str, labels: tuple[str, ...]) -> str:
    """Read a class: as data.labels writes it, or as the whole number that it is, or as a name."""
    word = cell.strip()
    if word in labels:
        return word
    number = _number(word)
    if not word or (number is not None and math.isnan(number)):
        raise DataError(f"{path}: line {line} has no class: fill it or drop the row")
    return str(int(number)) if number is not None and number >= 0 and number == int(min(number, 1e9)) else word


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _rows(path: Path, stream: IO[str]) -> Iterator[tuple[int, list[str]]]:
    first = _line(path, stream)
    delimiter = max(",;\t", key=first.count)

    def lines() -> Iterator[str]:
        line = first
        while line:
            yield line
            line = _line(path, stream)

    reader, before = csv.reader(lines(), delimiter=delimiter), 0
    for row in reader:
        if reader.line_num > before + 1:
            raise DataError(
                f"{path}: a quote that begins in line {before + 1} does not end there: close it or take it away"
            )
        before = reader.line_num
        yield before, row


def _line(path: Path, stream: IO[str]) -> str:
    """Read one line; an endless one must not fill the memory."""
    line = stream.readline(_LINE_MAX)
    if len(line) == _LINE_MAX:
        raise DataError(f"{path}: a line is longer than {_LINE_MAX} characters: is this a table?")
    return line


def _text(path: Path) -> IO[str]:
    opener = gzip.open if path.name.endswith(".gz") else open
    return cast("IO[str]", opener(path, "rt", encoding="utf-8-sig", newline=""))


@contextlib.contextmanager
def _complaints(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error, OverflowError) as error:
        raise DataError(f"{path}: not a readable table ({error}): save it as CSV in UTF-8") from error
