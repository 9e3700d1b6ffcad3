"""What the coordinator asks of a device: the largest part that one of the device's own engines holds, and no more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import algorithms, fitting
from coordinator.algorithm import DeviceView, rng_of
from coordinator.blocks import deadline
from coordinator.blocks.initial import initial_weights
from coordinator.fleet import Device
from coordinator.simulate import fleet
from coordinator.simulate.run import Log, play
from coordinator.simulate.world import Config, build
from edge_runtime import choice
from edge_runtime.choice import Chosen, Means
from edge_runtime.paces import Paces
from tests.support.messages import an_order
from wire import memory, prices, zoo
from wire.errors import Unsupported
from wire.messages import Caps, Order, Recipe
from wire.spec import Structure, parameter_count

MIB = 1 << 20
SPEC = zoo.by_name("digits-cnn")
RECIPE = Recipe(batch=20, momentum=0.9, clip=2.0)
WIDTHS = Structure(
    4, {g.name: tuple(memory.uniform(SPEC, f).widths[g.name][0] for f in fleet.KEPT) for g in SPEC.groups if g.prunable}
)
EVERY = [WIDTHS.narrowed(k) for k in range(5)]


def order_of(structure: Structure) -> Order:
    return dataclasses.replace(an_order("d0", 1), structures=(structure,), recipe=RECIPE)


def widest(budget: int, *engines: str) -> int | None:
    found = fitting.fit(SPEC, EVERY, RECIPE, fitting.Means(budget, engines=engines))
    return None if found is None else found.capacity


def sized(folder: Path, *budgets: int) -> str:
    """Write a fleet's file: machines that differ in memory alone."""
    kind = {"flops": 1e9, "bandwidth_down": 1e6, "bandwidth_up": 1e6}
    machines = [{"bytes_budget": budget, **kind} for budget in budgets]
    path = folder / "sized.json"
    path.write_text(json.dumps({"about": "three sizes", "machines": machines}), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("mebibytes", "torch", "native"),
    [(8, None, None), (10, None, 0), (14, 0, 1), (18, 1, 2), (26, 2, 3), (34, 3, 4), (40, 4, 4)],
)
def test_the_same_budget_holds_a_wider_part_on_the_smaller_engine(mebibytes, torch, native):
    """By hand, in MiB: the five widths take 10.4, 14.7, 19.8, 27.8, 37.4 on torch and 9.7, 13.4, 17.7, 23.8, 31.1 on ours.

    With one sample at a time it is 10.1, 14.2, 18.7, 26.4, 35.9 and 9.5, 13.0, 17.2, 23.0, 30.1.
    """
    budget = mebibytes * MIB
    assert widest(budget) == widest(budget, "torch") == widest(budget, "one of tomorrow") == torch
    assert widest(budget, "native") == native
    assert widest(budget, "native", "torch") == widest(budget, "torch", "native") == native


def test_an_engine_that_lacks_an_op_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(engine, spec):
        return ("conv2d",) if engine == "native" else ()

    monkeypatch.setattr(fitting, "lacks", without)
    monkeypatch.setattr(prices, "lacks", without)
    assert widest(34 * MIB, "native") is None
    assert widest(34 * MIB, "native", "torch") == 3
    whole = memory.predict(SPEC, Structure(), RECIPE).bound
    assert fitting.least(SPEC, Structure(), RECIPE, ("native", "torch")) == whole
    with pytest.raises(Unsupported, match="conv2d"):
        fitting.least(SPEC, Structure(), RECIPE, ("native",))


def test_what_is_first_and_fits_is_what_is_expected_to_be_taken() -> None:
    ours, theirs = (prices.training(engine)(SPEC, EVERY[2], RECIPE).bound for engine in ("native", "torch"))
    assert fitting.least(SPEC, EVERY[2], RECIPE, ("torch", "native")) == ours < theirs
    for engines, bound in ((("native", "torch"), ours), (("torch", "native"), theirs), ((), theirs)):
        found = fitting.fit(SPEC, EVERY[2:3], RECIPE, fitting.Means(1 << 40, engines=engines))
        assert found is not None
        assert (found.capacity, found.micro_batch, found.bytes_bound) == (2, 20, bound)
    twice = fitting.fit(SPEC, EVERY, RECIPE, fitting.Means(34 * MIB, 2.0, ("native", "torch")))
    assert twice is not None
    assert twice.capacity < 4


