"""`edge-runtime check`, `predict`, `keep` and their exit codes, as a person meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_runtime import cli, commands, exits, health, personal, predict
from edge_runtime.config import load
from edge_runtime.keep import Keep
from tests.support.messages import RUN, an_order
from tests.support.mosquitto import Mosquitto, free_port
from wire import zoo
from wire.errors import DataError
from wire.spec import Structure


def config_of(folder: Path, port: int, more: str = "") -> Path:
    path = folder / "pi.toml"
    path.write_text(
        f'federation = "home"\ndevice = "pi"\n[broker]\nurl = "mqtt://127.0.0.1:{port}"\n'
        f'[state]\ndir = "{folder / "state"}"\n{more}'
    )
    return path


def give_model(folder: Path, labels: tuple[str, ...] = ()) -> None:
    """A model that puts sample x into class argmax(x[:10])."""
    spec = zoo.by_name("linear")
    names = [t.name for t in spec.tensors]
    weight, bias = (names[0], names[1]) if "weight" in names[0] else (names[1], names[0])
    arrays = {weight: 5 * np.eye(10, 64, dtype=np.float32), bias: np.zeros(10, np.float32)}
    made = folder / "made"
    personal.write(made, personal.Personal(spec, Structure(), arrays, labels=labels), RUN)
    keep, order = Keep(folder / "state/keep"), an_order("d0", 1)
    keep.stage("home", order.recipe.rule, order.id, made)
    keep.promote("home", order)


def one_hot(*classes: int) -> np.ndarray:
    return np.eye(64, dtype=np.float32)[list(classes)]


def run(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "edge_runtime.cli", *words], input=stdin, capture_output=True, timeout=100, check=False
    )


def test_check_finds_this_machine_ready(broker: Mosquitto, tmp_path: Path) -> None:
    told = run("check", "--config", str(config_of(tmp_path, broker.port)), "--json")
    found = json.loads(told.stdout)
    assert (told.returncode, found["fit"]) == (exits.OK, True), told.stdout
    assert {"broker", "data", "memory", "engine", "clock", "disk"} <= {f["what"] for f in found["findings"]}
    said = {f["what"]: f["found"] for f in found["findings"]}
    assert said["engine"].startswith("native: numpy ")
    assert "convolves forward and back" in said["torch"]


def test_check_says_what_to_do_about_each_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_of(
        tmp_path, free_port(), '[data]\nsource = "npz"\npath = "gone.npz"\n[memory]\nreserve = "9999 GiB"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            health, "QUESTIONS", tuple(q for q in health.QUESTIONS if q.__module__ != "edge_runtime.health.engines")
        )
        assert cli.main(["check", "--config", str(path)]) == exits.UNFIT
    told = capsys.readouterr().out
    for failure in ("FAIL broker", "FAIL data", "FAIL memory", "gone.npz", "nobody answers"):
        assert failure in told


def test_a_wrong_file_is_one_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--config", str(tmp_path / "none.toml")]) == exits.UNFIT
    assert "none.toml does not exist" in capsys.readouterr().out


def test_predict_reads_every_form(tmp_path: Path) -> None:
    path = config_of(tmp_path, 1)
    give_model(tmp_path)
    x = one_hot(3, 7)
    np.save(tmp_path / "x.npy", x.reshape(2, 1, 8, 8))
    np.savez(tmp_path / "x.npz", x=x)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    (tmp_path / "x.json").write_text(json.dumps(x.tolist()))
    for name in ("x.npy", "x.npz", "x.csv", "x.json"):
        answers = predict.predict(load(path), str(tmp_path / name))
        assert [a.label for a in answers] == ["3", "7"], name
        assert abs(sum(answers[0].odds) - 1) < 1e-6
        assert answers[0].odds[3] > 0.9


def test_predict_reads_standard_input(tmp_path: Path) -> None:
    path = config_of(tmp_path, 1)
    give_model(tmp_path)
    row = ",".join(str(v) for v in one_hot(4)[0]).encode()
    told = run("predict", "--config", str(path), "--input", "-", "--json", stdin=row)
    assert told.returncode == 0, told.stderr
    (answer,) = json.loads(told.stdout)["predictions"]
    assert answer["class"] == "4"
    plain = run("predict", "--config", str(path), "--input", "-", stdin=row)
    assert plain.stdout.split()[0] == b"4"


def test_digits_are_scaled_as_the_data_set_is(tmp_path: Path) -> None:
    """Rows as they stand in the data set (0 to 16) and rows that are scaled already mean the same."""
    path = config_of(tmp_path, 1, '[data]\nsource = "digits"\n')
    give_model(tmp_path)
    np.save(tmp_path / "raw.npy", (16 * one_hot(5)).astype(np.uint8))
    np.save(tmp_path / "scaled.npy", one_hot(5))
    raw, scaled = (predict.predict(load(path), str(tmp_path / f"{n}.npy")) for n in ("raw", "scaled"))
    assert raw[0].odds == scaled[0].odds


def test_predict_reads_pictures(tmp_path: Path) -> None:
    from PIL import Image

    path = config_of(tmp_path, 1, '[data]\nsource = "images"\npath = "."\nshape = [1, 8, 8]\n')
    give_model(tmp_path)
    Image.fromarray((255 * one_hot(6)).astype(np.uint8).reshape(8, 8)).save(tmp_path / "x.png")
    (answer,) = predict.predict(load(path), str(tmp_path / "x.png"))
    assert answer.label == "6"


def test_predict_shows_names_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"kind-{i}" for i in range(10)]
    path = config_of(tmp_path, 1, f"[data]\nlabels = {json.dumps(names)}\n")
    give_model(tmp_path)
    np.save(tmp_path / "x.npy", one_hot(9))
    assert cli.main(["predict", "--config", str(path), "--input", str(tmp_path / "x.npy")]) == 0
    assert capsys.readouterr().out.startswith("kind-9  kind-9: 0.9")


def test_classes_have_the_names_of_the_data_that_it_was_trained_on(tmp_path: Path) -> None:
    """Folders of pictures give them, for instance; what the configuration says counts more."""
    np.save(tmp_path / "x.npy", one_hot(1, 9))
    give_model(tmp_path, ("cat", "dog"))
    for more, wanted in (("", ["dog", "9"]), ('[data]\nlabels = ["Katze", "Hund"]\n', ["Hund", "9"])):
        answers = predict.predict(load(config_of(tmp_path, 1, more)), str(tmp_path / "x.npy"))
        assert [answer.label for answer in answers] == wanted


def test_classes_beyond_the_named_ones_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data may have fewer classes than the model."""
    path = str(config_of(tmp_path, 1, '[data]\nlabels = ["cat", "dog"]\n'))
    give_model(tmp_path)
    np.save(tmp_path / "x.npy", one_hot(1, 9, 0))
    words = ["predict", "--config", path, "--input", str(tmp_path / "x.npy")]
    assert cli.main([*words, "--json"]) == exits.OK
    found = json.loads(capsys.readouterr().out)["predictions"]
    assert [answer["class"] for answer in found] == ["dog", "9", "cat"]
    assert [len(answer["probabilities"]) for answer in found] == [10, 10, 10]
    assert cli.main(words) == exits.OK
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["dog  dog", "9  9", "cat  cat"]


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "0 bytes"),
        (b"1,2,3", "rows of 64 numbers"),
        (b"hello", "neither npy, npz, CSV nor JSON"),
        (b"[" + b"1," * 63 + b"null]", "no number"),
        (b"[]", "neither"),
        (b"\x93NUMPY\1\0\xff", "neither"),
        (b"PK\3\4", "neither"),
        (",".join(["nan"] * 64).encode(), "no number"),
    ],
)
def test_samples_that_cannot_be_read_are_named(tmp_path: Path, data: bytes, told: str) -> None:
    path = config_of(tmp_path, 1)
    give_model(tmp_path)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match=told):
        predict.predict(load(path), str(tmp_path / "x"))


