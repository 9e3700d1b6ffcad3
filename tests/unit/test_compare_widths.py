"""What a comparison says of widths and of devices' own data; methods with a model or a fleet of their own; the tables."""

import dataclasses
import json

import pytest

from coordinator.simulate import compare, compare_report, trials
from coordinator.simulate.trials import Failure, Store, Trial
from coordinator.simulate.world import Config, build
from tests.long import nested, sparse
from tests.support.compared import a_result, asked, played
from tests.unit.test_compare import found_of
from wire.errors import ConfigError
from wire.spec import Structure, parameter_count


def test_a_method_may_have_a_model_and_a_fleet_of_its_own(monkeypatch, tmp_path):
    played(monkeypatch, lambda _: 0.5)
    comparison = asked(
        "--algos", "nestfl,small=fedavg,top=fedavg", "--model", "digits-mlp", "--fleet", "spread", "--seeds", "0",
        "--set", "small.run.model=digits-mlp@0.2", "--set", "top.run.fleet=spread-whole",
    )  # fmt: skip
    found = [(t.label, t.config.model, t.config.fleet, dict(t.config.params)) for t, _ in
             compare.compare(comparison, Store(tmp_path), 1)]  # fmt: skip
    assert found == [
        ("nestfl", "digits-mlp", "spread", {}),
        ("small", "digits-mlp@0.2", "spread", {}),
        ("top", "digits-mlp", "spread-whole", {}),
    ]


def test_a_method_may_have_rounds_of_its_own_and_is_measured_as_often(monkeypatch, tmp_path):
    played(monkeypatch, lambda _: 0.5)
    flags = ("--algos", "taper,long=fedavg", "--rounds", "10", "--evaluate-every", "2", "--seeds", "0")
    comparison = asked(*flags, "--set", "long.run.rounds=35", "--set", "taper.run.rounds=5")
    found = [(t.config.rounds, t.config.terms.evaluate_every, dict(t.config.params)) for t, _ in
             compare.compare(comparison, Store(tmp_path), 1)]  # fmt: skip
    assert found == [(5, 1, {"horizon": 5.0}), (35, 7, {})]
    for wrong in ("0", "2.5", "many"):
        with pytest.raises(ConfigError, match=r"long: run\.rounds"):
            compare.compare(asked(*flags, "--set", f"long.run.rounds={wrong}"), Store(tmp_path), 1)


def test_nested_widths_are_tuned_by_the_mean_of_all(monkeypatch, tmp_path):
    played(monkeypatch, lambda _: 0.5)
    keep, worth = trials.keep, {0.1: (0.2, 0.9), 0.2: (0.7, 0.8), 0.3: (0.6, 0.85)}

    def kept(path, config, result):
        narrow, wide = worth[config.params["recipe.rate"]]
        keep(path, config, {**result, "accuracy": {"full": wide, "by_width": {"0": narrow, "1": wide}}})

    monkeypatch.setattr(trials, "keep", kept)
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"nestfl": [{"recipe.rate": rate} for rate in worth]}))
    comparison = asked("--algos", "nestfl", "--configs", str(file), "--seeds", "0", "--tune")
    ((trial, _),) = compare.compare(comparison, Store(tmp_path), 1)
    assert trial.config.params["recipe.rate"] == 0.2


def test_the_fleet_of_a_narrower_model_is_that_of_the_whole(tmp_path):
    config = Config(algo="fedavg", model="digits-cnn", partition="iid", fleet="spread", devices=5)
    whole, narrow = (
        build(dataclasses.replace(config, model=model), tmp_path / model) for model in ("digits-cnn", "digits-cnn@0.2")
    )
    assert [c.machine for c in narrow.clients.values()] == [c.machine for c in whole.clients.values()]
    assert parameter_count(narrow.spec, Structure()) < 0.1 * parameter_count(whole.spec, Structure())
    assert narrow.digest == whole.digest


def nested_of(widths: dict[str, list[float]]):
    """Let the runs of `found_of` have several widths: each goes up by the round as the whole model does."""
    found = []
    for label, shares in widths.items():
        for seed in (0, 1, 2):
            config = Config(algo="nestfl", rounds=10, seed=seed)
            one = a_result(config, 0.7 + 0.1 * seed)
            for point in [one["accuracy"], *one["curve"]]:
                full = point.get("full", point.get("accuracy"))
                point["by_width"] = {} if full is None else {str(k): full * share for k, share in enumerate(shares)}
            trained = {"mean": 0.9 - 0.1 * seed, "p10": None if seed == 2 else 0.5 * seed, "devices": 7 + seed}
            one["personal"] = {"after": {"mean": 0.25 * seed, "p10": 0.1}, "before": trained}
            found.append((Trial(label, None, config), one))
    return found


def test_widths_and_personal_accuracies_by_hand():
    found = nested_of({"nest": [0.5, 0.25, 1.0], "flat": [1.0]})
    facts = compare_report.summed_up([*found, *found_of({"old": [0.8]})], "0.19")
    nest, flat, old = facts["summary"]
    assert nest["by_width"] == pytest.approx({"0": 0.4, "1": 0.2, "2": 0.8})
    assert nest["worst"] == pytest.approx({"median": 0.2, "least": 0.175, "most": 0.225})
    # The worst width is at 0.25 * full * n / 10 in round n = 2, 4, ...: it passes 0.19 in rounds never, 10 and 10.
    assert [run["to_target_worst"] and run["to_target_worst"]["round"] for run in facts["runs"][:3]] == [None, 10, 10]
    assert (nest["reached_worst"], nest["to_target_worst"]["round"], nest["to_target"]["round"]) == (2, 10, 4)
    assert nest["personal"]["after"] == {"mean": 0.25, "p10": 0.1, "devices": None}
    assert nest["personal"]["before"] == pytest.approx({"mean": 0.8, "p10": 0.25, "devices": 8})
    assert flat["by_width"] == pytest.approx({"0": 0.8})
    assert (flat["worst"]["median"], flat["reached_worst"], flat["to_target_worst"]["round"]) == (None, 0, None)
    assert (old["by_width"], old["personal"]["before"]["mean"]) == ({}, None)
    json.dumps(facts, allow_nan=False)


