"""`edge-runtime plan`: what it prices is what an order would be priced at, and the largest that fits is the one it names."""

from __future__ import annotations

import argparse
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import fitting
from edge_runtime import exits, planning
from edge_runtime.config import load
from edge_runtime.desk import BASE_GUESS
from edge_runtime.memory import candidates as parts
from edge_runtime.memory import probe
from edge_runtime.paces import Paces
from tests.support.models import small_cnn
from tests.support.sequences import normed
from wire import memory, zoo
from wire.errors import ConfigError
from wire.messages import Recipe
from wire.spec import Structure, encode, parameter_count

MIB = 1 << 20
RECIPE = parts.recipe_of(32, 0.9, 2.0, adam=False)


def asked(*words):
    parser = argparse.ArgumentParser()
    planning.arguments(parser)
    return parser.parse_args(["--engine", "torch", *words])


def room(budget):
    return parts.Room({"torch": budget}, Paces())


@settings(max_examples=25, deadline=None)
@given(budget=st.integers(9 * MIB, 64 * MIB))
def test_the_chosen_width_is_the_one_that_an_order_would_get(budget):
    """`coordinator.fitting` chooses among real structures for the coordinator; this command must not say something else."""
    spec, kept = zoo.by_name("digits-cnn"), (0.2, 0.4, 0.6, 0.8, 1.0)
    structures = [Structure(k, {g.name: tuple(memory.uniform(spec, f).widths[g.name][0] for f in kept)
                                for g in spec.groups if g.prunable}) for k in range(5)]  # fmt: skip
    best = parts.chosen(parts.candidates(spec, RECIPE, room(budget), kept, ()), masked=False)
    plan = fitting.fit(spec, structures, RECIPE, fitting.Means(budget))
    if plan is not None:  # a coordinator does not count on recomputation, by which a device may do more
        assert best is not None
        assert best.width >= kept[plan.capacity]
        if best.width == kept[plan.capacity] and not best.cuts:
            assert (best.micro_batch, best.bytes_bound) == (plan.micro_batch, plan.bytes_bound)


def test_widths_then_densities_and_what_each_lacks():
    spec = zoo.by_name("conv-2")
    found = parts.candidates(spec, RECIPE, room(36 * MIB), (0.2, 0.5), (0.05, 0.2))
    assert [(one.width, one.density) for one in found] == [(1, 1), (0.5, 1), (0.2, 1), (1, 0.2), (1, 0.05)]
    assert found[0].weights == parameter_count(spec, Structure()) == 6_603_710
    assert [one.bytes_bound for one in found[:3]] == sorted((one.bytes_bound for one in found[:3]), reverse=True)
    assert not found[0].fits
    assert 0.04 < found[4].weights / found[0].weights < 0.06
    best = parts.chosen(found, masked=True)
    assert best is not None
    assert best == next(one for one in found if one.density < 1 and one.bytes_bound <= 36 * MIB)


def test_no_limit_takes_all_at_once_and_batch_norm_is_exact_only_then():
    spec = normed()
    whole = parts.candidates(spec, RECIPE, room(0), (0.5,), ())[0]
    assert (whole.fits, whole.micro_batch, whole.exact, whole.kept) == (True, 32, True, True)
    tight = parts.candidates(spec, RECIPE, room(1), (0.5,), ())[0]
    assert not tight.fits
    assert tight.bytes_bound == min(one.bytes_bound for one in tight.manners)
    assert [one.exact for one in tight.manners] == [one.micro_batch == 32 for one in tight.manners]
    assert parts.candidates(small_cnn(), RECIPE, room(1), (0.5,), ())[0].exact
    fused = parts.candidates(spec, Recipe(batch=32), room(0), (), ())[0]
    assert not fused.kept


def test_the_text_names_the_largest_and_the_json_says_the_same(capsys, tmp_path):
    model = tmp_path / "mine.spec"
    model.write_bytes(encode(small_cnn()))
    words = ("--model", str(model), "--budget", "16 MiB", "--densities", "0.5")
    assert planning.run(asked(*words)) == exits.OK
    text = capsys.readouterr().out
    assert text.count("<- largest that fits") == 2
    assert planning.run(asked(*words, "--json")) == exits.OK
    told = json.loads(capsys.readouterr().out)
    assert told["bytes_budget"] == 16 * MIB
    assert [one["width"] for one in told["candidates"] if one["chosen"]] == [1.0, 1.0]


def test_nothing_fits_is_an_exit_code_and_an_advice(capsys):
    assert planning.run(asked("--model", "conv-2", "--budget", "1 MiB")) == exits.UNFIT
    text = capsys.readouterr().out
    assert "nothing fits" in text
    assert text.count("  lacks") == 10


def test_the_budget_is_what_an_order_would_be_granted(capsys, tmp_path):
    config = tmp_path / "pi.toml"
    config.write_text(
        f'device = "a"\n[broker]\nurl = "mqtt://127.0.0.1"\n[memory]\nbudget = "48 MiB"\n[state]\ndir = "{tmp_path}"\n'
    )
    planning.run(asked("--model", "digits-cnn", "--config", str(config)))
    assert "48.0 MiB may be taken above the worker's base ([memory] budget)" in capsys.readouterr().out
    (tmp_path / "budget").write_text("24 MiB")
    planning.run(asked("--model", "digits-cnn", "--config", str(config)))
    assert "24.0 MiB may be taken above the worker's base (the file budget" in capsys.readouterr().out


def test_a_machine_without_room_is_not_one_without_a_limit(capsys, tmp_path, monkeypatch):
    config = tmp_path / "pi.toml"
    config.write_text(f'device = "a"\n[broker]\nurl = "mqtt://127.0.0.1"\n[state]\ndir = "{tmp_path}"\n')
    monkeypatch.setattr(probe, "group_room", lambda root: None)
    reserve = load(config).bytes_reserve
    for free, text, code in (
        (reserve // 2, "0.0 MiB", exits.UNFIT),
        (reserve + BASE_GUESS["torch"] + 48 * MIB, "48.0", 0),
    ):
        monkeypatch.setattr(probe, "available", lambda root, free=free: free)
        assert planning.run(asked("--model", "digits-cnn", "--config", str(config))) == code
        assert f"weights; {text}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--model", "digits-cnn"), "--config FILE"),
        (("--model", "digits-cnn", "--budget", "much"), "--budget"),
        (("--model", "nothing", "--budget", "1 MiB"), "nothing"),
        (("--model", "digits-cnn", "--budget", "1 MiB", "--widths", "a"), "--widths"),
        (("--model", "digits-cnn", "--budget", "1 MiB", "--densities", "0"), "above 0"),
        (("--model", "digits-cnn", "--budget", "1 MiB", "--batch", "0"), "--batch"),
    ],
)
def test_wrong_words_are_explained(words, match):
    with pytest.raises(ConfigError, match=match):
        planning.run(asked(*words))
