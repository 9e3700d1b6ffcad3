"""Orders that a worker died of: what is tried next, how often, and what the coordinator hears in the end."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from edge_runtime.choice import Means
from edge_runtime.retry import SECONDS_PAUSE, TRIES, Tries, Way
from edge_runtime.session import Failed as Refusing
from tests.support.messages import an_order
from wire import memory, zoo
from wire.job import Done, Failed, Job
from wire.messages import BlobRef, Order, Recipe, Usage, Verb
from wire.spec import ModelSpec, Structure

KEPT = (0.2, 0.4, 0.6, 0.8, 1.0)
CONV = zoo.by_name("conv-2")
NORMS = zoo.by_name("digits-cnn-bn")
MIB = 1 << 20


def nested(spec: ModelSpec) -> Structure:
    counts = {
        g.name: tuple(memory.uniform(spec, kept).widths[g.name][0] for kept in KEPT) for g in spec.groups if g.prunable
    }
    return Structure(4, counts, "ab" * 32)


def order_of(spec: ModelSpec, batch: int, number: int = 1, structure: Structure | None = None) -> Order:
    recipe = Recipe(batch=batch, clip=1.0)
    return replace(an_order("d0", number), structures=(structure or nested(spec),), recipe=recipe)


def job_of(way: Way, budget: int) -> Job:
    return Job(way.order, "spec", ("shell",), "out", "", budget, way.micro_batch, 1, engine=way.means.engine)


def torch(budget: int = 0) -> list[Means]:
    return [Means("torch", budget)]


def fit(tries: Tries, order: Order, spec: ModelSpec, budget: int = 0) -> Way:
    way = tries.fit(order, spec, torch(budget))
    assert isinstance(way, Way), way
    return way


OOM = Failed("oom", "the worker ended with -11", 0, 30 * MIB)


def test_each_try_takes_a_quarter_less_first_in_parts_and_then_narrower() -> None:
    order, tries = order_of(CONV, 128), Tries()
    ways = [fit(tries, order, CONV)]
    for _ in range(1, TRIES):
        assert tries.failed(job_of(ways[-1], 0), OOM, 10.0) is None
        assert tries.due == 10.0 + SECONDS_PAUSE
        assert tries.again().order == order.id
        ways.append(fit(tries, order, CONV))
    assert all(after.bytes_peak <= 0.75 * before.bytes_peak for before, after in itertools.pairwise(ways))
    assert (ways[0].order, ways[0].micro_batch) == (order, 128)
    assert (ways[1].order, ways[1].micro_batch < 128) == (order, True)
    last = ways[-1].order.structures[0]
    assert last == order.structures[0].narrowed(last.capacity)
    assert last.capacity < 4
    assert replace(ways[-1].order, structures=order.structures) == order
    verdict = tries.failed(job_of(ways[-1], 0), replace(OOM, bytes_peak=20 * MIB), 11.0)
    assert isinstance(verdict, Refusing)
    assert (verdict.order, verdict.reason, verdict.bytes_needed) == (order.id, "oom", 30 * MIB)
    assert f"after {TRIES} tries, with up to 30.0 MiB seen" in verdict.detail


def test_with_batch_norms_a_narrower_width_comes_before_parts_of_a_batch() -> None:
    order, tries = order_of(NORMS, 256), Tries()
    first = fit(tries, order, NORMS)
    tries.failed(job_of(first, 0), OOM, 0.0)
    second = fit(tries, order, NORMS)
    assert second.micro_batch == 256
    assert second.order.structures[0].capacity < 4


def test_what_is_tried_fits_what_may_be_taken_by_then() -> None:
    order, tries = order_of(CONV, 128), Tries()
    first = fit(tries, order, CONV)
    tries.failed(job_of(first, 0), OOM, 0.0)
    budget = memory.predict(CONV, order.structures[0].narrowed(1), order.recipe, 1).bound
    second = fit(tries, order, CONV, budget)
    assert second.bytes_bound <= budget


@pytest.mark.parametrize("changes", [{"verb": "evaluate"}, {"masks": BlobRef("d" * 64, 10)}], ids=["verb", "masks"])
def test_what_must_keep_its_width_is_only_done_in_parts(changes: dict[str, Verb | BlobRef]) -> None:
    order, tries = replace(order_of(CONV, 64), **changes), Tries()  # type: ignore[arg-type]  # two fields at a time
    tries.failed(job_of(fit(tries, order, CONV), 0), OOM, 0.0)
    second = tries.fit(order, CONV, torch())
    assert isinstance(second, Refusing) or (second.order == order and second.micro_batch < 64)


def test_nothing_smaller_is_an_oom_with_what_was_seen() -> None:
    linear = zoo.by_name("linear")
    order, tries = order_of(linear, 1, structure=Structure()), Tries()
    first = fit(tries, order, linear, 20 * MIB)
    assert tries.failed(job_of(first, 20 * MIB), replace(OOM, bytes_peak=19 * MIB), 0.0) is None
    verdict = tries.fit(order, linear, torch(20 * MIB))
    assert isinstance(verdict, Refusing)
    assert (verdict.reason, verdict.bytes_needed, verdict.bytes_free) == ("oom", 19 * MIB, 20 * MIB)
    assert "nothing smaller fits; after one try" in verdict.detail


@pytest.mark.parametrize("reason", ["memory", "crash", "stalled", "data", "unsupported", "nonfinite"])
def test_other_failures_are_told_at_once(reason: str) -> None:
    tries = Tries()
    job = job_of(fit(tries, order_of(CONV, 8), CONV), 7)
    verdict = tries.failed(job, Failed(reason, "why", 5, 9), 0.0)  # type: ignore[arg-type]  # a Literal
    assert verdict == Refusing(job.order.id, reason, "why", 9, 7)  # type: ignore[arg-type]  # a Literal
    assert tries.due == float("inf")


def test_the_next_order_begins_as_large_as_fits() -> None:
    order, tries = order_of(CONV, 128), Tries()
    tries.failed(job_of(fit(tries, order, CONV), 0), OOM, 0.0)
    following = order_of(CONV, 128, 2)
    assert fit(tries, following, CONV).micro_batch == 128


def test_a_device_that_takes_more_than_was_predicted_plans_for_more() -> None:
    order, tries = order_of(CONV, 32), Tries()
    way = fit(tries, order, CONV)
    spent = Usage(bytes_peak=2 * way.bytes_bound)
    tries.done(job_of(way, 0), Done(way.order.structures[0], "", None, "", "", 1, {}, spent))
    assert tries.scales == {"torch": 2.0}
    following = fit(tries, order_of(CONV, 32, 2), CONV)
    assert following.bytes_bound > 1.8 * way.bytes_bound
    tries.done(job_of(following, 0), Done(way.order.structures[0], "", None, "", "", 1, {}, Usage(bytes_peak=1)))
    assert tries.scales == {"torch": pytest.approx(1.9)}
