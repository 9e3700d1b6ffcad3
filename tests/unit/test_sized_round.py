"""Rounds of devices of several sizes, whole: published, trained, checked, closed and measured as in a real run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import coordinator.evaluate as evaluating
from coordinator.advance import Head, Outcome, Task, advance, load_state, save_state
from coordinator.algorithm import DeviceView, State
from coordinator.algorithms import fiarse
from coordinator.answers import Answers, check_update
from coordinator.blocks.masks import held_at, masks_at, top_global
from coordinator.blocks.nesting import levels_of
from coordinator.shells import sizes_of, structures_of
from edge_runtime.worker import perform
from tests.support import coordinates
from tests.support.by_torch import small_cnn_forward
from tests.support.models import random_arrays, small_cnn
from tests.support.orders import dataset
from wire.child import Said
from wire.errors import MaskUnknown, PeerError, SpecError
from wire.job import Done, Failed, Job
from wire.maskfile import WHOLE, read_masks
from wire.messages import BlobRef, Recipe, Reply, Usage
from wire.spec import Structure, encode, tensor_shapes
from wire.spool import Spool
from wire.structure import masked

SPEC = small_cnn()
NAMES = ("c.weight", "f.weight", "o.weight")
GREAT = 1 << 40
SIZES = {"sizes": "0.1 0.4 1"}
CUT = {"sizes": "0.9 0.7 0.5", "fractions": "0.3 0.6 1", "by": "layer"}
"""Nested and sparse: a size lacks channels, and weights of those that it has."""
RUN = "ab" * 8


@pytest.fixture(params=[SIZES, CUT], ids=["whole", "cut"])
def played(request, tmp_path):
    return Round(tmp_path, request.param)


@pytest.mark.parametrize("sizes", [SIZES, CUT], ids=["whole", "cut"])
def test_a_state_with_nested_masks_comes_back_as_it_was(tmp_path, sizes):
    spool = Spool(tmp_path)
    state = fiarse.init(SPEC, random_arrays(SPEC, Structure()), sizes)
    saved = save_state(spool, state).digest
    again = load_state(spool, saved, SPEC)
    assert save_state(spool, again).digest == saved
    assert {n: a.tolist() for n, a in again.mask_levels.items()} == {
        n: a.tolist() for n, a in state.mask_levels.items()
    }
    assert structures_of(again) == structures_of(state)
    plain = State(SPEC, 0, state.weights)
    assert load_state(spool, save_state(spool, plain).digest, SPEC).mask_levels == {}


class Round:
    """One round of several sizes, both sides of it, without the network between them."""

    def __init__(self, folder, sizes):
        self.folder, self.spool, self.sizes = folder, Spool(folder / "spool"), sizes
        self.spec_ref = self.spool.add_bytes(encode(SPEC))
        self.data = {f"d{k}": dataset(SPEC, 20 + 4 * k, 8, seed=k) for k in range(4)}
        self.outcome = self.advance("", 1)

    def advance(self, state, number, replies=()):
        # every prediction has the same slack; budgets are set by hand below, through the drafts
        views = tuple(DeviceView(name, GREAT, len(data.train[0])) for name, data in self.data.items())
        params = {**self.sizes, "recipe.batch": 8.0}
        return advance(
            Task(
                spool=str(self.spool.root), spec=self.spec_ref.digest, algo="fiarse", params=params, recipe={},
                seed=7, state=state, replies=replies, round=number, devices=views,
            )
        )  # fmt: skip

    def state(self):
        return load_state(self.spool, self.outcome.state, SPEC)

    def head(self, number, place=0):
        return Head(f"{number:08d}{place:08d}", RUN, number, self.spec_ref, 60.0)

    def orders(self, number):
        """Give device k size k, and the last device size 1 again."""
        least = fiarse.thresholds(self.state())
        for place, draft in enumerate(self.outcome.drafts):
            capacity = place if place < 3 else 1
            recipe = dataclasses.replace(draft.recipe, knobs={"threshold": least[capacity]})
            narrower = dataclasses.replace(draft, structure=self.outcome.structures[capacity], recipe=recipe)
            yield self.outcome.order(narrower, self.head(number, place))

    def job(self, order):
        path = {ref.digest: str(self.spool.path(ref.digest)) for ref in order.blobs}
        out = self.folder / order.device / str(order.round)
        out.mkdir(parents=True, exist_ok=True)
        shells = tuple(path[ref.digest] for ref in order.shells)
        masks = "" if order.masks is None else path[order.masks.digest]
        return Job(order, path[order.spec.digest], shells, str(out), "", 0, 0, 1, masks)

    def play(self, number):
        replies = []
        for order in self.orders(number):
            job = self.job(order)
            done = perform(job, self.data[order.device], pinned=True)
            assert isinstance(done, Done), done
            held = read_masks(job.masks, SPEC, done.structure)
            check_update(Path(done.update), SPEC, done.structure, held)
            ref = self.spool.add_bytes(Path(done.update).read_bytes())
            replies.append(
                Reply(order.id, order.device, RUN, done.structure, ref, "", done.samples, done.metrics, done.usage)
            )
        self.replies = tuple(replies)
        self.outcome = self.advance(self.outcome.state, number + 1, self.replies)


def test_rounds_of_several_sizes_whole(played):
    for number in (1, 2):
        state = played.state()
        outcome, orders = played.outcome, list(played.orders(number))
        assert [order.structures[0] for order in orders] == [outcome.structures[k] for k in (0, 1, 2, 1)]
        assert orders[1].blobs == orders[3].blobs, "one blob of masks and one of values for each size"
        assert (orders[2].masks is None) == (played.sizes is SIZES)
        assert len({order.shells for order in orders}) == 3
        assert set(outcome.blobs) == {ref for order in orders for ref in order.blobs} - {played.spec_ref}
        for order in orders[:2]:
            shapes = tensor_shapes(SPEC, order.structures[0])
            biases = sum(math.prod(shape) for name, shape in shapes.items() if name not in NAMES)
            payload = 4 * (sum(order.structures[0].kept.values()) + biases)
            assert payload < order.shells[0].size < payload + 200
        played.play(number)
        after = played.state()
        answers = list(Answers(played.spool, SPEC, played.replies, WHOLE, sizes_of(SPEC, state)))
        for one, order in zip(answers, orders, strict=True):
            masks = held_at(state, order.structures[0].capacity)
            assert set(one.sent) == set(masks)
            for name, mask in masks.items():
                np.testing.assert_array_equal(one.sent[name], mask)
                assert not one.update[name][~mask].any()
            assert any(one.update[name].any() for name in NAMES) or order.structures[0].capacity == 0
        wanted = coordinates.looped(state, answers, coordinates.by_count(answers))
        for name, array in wanted.items():
            np.testing.assert_allclose(after.weights[name], array, atol=1e-6)
        if played.sizes is SIZES:
            largest = top_global({n: np.abs(after.weights[n]) for n in NAMES}, int(np.ceil(0.1 * 750)))
            for name, mask in masks_at(after.mask_levels, 0).items():
                np.testing.assert_array_equal(mask, largest[name])
        again = fiarse.ranked(dataclasses.replace(after, levels={}, mask_levels={}))
        assert structures_of(again) == structures_of(after), "chosen from the weights of now"


def test_an_answer_against_the_masks_of_another_size_is_refused(played):
    orders = list(played.orders(1))
    done = perform(played.job(orders[0]), played.data["d0"], pinned=True)
    assert isinstance(done, Done), done
    other = read_masks(played.job(orders[1]).masks, SPEC, orders[1].structures[0])
    with pytest.raises(MaskUnknown):
        check_update(Path(done.update), SPEC, orders[1].structures[0], other)
    with pytest.raises(PeerError):
        read_masks(played.job(orders[1]).masks, SPEC, orders[0].structures[0])
    failed = perform(dataclasses.replace(played.job(orders[0]), masks=played.job(orders[1]).masks), played.data["d0"])
    assert isinstance(failed, Failed)
    state = dataclasses.replace(played.state(), masks={"f.weight": np.ones((12, 54), bool)})
    with pytest.raises(SpecError, match="nested masks"):
        sizes_of(SPEC, state)


def test_every_size_is_measured_as_itself(played):
    state, test = played.state(), played.data["d3"]
    metrics = {}
    for order in played.outcome.evaluations(played.head(1), Recipe(batch=5)):
        done = perform(played.job(order), test, pinned=True)
        assert isinstance(done, Done), done
        metrics |= done.metrics
    x, y = test.test
    for capacity in range(3):
        masks = masks_at(state.mask_levels, capacity)
        masks |= {
            t.name: levels_of(t, state.levels) <= capacity for t in SPEC.tensors if state.levels and t.name not in masks
        }
        weights = {name: torch.tensor(array * masks.get(name, 1)) for name, array in state.weights.items()}
        output = small_cnn_forward(weights, torch.tensor(x))
        loss = torch.nn.functional.cross_entropy(output, torch.tensor(y)).item()
        assert metrics[f"loss.{capacity}"] == pytest.approx(loss, rel=1e-5)
        assert metrics[f"accuracy.{capacity}"] == (output.argmax(1).numpy() == y).mean()


class Local:
    """Stands in for the local worker's process: notes what it is sent."""

    def __init__(self, *_, env):
        self.pid, self.sent, self.env = 7, [], env

    def send(self, job):
        self.sent.append(job)

    def close(self):
        pass