def test_a_run_that_failed_has_never_got_to_the_target():
    """Of three runs two failed: one cost is no median, as it would be none if those two had ended below the target."""
    found = nested_of({"nest": [0.5, 0.3, 1.0]})
    failed = [(trial, one if trial.config.seed == 2 else Failure("it broke")) for trial, one in found]
    (row,) = compare_report.summed_up(failed, "0.19")["summary"]
    assert (row["runs"], row["failed"], row["reached"], row["reached_worst"]) == (3, 2, 1, 1)
    assert (row["to_target"]["round"], row["to_target_worst"]["round"]) == (None, None)
    assert row["accuracy"]["median"] == pytest.approx(0.9)


def test_the_text_has_a_line_for_each_method_that_has_widths_or_personal_results(tmp_path):
    found = nested_of({"nest": [0.5, 0.25, 1.0], "flat": [1.0]})
    facts = compare_report.summed_up([*found, *found_of({"old": [0.8]})], "0.19")
    first, _, second = compare_report.text(facts).partition("widths from")[0].partition("worst")
    assert all(label in first for label in ("nest", "flat", "old"))
    (nest,) = [line.split() for line in second.splitlines() if line.strip().startswith("nest")]
    assert " ".join(nest) == "nest - 0.2000 0.4000 0.2000 0.8000 2/3 10 10.0 0.00300 8 0.8000 0.2500 0.2500 0.1000"
    (flat,) = [line.split() for line in second.splitlines() if line.strip().startswith("flat")]
    assert " ".join(flat) == "flat - - - - - - - - - 8 0.8000 0.2500 0.2500 0.1000"
    assert "old" not in second
    assert compare_report.plot(facts, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    plain = compare_report.summed_up(found_of({"old": [0.8]}), "0.19")
    assert "worst" not in compare_report.text(plain)
    wide = compare_report.summed_up(nested_of({"nest": [1.0 - i / 20 for i in range(9)]}), "0.19")
    assert "width 0" not in compare_report.text(wide)
    assert "worst" in compare_report.text(wide)


def test_masks_of_devices_own_have_columns_where_a_method_has_them():
    """A run in which nobody answered last tells no density, and the others' median counts."""
    lottery, plain = nested_of({"lottery": [1.0]}), nested_of({"plain": [1.0]})
    for seed, (_, one) in enumerate(lottery):
        one["personal"]["own"] = {"mean": 0.5 + 0.1 * seed, "p10": 0.25}
        one["personal"]["density"] = {"mean": 0.3 if seed else None, "p10": 0.2 if seed else None}
    facts = compare_report.summed_up([*lottery, *plain], "0.5")
    personal = facts["summary"][0]["personal"]
    assert (personal["own"]["mean"], personal["own"]["p10"]) == pytest.approx((0.6, 0.25))
    assert (personal["density"]["mean"], personal["density"]["p10"]) == pytest.approx((0.3, 0.2))
    text = compare_report.text(facts)
    (head,) = [line for line in text.splitlines() if "own before" in line and "p10" in line]
    assert head.split("  ")[-1].strip() == "p10"
    assert [word for word in head.replace("own ", "own-").split() if word.startswith("own")] == [
        "own-before", "own-after", "own-mask", "own-density"
    ]  # fmt: skip
    lines = [line.split() for line in text.partition(head)[2].splitlines() if line.startswith("lottery")]
    assert lines[0][-4:] == ["0.6000", "0.2500", "0.3000", "0.2000"]
    assert "own mask" not in compare_report.text(compare_report.summed_up(plain, "0.5"))


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in (sparse, nested) for name in family.TABLES])
def test_the_committed_tables_can_be_asked_for(family, name, capsys):
    comparison = asked(*family.TABLES[name].words()[1:])
    for method in comparison.methods:
        assert comparison.trial(method, None, method.configurations[0], 0)
    assert family.main([name, "--show"]) == 0
    assert capsys.readouterr().out.startswith("coordinator compare --algos")


def configs_of(table):
    comparison = asked(*nested.TABLES[table].words()[1:])
    return {m.label: comparison.trial(m, None, m.configurations[0], 0).config for m in comparison.methods}


def test_a_table_gives_methods_the_model_and_the_fleet_that_their_labels_ask_for():
    found = configs_of("digits")
    assert {label: (c.algo, c.model, c.fleet) for label, c in found.items() if c.algo == "fedavg"} == {
        "fedavg": ("fedavg", "digits-cnn", "spread"),
        "fedavg-20": ("fedavg", "digits-cnn@0.2", "spread"),
        "fedavg-all": ("fedavg", "digits-cnn", "spread-whole"),
    }
    alone = {label: c.model for label, c in configs_of("equal").items() if label != "fledge"}
    assert alone == {f"alone-{10 * tenths}": f"digits-cnn@{tenths / 10}" for tenths in (2, 4, 6, 8, 10)}
