"""Whole simulated runs of small models: repeatable, in the promised shape, and sensible in bad weather."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from coordinator.advance import load_state
from coordinator.algorithms import by_name
from coordinator.cli import main
from coordinator.recipes import merged, recipe_of
from coordinator.simulate import fleet, flops, report, weather
from coordinator.simulate.run import Log, play, simulate
from coordinator.simulate.world import Config, Terms, build
from wire import zoo
from wire.errors import NestlingError

SMALL = Config(model="digits-mlp", partition="iid", devices=3, rounds=2)
STILL = dataclasses.replace(SMALL, params={"recipe.rule": "still"})


def timeless(result):
    return {k: v for k, v in result.items() if k != "seconds"}


def test_a_run_has_the_promised_shape_and_can_be_repeated():
    seen = []
    result = simulate(SMALL, lambda view: seen.append(len(view.rounds)))
    wanted = "algo model data partition partition_digest seed rounds seconds seconds_virtual accuracy personal bytes_up"
    assert set(wanted.split()) | {"bytes_down", "flops", "density_by_layer", "devices", "curve"} <= set(result)
    assert seen == [1, 2]
    assert result["rounds"] == 2
    assert set(result["accuracy"]["by_width"]) == {"0", "1", "2", "3", "4"}
    assert result["accuracy"]["full"] == result["accuracy"]["by_width"]["4"]
    assert [d["width"] for d in result["devices"]] == [0, 2, 4]
    assert all(d["bytes_peak"] <= d["bytes_budget"] for d in result["devices"])
    assert result["personal"]["before"]["mean"] > 0
    json.dumps(result)
    assert timeless(simulate(SMALL)) == timeless(result)


def test_fedavg_learns_on_even_machines():
    config = dataclasses.replace(SMALL, algo="fedavg", fleet="even", rounds=3, params={"recipe.rate": 0.3})
    result = simulate(config)
    accuracies = [point["accuracy"] for point in result["curve"]]
    assert accuracies[-1] > 0.5
    assert result["bytes_up"] > 3 * 3 * 4 * 16_000


def test_a_lottery_is_told_by_the_tickets_of_its_devices():
    """The joined model is dense; what LotteryFL is about is each device's own, under its own mask."""
    params = {"recipe.rate": 0.1, "recipe.epochs": 1.0, "recipe.threshold": 0.0, "recipe.prune": 0.5}
    config = dataclasses.replace(SMALL, algo="lotteryfl", fleet="even", rounds=3, params=params)
    views = []
    result = simulate(config, views.append)
    replies = views[-1].rounds[3].replies
    for what, metric in (("own", "accuracy.ticket"), ("density", "density")):
        told = [reply.metrics[metric] for reply in replies.values()]
        assert result["personal"][what]["mean"] == pytest.approx(np.mean(told))
        assert result["personal"][what]["p10"] == pytest.approx(np.percentile(told, 10))
    assert result["personal"]["density"]["mean"] == pytest.approx(0.125, abs=1e-3), "halved three times"
    assert {row["name"]: row["density"] for row in result["devices"]} == {
        name: pytest.approx(reply.metrics["density"], abs=1e-6) for name, reply in replies.items()
    }
    assert set(result["density_by_layer"].values()) == {1.0}
    assert "3 devices with 0.125 of the weights" in report.text(result)
    plain = simulate(dataclasses.replace(config, algo="fedavg", params={}))
    assert plain["personal"]["own"] == plain["personal"]["density"] == {"mean": None, "p10": None, "devices": 0}


def test_virtual_time_is_that_of_the_slowest(tmp_path):
    world, log = build(dataclasses.replace(STILL, rounds=1), tmp_path), Log()
    list(play(world, log))
    needed = []
    for name, order in log.view.rounds[1].orders.items():
        client = world.clients[name]
        down = sum(ref.size for ref in order.blobs) / client.machine.bandwidth_down
        up = log.view.rounds[1].replies[name].update.size / client.machine.bandwidth_up
        work = flops.flops(world.spec, order, len(client.data.train[0])) / client.machine.flops
        needed.append(down + work + up)
    assert log.view.rounds[1].seconds == pytest.approx(max(needed))
    assert max(needed) > min(needed)


