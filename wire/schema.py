"""Frozen dataclasses to and from plain maps, strictly: the one reader behind messages, specs and configuration files.

A field's type annotation is its whole contract. Understood are ``bool int float str bytes``, ``Literal``, ``X | None``,
``tuple[X, ...]``, ``Mapping[str, X]``, nested dataclasses, and ``Annotated[X, Limit(...)]`` around any of them. Nothing is
converted silently, except an int where a float is wanted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgpack

from wire.errors import Malformed, TooLarge

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Limit:
    """Bounds of a field.

    Attributes:
        low: Least value of a number, or least length of a string, bytes, tuple or map.
        high: Greatest value or length.
        pattern: A regular expression that a string must match as a whole.
    """

    low: float | None = None
    high: float | None = None
    pattern: str | None = None


_SCALARS = frozenset({str, int, float, bool, bytes, type(None)})

CONTAINERS_MAX = 131_072
"""Most lists and maps of one document: an empty map is one byte that costs a reader 64."""

# What one document may cost before it is surveyed, and what its marks mean (see msgpack's specification).
_SURVEY_ABOVE, _CONTAINER_BYTES, _SLOT_BYTES, _NESTED_MAX = 1 << 23, 64, 8, 1024
_KEYS_MAX = 8_192
_SMALL = 1 << 16
_MAPS = frozenset([*range(0x80, 0x90), 0xDE, 0xDF])
_CONTAINER_MARKS = bytes([*range(0x80, 0xA0), *range(0xDC, 0xE0)])
_EXTENSIONS = frozenset([0xC7, 0xC8, 0xC9, *range(0xD4, 0xD9)])
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_WIDTHS = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}

Natural = Annotated[int, Limit(0, 2**53)]
Positive = Annotated[int, Limit(1, 2**53)]
Amount = Annotated[float, Limit(0.0, 1e18)]
Fraction = Annotated[float, Limit(0.0, 1.0)]
Name = Annotated[str, Limit(1, 64, r"[A-Za-z0-9_.-]+")]
Digest = Annotated[str, Limit(64, 64, r"[0-9a-f]+")]
Token = Annotated[str, Limit(16, 16, r"[0-9a-f]+")]
Text = Annotated[str, Limit(0, 2000)]


def to_plain(value: Any) -> Any:
    """Turn a dataclass (or a tuple or map of them) into maps, lists and scalars. Cost: one visit per leaf."""
    kind: Any = type(value)
    if kind in _SCALARS:
        return value
    if isinstance(value, (tuple, list)):
        return [item if type(item) in _SCALARS else to_plain(item) for item in value]
    names = _names(kind)
    if names is not None:
        return {name: item if type(item := getattr(value, name)) in _SCALARS else to_plain(item) for name in names}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[T], data: object, *, strict: bool = False, path: str = "$") -> T:
    """Build a frozen dataclass from a plain map.

    Args:
        cls: The dataclass.
        data: What a msgpack or TOML reader returned.
        strict: Refuse unknown keys (configuration files); otherwise ignore them (messages of a newer peer).
        path: Where `data` stands in its document, for error texts.

    Raises:
        Malformed: A key is missing, unknown or of the wrong type, or a value is out of its bounds.
    """
    try:
        return typing.cast("T", _reader(typing.cast("Any", cls))(data, strict))
    except Malformed as error:
        raise Malformed(error.problem, path + error.path.removeprefix("$")) from None


# Annotations are turned into nested functions once per class. The path of an error is put together on the way out, so that
# a good message pays nothing for it.
_Reader = Callable[[Any, bool], Any]


@functools.cache
def _names(cls: type[Any]) -> tuple[str, ...] | None:
    return tuple(f.name for f in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else None


@functools.cache
def _reader(hint: Any) -> _Reader:
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is Annotated:
        limits = [note for note in arguments[1:] if isinstance(note, Limit)]
        explain = _bounded(_reader(arguments[0]), limits)
        return _quick(arguments[0], limits[0], explain) if arguments[0] in _SCALARS and len(limits) == 1 else explain
    if origin is Literal:
        return _choice(arguments)
    if origin in (typing.Union, types.UnionType):
        return _either(arguments)
    if origin is tuple:
        return _list(_reader(arguments[0]))
    if origin is Mapping:
        return _map(_reader(arguments[0]), _reader(arguments[1]))
    return _record(hint) if dataclasses.is_dataclass(hint) else _scalar(hint)


def _record(cls: Any) -> _Reader:
    hints = typing.get_type_hints(cls, include_extras=True)
    missing = dataclasses.MISSING
    fields = [
        (f.name, _reader(hints[f.name]), f.default is missing and f.default_factory is missing)
        for f in dataclasses.fields(cls)
    ]
    known = {name for name, _, _ in fields}

    def read(value: Any, strict: bool) -> Any:
        if type(value) is not dict and not isinstance(value, Mapping):
            raise Malformed(f"expected a map, got {_kind(value)}")
        if strict and not known.issuperset(value):
            key = next(key for key in value if key not in known)
            raise Malformed(f"unknown key; known here: {', '.join(sorted(known))}", f"$.{str(key)[:80]}")
        values: dict[str, Any] = {}
        name = ""
        try:
            for name, reader, required in fields:
                if name in value:
                    values[name] = reader(value[name], strict)
                elif required:
                    _missing()
        except Malformed as error:
            raise _within(f".{name}", error) from None
        return cls(**values)

    return read


def _missing() -> None:
    raise Malformed("this key is missing")


def _quick(kind: Any, limit: Limit, explain: _Reader) -> _Reader:
    """Let a good scalar pass at once; whatever else it is, the slow reader says."""
    number = kind in (int, float)
    low = -sys.float_info.max if limit.low is None else limit.low
    high = sys.float_info.max if limit.high is None else limit.high
    match = re.compile(limit.pattern).fullmatch if limit.pattern is not None else None

    def read(value: Any, strict: bool) -> Any:
        if type(value) is kind and low <= (value if number else len(value)) <= high and (match is None or match(value)):
            return value
        return explain(value, strict)

    return read


def _bounded(reader: _Reader, limits: list[Limit]) -> _Reader:
    def read(value: Any, strict: bool) -> Any:
        result = reader(value, strict)
        if result is not None:
            for limit in limits:
                _bound(limit, result)
        return result

    return read


def _choice(choices: tuple[Any, ...]) -> _Reader:
    kinds = {type(choice) for choice in choices}

    def read(value: Any, strict: bool) -> Any:  # noqa: ARG001 - every reader has the same form
        if type(value) not in kinds or value not in choices:
            raise Malformed(f"expected one of {', '.join(map(str, choices))}, got {shown(value)}")
        return value

    return read


def _either(options: tuple[Any, ...]) -> _Reader:
    readers = [_reader(option) for option in options if option is not type(None)]
    optional = type(None) in options

    def read(value: Any, strict: bool) -> Any:
        if value is None:
            if optional:
                return None
            raise Malformed("expected a value, got nothing")
        problems = []
        for reader in readers:
            try:
                return reader(value, strict)
            except Malformed as error:
                problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        raise Malformed(" or ".join(p.problem for p in problems))

    return read


def _list(reader: _Reader) -> _Reader:
    def read(value: Any, strict: bool) -> Any:
        if not isinstance(value, (list, tuple)):
            raise Malformed(f"expected a list, got {_kind(value)}")
        result: list[Any] = []
        try:
            for item in value:
                result.append(reader(item, strict))  # noqa: PERF401 - its length names the item that is wrong
        except Malformed as error:
            raise _within(f"[{len(result)}]", error) from None
        return tuple(result)

    return read


def _map(key_reader: _Reader, reader: _Reader) -> _Reader:
    def read(value: Any, strict: bool) -> Any:
        if not isinstance(value, Mapping):
            raise Malformed(f"expected a map, got {_kind(value)}")
        result = {}
        for key, item in value.items():
            try:
                result[key_reader(key, strict)] = reader(item, strict)
            except Malformed as error:
                raise _within(f".{str(key)[:80]}", error) from None
        return result

    return read


def _scalar(hint: Any) -> _Reader:
    def read(value: Any, strict: bool) -> Any:  # noqa: ARG001 - every reader has the same form
        if type(value) is not hint:
            if hint is not float or type(value) is not int:
                raise Malformed(f"expected {hint.__name__}, got {_kind(value)}")
            value = _as_float(value)
        if hint is float and not math.isfinite(value):
            raise Malformed(f"expected a finite number, got {value}")
        return value

    return read


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:  # TOML has integers of any length
        raise Malformed(f"value {shown(value)} is too large") from None


def _bound(limit: Limit, value: Any) -> None:
    number = type(value) is int or type(value) is float
    size = value if number else len(value)
    if (limit.low is not None and size < limit.low) or (limit.high is not None and size > limit.high):
        side = f"above {limit.high:g}" if limit.high is not None and size > limit.high else f"below {limit.low:g}"
        raise Malformed(f"{'value' if number else 'length'} {shown(size)} is {side}")
    if limit.pattern is not None and not re.fullmatch(limit.pattern, value):
        raise Malformed(f"{value[:80]!r} does not match {limit.pattern}")


def _within(step: str, error: Malformed) -> Malformed:
    return Malformed(error.problem, f"${step}{error.path.removeprefix('$')}")


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def shown(value: object) -> str:
    """Name a stranger's value in an error text, in a few words and without ever failing.

    Python's own `repr` fails on lists within 1,000 lists and on integers of more than 4,300 digits.
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        return repr(value[:80])[:80]
    return repr(value)[:80] if type(value) in _SCALARS else f"a {type(value).__name__}"


