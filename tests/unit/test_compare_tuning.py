"""How `coordinator compare --tune` chooses among configurations."""

from __future__ import annotations

import json

import pytest

from coordinator import cli
from coordinator.simulate import compare
from coordinator.simulate.trials import Store
from coordinator.simulate.world import Config, Terms, build
from tests.support.compared import asked, played
from wire.errors import ConfigError


def test_tuning_takes_the_best_configuration_on_other_seeds_and_other_data(monkeypatch, tmp_path, capsys):
    worth = {0.1: 0.6, 0.2: 0.9, 0.3: 0.7, 0.5: 0.65}
    done = played(
        monkeypatch,
        lambda config: "burst" if config.params["recipe.rate"] == 0.4 else worth[config.params["recipe.rate"]],
    )
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"fedavg": [{"recipe.rate": rate} for rate in (0.1, 0.2, 0.3, 0.4, 0.5)]}))
    words = ["--algos", "fedavg", "--configs", str(file), "--seeds", "0,1"]
    with pytest.raises(ConfigError, match="--tune"):
        asked(*words)
    with pytest.raises(ConfigError, match="other seeds"):
        asked(*words, "--tune", "--tuning-seeds", "1,2")
    with pytest.raises(ConfigError, match="at least one"):
        asked(*words, "--tune", "--tuning-seeds", ",")
    comparison = asked(*words, "--tune", "--tuning-seeds", "100,101,102")
    found = compare.compare(comparison, Store(tmp_path), 1)
    assert [(t.config.seed, t.config.terms.tuning, t.config.params["recipe.rate"]) for t in done] == [
        *((100, True, rate) for rate in (0.1, 0.2, 0.3, 0.4, 0.5)),
        *((101, True, rate) for rate in (0.2, 0.3, 0.5)),
        *((102, True, rate) for rate in (0.2, 0.3)),
        (0, False, 0.2),
        (1, False, 0.2),
    ]
    assert all(t.config.params["recipe.rate"] == 0.2 for t, _ in found)
    said = "tuned fedavg: 0.6000, 0.9000 (3 seeds), 0.7000 (3 seeds), failed, 0.6500 (2 seeds); goes on"
    assert said in capsys.readouterr().out


def test_tuning_goes_by_the_mean_of_the_seeds_and_leaves_out_what_failed_once(monkeypatch, tmp_path):
    worth = {
        (0.1, 7): 0.8,
        (0.2, 7): 0.9,
        (0.3, 7): 0.7,
        (0.1, 8): 0.9,
        (0.2, 8): 0.7,
        (0.1, 9): 0.5,
        (0.2, 9): "burst",
    }
    done = played(monkeypatch, lambda config: worth.get((config.params["recipe.rate"], config.seed), 0.5))
    file = tmp_path / "c.json"

    def chosen(*rates, seeds):
        file.write_text(json.dumps({"fedavg": [{"recipe.rate": rate} for rate in rates]}))
        words = ["--algos", "fedavg", "--configs", str(file), "--seeds", "0", "--tune", "--tuning-seeds", seeds]
        done.clear()
        ((trial, _),) = compare.compare(asked(*words), Store(tmp_path / "kept"), 1)
        return trial.config.params["recipe.rate"]

    assert chosen(0.1, 0.2, 0.3, seeds="7") == 0.2
    assert chosen(0.1, 0.2, 0.3, seeds="7,8") == 0.1, ".85 against .8"
    assert [(t.config.seed, t.config.params["recipe.rate"]) for t in done][:2] == [(8, 0.1), (8, 0.2)], (
        "the rest is kept"
    )
    assert chosen(0.1, 0.2, 0.3, seeds="8,7") == 0.1, "though the last seed says .2"
    assert chosen(0.2, 0.1, seeds="9,7") == 0.1
    assert chosen(0.1, 0.2, 0.3, seeds="7,9") == 0.1, "what fails with the last seed only is out as well"


