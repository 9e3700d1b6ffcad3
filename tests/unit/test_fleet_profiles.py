"""Fleets from files: they can be read, say what the publications say, and charge what an order really moves."""

import json
from dataclasses import replace

import numpy as np
import pytest

from coordinator import algorithms
from coordinator.algorithm import DeviceView, rng_of
from coordinator.blocks.initial import initial_weights
from coordinator.recipes import merged, recipe_of
from coordinator.simulate import fleet, flops, measured
from tests.house.walk import ROOT
from tests.support.messages import an_order
from wire import work, zoo
from wire.errors import ConfigError
from wire.masked import maskable
from wire.memory import predict, uniform
from wire.messages import BlobRef, Recipe
from wire.spec import Structure

ORDER = an_order("d1", 1)
CONV2 = zoo.by_name("conv-2")
STEPS = Recipe(batch=20, steps=5)


def order_of(structure: Structure, recipe: Recipe = STEPS):
    return replace(ORDER, structures=(structure,), recipe=recipe)


def masked(share: float, spec=CONV2) -> Structure:
    kept = {layer.tensor: round(share * layer.weights) for layer in work.layers(spec, Structure())}
    return Structure(masks="ab" * 32, kept=kept)


@pytest.mark.parametrize("name", fleet.names())
def test_every_profile_makes_a_fleet(name):
    machines = fleet.make(name, 7, zoo.by_name("lenet-300-100"), STEPS)
    assert [machine.name for machine in machines] == [f"device-{i}" for i in range(1, 8)]
    assert all(m.bytes_budget > 0 and m.flops > 0 and m.bandwidth_up > 0 for m in machines)
    assert all(fleet.seconds_of_work(m, CONV2, order_of(Structure()), 100) > 0 for m in machines)


