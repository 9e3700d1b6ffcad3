"""The registry: whatever is listed can be loaded, says where it comes from, and is held to that by tests that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator import algorithms
from coordinator.algorithm import DeviceView, rng_of
from coordinator.blocks.initial import initial_weights
from wire import zoo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_what_is_listed_has_a_paper_and_tests(name):
    facts = algorithms.describe()[name]
    assert facts["summary"].endswith(".")
    assert facts["text"]
    assert facts["tier"] in ("paper", "baseline", "ours")
    assert "import" in (ROOT / facts["tests"]).read_text("utf-8")


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_a_first_round_can_be_planned_with_the_defaults(name):
    spec = zoo.by_name("digits-cnn")
    algorithm = algorithms.by_name(name)
    state = algorithm.init(spec, initial_weights(spec, 0), {})
    devices = tuple(DeviceView(f"device-{i}", 1 << 30, samples=100) for i in range(3))
    state, drafts = algorithm.plan(state, 1, devices, rng_of(0, 1))
    assert drafts
    assert state.round == 1
    assert not algorithm.plan(state, 2, (), rng_of(0, 2))[1], "no devices, no drafts"
