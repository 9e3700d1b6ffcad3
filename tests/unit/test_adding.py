"""docs/adding-an-algorithm.md is true: its example is registered for a moment, passes its tests and all others', and runs."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from coordinator import algorithms, cli
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config
from tests.house.walk import ROOT
from tests.unit import test_algorithms

PAGE = (ROOT / "docs" / "adding-an-algorithm.md").read_text("utf-8")
SOURCE, LINE, TESTS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = re.findall(r"^coordinator (.*)$", PAGE, re.MULTILINE)
SMALLER = {"simulate": "", "compare": "--model linear --devices 2 --rounds 2 --seeds 0"}
"""What is said beside a command, so that it is a matter of seconds."""
NAME = "fedavgm"


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Write the page's algorithm and its tests to files of their own, and register it from there."""
    (tmp_path / "docs_fedavgm.py").write_text(SOURCE, "utf-8")
    (tmp_path / "docs_test_fedavgm.py").write_text(TESTS, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(algorithms.ALGORITHMS, NAME, "docs_fedavgm")
    yield tmp_path
    for module in ("docs_fedavgm", "docs_test_fedavgm"):
        sys.modules.pop(module, None)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Give a folder with a coordinator that has the page's file and line where the page says, and nothing else."""
    folder = tmp_path_factory.mktemp("page")
    where = folder / "coordinator" / "algorithms"
    shutil.copytree(ROOT / "coordinator", folder / "coordinator", ignore=shutil.ignore_patterns("__pycache__"))
    (where / f"{NAME}.py").write_text(SOURCE, "utf-8")
    before, end, after = (where / "__init__.py").read_text("utf-8").partition("\n}\n")
    (where / "__init__.py").write_text(f"{before}\n{LINE.rstrip()}{end}{after}", "utf-8")
    return folder


def test_the_registry_line_names_the_file_that_the_page_names():
    (found,) = re.findall(r'^    "(\w+)": "([\w.]+)",$', LINE, re.MULTILINE)
    assert found == (NAME, f"coordinator.algorithms.{NAME}")
    assert f"`{found[1].replace('.', '/')}.py`:" in PAGE
    assert NAME not in algorithms.ALGORITHMS, "then this page must take another example"


def test_the_example_is_short():
    found = ast.parse(SOURCE)
    docstrings = [
        node for node in ast.walk(found) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    prose = sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in docstrings)
    assert sum(bool(line.strip()) for line in SOURCE.splitlines()) - prose <= 36, "nine of them imports"


def test_the_example_passes_its_own_tests_and_those_of_all_algorithms(added):
    own = importlib.import_module("docs_test_fedavgm")
    for name, test in vars(own).items():
        if name.startswith("test_"):
            test()
    test_algorithms.test_a_first_round_can_be_planned_with_the_defaults(NAME)
    test_algorithms.test_a_round_without_answers_or_samples_leaves_the_model_as_it_is(NAME)
    for how in test_algorithms.SAID:
        (added / how).mkdir()
        test_algorithms.test_a_run_goes_on_from_any_saved_state_whatever_devices_say(NAME, how, added / how)


@pytest.mark.usefixtures("added")
def test_the_example_runs_two_rounds_and_its_speed_tells():
    config = Config(algo=NAME, model="linear", partition="iid", fleet="even", devices=2, rounds=2)
    fast, still = (simulate(Config(**{**_plain(config), "params": {"beta": beta}})) for beta in (0.5, 0.0))
    fedavg = simulate(Config(**{**_plain(config), "algo": "fedavg"}))
    assert fast["rounds"] == 2
    assert still["curve"] == fedavg["curve"], "without speed it is FedAvg"
    assert fast["curve"] != still["curve"]


@pytest.mark.usefixtures("added")
def test_the_example_is_listed_and_explained(capsys):
    assert cli.main(["algos"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(NAME)]
    assert "Hsu, Qi and Brown, 2019" in line
    assert cli.main(["algos", NAME]) == 0
    out = capsys.readouterr().out
    assert "section 4.3" in out
    assert "beta = 0.5" in out


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[0])
def test_the_commands_of_the_page_run_where_its_file_and_its_line_were_added(line, package):
    words = shlex.split(f"{line} {SMALLER[line.split()[0]]}")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package, ROOT)))}
    command = [sys.executable, "-m", "coordinator", *words]
    done = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    if words[0] == "simulate":
        assert re.search(r"^full width: 0\.\d+", done.stdout, re.MULTILINE)
    else:
        found = re.findall(r"^(\w+) +- +0\.\d{4}", done.stdout, re.MULTILINE)
        assert sorted(found) == ["fast", "fedavg", NAME]


def test_the_page_has_both_commands():
    assert [line.split()[0] for line in COMMANDS] == list(SMALLER)


def test_the_list_of_algorithms_fits_a_terminal(capsys):
    assert cli.main(["algos"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in algorithms.ALGORITHMS)
    assert max(map(len, lines)) <= 80


def _plain(config):
    return {name: getattr(config, name) for name in Config.__slots__}
