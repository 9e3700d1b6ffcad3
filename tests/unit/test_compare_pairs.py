"""How far methods are from each other, seed by seed."""

import math

import numpy as np
import pytest

from coordinator.simulate import compare_pairs, compare_report
from coordinator.simulate.trials import Failure
from tests.unit.test_compare import found_of
from tests.unit.test_compare_widths import nested_of


def test_ties_by_half_a_point_or_by_the_paired_interval():
    rows = {
        "best": [0.900, 0.901, 0.902],
        "near": [0.896, 0.897, 0.898],
        "wild": [0.930, 0.880, 0.860],
        "far": [0.880, 0.881, 0.8821],
    }
    facts = compare_report.summed_up(found_of(rows), "0.5")
    judged = {row["label"]: row["behind_best"] for row in facts["summary"]}
    assert {label: one["tied"] for label, one in judged.items()} == {
        "best": True, "near": True, "wild": True, "far": False
    }  # fmt: skip
    gaps = np.array(rows["best"]) - np.array(rows["wild"])
    assert judged["wild"]["mean"] == pytest.approx(gaps.mean())
    assert judged["wild"]["half_width"] == pytest.approx(4.303 * gaps.std(ddof=1) / math.sqrt(3))
    two = compare_report.summed_up(found_of({"a": [0.9, 0.9], "b": [0.7, 0.8]}), "0.5")["summary"][1]
    assert not two["behind_best"]["tied"], "two seeds say nothing of their spread"


def test_methods_are_judged_within_their_density():
    facts = compare_report.summed_up(found_of({"a@0.2": [0.9], "b@0.2": [0.8], "a@0.1": [0.7], "dense": [0.85]}), "0.5")
    judged = {(row["label"], row["density"]): row["behind_best"] for row in facts["summary"]}
    assert judged["b", 0.2]["label"] == "a"
    assert judged["a", 0.1]["label"] == "dense"
    assert judged["b", 0.2]["half_width"] is None


def test_widths_are_judged_one_by_one():
    """Whole models end at .7, .8 and .9 by seed, a width at its share of that."""
    found = nested_of({"a": [0.5, 0.9], "b": [0.75, 0.5], "flat": [1.0]})
    facts = compare_report.summed_up([*found, *found_of({"old": [0.95]})], "0.5")
    a, b, flat, old = (row["behind_by_width"] for row in facts["summary"])
    gaps = np.array([0.7, 0.8, 0.9])
    wide = 4.303 * gaps.std(ddof=1) / math.sqrt(3)
    assert a["0"] == pytest.approx({"label": "b", "mean": 0.2, "half_width": 0.25 * wide, "tied": False})
    assert b["1"] == pytest.approx({"label": "a", "mean": 0.32, "half_width": 0.4 * wide, "tied": False})
    assert (a["1"]["label"], a["1"]["mean"], b["0"]["label"], b["0"]["mean"]) == ("a", 0.0, "b", 0.0)
    narrow = {width: (one["label"], round(one["mean"], 9), one["tied"]) for width, one in flat.items()}
    assert narrow == {"0": ("b", -0.2, True), "1": ("a", -0.08, True)}, "one model is held against every width"
    assert old["0"] == pytest.approx({"label": "b", "mean": 0.525 - 0.95, "half_width": None, "tied": True})
    text = compare_report.text(facts)
    (head,) = [line for line in text.splitlines() if line.split() == ["method", "density", "width", "0", "width", "1"]]
    lines = [line.split() for line in text.partition(head)[2].splitlines()]
    assert ["a", "-", "0.2000", f"±{0.25 * wide:.4f}", "best"] in lines
    assert ["b", "-", "best", "0.3200", f"±{0.4 * wide:.4f}"] in lines
    assert ["old", "-", "-0.4250", "±-", "-0.3200", "±-"] in lines
    for other in (
        found_of({"a": [0.9], "b": [0.8]}),
        nested_of({"a": [1.0 - i / 20 for i in range(9)], "b": [0.5] * 9}),
    ):
        assert "±" not in compare_report.text(compare_report.summed_up(other, "0.5")), (
            "no widths, or too many for columns"
        )


def test_one_method_with_widths_is_the_best_of_them_where_others_have_none():
    found = nested_of({"a": [0.5, 0.9]})
    (alone,) = compare_report.summed_up(found, "0.5")["summary"]
    assert alone["behind_by_width"] == {}, "nobody to compare with"
    facts = compare_report.summed_up([*found, *found_of({"old": [0.95, "lost", "lost"]})], "0.5")
    assert [row["behind_by_width"]["1"]["label"] for row in facts["summary"]] == ["a", "a"]


def test_one_seed_has_no_interval_and_a_lost_one_no_pair():
    found = nested_of({"a": [0.5, 0.9], "b": [0.75, 0.5]})
    facts = compare_report.summed_up([found[0], found[3]], "0.5")
    assert facts["summary"][0]["behind_by_width"]["0"] == pytest.approx(
        {"label": "b", "mean": 0.175, "half_width": None, "tied": False}
    )
    assert "0.1750 ±-" in compare_report.text(facts)
    lost = [*found[:2], *((trial, Failure("lost")) for trial, _ in found[3:5]), found[5]]
    assert compare_report.summed_up(lost, "0.5")["summary"][0]["behind_by_width"]["0"] is None, "no seed in common"


@pytest.mark.parametrize("seeds", [2, 10, 11, 21, 200])
def test_an_interval_is_students(seeds):
    """Against the quantile by numerical integration of the density; beyond the table a little wide, never narrow."""
    values = {seed: float(seed % 2) for seed in range(seeds)}
    found = compare_pairs.gap(dict.fromkeys(values, 0.0), values)
    quantile = found["half_width"] * math.sqrt(seeds) / np.std(list(values.values()), ddof=1)
    nu = seeds - 1
    at = np.linspace(0.0, quantile, 200_001)
    density = (1 + at**2 / nu) ** (-(nu + 1) / 2)
    log = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi)
    share = 2 * float(np.trapezoid(density, at)) * math.exp(log)
    assert share == pytest.approx(0.95, abs=1e-4) or (seeds > 21 and 0.95 < share < 0.965)