def test_no_model_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", "--config", str(config_of(tmp_path, 1)), "--input", "x"]) == exits.DISK
    assert "no model of federation 'home' yet" in capsys.readouterr().err


def test_keep_lists_and_wipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(config_of(tmp_path, 1))
    assert cli.main(["keep", "--config", path]) == 0
    assert capsys.readouterr().out == "nothing yet\n"
    give_model(tmp_path)
    assert cli.main(["keep", "--config", path, "--json"]) == 0
    (kept,) = json.loads(capsys.readouterr().out)["kept"]
    assert (kept["federation"], kept["rule"]) == ("home", "sgd")
    assert kept["bytes"] > 64 * 10 * 4
    assert cli.main(["keep", "--config", path, "--wipe", "work"]) == 0
    assert cli.main(["keep", "--config", path, "--wipe", "all"]) == 0
    assert capsys.readouterr().out == "wiped: 0\nwiped: 1\n"


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../..", "a/b", "home/", "/", "*", "h*", "hom?", "[h]ome", "**", " home", "home\n", "h\0me"]
)
def test_keep_wipes_nothing_for_what_is_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = str(config_of(tmp_path, 1))
    give_model(tmp_path)
    (tmp_path / "state/keep/b").mkdir()
    for beside in ("state/lives", "state/keep/beside", "state/keep/b/sgd", "pictures"):
        (tmp_path / beside).write_text("mine")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert cli.main(["keep", "--config", path, "--wipe", name]) == exits.CONFIG
    told = capsys.readouterr()
    assert told.out == ""
    assert f"--wipe {name!r}: use 1 to 64 letters" in told.err
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_help_teaches_by_example_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom edge_runtime import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'numpy', 'torch', 'paho', 'msgpack'} & sys.modules.keys(), 'heavy'\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    for word in ("examples:", "edge-runtime run --config pi.toml", "exit codes:", *exits.MEANINGS.values()):
        assert word in told.stdout


@pytest.mark.parametrize("command", ["run", "check", "predict", "keep"])
def test_every_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert f"example:\n  edge-runtime {command} --config pi.toml" in capsys.readouterr().out


def test_the_printed_example_is_a_valid_configuration(tmp_path: Path) -> None:
    text = commands._EXAMPLES.partition("a configuration file, whole:\n")[2]
    path = tmp_path / "pi.toml"
    path.write_text(text)
    assert load(path).device == "kitchen-pi"


def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["run"])
    assert end.value.code == exits.CONFIG
    assert cli.main(["run", "--config", str(tmp_path / "none.toml")]) == exits.CONFIG
    assert "edge-runtime: " in capsys.readouterr().err
