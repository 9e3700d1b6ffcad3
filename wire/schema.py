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
import types
import typing
from collections.abc import Mapping
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
    if type(value) in _SCALARS:
        return value
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: to_plain(getattr(value, name)) for name in _names(type(value))}
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
    if not isinstance(data, Mapping):
        raise Malformed(f"expected a map, got {_kind(data)}", path)
    fields: dict[str, tuple[Any, bool]] = _fields(typing.cast("Any", cls))
    if strict:
        for key in data:
            if key not in fields:
                raise Malformed(f"unknown key; known here: {', '.join(sorted(fields))}", f"{path}.{key}")
    values: dict[str, Any] = {}
    for name, (hint, required) in fields.items():
        if name in data:
            values[name] = _read(hint, data[name], strict, f"{path}.{name}")
        elif required:
            raise Malformed("this key is missing", f"{path}.{name}")
    return cls(**values)


@functools.cache
def _names(cls: type[Any]) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cls))


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(cls, include_extras=True)
    missing = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is missing and f.default_factory is missing) for f in dataclasses.fields(cls)
    }


def _read(hint: Any, value: Any, strict: bool, path: str) -> Any:
    if type(value) is hint and hint is not float:
        return value  # most leaves, without a look at the annotation
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *notes = typing.get_args(hint)
        result = _read(inner, value, strict, path)
        for note in notes:
            if isinstance(note, Limit) and result is not None:
                _bound(note, result, path)
        return result
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            raise Malformed(f"expected one of {', '.join(map(str, choices))}, got {value!r}", path)
        return value
    if origin in (typing.Union, types.UnionType):
        return _read_union(typing.get_args(hint), value, strict, path)
    if origin is tuple:
        (item, _) = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise Malformed(f"expected a list, got {_kind(value)}", path)
        return tuple(_read(item, v, strict, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        (key_hint, item) = typing.get_args(hint)
        if not isinstance(value, Mapping):
            raise Malformed(f"expected a map, got {_kind(value)}", path)
        return {_read(key_hint, k, strict, path): _read(item, v, strict, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type", hint), value, strict=strict, path=path)
    return _read_scalar(hint, value, path)


def _read_union(options: tuple[Any, ...], value: Any, strict: bool, path: str) -> Any:
    if value is None:
        if type(None) in options:
            return None
        raise Malformed("expected a value, got nothing", path)
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _read(option, value, strict, path)
        except Malformed as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    raise Malformed(" or ".join(p.problem for p in problems), path)


def _read_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise Malformed(f"expected {hint.__name__}, got {_kind(value)}", path)
    if hint is float and not math.isfinite(value):
        raise Malformed(f"expected a finite number, got {value}", path)
    return value


def _bound(limit: Limit, value: Any, path: str) -> None:
    sized = not isinstance(value, (int, float))
    size = len(value) if sized else value
    what = "length" if sized else "value"
    if limit.low is not None and size < limit.low:
        raise Malformed(f"{what} {size} is below {limit.low:g}", path)
    if limit.high is not None and size > limit.high:
        raise Malformed(f"{what} {size} is above {limit.high:g}", path)
    if limit.pattern is not None and not re.fullmatch(limit.pattern, value):
        raise Malformed(f"{value[:80]!r} does not match {limit.pattern}", path)


def _kind(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def unpack(data: bytes | memoryview, bytes_max: int) -> Any:
    """Read one msgpack document with every length bounded and no key twice in a map.

    Raises:
        TooLarge: `data` is longer than `bytes_max`.
        Malformed: It is not exactly one document, nests too deep, or repeats a key.
    """
    if len(data) > bytes_max:
        raise TooLarge(f"{len(data)} bytes; the limit is {bytes_max}")
    try:
        return msgpack.unpackb(data, object_pairs_hook=unique, max_array_len=65_536, max_map_len=8_192, max_ext_len=0)
    except Malformed:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise Malformed(f"not one msgpack document: {error or type(error).__name__}") from None


def unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Make a map of pairs (a hook for msgpack's readers).

    Raises:
        Malformed: A key stands twice.
    """
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Malformed("a key stands twice in one map")
    return result