def test_seeds_that_a_plus_joins_all_have_their_say_before_anything_is_left_out(monkeypatch, tmp_path):
    worth = {(0.1, 7): 0.7, (0.1, 8): 0.9, (0.2, 7): 0.8, (0.2, 8): 0.6, (0.3, 7): 0.75, (0.3, 8): 0.8}
    done = played(monkeypatch, lambda config: worth.get((config.params["recipe.rate"], config.seed), 0.5))
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"fedavg": [{"recipe.rate": rate} for rate in (0.1, 0.2, 0.3)]}))
    words = ["--algos", "fedavg", "--configs", str(file), "--seeds", "0", "--tune", "--tuning-seeds"]

    def runs(seeds):
        done.clear()
        compare.compare(asked(*words, seeds), Store(tmp_path / seeds), 1)
        return [(t.config.seed, t.config.params["recipe.rate"]) for t in done]

    all_of_both = [(seed, rate) for seed in (7, 8) for rate in (0.1, 0.2, 0.3)]
    assert runs("7,8")[-1] == (0, 0.3), "what is the last with seed 7 is out"
    assert runs("7+8") == [*all_of_both, (0, 0.1)], ".8 against .7 and .775"
    assert runs("7+8,9") == [*all_of_both, (9, 0.1), (9, 0.3), (0, 0.1)]
    for wrong in ("7+", "7++8", "7+8,8", "7,seven"):
        with pytest.raises(ConfigError, match="--tuning-seeds"):
            asked(*words, wrong)
    with pytest.raises(ConfigError, match="other seeds"):
        asked(*words, "7+0")
    played(monkeypatch, lambda _: "burst")
    with pytest.raises(ConfigError, match="tuning seeds 7, 8 failed"):
        compare.compare(asked(*words, "7+8,9"), Store(tmp_path / "none"), 1)


def test_it_is_said_how_many_configurations_each_method_chose_from(monkeypatch, tmp_path, capsys):
    played(monkeypatch, lambda _: 0.5)
    file, out = tmp_path / "c.json", tmp_path / "o.json"
    common = ["--seeds", "0", "--keep", str(tmp_path / "kept"), "--json", str(out)]

    def told(group, *words):
        file.write_text(
            json.dumps({name: [{"recipe.rate": 0.1 * n} for n in range(1, 1 + count)] for name, count in group.items()})
        )
        words = ["compare", "--algos", "fedavg,feddip", "--configs", str(file), *words, *common]
        assert cli.main(words) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("configurations")]
        return lines, json.loads(out.read_text())["configurations"]

    unequal = ["configurations tried: UNEQUAL: fedavg 3, feddip 6"]
    assert told({"fedavg": 3, "feddip": 6}, "--tune") == (unequal, {"fedavg": 3, "feddip": 6})
    assert told({"fedavg": 2}, "--tune") == (
        ["configurations tried: UNEQUAL: fedavg 2, feddip 1"],
        {"fedavg": 2, "feddip": 1},
    )
    assert told({"*": 4}, "--tune") == (["configurations tried: fedavg 4, feddip 4"], {"fedavg": 4, "feddip": 4})
    assert told({"*": 1}) == ([], {}), "nothing was chosen"


def test_tuning_measures_on_a_validation_part_that_is_not_trained_on(tmp_path):
    plain = build(Config(algo="fedavg", model="linear", partition="iid"), tmp_path / "a")
    tuning = build(Config(algo="fedavg", model="linear", partition="iid", terms=Terms(tuning=True)), tmp_path / "b")

    def lines(world, parts):
        return {x.tobytes() for part in parts for x in part[0]}

    own = [part for client in tuning.clients.values() for part in (client.data.train, client.data.validation)]
    assert not lines(tuning, [tuning.test.test]) & lines(plain, [plain.test.test])
    assert not lines(tuning, [tuning.test.test]) & lines(tuning, own)
    assert len(tuning.test.test[0]) == round(0.1 * 1797)