def test_a_smaller_budget_gives_a_narrower_width(tmp_path):
    world = build(SMALL, tmp_path)
    wide = world.clients["device-3"]
    budget = world.clients["device-1"].machine.bytes_budget
    narrow = dataclasses.replace(wide, machine=dataclasses.replace(wide.machine, bytes_budget=budget))
    world = dataclasses.replace(world, clients={**world.clients, "device-3": narrow})
    log = Log()
    next(play(world, log))
    assert log.view.rounds[1].orders["device-3"].structures[0].capacity == 0


def test_lost_devices_are_not_waited_for_when_the_quorum_is_there(tmp_path):
    storm = dataclasses.replace(
        STILL, devices=8, rounds=6, weather="stormy", terms=Terms(quorum=1, seconds=100.0), fleet="even"
    )
    world = build(storm, tmp_path)
    log = Log()
    list(play(world, log))
    rounds = log.view.rounds.values()
    answered = [len(r.replies) for r in rounds]
    assert min(answered) < 8
    assert all(r.outcome == "closed" and r.seconds < 100.0 for r in rounds)


def test_a_round_without_its_quorum_is_abandoned_at_the_deadline_and_the_run_goes_on(tmp_path):
    storm = dataclasses.replace(STILL, devices=8, rounds=4, weather="stormy", terms=Terms(seconds=50.0), fleet="even")
    log = Log()
    list(play(build(storm, tmp_path), log))
    outcomes = [r.outcome for r in log.view.rounds.values()]
    assert any(o.startswith("abandoned") for o in outcomes)
    assert len(outcomes) == 4
    assert log.now >= 50.0
    assert log.view.finished


def test_what_an_abandoned_round_cost_is_counted(tmp_path):
    terms = Terms(seconds=50.0)
    storm = dataclasses.replace(STILL, devices=8, rounds=4, weather="stormy", terms=terms, fleet="even")
    log = Log()
    list(play(build(storm, tmp_path), log))
    result, rounds = simulate(storm), log.view.rounds.values()
    assert result["rounds"] == sum(r.outcome == "closed" for r in rounds) < 4
    assert result["seconds_virtual"] == pytest.approx(log.now, abs=1e-3)
    assert result["bytes_down"] == sum(r.bytes_down for r in rounds)
    assert all(r.seconds for r in rounds)


def test_the_density_is_that_of_the_model_that_was_measured():
    """The last round ends with the mask that it was not trained under."""
    params = {"sparsity": 0.8, "sparsity_start": 0.5, "horizon": 2.0, "every": 1.0, "recipe.epochs": 1.0}
    result = simulate(dataclasses.replace(SMALL, algo="feddip", fleet="even", params=params))
    sizes = {"fc1.weight": 64 * 96, "fc2.weight": 96 * 96, "out.weight": 96 * 10}
    kept = sum(result["density_by_layer"][name] * size for name, size in sizes.items())
    assert kept == pytest.approx(round(0.2 * sum(sizes.values())))


def test_selection_asks_some(tmp_path):
    log = Log()
    list(play(build(dataclasses.replace(STILL, devices=6, terms=Terms("random:2")), tmp_path), log))
    assert [len(r.orders) for r in log.view.rounds.values()] == [2, 2]


def test_devices_are_drawn_again_until_one_can_hold_the_model(tmp_path):
    config = Config("fedavg", "digits-mlp", fleet="spread", devices=5, rounds=4, terms=Terms("random:1"))
    log = Log()
    list(play(build(dataclasses.replace(config, params={"recipe.rule": "still"}), tmp_path), log))
    assert [list(r.orders) for r in log.view.rounds.values()] == 4 * [["device-5"]]


def test_fates_follow_the_seed_and_the_odds():
    storm = weather.forecast("stormy")
    fates = [weather.fate(storm, 0, n, "a") for n in range(400)]
    assert fates == [weather.fate(storm, 0, n, "a") for n in range(400)]
    lost = [f for f in fates if f.lost_at is not None]
    assert 50 < len(lost) < 115
    assert np.std(np.log([f.factor for f in fates])) == pytest.approx(0.6, rel=0.15)
    assert weather.fate(weather.forecast("fair"), 0, 1, "a") == weather.Fate(1.0, None)


