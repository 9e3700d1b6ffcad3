"""Comparisons: which runs they are made of, that finished ones are kept, and what is made of the results."""

import dataclasses
import json
from pathlib import Path

import pytest

from coordinator import cli
from coordinator.algorithms import ALGORITHMS, by_name
from coordinator.simulate import compare, compare_report, crew, trials
from coordinator.simulate.trials import Failure, Store, Trial
from coordinator.simulate.world import Config, Terms
from tests.support.compared import a_result, asked, played
from wire.errors import ConfigError

SMALL = ["--model", "linear", "--devices", "2", "--rounds", "2", "--recipe", "rule=still", "--partition", "iid"]


def test_the_grid_is_methods_times_densities_times_seeds(monkeypatch, tmp_path, capsys):
    done = played(monkeypatch, lambda config: 0.5 + config.seed / 10)
    comparison = asked(
        "--algos", "fedavg,late=fedavg,feddip", "--densities", ".2,.05", "--seeds", "0,1", "--rounds", "4",
        "--recipe", "batch=20", "--set", "late.recipe.rate=0.5", "--set", "*.recipe.steps=5",
    )  # fmt: skip
    found = compare.compare(comparison, Store(tmp_path), 1)
    places = [(t.label, t.density, t.config.seed) for t, _ in found]
    assert places == [
        (label, density, seed)
        for label, densities in (("fedavg", (None,)), ("late", (None,)), ("feddip", (0.2, 0.05)))
        for density in densities
        for seed in (0, 1)
    ]
    assert [t.config.seed for t in done] == [0] * 4 + [1] * 4, "the first seed of all comes first"
    params = {t.label: dict(t.config.params) for t, _ in found}
    assert params["fedavg"] == {"recipe.batch": 20.0, "recipe.steps": 5.0}
    assert params["late"] == {**params["fedavg"], "recipe.rate": 0.5}
    assert (params["feddip"]["sparsity"], params["feddip"]["horizon"]) == (0.95, 4.0)
    assert "[8/8, 0 s left]" in capsys.readouterr().out


def test_finished_runs_are_kept_and_failed_ones_tried_again(monkeypatch, tmp_path, capsys):
    broken = played(monkeypatch, lambda config: "no: memory" if config.seed == 1 else 0.5)
    comparison = asked("--algos", "fedavg", "--seeds", "0,1,2")
    found = compare.compare(comparison, Store(tmp_path), 1)
    assert [isinstance(one, Failure) for _, one in found] == [False, True, False]
    assert "fedavg, seed 1: FAILED: no: memory" in capsys.readouterr().out
    assert len(broken) == 3
    done = played(monkeypatch, lambda _: 0.7)
    found = compare.compare(comparison, Store(tmp_path), 1)
    assert [t.config.seed for t in done] == [1]
    assert [one["accuracy"]["full"] for _, one in found] == [0.5, 0.7, 0.5]
    assert "2 of them finished earlier and kept in" in capsys.readouterr().out


def test_a_damaged_file_is_a_run_that_is_not_finished(tmp_path):
    store, config = Store(tmp_path / "deep" / "er"), Config(algo="fedavg")
    assert store.read(config) is None
    trials.keep(store.path(config), config, a_result(config))
    assert store.read(config) == json.loads(json.dumps(a_result(config)))
    store.path(config).write_text(store.path(config).read_text()[:-5])
    assert store.read(config) is None


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"algo": "nestfl"},
        {"model": "digits-mlp"},
        {"fleet": "pi4"},
        {"params": {"recipe.rate": 0.2}},
        {"terms": Terms(evaluate_every=2)},
        {"terms": Terms(tuning=True)},
    ],
)
def test_whatever_decides_a_run_is_in_its_key(change):
    config = Config(algo="fedavg", model="linear")
    assert trials.key(config) == trials.key(dataclasses.replace(config))
    assert trials.key(config) != trials.key(dataclasses.replace(config, **change))


def test_the_fleets_file_and_the_source_are_in_the_key(tmp_path, monkeypatch):
    kind = {"bytes_budget": 0, "flops": 1e9, "bandwidth_down": 1e6, "bandwidth_up": 1e6}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"about": "", "machines": [kind]}))
    config = Config(algo="fedavg", fleet=str(path))
    before = trials.key(config)
    path.write_text(json.dumps({"about": "", "machines": [{**kind, "flops": 2e9}]}))
    changed = trials.key(config)
    assert before != changed
    monkeypatch.setattr(trials, "source_digest", lambda _: "other")
    assert trials.key(config) != changed