def test_the_local_worker_is_asked_for_one_size_after_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "Child", Local)
    played = Round(tmp_path, SIZES)
    local = evaluating.Evaluator(lambda _: None, "{}", played.spool)

    def measure(number):
        local.measure(number, "0" * 16, RUN, played.spec_ref, played.outcome)

    def says(capacity):
        metrics = {f"accuracy.{capacity}": 0.5 + capacity / 10}
        return Said("local", 7, Done(Structure(), "", None, "", "", 8, metrics, Usage()))

    measure(1)
    child = local._child
    assert [job.order.structures[0].capacity for job in child.sent] == [0]
    assert child.env["OPENBLAS_NUM_THREADS"] == "1", "the other cores are the rounds'"
    measure(2)
    measure(3)  # round 2's has not begun and is left out
    assert local.take(says(0)) is None
    assert local.take(says(1)) is None
    found = local.take(says(2))
    assert (found.round, found.metrics) == (1, {"accuracy.0": 0.5, "accuracy.1": 0.6, "accuracy.2": 0.7})
    assert [job.order.round for job in child.sent] == [1, 1, 1, 3]
    assert {ref.digest for ref in played.outcome.blobs} <= local.needs()
    failed = Failed("data", "broken", 0, 0)
    assert local.take(says(0)) is None
    assert local.take(Said("local", 7, failed)) == failed
    assert local.idle
    assert local.needs() == set()


def test_the_orders_of_other_models_are_as_before():
    refs = [BlobRef(letter * 64, 10) for letter in "abc"]
    kept = masked({"f.weight": np.eye(12, 54, dtype=bool)})
    head = Head("0" * 16, RUN, 1, refs[2], 0.0)
    (order,) = Outcome(shells=(refs[0],), shell_of=(1,), structures=(kept,), masks=refs[1]).evaluations(head, Recipe())
    assert (order.structures, order.shells, order.masks) == ((kept,), (refs[0],), refs[1])
    widths = tuple(Structure(k, {"a": (2, 6)}, "r") for k in range(2))
    (order,) = Outcome(shells=tuple(refs[:2]), shell_of=(1, 2), structures=widths).evaluations(head, Recipe())
    assert (order.structures, order.shells, order.masks) == (widths, tuple(refs[:2]), None)
