"""How fast each engine was here: seconds over predicted effort of orders that are done, kept over restarts.

`wire.effort` orders the ways of one engine; between engines only a clock can say. What was measured counts for the kind of
order that it was measured with: one model, dense or with about so large a share of the weights. Light: the agent loads it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

_BYTES_MAX = 1 << 16
_KEYS_MAX = 128
_LATEST = 5
"""Of each kind so many orders count: their median outlives one that ran beside something else."""
_KEY = re.compile(r"[a-z0-9-]{1,64}( [a-z0-9-]{1,64}){0,2}")
_LEAST, _MOST = 1e-9, 1e9


class Paces:
    """What was measured.

    Keys are ``ENGINE KIND``, for seconds over effort, and ``ENGINE`` alone, for the seconds that loading it takes.
    """

    __slots__ = ("_found", "_path")

    def __init__(self, path: Path | None = None) -> None:
        """Read a file, as far as it makes sense; None to remember nothing over restarts."""
        self._path = path
        self._found = _read(path) if path is not None else {}

    def ratio(self, engine: str, kind: str) -> float | None:
        """Give seconds for one of effort; None where nothing was measured."""
        return self._median(f"{engine} {kind}")

    def loading(self, engine: str) -> float:
        """Give the seconds until an engine is loaded; 0 where that was never measured."""
        return self._median(engine) or 0.0

    def learn(self, key: str, value: float) -> None:
        """Note one measurement; what makes no sense is left out. A disk that refuses costs the memory over restarts only."""
        if not _LEAST < value < _MOST or not _KEY.fullmatch(key):
            return
        latest = [*self._found.pop(key, ()), value][-_LATEST:]
        self._found[key] = latest  # the latest stands last
        while len(self._found) > _KEYS_MAX:
            del self._found[next(iter(self._found))]
        if self._path is None:
            return
        part = self._path.with_suffix(".new")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps({"version": 1, "paces": self._found}), "ascii")
            part.replace(self._path)

    def _median(self, key: str) -> float | None:
        values = sorted(self._found.get(key, ()))  # the library's median loads a megabyte of arithmetic
        middle = values[(len(values) - 1) // 2 : len(values) // 2 + 1]
        return sum(middle) / len(middle) if middle else None


def _read(path: Path) -> dict[str, list[float]]:
    """Read what is well formed; a file that another program wrote, or half of one, is as good as none."""
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
        plain: Any = json.loads(data) if len(data) <= _BYTES_MAX else {}
        entries = plain["paces"].items() if plain["version"] == 1 else ()
        found = {key: [float(value) for value in values[-_LATEST:]] for key, values in entries if _KEY.fullmatch(key)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    whole = {key: values for key, values in found.items() if values and all(_LEAST < v < _MOST for v in values)}
    return dict(list(whole.items())[-_KEYS_MAX:])


def kind(digest: str, share: float) -> str:
    """Name a kind of order: the model, and the share of its weights that is there, in octaves.

    Args:
        digest: Of the model's blob.
        share: Above 0; 1 where nothing is masked.
    """
    octave = f"d{round(-math.log2(share))}" if 0.0 < share < 1.0 else "dense"
    return f"{digest[:16]} {octave}"