def test_the_source_of_a_run_is_what_it_imports():
    files = {path.stem for path in trials._imported(["coordinator.simulate.run", "coordinator.algorithms.fedavg"])}
    assert {"run", "world", "fleet", "flops", "advance", "fedavg", "aggregate", "algorithm"} <= files
    assert not {"nestfl", "angles", "compare", "server", "cli"} & files
    assert trials.source_digest("fedavg") != trials.source_digest("nestfl")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--algos", "fedavg,fedavg"], "LABEL=NAME"),
        (["--algos", "fedavg", "--set", "nestfl.angle=1"], "not compared"),
        (["--algos", "fedavg", "--seeds", "a"], "commas"),
        (["--algos", "fedavg", "--seeds", ""], "at least one"),
        (["--algos", "fedavg", "--seeds=0,-1"], "from 0 on"),
        (["--algos", "fedavg", "--tune", "--tuning-seeds=-1"], "from 0 on"),
        (["--algos", "snip", "--densities", ".2,0"], "--densities"),
        (["--algos", "snip", "--densities", "20"], "--densities"),
        (["--algos", "snip", "--densities", "nan"], "--densities"),
        (["--algos", "fedavg", "--target", "2"], "--target"),
        (["--algos", "fedavg", "--target", "0.9*nestfl"], "--target"),
        (["--algos", "nothing"], "there are"),
        (["--algos", "fedavg", "--configs", "/nowhere"], "--configs"),
    ],
)
def test_what_cannot_be_compared_is_explained(words, text):
    with pytest.raises(ConfigError, match=text):
        asked(*words)


def test_an_unknown_parameter_names_its_method(tmp_path):
    comparison = asked("--algos", "fedavg", "--set", "fedavg.angel=1")
    with pytest.raises(ConfigError, match=r"fedavg: .*angel"):
        compare.compare(comparison, Store(tmp_path), 1)


def test_configurations_are_at_most_six(tmp_path):
    file = tmp_path / "c.json"
    for found in ({"*": [{}] * 7}, {"*": []}, [], {"*": [1]}):
        file.write_text(json.dumps(found))
        with pytest.raises(ConfigError, match=r"six|6|write"):
            asked("--algos", "fedavg", "--configs", str(file), "--tune")
    file.write_text(json.dumps({"*": [{"recipe.epochs": 3}]}))
    assert asked("--algos", "fedavg", "--configs", str(file)).methods[0].configurations == ({"recipe.epochs": 3.0},)


def test_configurations_of_what_is_not_compared_are_left_out_aloud(tmp_path, capsys):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"fedavg": [{"recipe.epochs": 3}], "nestfl": [{"angle": 1}]}))
    (method,) = asked("--algos", "fedavg", "--configs", str(file)).methods
    assert method.configurations == ({"recipe.epochs": 3.0},)
    assert capsys.readouterr().err == "--configs: nestfl is not compared; its configurations are left out\n"


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_every_algorithm_is_told_its_density_in_its_own_words(algo):
    method = compare.Method(algo, algo, ({},))
    known = by_name(algo).PARAMS
    for name, value in method.keeping(0.125).items():
        assert isinstance(known[name], float)
        assert value == (0.875 if name == "sparsity" else 0.125)
    assert bool(method.keeping(0.5)) == bool({"density", "sparsity", compare.PARAM_OF_DENSITY.get(algo)} & set(known))


def found_of(accuracies: dict[str, list[float | str]], rounds: int = 10):
    found = []
    for label, values in accuracies.items():
        density = float(label.partition("@")[2]) if "@" in label else None
        for seed, value in enumerate(values):
            config = Config(algo="fedavg", rounds=rounds, seed=seed)
            one = Failure(value) if isinstance(value, str) else a_result(config, value)
            found.append((Trial(label.partition("@")[0], density, config), one))
    return found


