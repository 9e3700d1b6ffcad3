"""Every rule and every algorithm in every engine: the same orders give the same answers but for rounding."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest

from coordinator.algorithms import ALGORITHMS
from coordinator.simulate.run import simulate
from coordinator.simulate.world import Config
from edge_runtime import rules
from edge_runtime.engines import Choice, open_engine
from tests.support.engines import NAMES
from tests.support.models import batch, random_arrays, small_cnn, widths
from tests.support.orders import some_masks
from wire.messages import Recipe
from wire.spec import Structure

SPEC, WHOLE = small_cnn(), Structure()
NESTED = widths(a=(2, 3, 4, 6), b=(3, 5, 8, 12))
PLAIN = {"epochs": 2, "batch": 8, "rate": 0.1, "seed": 3}
MOVED = {**PLAIN, "momentum": 0.9, "decay": 0.01, "clip": 0.5}
WHERE = {"whole": (WHOLE, False), "nested": (NESTED, False), "masked": (WHOLE, True)}
ORDERS = (
    ("sgd", "whole", PLAIN, {}),
    ("sgd", "whole", {**PLAIN, "momentum": 0.9, "decay": 0.01}, {}),
    ("sgd", "masked", MOVED, {}),
    ("sgd", "nested", MOVED, {"widths": 2.0, "distil": 0.5}),
    ("sgd", "whole", {**PLAIN, "rate": 0.01}, {"adam": 1.0}),
    ("prox", "whole", {**PLAIN, "momentum": 0.9}, {"mu": 0.1}),
    ("prox", "masked", PLAIN, {"mu": 0.1}),
    ("dpf", "masked", PLAIN, {}),
    ("fiarse", "masked", MOVED, {}),
    ("fiarse", "whole", PLAIN, {"threshold": 0.1}),
    ("importance", "masked", PLAIN, {}),
    ("importance", "whole", PLAIN, {"gradients": 1.0}),
    ("score", "whole", PLAIN, {}),
    ("score", "whole", PLAIN, {"synflow": 5.0, "density": 0.3}),
    ("topk", "whole", PLAIN, {"k": 40.0}),
    ("grouplasso", "whole", MOVED, {"lambda": 0.01}),
    ("lottery", "whole", MOVED, {}),
    ("heterofl", "nested", MOVED, {}),
    ("fjord", "nested", MOVED, {}),
    ("maml", "whole", PLAIN, {"alpha": 0.05}),
    ("maml", "whole", PLAIN, {"alpha": 0.05, "hf": 1.0}),
    ("selfprune", "whole", MOVED, {"lambda": 0.001}),
)
MASKED = ("dpf", "feddip", "prunefl", "snip", "synflow", "fixed", "taper")
"""Algorithms whose orders the smallest device of a mixed fleet cannot hold."""


@cache
def answer(engine_name, order, micro):
    """Give all that an order leaves behind: weights, losses, what is told beside them, and what is kept."""
    rule, where, fields, knobs = ORDERS[order]
    structure, masked = WHERE[where]
    masks = some_masks(SPEC, 0.5) if masked else {}
    engine = open_engine(engine_name)()
    ways = {"": "sparse", "f.weight": "dense"}
    engine.load(SPEC, structure, random_arrays(SPEC, structure), masks, Choice(ways=ways))
    engine.seed(3, 1)
    recipe = Recipe(rule=rule, **fields, knobs=knobs)
    task = rules.Task(recipe, engine, *batch(SPEC, 21), 1, micro, lambda *_: None, masks)
    trained = rules.find(rule).train(task)
    found = {f"weight {name}": engine.read(name) for name in engine.params} | {"losses": np.array(trained.losses)}
    found |= {f"metric {name}": np.float64(value) for name, value in trained.metrics.items()}
    found |= {f"own {name}": array for name, array in trained.own.items()}
    for kind, extras in (("extra", trained.extras), ("update", trained.update or {})):
        found |= {f"{kind} {name}": extra.values for name, extra in extras.items()}
        found |= {f"{kind} places {n}": extra.places for n, extra in extras.items() if extra.places is not None}
    return found


def test_every_rule_has_an_order():
    assert {rule for rule, *_ in ORDERS} | {"still"} == set(rules.RULES)


@pytest.mark.parametrize("micro", [8, 3])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "torch"])
@pytest.mark.parametrize("order", range(len(ORDERS)), ids=lambda i: f"{ORDERS[i][0]}-{ORDERS[i][1]}-{i}")
def test_an_order_gives_the_same_answer(order, name, micro):
    wanted, found = answer("torch", order, micro), answer(name, order, micro)
    assert found.keys() == wanted.keys()
    before = random_arrays(SPEC, WHERE[ORDERS[order][1]][0])
    assert ORDERS[order][0] == "score" or any(wanted[f"weight {n}"].size and n in before for n in before)
    for what, array in wanted.items():
        size = float(np.abs(array).max(initial=0.0))
        np.testing.assert_allclose(found[what], array, rtol=0, atol=2e-5 * max(size, 0.01), err_msg=what)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_an_algorithm_runs_on_every_engine(algo):
    fleet = "even" if algo in MASKED else "mixed"
    own = {"fractions": "0.2 1"} if algo == "heterofl" else {}  # what the fleet's budgets are made for, on every engine
    config = Config(algo, model="digits-mlp", partition="iid", fleet=fleet, devices=2, rounds=2, params=own)
    found = {name: simulate(dataclasses.replace(config, engine=name)) for name in NAMES}
    for name, run in found.items():
        assert run["rounds"] == 2
        assert all(device["engine"] == name for device in run["devices"] if device["engine"])
        wanted = found[NAMES[0]]
        assert run["accuracy"]["full"] == pytest.approx(wanted["accuracy"]["full"], abs=0.03)
        assert run["bytes_up"] == pytest.approx(wanted["bytes_up"], rel=0.01)