def unpack(data: bytes | memoryview, bytes_max: int, items_max: int = 1024) -> Any:
    """Read one msgpack document with every length bounded and no key twice in a map.

    Args:
        data: The document.
        bytes_max: Most bytes that it may have.
        items_max: Most items of one list. A list is made as long as it claims to be before its items are read, at every
            level of up to 1024 that are nested (see `refuse_costly`).

    Raises:
        TooLarge: `data` is longer than `bytes_max`, or has more than `CONTAINERS_MAX` lists and maps.
        Malformed: It is not exactly one document, nests too deep, or repeats a key.
    """
    if len(data) > bytes_max:
        raise TooLarge(f"{len(data)} bytes; the limit is {bytes_max}")
    if maybe_costly(bytes(data), items_max):
        refuse_costly(bytes(data))
    try:
        return msgpack.unpackb(
            data, object_pairs_hook=unique, max_array_len=items_max, max_map_len=_KEYS_MAX, max_ext_len=0
        )
    except Malformed:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise Malformed(f"not one msgpack document: {error or type(error).__name__}") from None


def maybe_costly(data: bytes, items_max: int) -> bool:
    """Tell whether bytes may cost a reader far more memory than they are. A few passes at C speed.

    Args:
        data: Of a msgpack document; what stands behind it counts as well.
        items_max: Most items of one list that the reader will make.
    """
    lists = min(data.count(b"\xdc") + data.count(b"\xdd"), _NESTED_MAX)
    maps = min(data.count(b"\xde") + data.count(b"\xdf"), _NESTED_MAX)
    containers = len(data) if len(data) < _SMALL else len(data) - len(data.translate(None, _CONTAINER_MARKS))
    slots = lists * items_max + maps * _KEYS_MAX
    return slots * _SLOT_BYTES + containers * _CONTAINER_BYTES > _SURVEY_ABOVE