def test_budgets_ascend_and_fit_five_widths():
    spec = zoo.load("digits-cnn")
    recipe = recipe_of(merged(by_name("nestfl").PARAMS, {}))
    limits = fleet.budgets(spec, recipe, 5, grain=1 << 20)
    assert limits == sorted(set(limits))
    assert all(limit % (1 << 20) == 0 for limit in limits)
    assert fleet.budgets(spec, recipe, 2, grain=1 << 20) == [limits[0], limits[-1]]
    assert fleet.budgets(spec, recipe, 1, grain=1 << 20) == [limits[-1]]
    assert limits[-1] - limits[0] >= 20 << 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fleet": "vast"}, "mixed, even, stragglers"),
        ({"weather": "mild"}, "fair, gusty, stormy"),
        ({"algo": "fed"}, "there are .*nestfl"),
        ({"devices": 0}, "at least 1"),
        ({"partition": "dir"}, "dir0.5"),
        ({"params": {"angles": 1.0}}, "angles"),
        ({"terms": Terms("most")}, "random:5"),
    ],
)
def test_what_cannot_work_is_explained(change, words):
    with pytest.raises(NestlingError, match=words):
        simulate(dataclasses.replace(SMALL, **change))


def test_command_prints_one_object(capsys, tmp_path):
    words = ["simulate", "--model", "digits-mlp", "--partition", "iid", "--devices", "2", "--rounds", "1"]
    assert main([*words, "--recipe", "rule=still", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rounds"] == 1
    file = tmp_path / "out.json"
    assert main([*words, "--recipe", "rule=still", "--json", str(file)]) == 0
    assert json.loads(file.read_text("utf-8"))["model"] == "digits-mlp"
    assert "test accuracy" in capsys.readouterr().out
    assert main([*words, "--recipe", "rate"]) != 0
    assert "NAME=VALUE" in capsys.readouterr().err


def test_a_squeezed_device_answers_about_a_narrower_width_and_nothing_is_lost(tmp_path):
    """Memory falls below what an order takes, now and then; what a width less takes is still there."""
    squeezed = dataclasses.replace(
        SMALL, model="digits-cnn", devices=3, rounds=2, weather="squeezed", seed=3, params={"recipe.steps": 6.0}
    )
    world = build(squeezed, tmp_path)
    wide = dataclasses.replace(world.clients["device-3"].machine, bytes_budget=1 << 30)
    clients = {n: dataclasses.replace(c, machine=dataclasses.replace(wide, name=n)) for n, c in world.clients.items()}
    world, log = dataclasses.replace(world, clients=clients), Log()
    list(play(world, log))
    rounds = list(log.view.rounds.values())
    answered = [
        (one.orders[n].structures[0].capacity, r.structure.capacity) for one in rounds for n, r in one.replies.items()
    ]
    assert len(answered) == 6
    narrower = [wide - found for wide, found in answered]
    assert min(narrower) >= 0
    assert max(narrower) > 0
    assert log.view.finished
    for one in rounds:
        ends = {n: _turn(world, one.orders[n], reply) for n, reply in one.replies.items()}
        for n, reply in one.replies.items():
            assert reply.usage.seconds == pytest.approx(ends[n][0])
        if one.number == 1:  # of the next one the devices hold some blobs already
            assert one.seconds == pytest.approx(max(end for _, end in ends.values()))


def _turn(world, order, reply):
    """Work and whole turn of an order by hand: the granted width until the squeeze, from then on what was answered about."""
    machine, samples = world.clients[order.device].machine, len(world.clients[order.device].data.train[0])
    fate = weather.fate(world.weather, world.config.seed, order.round, order.device)
    share = 1.0 if fate.squeezed_at is None else fate.squeezed_at
    narrow = dataclasses.replace(order, structures=(reply.structure,))
    (granted, found) = (fleet.seconds_of_work(machine, world.spec, one, samples) for one in (order, narrow))
    work = share * granted + (1.0 - share) * found
    moved = machine.seconds_down(sum(ref.size for ref in order.blobs)) + machine.seconds_up(reply.update.size)
    return work, machine.seconds_order + work + moved


def test_a_squeeze_leaves_the_other_fates_as_they_are():
    storm, also = weather.forecast("stormy"), dataclasses.replace(weather.forecast("stormy"), squeezed=0.3)
    fates = [(weather.fate(storm, 0, n, "a"), weather.fate(also, 0, n, "a")) for n in range(400)]
    assert all((one.factor, one.lost_at) == (two.factor, two.lost_at) for one, two in fates)
    squeezed = [two for _, two in fates if two.squeezed_at is not None]
    assert 90 < len(squeezed) < 150
    assert all(0.4 <= fate.left < 1.0 and 0.0 <= fate.squeezed_at < 1.0 for fate in squeezed)
    one = weather.Fate(1.0, None, 0.5, 0.75)
    assert [one.room(100, done) for done in (0.0, 0.4, 0.5, 0.9)] == [0, 0, 75, 75]
    assert weather.Fate(1.0, None).room(100, 1.0) == 0


@pytest.mark.parametrize(("command", "module"), [("simulate", "command"), ("ticket", "ticket")])
def test_numpy_is_told_of_one_thread_before_it_is_loaded(command, module):
    """On more, products are summed in another order, and the same run would be another one on another machine."""
    function = {"command": "run_simulation", "ticket": "run_ticket"}[module]
    code = (
        "import os, sys, types\n"
        "said = types.ModuleType('said')\n"
        f"said.{function} = lambda _: print(os.environ['OPENBLAS_NUM_THREADS'], 'numpy' in sys.modules)\n"
        f"sys.modules['coordinator.simulate.{module}'] = said\n"
        "from coordinator import flags\n"
        f"flags._{command}(None)\n"
    )
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "2"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["1", "False"]


def test_a_demo_on_an_engine_that_is_not_here_does_not_begin(tmp_path, capsys):
    assert main(["demo", "--engine", "ghost", "--out", str(tmp_path / "out")]) == 2
    assert "'ghost' is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prunefl_learns_that_a_slow_link_is_most_of_a_round(tmp_path):
    further = {"stages": "further", "every": 4.0, "target": 0.2, "horizon": 8.0, "recipe.steps": 5.0}
    config = dataclasses.replace(SMALL, algo="prunefl", fleet="pi4", rounds=12, params=further)
    world, log = build(config, tmp_path), Log()
    list(play(world, log))
    memo = load_state(world.spool, log.state, world.spec).scalars["prunefl"]
    machine = next(iter(world.clients.values())).machine
    told = [row for row in memo["seen"] if row[3]]
    assert [row[3] > 0.0 for row in memo["seen"]] == [number in (4, 8, 12) for number in range(1, 13)]
    assert all(row[2] > row[1] for row in told), "transfers take longer than training here"
    fact = memo["history"][-1]
    link = 4 / machine.bandwidth_down + 4 / machine.bandwidth_up
    constant, *each = fact["seconds"][0]
    assert each == pytest.approx([link] * 3, rel=0.2)
    for _, work, rest, beyond, *kept in memo["seen"]:
        took = constant + sum(t * n for t, n in zip(each, kept, strict=True))
        assert beyond > 0.0 or took == pytest.approx(work + rest, rel=0.1)
    assert fact["r2"] > 0.95


def test_the_device_of_initial_pruning_stays_whoever_is_drawn(tmp_path):
    begin = {"initial.rounds": 4.0, "initial.passes": 1.0, "initial.start": 99.0, "recipe.steps": 1.0}
    config = dataclasses.replace(SMALL, algo="prunefl", fleet="even", devices=5, rounds=9, seed=3, params=begin)
    world, log = build(dataclasses.replace(config, terms=Terms(select="random:2")), tmp_path), Log()
    list(play(world, log))
    asked = [sorted(entry.orders) for _, entry in sorted(log.view.rounds.items())]
    assert asked[:4] == [asked[0]] * 4
    assert [len(names) for names in asked] == [1] * 4 + [2] * 5
    assert len({name for names in asked[4:] for name in names}) > 2
