"""What a recipe's parameters may be: what every device would refuse in every round is refused before the first one."""

from __future__ import annotations

import dataclasses

import pytest

from coordinator import algorithms
from coordinator.blocks.initial import initial_weights
from coordinator.recipes import recipe_of
from coordinator.simulate.command import settings
from edge_runtime import rules, tuning
from tests.support.engines import make as MAKE
from tests.support.models import batch, random_arrays, small_cnn, widths
from wire import zoo
from wire.errors import ConfigError, NonFinite, SpecError
from wire.spec import Structure

SPEC = small_cnn()
KNOBS = {
    "sgd": ("widths", "distil", "mutual"),
    "fjord": ("distil",),
    "heterofl": ("mask",),
    "prox": ("mu",),
    "maml": ("alpha", "hf", "delta", "tune"),
    "lottery": ("threshold", "target", "prune"),
    "selfprune": ("threshold", "target", "prune", "lambda"),
}
VALUES = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0, 64.0, 65.0, 1001.0)


def refused(rule, knobs, loss="cross_entropy"):
    """Say whether a device refuses to train by it."""
    params = {"recipe.rule": rule, **{f"recipe.{name}": value for name, value in knobs.items()}}
    recipe = dataclasses.replace(recipe_of({"recipe.rule": rule}), knobs=knobs, loss=loss, batch=4, steps=1)
    structure = widths(a=(2, 6), b=(3, 12)) if rule in ("sgd", "fjord", "heterofl") else Structure()
    engine, (x, y) = MAKE(), batch(SPEC, 4)
    engine.load(SPEC, structure, random_arrays(SPEC, structure))
    try:
        tuning.passes(recipe, SPEC)
        rules.find(rule).train(rules.Task(recipe, engine, x, y, 1, 4, lambda *_: None))
    except SpecError:
        return params, True
    except NonFinite:  # it has tried
        pass
    return params, False


def said(params, loss="cross_entropy"):
    """Give why the coordinator refuses it; nothing if it does not."""
    try:
        recipe_of({**params, "recipe.loss": loss})
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("rule", "knob"), [(rule, knob) for rule, knobs in KNOBS.items() for knob in knobs])
def test_a_knob_is_refused_where_devices_refuse_it_and_nowhere_else(rule, knob):
    for value in VALUES:
        params, no = refused(rule, {knob: value})
        assert (f"recipe.{knob} = {value:g}" in said(params)) == no, value


def test_passes_of_a_device_s_own_are_refused_likewise():
    for value in VALUES:
        params, no = refused("sgd", {"personal": value})
        assert ("recipe.personal" in said(params)) == no


@pytest.mark.parametrize(
    ("rule", "knob"), [("sgd", "distil"), ("sgd", "mutual"), ("fjord", "distil"), ("heterofl", "mask")]
)
def test_targets_for_cross_entropy_go_with_no_other_loss(rule, knob):
    params, no = refused(rule, {knob: 1.0}, "mean_squared_error")
    assert no
    assert f"recipe.{knob}" in said(params, "mean_squared_error")
    assert not said({**params, f"recipe.{knob}": 0.0}, "mean_squared_error")


def test_two_ways_to_teach_are_one_too_many():
    params, no = refused("sgd", {"widths": 1.0, "distil": 0.5, "mutual": 0.5})
    assert no
    assert "recipe.distil" in said(params)
    assert "recipe.mutual" in said(params)


@pytest.mark.parametrize(
    ("name", "param", "value"),
    [
        ("nestfl", "recipe.widths", 1.5),
        ("nestfl", "recipe.distil", 2.0),
        ("fledge", "recipe.mutual", -1.0),
        ("fledge", "recipe.personal", 2000.0),
        ("fjord", "recipe.distil", 0.5),
        ("perfedavg", "recipe.alpha", -0.1),
        ("perfedavg", "recipe.hf", 2.0),
        ("perfedavg", "recipe.delta", 0.0),
        ("perfedavg", "recipe.tune", 0.5),
    ],
)
def test_a_run_that_every_device_would_refuse_does_not_start(name, param, value):
    spec = zoo.by_name("digits-mlp")
    with pytest.raises(ConfigError, match=f"parameter {param} = {value:g}: write a "):
        algorithms.by_name(name).init(spec, initial_weights(spec, 0), {param: value})


@pytest.mark.parametrize(
    ("name", "word", "wanted"),
    [("fedmp", "probes=0.9", "0.9"), ("fiarse", "sizes=1", "1.0"), ("fjord", "fractions=1", "1.0")],
)
def test_a_list_of_one_number_may_be_written_on_the_command_line(name, word, wanted):
    spec, params = zoo.by_name("digits-mlp"), settings([word], "--param")
    state = algorithms.by_name(name).init(spec, initial_weights(spec, 0), params)
    assert [state.scalars["params"][param] for param in params] == [wanted]
    (param,) = params
    with pytest.raises(ConfigError, match=f"parameter {param} = "):
        algorithms.by_name(name).init(spec, initial_weights(spec, 0), {param: -1.0})