def refuse_costly(data: bytes) -> None:
    """Walk from mark to mark to the end of the document at the beginning of `data` and count, without making anything.

    Raises:
        TooLarge: There are more than `CONTAINERS_MAX` lists and maps.
        Malformed: They claim more items than there are bytes; a reader would make room for all of them.
    """
    place = containers = 0
    items = 1  # that are still to come
    while items and place < len(data):
        mark = data[place]
        if mark in _EXTENSIONS:
            return  # refused by the reader when it comes here
        width = _LENGTHS.get(mark, 0)
        place += 1 + width
        length = int.from_bytes(data[place - width : place], "big") if width else mark & (31 if mark & 0x20 else 15)
        items -= 1
        if mark in _CONTAINER_MARKS:
            containers += 1
            items += length * (2 if mark in _MAPS else 1)
            if containers > CONTAINERS_MAX:
                raise TooLarge(f"more than {CONTAINERS_MAX} lists and maps")
            if items > len(data) - place:
                raise Malformed(f"not one msgpack document: {items} items to come in {len(data) - place} bytes")
        elif width or 0xA0 <= mark < 0xC0:
            place += length
        else:
            place += _WIDTHS.get(mark, 0)


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a map of pairs (a hook for msgpack's readers).

    Raises:
        Malformed: A key stands twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Malformed("a key stands twice in one map")
    return result
