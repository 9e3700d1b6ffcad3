"""What devices get for themselves, in `simulate` and `status`: who counts, before and after which aggregation."""

import dataclasses
import json

import numpy as np
import pytest

from coordinator import show
from coordinator.advance import load_state
from coordinator.events import Arrived
from coordinator.export import JOURNAL
from coordinator.journal import Abandoned, Closed, Journal, Planned, RunStarted
from coordinator.personal import summed_up
from coordinator.simulate import report, run
from coordinator.simulate.run import Log, play, simulate
from coordinator.simulate.world import Config, Terms, build
from tests.support.messages import a_reply, an_order
from wire import zoo
from wire.messages import Recipe
from wire.spec import Structure

FEW = Config(
    model="digits-mlp",
    partition="dir0.3",
    devices=6,
    rounds=5,
    terms=Terms(select="random:2"),
    params={"recipe.rate": 0.1},
)


def of_the(newest, metric):
    return [one.metrics[metric] for one in newest.values()]


def test_every_device_that_trained_counts_by_its_newest_answer():
    views = []
    result = simulate(FEW, views.append)
    newest = {}
    for number in range(1, 6):
        newest |= views[-1].rounds[number].replies
    told = of_the(newest, "accuracy.after")
    assert len(told) > 2
    trained, aggregated = result["personal"]["before"], result["personal"]["after"]
    assert trained == {
        "mean": pytest.approx(np.mean(told)),
        "p10": pytest.approx(np.percentile(told, 10)),
        "devices": len(told),
    }
    assert (aggregated["devices"], aggregated["final"]) == (len(told), True)
    line = f"{np.mean(told):.3f} as trained, before aggregation ({len(told)} devices)"
    assert line in report.text(result)


def test_after_aggregation_is_what_the_final_width_does_on_a_devices_own_test_data(tmp_path):
    world, log = build(FEW, tmp_path), Log()
    list(play(world, log))
    state = load_state(world.spool, log.state, world.spec)
    newest = {name: one for number in range(1, 6) for name, one in log.view.rounds[number].replies.items()}
    assert len({one.structure.capacity for one in newest.values()}) > 1
    assert {name: by_hand(state, one, world.clients[name].data.test) for name, one in newest.items()} == pytest.approx(
        log.own
    )
    assert np.mean(list(log.own.values())) == pytest.approx(simulate(FEW)["personal"]["after"]["mean"])
    came = of_the(newest, "accuracy.before")
    assert sorted(came) != pytest.approx(sorted(log.own.values()), abs=0.01), "what they were sent was another model"


def by_hand(state, answer, test):
    """Score the perceptron of one width: the channels whose level is not beyond the answer's."""
    x, y = test
    w, one, two = state.weights, *(state.levels[name] <= answer.structure.capacity for name in ("fc1", "fc2"))
    x = np.maximum(x.reshape(len(x), -1) @ w["fc1.weight"][one].T + w["fc1.bias"][one], 0)
    x = np.maximum(x @ w["fc2.weight"][two][:, one].T + w["fc2.bias"][two], 0)
    return float(np.mean((x @ w["out.weight"][:, two].T + w["out.bias"]).argmax(1) == y))


def test_a_run_that_ends_in_a_calibrating_round_has_figures():
    config = Config(
        model="digits-cnn-bn", partition="iid", devices=2, rounds=2, params={"calibrate": 2.0, "recipe.steps": 1.0}
    )
    views = []
    result = simulate(config, views.append)
    asked = [{one.verb for one in views[-1].rounds[number].orders.values()} for number in (1, 2)]
    assert asked == [{"train"}, {"calibrate"}]
    told = of_the(views[-1].rounds[1].replies, "accuracy.after")
    assert (result["personal"]["before"]["mean"], result["personal"]["before"]["devices"]) == (np.mean(told), 2)
    assert result["personal"]["after"]["devices"] == 2