@settings(max_examples=40, deadline=None)
@given(budget=st.integers(8 * MIB, 48 * MIB), engines=st.sampled_from([("native",), ("torch",), ("native", "torch")]))
def test_no_device_refuses_what_it_is_asked_for(budget, engines):
    plan = fitting.fit(SPEC, EVERY, RECIPE, fitting.Means(budget, engines=engines))
    if plan is not None:
        means = [Means(engine, budget) for engine in engines]
        assert isinstance(choice.choose(order_of(EVERY[plan.capacity]), SPEC, means, {}, (Paces(), 10)), Chosen)


def test_a_view_has_the_engines_that_the_device_has_told() -> None:
    caps = Caps("1", ("native", "torch"), 34 * MIB, 1, 100)
    view = DeviceView.of(Device("d0", "online", "b" * 16, 1, caps=caps))
    assert view.means == fitting.Means(34 * MIB, 1.0, ("native", "torch"))
    assert DeviceView.of(Device("d0", "lost", "b" * 16, 1)).means == fitting.Means(0)


@pytest.mark.parametrize(
    ("algo", "params"),
    [
        *((name, {}) for name in ("nestfl", "fledge", "fjord")),
        ("heterofl", {"assign": "fix"}),
        ("fedmp", {"policy": "uniform", "ratio": 0.0}),
    ],
)
def test_every_method_that_cuts_asks_by_engine(algo, params):
    algorithm, budgets = algorithms.by_name(algo), [14 * MIB, 18 * MIB, 26 * MIB, 34 * MIB]
    state, sizes = algorithm.init(SPEC, initial_weights(SPEC, 0), params), []
    for engines in (("torch",), ("native",), ("native", "torch")):
        views = tuple(DeviceView(f"d{i}", budget, 100, engines=engines) for i, budget in enumerate(budgets))
        drafts = {draft.device: draft for draft in algorithm.plan(state, 1, views, rng_of(0, 1))[1]}
        assert all(draft.bytes_peak <= view.bytes_budget for view in views for draft in [drafts[view.name]])
        sizes.append([parameter_count(SPEC, drafts[view.name].structure) for view in views])
    assert all(less <= more for less, more in zip(*sizes[:2], strict=True))
    assert sum(sizes[0]) < sum(sizes[1])
    assert sizes[1] == sizes[2]


def test_masks_of_many_sizes_are_given_out_by_engine() -> None:
    algorithm, spec = algorithms.by_name("fiarse"), zoo.by_name("lenet-300-100")
    state, budgets = algorithm.init(spec, initial_weights(spec, 0), {}), [k * MIB // 4 for k in range(36, 60)]
    sums = []
    for engines in (("torch",), ("native",)):
        views = tuple(DeviceView(f"d{i:02}", budget, 100, engines=engines) for i, budget in enumerate(budgets))
        drafts = algorithm.plan(state, 1, views, rng_of(0, 1))[1]
        sums.append(sum(sum(draft.structure.kept.values()) for draft in drafts))
    assert sums[0] < sums[1]


def test_the_least_ratio_is_that_of_the_engine() -> None:
    ratios = [
        deadline.least_ratio(SPEC, RECIPE, fitting.Means(26 * MIB, engines=e))
        for e in (("torch",), (), ("native", "torch"))
    ]
    assert ratios[0] is not None
    assert ratios[2] is not None
    assert ratios[0] == ratios[1] > ratios[2] > 0.0


def test_in_a_round_native_devices_get_wider_parts_and_do_them(tmp_path: Path) -> None:
    """Real orders, by the real planner of a worker, on machines with the same memory; only the engine differs."""
    where, took = sized(tmp_path, 14 * MIB, 18 * MIB, 34 * MIB), {}
    for engine in ("torch", "native"):
        config = Config(fleet=where, devices=3, rounds=1, engine=engine, params={"recipe.epochs": 1.0})
        log = Log()
        (tmp_path / engine).mkdir()
        list(play(build(config, tmp_path / engine), log))
        told = log.view.rounds[1]
        assert not told.refusals
        assert {reply.usage.engine for reply in told.replies.values()} == {engine}
        assert all(reply.usage.bytes_peak <= reply.usage.bytes_budget for reply in told.replies.values())
        took[engine] = [told.replies[f"device-{i}"].structure.capacity for i in (1, 2, 3)]
    assert took == {"torch": [0, 1, 3], "native": [1, 2, 4]}


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_an_uneven_fleet_is_made_for_its_engine(tmp_path: Path, engine: str) -> None:
    world, log = build(Config(rounds=1, engine=engine, params={"recipe.rule": "still"}), tmp_path), Log()
    list(play(world, log))
    assert [log.view.rounds[1].orders[f"device-{i}"].structures[0].capacity for i in range(1, 6)] == [0, 1, 2, 3, 4]
