"""The 8x8 handwritten digits that the package brings along (E. Alpaydin, C. Kaynak, UCI, CC BY 4.0: digits8x8.md)."""

from __future__ import annotations

from pathlib import Path

from edge_runtime.data import Source
from edge_runtime.data.npz import arrays
from edge_runtime.data.parts import Raw


def read(path: Path, source: Source) -> Raw:
    """Read the digits: x uint8 [1797, 1, 8, 8] in 0..16, ten classes.

    Args:
        path: The folder of this package.
        source: What was asked.
    """
    found = arrays(path / "digits8x8.npz", ("x", "y"), source)
    return Raw("digits", found["x"][:, None], found["y"], scale=16.0, classes=10)