@pytest.mark.parametrize("count", [5, 50])
def test_the_classes_of_a_spread_fleet_are_widths_and_the_widest_is_four_times_as_fast(count):
    spec = zoo.by_name("digits-cnn")
    machines = fleet.make("spread", count, spec, STEPS)
    needs = [predict(spec, uniform(spec, kept), STEPS).bound for kept in fleet.KEPT]
    assert [m.bytes_budget for m in machines] == [need for need in needs for _ in range(count // 5)]
    assert [m.flops for m in machines[:: count // 5]] == pytest.approx([2e9, 2e9 * 2**0.5, 4e9, 4e9 * 2**0.5, 8e9])
    assert all(m.bandwidth_down == m.bandwidth_up == pytest.approx(m.flops / 2e3) for m in machines)
    assert needs[-1] > 2 * needs[0]
    ample = fleet.make("spread-whole", count, spec, STEPS)
    assert [replace(m, bytes_budget=0) for m in ample] == [replace(m, bytes_budget=0) for m in machines]
    assert {m.bytes_budget for m in ample} == {4 * needs[-1]}


def test_a_spread_fleet_of_few_devices_or_of_an_uncut_model_still_is_one():
    (alone,) = fleet.make("spread", 1, CONV2, STEPS)
    assert (alone.bytes_budget, alone.flops) == (predict(CONV2, Structure(), STEPS).bound, 2e9)
    assert [m.flops for m in fleet.make("spread", 2, CONV2, STEPS)] == [2e9, 8e9]
    linear = fleet.make("spread", 10, zoo.by_name("linear"), STEPS)
    assert len({m.bytes_budget for m in linear}) == 1
    assert len({m.flops for m in linear}) == 5


def test_machines_take_turns():
    speeds = [machine.flops for machine in fleet.make("mixed-pi", 6, CONV2, STEPS)]
    assert speeds == [0.32e9, 0.4e9, 0.9e9, 0.9e9, 2.4e9, 0.32e9]


def test_the_published_coefficients_give_the_published_rounds():
    (machine,) = fleet.make("pi4-prunefl", 1, CONV2, STEPS)
    weights = sum(layer.weights for layer in work.layers(CONV2, Structure()))
    link = machine.seconds_down(4 * weights) + machine.seconds_up(4 * weights)
    assert link / weights == pytest.approx(5.5616e-6, rel=1e-3)
    full = fleet.seconds_of_work(machine, CONV2, order_of(masked(1.0)), 500)
    assert full + link == pytest.approx(51.08, rel=1e-3)
    dense = fleet.seconds_of_work(machine, CONV2, order_of(Structure()), 500)
    assert dense == pytest.approx(5 * 2.249)
    assert dense + link == pytest.approx(47.96, rel=1e-3)
    # A density of nothing leaves the constant; a layer's weights cost what that layer's coefficient says.
    assert fleet.seconds_of_work(machine, CONV2, order_of(masked(0.0)), 500) == pytest.approx(5 * 1.2493)
    kept = {**masked(0.0).kept, "conv2.weight": 1000}
    one = fleet.seconds_of_work(machine, CONV2, order_of(Structure(masks="ab" * 32, kept=kept)), 500)
    assert one == pytest.approx(5 * (1.2493 + 7.10e-6 * 1000))


def test_the_published_coefficients_of_vgg_11_give_its_published_steps():
    spec = zoo.by_name("vgg-11")
    (machine,) = fleet.make("pi4-prunefl", 1, spec, STEPS)
    one = Recipe(batch=20, steps=1)
    full = fleet.seconds_of_work(machine, spec, order_of(masked(1.0, spec), one), 500)
    assert full == pytest.approx(31.08, abs=0.01)
    assert fleet.seconds_of_work(machine, spec, order_of(masked(0.0, spec), one), 500) == pytest.approx(17.37)
    assert fleet.seconds_of_work(machine, spec, order_of(Structure(), one), 500) == pytest.approx(31.51)
    # Each layer has its own: the second convolution's 73728 weights are the dearest, the first's and the last's cost nothing.
    for tensor, seconds in (
        ("conv1.weight", 0.0),
        ("conv2.weight", 8.96e-6),
        ("fc10.weight", 2.43e-7),
        ("out.weight", 0.0),
    ):
        kept = {**masked(0.0, spec).kept, tensor: 1000}
        took = fleet.seconds_of_work(machine, spec, order_of(Structure(masks="ab" * 32, kept=kept), one), 500)
        assert took == pytest.approx(17.37 + 1000 * seconds)


def test_a_step_of_fewer_samples_takes_its_part():
    (machine,) = fleet.make("pi4-prunefl", 1, CONV2, STEPS)
    order = order_of(Structure(), Recipe(batch=20, epochs=1))
    assert fleet.seconds_of_work(machine, CONV2, order, 30) == pytest.approx(1.5 * 2.249)


WIDTHS = {"fc1": (30, 150, 300), "fc2": (10, 50, 100)}
"""Of lenet-300-100: a tenth, half and all of it."""
NESTED = Structure(2, WIDTHS, "ab" * 32)


def operations(one, two):
    """Of a step of lenet-300-100 with so many channels, by hand: nobody asks for the gradient of the pictures."""
    return 4 * 784 * one + 6 * one * two + 6 * two * 10


def test_a_narrower_width_takes_its_share_of_the_measured_seconds():
    spec = zoo.by_name("lenet-300-100")
    (machine,) = fleet.make("this-machine", 1, spec, STEPS)
    took = [fleet.seconds_of_work(machine, spec, order_of(NESTED.narrowed(k)), 500) for k in range(3)]
    by_hand = [operations(one, two) / operations(300, 100) for one, two in zip(*WIDTHS.values(), strict=True)]
    assert took == pytest.approx([5 * machine.step.dense * share for share in by_hand])
    assert took[2] == fleet.seconds_of_work(machine, spec, order_of(Structure()), 500)
    assert took[0] < 0.1 * took[2] < took[1] < 0.5 * took[2]


def test_so_it_does_of_the_published_seconds_of_a_model_without_masks():
    (machine,) = fleet.make("pi4-prunefl", 1, CONV2, STEPS)
    half = Structure(0, {g.name: (g.size // 2,) for g in CONV2.groups if g.prunable}, "ab" * 32)
    share = work.per_sample(CONV2, half) / work.per_sample(CONV2, Structure())
    assert 0.2 < share < 0.4, "a half by a half, but for the first and the last layer"
    assert fleet.seconds_of_work(machine, CONV2, order_of(half), 500) == pytest.approx(5 * 2.249 * share)


@pytest.mark.parametrize(
    ("recipe", "often"),
    [
        (Recipe(batch=20, steps=5), (0, 0, 1)),
        (Recipe(batch=20, steps=5, knobs={"widths": 1.0}), (1, 1, 1)),
        (Recipe(rule="fjord", batch=20, steps=5), (1 / 3, 1 / 3, 1 / 3)),
        (Recipe(rule="fjord", batch=20, steps=5, knobs={"distil": 1.0}), (1 / 3, 1 / 3, 1)),
    ],
)
def test_all_widths_of_a_step_take_their_time(recipe, often):
    spec = zoo.by_name("lenet-300-100")
    (machine,) = fleet.make("this-machine", 1, spec, STEPS)
    alone = [fleet.seconds_of_work(machine, spec, order_of(NESTED.narrowed(k)), 500) for k in range(3)]
    wanted = sum(n * seconds for n, seconds in zip(often, alone, strict=True))
    assert fleet.seconds_of_work(machine, spec, order_of(NESTED, recipe), 500) == pytest.approx(wanted)
    # The passes by which a device makes its model its own are of its own width alone: 500 samples are 25 steps of 20.
    more = replace(recipe, knobs={**recipe.knobs, "personal": 2.0})
    extra = fleet.seconds_of_work(machine, spec, order_of(NESTED, more), 500) - wanted
    assert extra == pytest.approx(2 * 5 * alone[2])
    # A model that is not cut has one width, whatever the rule says.
    whole = fleet.seconds_of_work(machine, spec, order_of(Structure(), recipe), 500)
    assert whole == pytest.approx(alone[2])


def a_file(path, **changes):
    kind = {"bytes_budget": 0, "flops": 2e9, "bandwidth_down": 1e6, "bandwidth_up": 5e5, **changes}
    path.write_text(json.dumps({"about": "for a test", "machines": [kind]}))
    return str(path)


def test_a_measured_table_is_read_between_its_points(tmp_path):
    points = [{"share": 0.1, "seconds": 1.0}, {"share": 0.5, "seconds": 3.0}]
    name = a_file(tmp_path / "f.json", measured={"conv-2": {"dense": 9.0, "batch": 20, "points": points}})
    (machine,) = fleet.make(name, 1, CONV2, STEPS)
    seconds = [fleet.seconds_of_work(machine, CONV2, order_of(masked(d)), 500) for d in (0.01, 0.1, 0.3, 0.5, 1.0)]
    assert seconds == pytest.approx([5.0, 5.0, 10.0, 15.0, 15.0], rel=1e-4)
    assert fleet.seconds_of_work(machine, CONV2, order_of(Structure()), 500) == pytest.approx(45.0)
    # A dense weight gradient has more of the dense step's operations: (2 + 4 d) / 6 of them, the first layer apart.
    dense = fleet.seconds_of_work(machine, CONV2, order_of(masked(0.01), Recipe(rule="dpf", batch=20, steps=5)), 500)
    assert 11.0 < dense < 11.2
    # A model that was not measured goes by operations per second, and evaluation always does.
    other = zoo.by_name("lenet-5")
    order = order_of(Structure())
    assert fleet.seconds_of_work(machine, other, order, 100) != 0.0
    (plain,) = fleet.make(name, 1, other, STEPS)
    assert plain.step is None
    assert fleet.seconds_of_work(plain, other, order, 100) == flops.flops(other, order, 100) / 2e9


def test_what_a_device_holds_is_not_sent_again():
    spec, masks, shell, other = (BlobRef(c * 64, size) for c, size in zip("abcd", (10, 200, 3000, 4000), strict=True))
    order = replace(ORDER, spec=spec, masks=masks, shells=(shell,))
    assert fleet.bytes_down(order, ()) == 3210
    after = replace(ORDER, spec=spec, masks=masks, shells=(other,))
    assert fleet.bytes_down(after, {ref.digest for ref in order.blobs}) == 4000
    assert fleet.bytes_down(order, {ref.digest for ref in order.blobs}) == 0


def test_what_cannot_be_a_fleet_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there are .*pi4"):
        fleet.make("nowhere", 1, CONV2, STEPS)
    with pytest.raises(ConfigError, match="there are"):
        fleet.make(str(tmp_path / "missing.json"), 1, CONV2, STEPS)
    for number, (changes, words) in enumerate(
        [
            ({"flops": -1.0}, "flops"),
            ({"flops": 0.0}, "speed of 0"),
            ({"wings": 2}, "wings"),
            ({"coefficients": {"conv-2": {"dense": 1, "constant": 1, "weights": [1.0], "batch": 20}}}, "1 layers"),
        ]
    ):
        with pytest.raises(ConfigError, match=words):
            fleet.make(a_file(tmp_path / f"{number}.json", **changes), 1, CONV2, STEPS)
    (tmp_path / "none.json").write_text('{"about": ""}')
    with pytest.raises(ConfigError, match="no machines"):
        fleet.make(str(tmp_path / "none.json"), 1, CONV2, STEPS)
    (tmp_path / "text.json").write_text("fleet")
    with pytest.raises(ConfigError, match=r"text\.json"):
        fleet.make(str(tmp_path / "text.json"), 1, CONV2, STEPS)


def test_all_that_decides_a_fleet_is_in_its_text(tmp_path):
    assert fleet.text_of("even") == ""
    assert "0.32e9" in fleet.text_of("mixed-pi") or "320000000.0" in fleet.text_of("mixed-pi")
    assert fleet.text_of(a_file(tmp_path / "f.json")) != fleet.text_of(a_file(tmp_path / "g.json", flops=3e9))


def test_this_machine_is_what_the_bench_measured():
    result = json.loads((ROOT / "docs" / "results" / "step.json").read_text())
    made = measured.profile([result])
    (machine,) = fleet.make("this-machine", 1, CONV2, STEPS)
    assert fleet.kinds("this-machine") == made.machines
    rows = {row["measure"]: row["value"] for row in result["rows"] if row["case"] == "conv-2"}
    for density in (0.5, 0.1, 0.01):
        took = fleet.seconds_of_work(machine, CONV2, order_of(masked(density)), 500)
        assert took == pytest.approx(5 * rows[f"step, density {density}"] / 1e3, rel=1e-3)
    dense = min(rows["step, dense, torch.nn"], rows["step, dense, engine"])
    assert fleet.seconds_of_work(machine, CONV2, order_of(Structure()), 500) == pytest.approx(5 * dense / 1e3)


@pytest.mark.parametrize("algo", algorithms.ALGORITHMS)
@pytest.mark.parametrize("model", ["digits-mlp", "digits-cnn", "lenet-300-100"])
def test_an_even_fleet_can_hold_the_whole_model_by_any_algorithm(algo, model):
    """Even with masks that keep everything, which take more than none."""
    spec, algorithm = zoo.by_name(model), algorithms.by_name(algo)
    weights = initial_weights(spec, 0)
    (machine,) = fleet.make("even", 1, spec, recipe_of(merged(algorithm.PARAMS, {})))
    devices = (DeviceView("a", machine.bytes_budget, 100),)
    state, drafts = algorithm.plan(algorithm.init(spec, weights, {}), 1, devices, rng_of(0, 1))
    assert drafts
    if not state.widths:
        masks = {name: np.ones(weights[name].shape, np.bool_) for name in maskable(spec)}
        assert algorithm.plan(replace(state, masks=masks), 2, devices, rng_of(0, 2))[1]
