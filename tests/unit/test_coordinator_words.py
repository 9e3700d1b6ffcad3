"""The command line of the coordinator: numbers that cannot be meant, files that cannot be written, before anything runs."""

from __future__ import annotations

import errno
import os

import pytest

from coordinator import show
from coordinator.cli import main
from coordinator.simulate import command, compare, demo, ticket
from edge_runtime import cli as edge
from edge_runtime import keep

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


def begins(*_: object, **__: object) -> None:
    """Stand for what takes hours."""
    raise AssertionError("a run has begun")


@pytest.fixture
def nothing_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((command, "simulate"), (ticket, "experiment"), (compare, "compare"), (demo, "_fresh")):
        monkeypatch.setattr(module, name, begins)


@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["simulate"], ["--json"]),
        (["ticket"], ["--json"]),
        (["demo"], ["--json"]),
        (["compare", "--algos", "fedavg"], ["--json", "--plot", "--keep"]),
    ],
)
def test_a_result_that_nothing_can_be_written_to_is_found_before_the_runs(tmp_path, monkeypatch, capsys, words, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for flag in flags:
        for file in ("file/x.png", "/proc/new/x.png", "/proc/x.png", "x" * 300, *(["."] if flag != "--keep" else [])):
            assert main([*words, flag, file]) == 5
            told = capsys.readouterr()
            assert told.err.startswith(f"coordinator: StoreError: {file}"), told.err
            assert "cannot be written" in told.err
            assert not told.out
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.usefixtures("nothing_begins")
def test_a_plot_that_cannot_be_drawn_is_found_before_the_runs(tmp_path, capsys):
    words = ["compare", "--algos", "fedavg", "--keep", str(tmp_path / "kept"), "--plot"]
    assert main([*words, str(tmp_path / "out.xyz")]) == 2
    assert ".xyz" in (said := capsys.readouterr().err)
    assert "png" in said
    with pytest.raises(AssertionError, match="has begun"):
        main([*words, str(tmp_path / "new" / "out.svg")])
    assert not list((tmp_path / "new").iterdir())


def test_a_result_goes_into_a_folder_that_is_made_and_over_one_of_before(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "simulate", lambda *_, **__: {"of": "now"})
    monkeypatch.setattr(command.report, "text", str)
    file = tmp_path / "new" / "out.json"
    assert main(["simulate", "--json", str(file)]) == 0
    file.write_text("of before")
    assert main(["simulate", "--json", str(file)]) == 0
    assert file.read_text() == '{\n "of": "now"\n}\n'
    assert main(["simulate", "--json", "/dev/full"]) == 5
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/some/file"), 5),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 5),
        (ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)), None),
        (TimeoutError("no answer"), None),
    ],
)
def test_the_disk_s_refusal_is_told_and_the_rest_is_for_us(tmp_path, monkeypatch, capsys, error, code):
    def refuse(*_: object, **__: object) -> None:
        raise error

    config = tmp_path / "d.toml"
    config.write_text(f'device = "d"\n[broker]\nurl = "mqtt://127.0.0.1"\n[state]\ndir = "{tmp_path}"\n')
    monkeypatch.setattr(show, "show_status", refuse)
    monkeypatch.setattr(keep.Keep, "listing", refuse)
    for begin, words in ((main, ["status"]), (edge.main, ["keep", "--config", str(config)])):
        if code is None:
            with pytest.raises(type(error)):
                begin(words)
            continue
        assert begin(words) == code
        assert str(error) in capsys.readouterr().err
