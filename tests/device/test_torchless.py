"""A device and a coordinator on machines where torch cannot be had: all commands work, models are trained to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import exits
from tests.support.federation import MIB, Federation
from tests.support.torchless import without_torch

ASIDE = "from edge_runtime import frugal, worker_process as w\nfrugal.put_aside(w.ASIDE, w.ANSWERS)\n"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **without_torch(folder / "site"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=100, check=False, env=env)


def test_torch_is_really_not_there(tmp_path: Path) -> None:
    code = "from edge_runtime.engines import available; print(available())"
    assert run(tmp_path, "-c", code).stdout.strip() == "('native',)"
    told = run(tmp_path, "-c", "import torch")
    assert told.returncode == 1
    assert "ModuleNotFoundError" in told.stderr


@pytest.mark.parametrize(
    ("algo", "model", "params", "recipe"),
    [
        ("nestfl", "digits-cnn", {}, {}),
        ("fixed", "digits-mlp", {"density": 0.2}, {"epochs": 3, "rate": 0.2, "batch": 16}),
    ],
)
def test_digits_are_learnt_to_the_end(
    tmp_path: Path, algo: str, model: str, params: dict[str, object], recipe: dict[str, object]
) -> None:
    """The coordinator measures with a local worker, which has no torch either."""
    made = Federation(
        *(tmp_path, algo, model, 2, 3), params=params, recipe=recipe, samples=160, evaluate=True, engine="",
        env=without_torch(tmp_path / "site"), budgets=(64 * MIB, 128 * MIB),
    )  # fmt: skip
    with made as running:
        running.start()
        view = running.wait_finished(100.0)
        config = str(running.root / "device-0.toml")
        for words in (["keep"], ["predict", "--input", str(running.root / "device-0.npz")]):
            told = run(tmp_path, "-m", "edge_runtime.cli", *words, "--config", config)
            assert told.returncode == exits.OK, told.stderr
    assert [view.rounds[n].outcome for n in (1, 2, 3)] == ["closed"] * 3
    engines = {reply.usage.engine for current in view.rounds.values() for reply in current.replies.values()}
    assert "native" in engines
    assert engines <= {"native", ""}, "a rule without an engine names none"
    measured = view.rounds[3].accuracy()
    assert measured[max(measured)] >= 0.5, measured


def test_the_check_is_content(tmp_path: Path) -> None:
    config = tmp_path / "device.toml"
    config.write_text(f'device = "d"\n[broker]\nurl = "mqtt://127.0.0.1:9"\n[state]\ndir = "{tmp_path / "state"}"\n')
    told = run(tmp_path, "-m", "edge_runtime.cli", "check", "--config", str(config), "--json")
    found = {one["what"]: one for one in json.loads(told.stdout)["findings"]}
    assert found["engine"]["found"].startswith("native: numpy ")
    assert found["engine"]["fine"]
    assert found["torch"]["fine"]
    assert "not installed" in found["torch"]["found"]
    assert [one["what"] for one in found.values() if not one["fine"]] == ["broker"]


def test_plan_and_simulate_say_which_engine(tmp_path: Path) -> None:
    words = ["-m", "edge_runtime.cli", "plan", "--model", "digits-cnn", "--budget", "24 MiB", "--json"]
    told = run(tmp_path, *words)
    assert told.returncode == exits.OK, told.stderr
    facts = json.loads(told.stdout)
    assert facts["engines"] == {"native": 24 * MIB}
    assert {way["engine"] for one in facts["candidates"] for way in one["manners"]} == {"native"}
    words = ["-m", "coordinator", "simulate", "--algo", "fedavg", "--model", "linear", "--rounds", "1", "--json", "-"]
    told = run(tmp_path, *words)
    assert told.returncode == 0, told.stderr
    assert {device["engine"] for device in json.loads(told.stdout)["devices"]} == {"native"}


def test_an_engine_that_is_not_there_is_a_named_refusal(tmp_path: Path) -> None:
    words = ["-m", "coordinator", "simulate", "--algo", "fedavg", "--model", "linear", "--rounds", "1"]
    for engine in ("torch", "abacus"):
        told = run(tmp_path, *words, "--engine", engine)
        assert told.returncode == 2
        assert f"engine '{engine}' is not installed here; there are native" in told.stderr


def test_a_worker_loads_nothing_that_is_large(tmp_path: Path) -> None:
    code = (
        f"import sys, numpy as np\n{ASIDE}"
        "import edge_runtime.worker\n"
        "from edge_runtime.warm import warm\n"
        "warm('native', 1)\n"
        "large = {'torch', 'psutil', 'cryptography', 'click', 'sqlite3', 'paho', 'statistics', 'decimal', 'asyncio', 'ssl',"
        " 'tomllib', 'email', 'http'}\n"
        "print(sorted(large & {name for name, module in sys.modules.items() if module is not None}))\n"
    )
    assert run(tmp_path, "-c", code).stdout == "[]\n"
    code = (
        f"import sys\nbefore = set(sys.modules)  # what an installation loads with Python itself\n{ASIDE}"
        "import edge_runtime.worker\n"
        "here = set(w.ASIDE) & set(sys.modules) - before\n"
        "print(sorted(n for n in here if '__stands_in__' not in sys.modules[n].__dict__))\n"
    )
    assert run(tmp_path, "-c", code).stdout == "[]\n", "what stands aside stays aside"


def test_stand_ins_become_real_for_an_engine_that_asks_for_more(tmp_path: Path) -> None:
    code = (
        f"{ASIDE}"
        "import edge_runtime.worker, inspect, secrets, sys, textwrap, numpy.typing, pathlib\n"
        "held = inspect\n"
        "frugal.take_back()\n"
        "import inspect, platform\n"
        "print(held.signature(lambda a, b=1: 0), inspect.signature(print) is not None)\n"
        "print(platform.python_implementation().lower() == sys.implementation.name)\n"
        "print(textwrap.dedent('  x'), numpy.typing.ArrayLike is not None, pathlib.Path('/a b').as_uri())\n"
    )
    told = run(tmp_path, "-c", code)
    assert told.stdout.splitlines() == ["(a, b=1) True", "True", "x True file:///a%20b"], told.stderr


def test_a_stand_in_that_is_asked_by_surprise_answers_as_the_real_one(tmp_path: Path) -> None:
    code = (
        f"{ASIDE}"
        "import pathlib, pickle, gettext, secrets\n"
        "print(pathlib.Path('/a b').as_uri(), pickle.loads(pickle.dumps(3)), gettext.ngettext('one', 'many', 2))\n"
        "print(0 <= secrets.randbits(128) < 2**128, len(secrets.token_hex(8)))\n"
    )
    told = run(tmp_path, "-c", code)
    assert told.stdout.splitlines() == ["file:///a%20b 3 many", "True 16"], told.stderr


def test_numbers_are_the_same_with_stand_ins(tmp_path: Path) -> None:
    code = "import numpy as np\nprint(np.random.default_rng([1, 2]).permutation(9).tolist())\n"
    code += "print(np.random.default_rng().random() < 1)\n"
    plain, lean = run(tmp_path, "-c", code), run(tmp_path, "-c", ASIDE + code)
    expected = f"{np.random.default_rng([1, 2]).permutation(9).tolist()}\nTrue\n"
    assert plain.stdout == lean.stdout == expected, lean.stderr
