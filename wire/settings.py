"""TOML files into frozen dataclasses, and back: every mistake is an error that names file, key and what to write."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

from wire.errors import ConfigError, Malformed
from wire.schema import from_plain, to_plain

T = TypeVar("T")


def read(cls: type[T], path: Path | None, flags: Mapping[str, object] | None = None) -> T:
    """Read a file and lay a command line's flags over it.

    Args:
        cls: The dataclass.
        path: TOML file, or None for flags only.
        flags: Dotted key to value, for example ``{"round.seconds": 30.0}``; those that are None are left out. The keys of a
            table go over the file's one by one.

    Raises:
        ConfigError: Naming file, key and what to write.
    """
    plain: dict[str, object] = {}
    if path is not None:
        try:
            plain = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; write it, or name another file with --config") from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not TOML, an endless number
            raise ConfigError(f"{path} is not a readable TOML file: {error}") from None
    for key, value in (flags or {}).items():
        if value is not None:
            _lay(plain, key, value, path)
    try:
        return from_plain(cls, plain, strict=True)
    except Malformed as error:
        where = error.path.removeprefix("$").removeprefix(".") or "the file"
        raise ConfigError(f"{path or 'command line'}: {where}: {error.problem}") from None


def _lay(plain: dict[str, object], key: str, value: object, path: Path | None) -> None:
    *parents, last = key.split(".")
    table = plain
    for parent in parents:
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{path}: {parent} must be a table: write [{parent}] and its keys below")
        table = inner
    known = table.get(last, {})
    table[last] = {**known, **value} if isinstance(value, Mapping) and isinstance(known, dict) else value


def text(config: Any, about: str) -> str:
    """Write a configuration as TOML; what is as it would be anyway is left out of its tables.

    Args:
        config: A dataclass of values, of dataclasses of values, and of tables of values.
        about: One line for its head.
    """
    lines = [f"# {about}"]
    tables: list[str] = []
    for name, value in to_plain(config).items():
        if not isinstance(value, Mapping):
            lines.append(f"{name} = {_value(value)}")
            continue
        own, defaults = getattr(config, name), {}
        if dataclasses.is_dataclass(own):
            defaults = {f.name: f.default for f in dataclasses.fields(own) if f.default is not MISSING}
        said = [
            f"{_key(k)} = {_value(v)}" for k, v in value.items() if k not in defaults or getattr(own, k) != defaults[k]
        ]
        tables += ["", f"[{name}]", *said] if said else []
    return "\n".join([*lines, *tables, ""])


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)  # of what TOML knows, JSON has neither inf nor nan
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
