"""Which way to do a step is taken: by predicted time, and with batch norms one that is exact before one that is fast."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edge_runtime.choice import Means
from edge_runtime.memory import plan as planning
from edge_runtime.memory import reasons, speed
from edge_runtime.memory.candidates import Room, candidates, chosen
from edge_runtime.paces import Paces
from edge_runtime.retry import Tries, Way
from edge_runtime.session import Failed as Refusing
from tests.support.messages import an_order
from tests.support.models import small_cnn
from wire import effort, memory, zoo
from wire.builders import Conv, cnn
from wire.job import Failed, Job
from wire.messages import BlobRef, Order, Recipe
from wire.passes import Passes, options, passes
from wire.spec import Structure

WHOLE = Structure()
NORMS = cnn("norms", (1, 16, 16), 4, tuple(Conv(16, norm="batch") for _ in range(8)), (8,))
PLAIN = cnn("plain", (1, 16, 16), 4, tuple(Conv(16) for _ in range(8)), (8,))
RECIPE = Recipe(batch=64)
MIB = 1 << 20


def order_of(structure: Structure = WHOLE) -> Order:
    return replace(an_order("d0", 1), structures=(structure,), recipe=RECIPE)


def test_with_batch_norms_all_that_is_exact_comes_first() -> None:
    found = passes(NORMS, WHOLE, RECIPE)
    exact = [one for one in found if one.exact]
    assert found[: len(exact)] == exact
    assert {one.micro_batch for one in exact} == {64}
    assert len(exact) == 1 + len(options(NORMS, WHOLE)) > 2
    assert found[0] == Passes(64, (), exact[0].seconds, exact=True)
    for part in (exact, found[len(exact) :]):
        assert [one.seconds for one in part] == sorted(one.seconds for one in part)


def test_without_batch_norms_it_is_time_alone() -> None:
    found = passes(PLAIN, WHOLE, RECIPE)
    assert all(one.exact for one in found)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert not any(one.cuts for one in passes(PLAIN, WHOLE, RECIPE, masked=True))


@pytest.mark.parametrize("spec", [NORMS, PLAIN], ids=["norms", "plain"])
def test_the_plan_is_the_first_way_that_fits(spec) -> None:
    every = passes(spec, WHOLE, RECIPE)
    bounds = [memory.predict(spec, WHOLE, RECIPE, one.micro_batch, cuts=one.cuts).bound for one in every]
    for budget in range(min(bounds), max(bounds), (max(bounds) - min(bounds)) // 7):
        fits = planning.plan(order_of(), spec, budget)
        first = next(i for i, bound in enumerate(bounds) if bound <= budget)
        assert fits == planning.Fits(every[first].micro_batch, bounds[first], every[first].cuts)
    refused = planning.plan(order_of(), spec, min(bounds) - 1)
    assert isinstance(refused, planning.Refused)
    assert refused.bytes_needed == min(bounds)


def test_what_is_masked_or_not_trained_is_not_cut() -> None:
    budget = memory.predict(PLAIN, WHOLE, RECIPE, 1).bound
    masked = replace(order_of(), masks=BlobRef("d" * 64, 10))
    for order in (masked, replace(order_of(), verb="evaluate")):
        assert all(not cuts for _, cuts in planning.manners(order, PLAIN, WHOLE))
        fits = planning.plan(order, PLAIN, budget)
        assert not isinstance(fits, planning.Fits) or not fits.cuts


def test_after_running_out_of_memory_a_norm_still_sees_the_whole_batch() -> None:
    tries = Tries()
    way = tries.fit(order_of(), NORMS, [Means("torch", 0)])
    assert isinstance(way, Way)
    assert (way.micro_batch, way.cuts) == (64, ())
    assert tries.failed(Job(way.order, "s", (), "o", "", 0, 64, 1), Failed("oom", "", 0, 1), 0.0) is None
    again = tries.fit(order_of(), NORMS, [Means("torch", 0)])
    assert isinstance(again, Way)
    assert again.micro_batch == 64
    assert again.cuts
    assert again.bytes_peak <= 0.75 * way.bytes_peak
    assert not isinstance(tries, Refusing)


@pytest.mark.parametrize("name", ["conv-2", "vgg-11", "resnet-18", "digits-cnn"])
def test_time_grows_with_passes_and_with_what_runs_again(name: str) -> None:
    spec = zoo.by_name(name)
    took = effort.effort(spec, WHOLE)
    assert len(took.forward) == len(took.backward) == len(spec.nodes)
    sizes = [took.step(32, size) for size in (32, 16, 4, 1)]
    assert sizes == sorted(sizes)
    ways = [took.step(32, 32, cuts) for cuts in ((), *options(spec, WHOLE))]
    assert ways == sorted(ways)
    assert ways[-1] < 1.5 * ways[0], "running all of the forward pass again is at most half a step's work"


def test_multiplications_by_hand() -> None:
    spec = small_cnn()
    for op, shape, roles, count in (
        ("conv2d", (6, 6, 6), {"weight": (6, 1, 3, 3), "bias": (6,)}, 6 * 6 * 6 * 9),
        ("linear", (12,), {"weight": (12, 54), "bias": (12,)}, 12 * 54),
        ("linear", (5, 12), {"weight": (12, 54)}, 5 * 12 * 54),
        ("embedding", (5, 12), {"weight": (9000, 12)}, 0),
        ("attention", (5, 8), {"weight_in": (36, 8), "weight_out": (8, 12)}, 5 * (36 * 8 + 8 * 12) + 2 * 5 * 5 * 12),
    ):
        ((seconds,), _) = effort.of_node(op, shape, roles, 0)
        assert seconds == count / effort.MULTIPLICATIONS
    took = effort.effort(spec, WHOLE)
    assert took.backward[0] == took.forward[0], "nobody wants a gradient for samples"
    assert took.backward[4] == 2 * took.forward[4]
    assert took.forward[3] == 0.0


def test_why_says_what_was_given_up_for_what() -> None:
    whole = memory.predict(NORMS, WHOLE, RECIPE).bound
    for budget, said in (
        (0, "the whole batch at once fits"),
        (whole - 1, "run again, 1."),
        (
            memory.predict(NORMS, WHOLE, RECIPE, 4).bound,
            "nothing fits that shows batch norms the whole batch: they see",
        ),
        (1, "no way fits"),
    ):
        (one, *_) = candidates(NORMS, RECIPE, Room({"torch": budget}, Paces()), (), ())
        assert said in reasons.why(one, {"torch": budget})
    tight = {"torch": whole - 1}
    (one, *_) = candidates(NORMS, RECIPE, Room(tight, Paces()), (), ())
    said = reasons.why(one, tight)
    assert said.endswith("batch norms see the whole batch") or "would be faster" in said
    text = reasons.text([one], [one], tight, {})
    assert text.count("<- this one") == 1
    assert "1.00 x" in text
    assert " s  " in reasons.text([one], [one], tight, {"torch": 2.0})
    assert chosen([one], masked=False) is one


def entry(seconds: object, op: str = "linear", threads: int = 1) -> tuple[str, dict[str, object]]:
    sides = ([64, 32], [32], []) if op == "linear" else ([8, 4, 3, 3], [4, 16, 16], [3, 1, 2])
    layer = {"op": op, "shape": sides[0], "input_shape": sides[1], "details": sides[2], "kept": 9, "batch": 20}
    key = f"cpu | x | kit | torch | t{threads} {op} inner 64x32 {seconds}"
    return key, {
        "seconds": {"dense": seconds, "csr": 1.0},
        "asked": ["dense"],
        "layer": {**layer, "input_gradient": True},
    }


def test_speed_is_the_median_of_timed_layers(tmp_path: Path) -> None:
    path = tmp_path / "timings.json"
    assert speed.known(path, 1) is None
    alone = effort.Effort(*effort.of_node("linear", (64,), {"weight": (64, 32)}, 96), 64 * 32 * effort.UNIT).step(
        20, 20
    )
    conv = effort.Effort(
        *effort.of_node("conv2d", (8, 7, 7), {"weight": (8, 4, 3, 3)}, 4 * 256 + 8 * 49), 8 * 36 * effort.UNIT
    ).step(20, 20)
    entries = dict([entry(2 * alone), entry(3 * alone), entry(9 * conv, "conv2d"), entry(50.0, threads=4)])
    entries["cpu | t1 step abc"] = {"seconds": {"0": 1.0}, "asked": ["0"]}
    path.write_text(json.dumps({"format": 1, "entries": entries}))
    found = speed.known(path, 1)
    assert found is not None
    assert (round(found.factor, 6), found.layers) == (3.0, 3)
    assert speed.known(path, 2) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"entries": 3}', '{"entries": {"a t1 linear b": 3}}', '{"entries": {"a t1 linear b": {"seconds": 1}}}',
     json.dumps({"entries": dict([entry("nan")])}), json.dumps({"entries": dict([entry(-1.0)])}),
     json.dumps({"entries": dict([entry(1e308)])}), "[" * 100_000],
)  # fmt: skip
def test_what_is_no_timings_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "timings.json").write_text(text)
    assert speed.known(tmp_path / "timings.json", 1) is None
