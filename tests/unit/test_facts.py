"""What algorithms tell of a round: bounded, finite, told by the journal, by `inspect` and by a run's curve."""

from __future__ import annotations

import io
import json
import types

import numpy as np
import pytest

from coordinator import algorithms, show
from coordinator.advance import Outcome
from coordinator.algorithm import State, rng_of
from coordinator.algorithms import prunefl
from coordinator.blocks.initial import initial_weights
from coordinator.blocks.masks import NEVER
from coordinator.export import JOURNAL
from coordinator.facts import FACTS_MAX, facts_of
from coordinator.journal import Closed, Journal, Planned, RunStarted
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config
from tests.support.messages import RUN
from tests.unit.test_algorithms import DEVICES, answered, begun
from tests.unit.test_feddip import rounds_of
from tests.unit.test_feddip import start as feddip_start
from wire import zoo
from wire.errors import Malformed
from wire.job import read_frame, write_frame
from wire.schema import from_plain

SPEC = zoo.by_name("digits-mlp")
SILENT = types.SimpleNamespace()


def with_masks(**masks) -> State:
    return State(SPEC, 1, {}, masks={name: np.array(mask, bool) for name, mask in masks.items()})


def test_densities_are_told_of_every_algorithm_that_has_masks():
    state = with_masks(a=[[1, 0], [0, 0]], b=[1, 1])
    assert facts_of(SILENT, state) == {"density": 0.5, "density.a": 0.25, "density.b": 1.0}
    assert facts_of(SILENT, State(SPEC, 1, {})) == {}
    nested = State(SPEC, 1, {}, mask_levels={"a": np.array([0, 1, NEVER, NEVER], np.uint8)})
    assert facts_of(SILENT, nested) == {"density": 0.5, "density.a": 0.5}, "of the widest"


def test_what_an_algorithm_tells_comes_first_and_must_be_a_number_with_a_name():
    told = {"r2": np.float32(0.5), "bad name": 1.0, "": 1.0, "x" * 65: 1.0, "nan": np.nan, "great": np.inf, "count": 3}
    asked = types.SimpleNamespace(facts=lambda state: told | {"round": state.round})
    found = facts_of(asked, with_masks(a=[1, 0]))
    assert list(found) == ["r2", "count", "round", "density", "density.a"]
    assert all(type(value) is float for value in found.values())
    assert found["r2"] == 0.5


def test_there_are_at_most_so_many_and_the_largest_layers_stay():
    many = with_masks(**{f"t{size}": np.ones(size) for size in range(1, 101)})
    found = facts_of(types.SimpleNamespace(facts=lambda _: {"own": 1.0}), many)
    assert len(found) == FACTS_MAX
    assert list(found)[:3] == ["own", "density", "density.t100"]
    assert "density.t38" not in found
    for count in (FACTS_MAX, FACTS_MAX + 1):
        plain = {"round": 1, "state": "", "devices": [], "facts": {f"n{i}": 0.0 for i in range(count)}}
        if count == FACTS_MAX:
            assert len(from_plain(Closed, plain).facts) == count
        else:
            with pytest.raises(Malformed, match="facts"):
                from_plain(Closed, plain)


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_tells_names_and_numbers_that_all_arrive(name):
    algorithm, state = begun(name)
    ask = getattr(algorithm, "facts", lambda _: {})
    assert facts_of(algorithm, state).keys() >= ask(state).keys()
    for number in range(1, 10):
        state, drafts = algorithm.plan(state, number, DEVICES, rng_of(0, number))
        state = algorithm.close(
            state, tuple(answered(state, draft, "well", number + i) for i, draft in enumerate(drafts))
        )
        assert facts_of(algorithm, state).keys() >= ask(state).keys()
    wanted = {
        "prunefl": {"round", "gamma", "r2", "undecided"},
        "feddip": {"round", "sparsity", "loss"},
        "dpf": {"round", "sparsity", "loss"},
        "fedmp": {"ratio.least", "ratio.mean", "ratio.most"},
    }
    assert set(ask(state)) == wanted.get(name, set())
    masked = {f"density.{tensor}" for tensor in state.masks}
    assert masked <= facts_of(algorithm, state).keys()
    assert bool(masked) == (name in {"prunefl", "feddip", "dpf", "snip", "synflow", "iterative", "fixed", "taper"})


def test_prunefls_are_those_of_its_latest_reconfiguration():
    state = prunefl.init(SPEC, initial_weights(SPEC, 0), {})
    assert prunefl.facts(state) == {}
    history = [{"round": n, "gamma": n / 2, "r2": 0.9, "undecided": -1, "density": 0.1, "layers": {}} for n in (5, 10)]
    memo = {**state.scalars["prunefl"], "history": history}
    told = prunefl.facts(State(SPEC, 12, {}, scalars={**state.scalars, "prunefl": memo}))
    assert told == {"round": 10, "gamma": 5.0, "r2": 0.9, "undecided": -1}


def test_feddips_loss_is_what_its_mask_leaves_out_of_the_mean():
    state = feddip_start(mask="dense", every=3.0, start="dense", sparsity_start=0.0, sparsity=0.7, **{"lambda": 0.0})
    for after in rounds_of(algorithms.by_name("feddip"), state, 3):
        state = after
    told = facts_of(algorithms.by_name("feddip"), state)
    whole = sum(float(np.square(w.astype(float)).sum()) for w in state.weights.values())
    lost = sum(float(np.square(state.weights[n].astype(float))[~m].sum()) for n, m in state.masks.items())
    assert told["round"] == 3
    assert told["loss"] == pytest.approx(lost / whole, rel=1e-5)
    assert 0.0 < told["loss"] < 1.0 - told["density"]


def test_the_curve_of_a_run_and_the_journal_have_them(tmp_path, capsys):
    config = Config(
        algo="dpf",
        model="linear",
        partition="iid",
        fleet="even",
        devices=2,
        rounds=4,
        params={"horizon": 3.0, "every": 2.0},
    )
    seen = []
    result = simulate(config, lambda view: seen.append(view.rounds[max(view.rounds)].facts))
    points = [point["facts"] for point in result["curve"]]
    assert points == seen
    assert points[0] == {}, "nothing was pruned yet"
    assert [point["round"] for point in points[1:]] == [2, 3, 3]
    assert points[-1]["density.out.weight"] == pytest.approx(result["density_by_layer"]["out.weight"])
    assert points[1]["loss"] < points[2]["loss"]
    with Journal(tmp_path / JOURNAL) as journal:
        journal.append([RunStarted(RUN), Planned(1, "", (), None, 1.0), Closed(1, "", (), facts=points[-1])])
    assert show.show_round(tmp_path, None, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["facts"] == points[-1]


def test_an_outcome_carries_them_out_of_a_child():
    stream = io.BytesIO()
    write_frame(stream, Outcome(facts={"r2": 0.25}))
    stream.seek(0)
    assert read_frame(stream, (Outcome,)).facts == {"r2": 0.25}
