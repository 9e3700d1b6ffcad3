"""Amounts of memory as people write them. A worker reads them as well, which needs nothing else of the configuration."""

from __future__ import annotations

import re

from wire.errors import ConfigError
from wire.schema import shown

_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 1000, "mb": 1000**2, "gb": 1000**3}
_AMOUNT_MAX = 2**53


def amount(value: int | str, key: str) -> int:
    """Read an amount of memory: ``50331648`` or ``"48 MiB"``.

    Raises:
        ConfigError: It is neither.
    """
    wrong = ConfigError(f'{key}: {shown(value)} is no amount of memory; write bytes or text such as "48 MiB"')
    if isinstance(value, int):
        if not 0 <= value <= _AMOUNT_MAX:
            raise wrong
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].lower() not in _UNITS:
        raise wrong
    bytes_wanted = float(found[1]) * _UNITS[found[2].lower()]
    if bytes_wanted > _AMOUNT_MAX or 0 < bytes_wanted < 1:  # "0.5" was meant for more than nothing, which is no limit
        raise wrong
    return int(bytes_wanted)
