"""The lottery-ticket experiment on a planted ticket, and as a command."""

import dataclasses
import json

import numpy as np
import pytest

from coordinator.cli import main
from coordinator.simulate import ticket
from coordinator.simulate.world import Config
from tests.support.models import random_arrays
from wire.errors import ConfigError
from wire.spec import Structure, encode
from wire.zoo import mlp

CLASSES = 6
SPEC = mlp("planted", (CLASSES,), CLASSES, (CLASSES,))


@pytest.fixture
def planted(tmp_path):
    """Class k is the brightest of k inputs; one path of positive weights for each class is all that is needed."""
    rng = np.random.default_rng(0)
    y = np.arange(600) % CLASSES
    x = rng.random((600, CLASSES)).astype(np.float32)
    x[np.arange(600), y] += 1.0
    np.savez(tmp_path / "data.npz", x=x, y=y)
    (tmp_path / "planted.spec").write_bytes(encode(SPEC))
    return Config(
        algo="fixed",
        model=str(tmp_path / "planted.spec"),
        data=f"npz={tmp_path / 'data.npz'}",
        partition="iid",
        fleet="even",
        devices=2,
        rounds=4,
        params={"recipe.rate": 0.3, "density": 1.0},
    )


def entrants(sign):
    """The planted paths, with weights that feed them or (sign -1) starve them; a starved ReLU never learns."""
    mask = np.eye(CLASSES, dtype=np.bool_)
    masks = {"fc1.weight": mask, "out.weight": mask}
    first = random_arrays(SPEC, Structure(), 1, 0.3)
    first["fc1.weight"] = np.where(mask, 0.8, first["fc1.weight"]).astype(np.float32)
    first["fc1.bias"] = np.zeros(CLASSES, np.float32)
    fresh = {**first, "fc1.weight": np.where(mask, sign * 0.8, 0.0).astype(np.float32)}
    return ticket.Entrants(masks, first, fresh)


def test_a_planted_ticket_holds(planted):
    seen = []
    runs = ticket.race(planted, entrants(-1.0), lambda name, view: seen.append((name, len(view.rounds))))
    assert [name for name, _ in seen] == ["ticket"] * 4 + ["fresh"] * 4 + ["dense"] * 4
    assert runs["ticket"]["accuracy"] > 0.9
    assert runs["fresh"]["accuracy"] < 0.5
    assert runs["dense"]["accuracy"] > 0.9
    assert [run["answers"] for run in runs.values()] == [8, 8, 8]
    assert [number for number, _ in runs["ticket"]["curve"]] == [1, 2, 3, 4]
    assert ticket.holds(runs, 0.05)


def test_the_same_start_gives_the_same_bits(planted):
    runs = ticket.race(dataclasses.replace(planted, rounds=2), entrants(1.0))
    some = entrants(1.0)
    assert not np.array_equal(some.first["fc1.weight"], some.fresh["fc1.weight"])  # but where it counts they are equal
    assert runs["ticket"] == runs["fresh"]
    assert not ticket.holds(runs, 0.0)


@pytest.mark.parametrize(
    ("accuracies", "epsilon", "held"),
    [
        ((0.90, 0.8, 0.91), 0.02, True),
        ((0.90, 0.8, 0.93), 0.02, False),
        ((0.90, 0.9, 0.90), 0.02, False),
        ((0.95, 0.9, 0.90), 0.0, True),
    ],
)
def test_the_verdict(accuracies, epsilon, held):
    runs = {name: {"accuracy": a} for name, a in zip(("ticket", "fresh", "dense"), accuracies, strict=True)}
    assert ticket.holds(runs, epsilon) is held


def test_training_is_the_algorithms_own_without_its_rule():
    config = Config(algo="snip", seed=4, params={"recipe.rate": 0.25, "density": 0.3, "schedule": "halving 9"})
    found = ticket.plain(config)
    assert found.algo == "fixed"
    assert found.seed == 4
    assert found.params["recipe.rate"] == 0.25
    assert found.params["schedule"] == "halving 9"
    assert found.params["density"] == 1.0
    assert "saliency" not in found.params
    assert "recipe.rule" not in found.params


FLAGS = ["--model", "digits-mlp", "--partition", "iid", "--devices", "2", "--rounds", "2"]


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out.json"
    snip = ["--algo", "snip", "--param", "density=0.2"]
    assert main(["ticket", *snip, *FLAGS, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "dense:" in printed
    assert "the ticket " in printed
    result = json.loads(out.read_text("utf-8"))
    assert result["density"] == pytest.approx(0.2, abs=1e-3)
    assert list(result["runs"]) == ["ticket", "fresh", "dense"]
    assert result["holds"] == ticket.holds(result["runs"], 0.01)
    assert result["source"]["accuracy"] > 0.3
    assert main(["ticket", *snip, *FLAGS[:-1], "1", "--json", "-"]) == 0
    shorter = json.loads(capsys.readouterr().out)
    assert shorter["runs"]["dense"]["curve"] == result["runs"]["dense"]["curve"][:1]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--algo", "fixed", "--param", "density=1"], "without masks"),
        (["--epsilon", "-1"], "epsilon"),
        (["--fresh-seed", "0"], "fresh-seed"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, why, capsys):
    assert main(["ticket", *flags, *FLAGS[:-1], "1"]) == 2
    assert why in capsys.readouterr().err


def test_nothing_to_compare():
    with pytest.raises(ConfigError, match="nothing to compare"):
        ticket.holds({name: {"accuracy": None} for name in ("ticket", "fresh", "dense")}, 0.0)


def test_the_dense_run_starts_from_all_initial_weights(planted, monkeypatch):
    """Taper's own start is masked already, and its schedule follows the horizon."""
    seen = {}

    def race(config, entrants, watch):
        seen["config"], seen["entrants"] = config, entrants
        return {name: {"accuracy": 0.5} for name in ("ticket", "fresh", "dense")}

    monkeypatch.setattr(ticket, "race", race)
    params = {"first": "erk", "start": 0.5, "density": 0.5, "horizon": 2.0}
    ticket.experiment(dataclasses.replace(planted, algo="taper", rounds=2, params=params), 0.01, 7)
    assert all(seen["entrants"].first[name].all() for name in ("fc1.weight", "out.weight"))
    assert seen["config"].params["schedule"] == "linear 2"