def test_the_summary_by_hand():
    facts = compare_report.summed_up(found_of({"a": [0.8, 0.9, 1.0], "b": [0.5, "lost", 0.7]}), "0.5")
    a, b = facts["summary"]
    assert a["accuracy"] == {"median": 0.9, "least": 0.8, "most": 1.0}
    assert (a["runs"], a["failed"], b["failed"], b["error"]) == (3, 0, 1, "lost")
    # Measured in rounds 2, 4, ...: accuracy * n / 10 reaches 0.5 in rounds 8, 6 and 6.
    assert a["to_target"] == {
        "round": 6, "seconds_virtual": 6.0, "bytes_up": 600, "bytes_down": 1200, "flops": 6000
    }  # fmt: skip
    assert (a["reached"], b["reached"]) == (3, 2)
    assert b["to_target"]["round"] == 10  # of 8, 10 and never, since one has failed
    assert a["bytes_peak"] == 200
    assert a["density_by_layer"] == {"out.weight": 0.5}
    assert [run["to_target"] and run["to_target"]["round"] for run in facts["runs"] if "error" not in run] == [
        8,
        6,
        6,
        10,
        8,
    ]
    assert all(len(run["devices"]) == 1 and len(run["curve"]) == 5 for run in facts["runs"] if "error" not in run)
    json.dumps(facts, allow_nan=False)
    text = compare_report.text(facts)
    assert "b: 1 of 3 runs FAILED: lost" in text
    assert "predicts" in text


def test_a_target_may_be_a_share_of_a_method_seed_by_seed():
    facts = compare_report.summed_up(found_of({"fedavg": [0.8, 1.0, 0.9], "b": [0.5, 1.0, 0.6]}), "0.75*fedavg")
    assert [run["target"] for run in facts["runs"]] == pytest.approx([0.6, 0.75, 0.675] * 2)
    assert facts["summary"][1]["reached"] == 1
    assert facts["summary"][1]["to_target"]["round"] is None, "the median run never got there"


def test_a_share_of_a_method_is_one_of_the_same_density():
    accuracies = {"snip@0.2": [0.8], "snip@0.1": [0.6], "taper@0.2": [0.5], "taper@0.1": [0.5], "fedavg": [0.9]}
    facts = compare_report.summed_up(found_of(accuracies), "0.5*snip")
    wanted = {("snip", 0.2): 0.4, ("snip", 0.1): 0.3, ("taper", 0.2): 0.4, ("taper", 0.1): 0.3, ("fedavg", None): 0.4}
    assert {(run["label"], run["density"]): run["target"] for run in facts["runs"]} == pytest.approx(wanted)


def test_a_method_that_was_never_measured_sets_no_target():
    found = found_of({"fedavg": [0.8], "b": [0.5]})
    found[0][1]["accuracy"]["full"] = None
    facts = compare_report.summed_up(found, "0.5*fedavg")
    assert [run["target"] for run in facts["runs"]] == [None, None]
    assert facts["summary"][1]["reached"] == 0


def test_the_plot_is_a_picture(tmp_path):
    facts = compare_report.summed_up(
        found_of({"a@0.2": [0.9, 0.8], "a@0.1": [0.7], "dense": [0.85], "no": ["x"]}), "0.5"
    )
    path = compare_report.plot(facts, tmp_path / "p.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_real_processes_do_real_runs_and_one_that_dies_costs_its_run(tmp_path, capsys):
    """`nestfl` cannot cut a model without hidden channels; its runs fail and the others go on."""
    words = ["compare", "--algos", "fedavg,nestfl", *SMALL, "--seeds", "0,1", "--keep", str(tmp_path / "kept")]
    assert cli.main([*words, "--json", str(tmp_path / "o.json")]) == 0
    out = capsys.readouterr().out
    facts = json.loads((tmp_path / "o.json").read_text())
    assert [("error" in run) for run in facts["runs"]] == [False, False, True, True]
    assert "no prunable channels" in facts["summary"][1]["error"]
    assert "no prunable channels" in out
    assert facts["runs"][0]["accuracy"]["full"] is not None
    assert len(list((tmp_path / "kept").glob("*.json"))) == 2
    assert cli.main([*words[:2], "fedavg", *words[3:], "--json", "-"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["runs"][0] == facts["runs"][0]


def test_a_process_that_dies_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(crew.sys, "executable", str(_short_lived(tmp_path)))
    config = Config(algo="fedavg")
    jobs = [(Trial(label, None, config), tmp_path / label) for label in ("one", "BURST", "three")]
    found = {e.trial.label: e.error for e in crew.work(jobs, 1) if isinstance(e, crew.Ended)}
    assert found == {"one": "", "BURST": "its process ended with code 9", "three": ""}


def _short_lived(folder: Path) -> Path:
    """Make a program that answers each line, but ends at the one that says so."""
    path = folder / "python"
    path.write_text(
        '#!/bin/sh\nwhile read -r line; do case "$line" in *BURST*) exit 9;; esac; echo \'{"error": ""}\'; done\n'
    )
    path.chmod(0o755)
    return path
