"""`edge-runtime export-spec` as a person meets it: the walk of docs/export-spec.md, JSON, mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edge_runtime import cli, exits
from wire import zoo
from wire.spec import Structure, encode, group_sizes, tensor_shapes

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/export-spec.md").read_text("utf-8")


def block(kind: str) -> str:
    """The document's first block of a kind."""
    return re.search(rf"^```{kind}\n(.*?)^```", DOC, re.DOTALL | re.MULTILINE).group(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mine")
    (made / "mine.py").write_text(block("python"))
    (made / "broken.py").write_text(
        "from torch import nn\nNet = lambda: nn.Sequential(nn.Linear(4, 3), nn.ELU())\nlist_of = list\n"
    )
    (made / "odd").mkdir()
    (made / "odd/json.py").write_text(
        "import sys\nfrom torch import nn\nfrom parts import last\nprint('loading')\n"
        "def loud():\n    print('making')\n    return nn.Sequential(nn.Linear(4, 3), last())\n"
        "def leaves():\n    sys.exit(0)\n"
    )
    (made / "odd/parts.py").write_text("from torch import nn\nlast = nn.Tanh\n")
    (made / "exits.py").write_text("raise SystemExit(0)\n")
    return made


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime.cli", "export-spec", *words],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


def test_the_document_s_walk(folder):
    command = block("sh").splitlines()[0].split()
    assert command[:2] == ["edge-runtime", "export-spec"]
    done = run(folder, *command[2:])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == block("text")
    spec = zoo.load(folder / "mine.spec")
    assert {g.name: g.size for g in spec.groups if g.prunable} == {
        "fine": 12, "broad": 8, "mix": 24, "squeeze": 6, "head.0": 64
    }  # fmt: skip
    arrays = load_file(folder / "mine.safetensors")
    assert {name: array.shape for name, array in arrays.items()} == tensor_shapes(spec, Structure())
    half = Structure(0, {g.name: (g.size // 2,) for g in spec.groups if g.prunable}, "ab" * 32)
    assert group_sizes(spec, half)["fine"] == 6


def test_json_says_the_same_and_modules_are_found_by_name(folder):
    done = run(folder, "mine:Mine", "--input", "1,8,8", "--json", "--name", "other", "--out", str(folder / "o.spec"))
    facts = json.loads(done.stdout)
    spec = zoo.load(folder / "o.spec")
    assert (facts["name"], facts["input"], facts["classes"]) == ("other", [1, 8, 8], 10)
    assert facts["bytes_spec"] == len(encode(spec)) == (folder / "o.spec").stat().st_size
    assert [(g["name"], g["size"], g["prunable"]) for g in facts["groups"]] == [
        (g.name, g.size, g.prunable) for g in spec.groups
    ]


def test_nothing_is_written_of_what_is_refused(folder):
    done = run(folder, "broken.py:Net", "--input", "4", "--out", str(folder / "never.spec"))
    assert done.returncode == exits.CONFIG
    assert "1: ELU: this module is not on the list; nearest supported form: silu" in done.stderr.replace("SiLU", "silu")
    assert not (folder / "never.spec").exists()


def test_what_a_factory_prints_is_not_in_the_report_and_its_file_may_have_any_name(folder):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    done = run(elsewhere, "../odd/json.py:loud", "--input", "4", "--json")
    assert json.loads(done.stdout)["classes"] == 3
    assert done.stderr.splitlines() == ["loading", "making"]


@pytest.mark.parametrize("target", ["exits.py:Net", "odd/json.py:leaves"])
def test_a_factory_that_exits_is_a_mistake(folder, target):
    done = run(folder, target, "--input", "4", "--out", str(folder / "left.spec"))
    assert done.returncode == exits.CONFIG
    assert "SystemExit: 0" in done.stderr
    assert not (folder / "left.spec").exists()


def test_files_are_written_whole_or_not_at_all(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    asked = ["export-spec", "mine.py:Mine", "--input", "1,8,8"]
    (old, weights) = (tmp_path / "old.spec", tmp_path / "taken")
    old.write_bytes(b"old")
    weights.mkdir()
    assert cli.main([*asked, "--out", str(old), "--weights", str(weights)]) == exits.DISK
    assert str(weights) in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.spec", "taken"]
    assert old.read_bytes() == b"old"
    assert cli.main([*asked, "--out", str(old), "--weights", str(old)]) == exits.CONFIG
    assert "two files" in capsys.readouterr().err
    assert old.read_bytes() == b"old"
    assert cli.main([*asked, "--out", str(old), "--weights", str(tmp_path / "w")]) == exits.OK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.spec", "taken", "w"]
    assert zoo.load(old).name == "Mine"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("broken.py:Nothing", "--input", "4"), "has no attribute 'Nothing'"),
        (("nowhere.py:Net", "--input", "4"), "there is no file"),
        (("no_such_package:Net", "--input", "4"), "No module named"),
        (("broken.py", "--input", "4"), "package.module:factory or file.py:factory"),
        (("broken.py:nn.Linear", "--input", "4"), "cannot be made without arguments: TypeError"),
        (("broken.py:list_of", "--input", "4"), "gives list, expected a torch.nn.Module"),
        (("broken.py:Net", "--input", "4x4"), "for example 1,28,28"),
    ],
)
def test_mistakes_are_told_what_to_write(folder, monkeypatch, capsys, words, told):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert cli.main(["export-spec", *words]) == exits.CONFIG
    assert told in capsys.readouterr().err
