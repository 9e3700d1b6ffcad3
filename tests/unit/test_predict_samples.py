"""What `edge-runtime predict` takes for samples, and what it does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_runtime.config import BrokerConfig, Config
from edge_runtime.predict import _fitting, _read
from wire.errors import DataError

SHAPE = (1, 8, 8)


@pytest.mark.parametrize(("given", "count"), [((64,), 1), ((8, 8), 1), ((3, 64), 3), ((3, 8, 8), 3), ((3, 1, 8, 8), 3)])
def test_samples_of_any_layout(given: tuple[int, ...], count: int) -> None:
    assert _fitting(np.zeros(given, np.float32), SHAPE).shape == (count, *SHAPE)


@pytest.mark.parametrize("given", [(64, 65), (128,), (64, 1, 65), (2, 48), (0, 64)])
def test_rows_that_are_no_samples_are_not_cut_into_some(given: tuple[int, ...]) -> None:
    """64 rows with the class at their end are 65 times 64 numbers."""
    with pytest.raises(DataError, match="rows of 64 numbers"):
        _fitting(np.zeros(given, np.float32), SHAPE)


@pytest.mark.parametrize("text", ['[{"x": 1}]', "[]", "[[1, 2], [3]]"])
def test_json_that_is_no_rows(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError, match="JSON rows"):
        _read(Config("d", BrokerConfig("mqtt://localhost")), str(file), SHAPE)
