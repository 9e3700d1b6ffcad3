"""`python -m tests` and the shape of a benchmark's result, which scripts rely on."""

from __future__ import annotations

import json
import math

import pytest

from tests import __main__ as commands
from tests.bench import Row, machine, outcome, table

ROWS = [
    Row("ours", "time", 40.0, "ms", "lower", 50.0),
    Row("a peer", "time", 19.0, "s", "lower"),
    Row("ours", "accuracy", 0.95, "share", "higher", 0.94),
]


def test_the_shape_of_a_result():
    result = outcome("sample", ROWS)
    assert set(result) == {"bench", "machine", "rows", "holds"}
    assert result["holds"] is True
    assert result["rows"][1] == {
        "case": "a peer", "measure": "time", "value": 19.0, "unit": "s", "better": "lower", "target": None, "holds": True
    }  # fmt: skip
    assert {"cpu", "cores", "bytes_memory", "system", "python"} == set(machine())
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(
    ("value", "better", "holds"),
    [(50.0, "lower", True), (50.1, "lower", False), (50.0, "higher", True), (49.9, "higher", False)]
    + [(value, "lower", False) for value in (math.nan, -math.inf)],
)
def test_a_target_is_reached_or_missed(value, better, holds):
    result = outcome(
        "sample", [*ROWS, Row("x", "y", value, "z", better, 50.0)], {"cpu": "c", "cores": 1, "python": "3"}
    )
    assert result["holds"] is holds
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert ("MISSED" in table(result)) is not holds


def test_every_name_is_listed_and_an_unknown_one_is_refused(capsys):
    assert commands.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in (*commands.LAYERS, *commands.named("bench"), *commands.named("long")):
        assert name in text
    assert commands.main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


def test_every_benchmark_and_long_run_says_what_it_is():
    for folder in ("bench", "long"):
        assert all(about.endswith(".") for about in commands.named(folder).values())
