"""The command line of the coordinator: numbers that cannot be meant, files that cannot be written, before anything runs."""

from __future__ import annotations

import pytest

from coordinator.cli import main

RUNS = ("simulate", "ticket", "compare", "demo")
ENDLESS = "9" * 5000


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Give what the command says on its way out with 2, before it has done anything."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert not told.out
    return told.err.splitlines()[-1]


@pytest.mark.parametrize("command", RUNS)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "nan", "inf", "many", str(2**53 + 1), ENDLESS])
def test_a_number_of_rounds_is_one(capsys, command, value):
    more = ["--algos", "fedavg"] if command == "compare" else []
    assert "argument --rounds: " in (said := refused(capsys, command, *more, f"--rounds={value}"))
    assert "write a whole number from 1 to" in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("command", "flag", "values"),
    [
        *((command, "--seed", ["-1", "nan", ENDLESS]) for command in ("simulate", "ticket", "demo")),
        *((command, "--devices", ["0", "-1", "1000001"]) for command in RUNS),
        *((command, "--quorum", ["-1", "1.5"]) for command in RUNS[:3]),
        *((command, "--seconds", ["0", "-1", "nan", "inf", "1e400", "soon"]) for command in RUNS[:3]),
        ("ticket", "--fresh-seed", ["-1"]),
        ("compare", "--jobs", ["0", "-1"]),
        ("compare", "--evaluate-every", ["0", "-1"]),
    ],
)
def test_a_number_that_cannot_be_meant_is_refused_by_its_flag(capsys, command, flag, values):
    more = ["--algos", "fedavg"] if command == "compare" else []
    for value in values:
        said = refused(capsys, command, *more, f"{flag}={value}")
        assert f"argument {flag}: {value[:40]}: write a " in said