def test_where_widths_change_by_the_round_a_device_gets_none_that_is_wider():
    """FedMP: a ratio for each device and round. The fleet's budgets hold what a device trained last, so all are measured."""
    config = dataclasses.replace(FEW, algo="fedmp", params={}, rounds=3)
    views = []
    result = simulate(config, views.append)
    widths = {tuple(one.structures[0].widths["fc1"]) for r in views[-1].rounds.values() for one in r.orders.values()}
    assert len(widths) > 1
    assert result["personal"]["after"]["devices"] == result["personal"]["before"]["devices"] > 2
    spec = zoo.load(FEW.model)
    now = Structure(0, {"fc1": (10, 40, 96), "fc2": (20, 50, 96)})
    for capacity, last, wanted in ((1, (20, 50), 1), (0, (20, 50), 0), (1, (8, 96), 2), (0, (8, 96), 0)):
        had = Structure(capacity, {"fc1": last, "fc2": (20, last[1])})
        assert run._at_width(spec, [now.narrowed(k) for k in range(3)], had).capacity == wanted
    assert run._at_width(spec, [now.narrowed(k) for k in range(3)], now.narrowed(1)).capacity == 1
    nested_masks = [Structure(k, masks="ab" * 32) for k in range(3)]
    assert run._at_width(spec, nested_masks, Structure(1, masks="cd" * 32)).capacity == 1


def test_nobody_has_a_model_after_aggregation_where_no_round_was_closed():
    """What was trained is there all the same: its devices keep it, though nobody waited for the lost ones."""
    storm = dataclasses.replace(FEW, weather="stormy", terms=Terms(seconds=50.0), rounds=1, devices=8, fleet="even")
    result = simulate(storm)
    assert result["rounds"] == 0
    assert result["personal"]["before"]["devices"] > 0
    assert result["personal"]["after"]["devices"] == 0


def told(number, device, before, after, **changes):
    """An order and its answer."""
    asked = dataclasses.replace(an_order(device, number), **changes)
    metrics = {"accuracy.before": before, "accuracy.after": after}
    return asked, dataclasses.replace(a_reply(device, asked.id), metrics=metrics)


def rounds(*lines):
    """A run's records: of each round whether it was closed, and its orders and answers."""
    yield RunStarted("1" * 16)
    for number, (closed, pairs) in enumerate(lines, 1):
        yield Planned(number, "", tuple(asked for asked, _ in pairs), None, 0.0)
        yield from (Arrived(asked.device, asked.id, answer) for asked, answer in pairs)
        yield Closed(number, "", tuple(asked.device for asked, _ in pairs)) if closed else Abandoned(number)


def test_a_real_run_is_told_by_the_models_that_came_with_the_newest_orders(tmp_path, capsys):
    """Scores are no trained weights; a model of the start is not aggregated; an abandoned round's answer counts."""
    records = rounds(
        (True, [told(1, "d1", 0.1, 0.1, recipe=Recipe(rule="score"))]),
        (True, [told(2, "d2", 0.1, 0.5), told(2, "d3", 0.1, 0.6)]),
        (True, [told(3, "d3", 0.4, 0.7), told(3, "d4", 0.2, 0.3)]),
        (False, [told(4, "d4", 0.6, 0.9)]),
        (True, [told(5, "d3", 0.9, 0.9, verb="calibrate")]),
    )
    with Journal(tmp_path / JOURNAL) as journal:
        journal.append(list(records))
    found = summed_up(show.read(tmp_path).trained())
    assert found["before"] == {"mean": pytest.approx(0.7), "p10": pytest.approx(0.54), "devices": 3}
    assert found["after"] == {"mean": pytest.approx(0.5), "p10": pytest.approx(0.42), "devices": 2, "final": False}
    assert found["own"] == found["density"] == {"mean": None, "p10": None, "devices": 0}
    assert show.show_status(tmp_path, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["personal"] == found
    assert show.show_status(tmp_path, as_json=False) == 0
    said = capsys.readouterr().out
    assert "0.700 as trained, before aggregation (3 devices)" in said
    assert (
        "0.500 by the global model of their width after aggregation, as their newest orders brought it (2 devices)"
        in said
    )
