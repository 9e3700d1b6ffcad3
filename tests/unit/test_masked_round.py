"""Rounds of masked orders, whole: planned, trained, checked and closed by the functions that a real run calls."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from coordinator import algorithms
from coordinator.advance import Head, Task, advance, load_state
from coordinator.algorithm import DeviceView
from coordinator.answers import Answers, check_update
from coordinator.simulate.fleet import bytes_down
from edge_runtime import personal, rules
from edge_runtime.rules import still
from edge_runtime.worker import perform
from tests.support import telling
from tests.support.by_torch import small_cnn_forward
from tests.support.models import random_arrays, small_cnn
from tests.support.orders import dataset, masked_job, some_masks
from wire.errors import DigestMismatch, MaskUnknown
from wire.job import Done, Failed, Job
from wire.maskfile import WHOLE, read_masks
from wire.messages import Recipe, Reply
from wire.spec import Structure, encode
from wire.spool import Spool
from wire.structure import masked
from wire.tensor import open_blob

pytestmark = pytest.mark.usefixtures("every_engine")

SPEC = small_cnn()
MASKED = ("c.weight", "f.weight")
RUN = "ab" * 8
DATA = {"d1": dataset(SPEC, 24, 8, seed=1), "d2": dataset(SPEC, 40, 8, seed=2)}
RECIPE = Recipe(epochs=3, batch=8, rate=0.1, clip=1.0, seed=5)


class Fleet:
    """Both sides of a run, without the network between them."""

    def __init__(self, folder, monkeypatch, **params):
        monkeypatch.setitem(algorithms.ALGORITHMS, "fixed-masks", "tests.support.fixed_masks")
        self.folder, self.spool, self.params = folder, Spool(folder / "spool"), params
        self.spec_ref = self.spool.add_bytes(encode(SPEC))
        self.keeps, self.held, self.down = {}, {}, []
        self.outcome = self.advance("", 1)

    def advance(self, state, number, replies=()):
        views = tuple(DeviceView(name, 1 << 40, len(data.train[0])) for name, data in DATA.items())
        return advance(
            Task(
                spool=str(self.spool.root), spec=self.spec_ref.digest, algo="fixed-masks", params=self.params, recipe={},
                seed=7, state=state, replies=replies, round=number, devices=views,
            )
        )  # fmt: skip

    def state(self):
        return load_state(self.spool, self.outcome.state, SPEC)

    def job(self, order, out, keep=""):
        path = {ref.digest: str(self.spool.path(ref.digest)) for ref in order.blobs}
        out.mkdir(parents=True, exist_ok=True)
        shells = tuple(path[ref.digest] for ref in order.shells)
        return Job(order, path[order.spec.digest], shells, str(out), keep, 0, 0, 1, path[order.masks.digest])

    def orders(self, number):
        return [
            self.outcome.order(draft, Head(f"{number:08d}{place:08d}", RUN, number, self.spec_ref, 60.0))
            for place, draft in enumerate(self.outcome.drafts)
        ]

    def round(self, number):
        """Play a round; gives what the devices answered."""
        replies, answers, down = [], {}, 0
        for order in self.orders(number):
            down += bytes_down(order, self.held.get(order.device, ()))
            self.held[order.device] = {ref.digest for ref in order.blobs}
            job = self.job(order, self.folder / order.device / str(number), self.keeps.get(order.device, ""))
            done = perform(job, DATA[order.device], pinned=True)
            assert isinstance(done, Done), done
            check_update(Path(done.update), SPEC, done.structure, read_masks(job.masks, SPEC, done.structure))
            answers[order.device], self.keeps[order.device] = done, done.keep
            replies.append(
                Reply(
                    order.id, order.device, RUN, done.structure, self.spool.add_bytes(Path(done.update).read_bytes()),
                    done.keep_digest, done.samples, done.metrics, done.usage,
                )
            )  # fmt: skip
        self.down.append(down)
        self.replies = tuple(replies)
        self.outcome = self.advance(self.outcome.state, number + 1, self.replies)
        return answers


def by_hand(weights, masks, recipe, number, data):
    """Train a dense model whose weights and gradients are multiplied by the masks; gives trained minus received."""
    keep = {name: torch.tensor(masks.get(name, np.True_)) for name in weights}
    params = {name: (torch.tensor(array) * keep[name]).requires_grad_() for name, array in weights.items()}
    start = {name: param.detach().clone() for name, param in params.items()}
    velocity = {name: torch.zeros_like(param) for name, param in start.items()}
    x, y = data.train
    rng = np.random.default_rng([recipe.seed, number])
    for _ in range(recipe.epochs):
        order = rng.permutation(len(x))
        for rows in (order[i : i + recipe.batch] for i in range(0, len(x), recipe.batch)):
            output = small_cnn_forward(params, torch.tensor(x[rows]))
            grads = torch.autograd.grad(
                torch.nn.functional.cross_entropy(output, torch.tensor(y[rows])), params.values()
            )
            with torch.no_grad():
                for (name, param), grad in zip(params.items(), grads, strict=True):
                    velocity[name] = recipe.momentum * velocity[name] + grad * keep[name] + recipe.decay * param
                    param.sub_(recipe.rate * velocity[name])
    return {name: (param.detach() - start[name]).numpy() for name, param in params.items()}


def test_a_round_is_masked_fedavg_as_by_hand(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, monkeypatch, **{"recipe.momentum": 0.9, "recipe.decay": 0.01, "recipe.epochs": 2})
    state = fleet.state()
    assert set(state.masks) == set(MASKED)
    weights = {name: array.astype(np.float64) for name, array in state.weights.items()}
    samples = sum(len(data.train[0]) for data in DATA.values())
    for number in (1, 2):
        received = {name: array.astype(np.float32) for name, array in weights.items()}
        for draft in fleet.outcome.drafts:
            data = DATA[draft.device]
            moved = by_hand(received, state.masks, draft.recipe, number, data)
            for name, array in moved.items():
                weights[name] = weights[name] + len(data.train[0]) / samples * array
        answers = fleet.round(number)
        after = fleet.state()
        for name, mask in state.masks.items():
            np.testing.assert_array_equal(after.weights[name][~mask], state.weights[name][~mask])
            assert not np.array_equal(after.weights[name][mask], state.weights[name][mask])
        for name, array in after.weights.items():
            np.testing.assert_allclose(array, weights[name], rtol=2e-5, atol=2e-6, err_msg=name)
        assert answers["d1"].metrics["loss"] < answers["d1"].metrics["loss.first"]


def test_devices_are_sent_the_kept_values_and_send_no_more(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, monkeypatch, density=0.1)
    state = fleet.state()
    kept = {name: int(mask.sum()) for name, mask in state.masks.items()}
    payload = 4 * sum(kept.get(name, array.size) for name, array in state.weights.items())
    for order in fleet.orders(1):
        (structure,), (shell,) = order.structures, order.shells
        assert (structure, dict(structure.kept)) == (masked(state.masks), kept)
        assert payload < shell.size < payload + 200
        assert order.blobs == (fleet.spec_ref, order.masks, shell)
        held = read_masks(str(fleet.spool.path(order.masks.digest)), SPEC, structure)
        with open_blob(fleet.spool.path(shell.digest), outline=held.outline) as blob:
            for name, array in state.weights.items():
                wanted = array[state.masks[name]] if name in state.masks else array.ravel()
                np.testing.assert_array_equal(blob.values(name), wanted)
    for done in fleet.round(1).values():
        assert payload < done.update_ref.size < payload + 200
        with pytest.raises(MaskUnknown):
            check_update(Path(done.update), SPEC, done.structure, WHOLE)
        other = some_masks(SPEC, 0.5, 9, MASKED)
        with pytest.raises(MaskUnknown):
            check_update(Path(done.update), SPEC, masked(other), dataclasses.replace(WHOLE, masks=other))
    held = read_masks(str(fleet.spool.path(order.masks.digest)), SPEC, structure)
    for answer in Answers(fleet.spool, SPEC, fleet.replies, held):
        assert answer.extras == {}
        assert set(answer.sent) == set(MASKED)
        for name, mask in answer.sent.items():
            np.testing.assert_array_equal(mask, state.masks[name])
            assert not answer.update[name][~mask].any()


def test_masks_that_stay_are_published_and_fetched_once(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, monkeypatch)
    first = fleet.outcome
    fleet.round(1)
    second = fleet.outcome
    assert second.masks == first.masks
    assert second.structures == first.structures
    assert second.shells != first.shells
    assert second.blobs == (second.masks, *second.shells)
    fleet.round(2)
    fetched = [fleet.spec_ref.size + first.masks.size + first.shells[0].size, second.shells[0].size]
    assert fleet.down == [len(DATA) * size for size in fetched]


def test_what_is_measured_is_the_masked_model(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, monkeypatch)
    fleet.round(1)
    state, data = fleet.state(), DATA["d1"]
    assert all(state.weights[name][~mask].any() for name, mask in state.masks.items()), (
        "there is something to leave out"
    )
    draft = dataclasses.replace(fleet.outcome.drafts[0], verb="evaluate", recipe=Recipe(batch=5))
    order = fleet.outcome.order(draft, Head("0" * 16, RUN, 2, fleet.spec_ref, 60.0))
    done = perform(fleet.job(order, tmp_path / "measured"), data, pinned=True)
    weights = {name: torch.tensor(array * state.masks.get(name, 1)) for name, array in state.weights.items()}
    x, y = data.test
    output = small_cnn_forward(weights, torch.tensor(x))
    loss = torch.nn.functional.cross_entropy(output, torch.tensor(y)).item()
    assert done.metrics["loss.0"] == pytest.approx(loss, rel=1e-5)
    assert done.metrics["accuracy.0"] == (output.argmax(1).numpy() == y).mean()
    assert (done.update, done.structure) == ("", fleet.outcome.structures[0])


def test_a_masked_order_that_is_done_again_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setitem(rules.RULES, "telling", "tests.support.telling")
    arrays, masks = random_arrays(SPEC, Structure()), some_masks(SPEC)
    recipe = dataclasses.replace(RECIPE, rule="telling", form="int8", knobs={"tell": 1.0})
    digests = set()
    for folder in ("a", "b"):
        job = masked_job(tmp_path / folder, SPEC, arrays, masks, recipe)
        if folder == "b":
            for file in ("update", "keep"):
                (Path(job.out) / f"{job.order.id}.{file}").write_bytes(b"half an ans")
            knobs = {**recipe.knobs, "fail": 7}
            order = dataclasses.replace(job.order, recipe=dataclasses.replace(recipe, knobs=knobs))
            with pytest.raises(telling.Killed):
                perform(dataclasses.replace(job, order=order), DATA["d2"], pinned=True)
        done = perform(job, DATA["d2"], pinned=True)
        digests.add((done.update_ref.digest, done.keep_digest))
    assert len(digests) == 1


@pytest.mark.parametrize("form", ["bfloat16", "float16", "int8"])
def test_what_a_form_loses_of_kept_weights_comes_with_the_next_update(tmp_path, form):
    arrays, masks, data = random_arrays(SPEC, Structure()), some_masks(SPEC, names=MASKED), DATA["d2"]
    structure = masked(masks)

    def said_by(done):
        held = read_masks(str(Path(done.update).parent.parent / "masks"), SPEC, structure)
        check_update(Path(done.update), SPEC, structure, held)
        with open_blob(Path(done.update), outline=held.outline) as blob:
            return {name: blob.tensor(name, masks.get(name)).copy() for name in blob.names}

    plain = perform(masked_job(tmp_path / "meant", SPEC, arrays, masks, RECIPE), data, pinned=True)
    meant = said_by(plain)
    recipe = dataclasses.replace(RECIPE, form=form)
    total, keep = dict.fromkeys(meant, 0.0), ""
    for turn in range(3):  # always the same weights, so that every update means the same
        job = dataclasses.replace(masked_job(tmp_path / str(turn), SPEC, arrays, masks, recipe), keep=keep)
        done = perform(job, data, pinned=True)
        total = {name: total[name] + array for name, array in said_by(done).items()}
        assert done.update_ref.size < 0.75 * plain.update_ref.size
        step = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 127}[form]
        for name, array in meant.items():
            off = np.abs(total[name] - (turn + 1) * array).max()
            assert off <= 1.6 * step * np.abs(array).max() + 1e-6, "the error of one update, however many there were"
        keep = done.keep
        for name, array in personal.read(Path(keep)).arrays.items():
            np.testing.assert_allclose(array, arrays[name] * masks.get(name, 1) + meant[name], rtol=0, atol=1e-6)
    other = some_masks(SPEC, seed=8, names=MASKED)
    first = perform(masked_job(tmp_path / "x", SPEC, arrays, other, recipe), data, pinned=True)
    job = dataclasses.replace(masked_job(tmp_path / "y", SPEC, arrays, other, recipe), keep=keep)
    assert perform(job, data, pinned=True).update_ref == first.update_ref, "what was lost under other masks is let go"


def test_the_kept_model_has_zeros_where_nothing_is_kept(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, monkeypatch)
    before = fleet.state()
    for device, done in fleet.round(1).items():
        kept = personal.read(Path(done.keep))
        assert (kept.spec, kept.structure) == (SPEC, masked(before.masks))
        held = read_masks(str(fleet.spool.path(fleet.outcome.masks.digest)), SPEC, kept.structure)
        (answer,) = (a for a in Answers(fleet.spool, SPEC, fleet.replies, held) if a.device == device)
        for name, array in kept.arrays.items():
            mask = before.masks.get(name, np.True_)
            assert not array[~np.broadcast_to(mask, array.shape)].any()
            np.testing.assert_allclose(array, before.weights[name] * mask + answer.update[name], atol=1e-6)
        assert Path(done.keep).stat().st_size < len(encode(SPEC)) + 4 * sum(mask.size for mask in before.masks.values())


def test_what_a_rule_keeps_comes_back_to_it(tmp_path, monkeypatch):
    monkeypatch.setitem(rules.RULES, "telling", "tests.support.telling")
    arrays, recipe, keep = random_arrays(SPEC, Structure()), dataclasses.replace(RECIPE, rule="telling"), ""
    for turn, density in enumerate((0.3, 0.3, 0.6, 1.0)):  # masks may change in between
        masks = some_masks(SPEC, density, seed=turn // 2)
        job = dataclasses.replace(masked_job(tmp_path / str(turn), SPEC, arrays, masks, recipe), keep=keep)
        done = perform(job, DATA["d1"], pinned=True)
        assert done.metrics["orders"] == turn + 1
        keep = done.keep
        own = personal.own(keep, RUN, SPEC)
        assert set(own) == {"orders", "deep/er:name-1"}
        np.testing.assert_array_equal(own["deep/er:name-1"], np.arange(6).reshape(2, 3) * (turn + 1))
        assert own["orders"].flags.writeable
        assert set(personal.read(Path(keep)).arrays) == set(arrays)
    assert personal.own(keep, RUN, small_cnn(hidden=13)) == {}
    for odd in ("", str(tmp_path / "nowhere"), job.spec, job.masks):
        assert personal.own(odd, RUN, SPEC) == {}


def test_still_moves_kept_weights_only(tmp_path):
    masks = some_masks(SPEC, 0.2)
    recipe = Recipe(rule="still", knobs={"step": 0.5})
    job = masked_job(tmp_path, SPEC, random_arrays(SPEC, Structure()), masks, recipe, number=3)
    done = perform(job, DATA["d1"])
    held = read_masks(job.masks, SPEC, masked(masks))
    check_update(Path(done.update), SPEC, done.structure, held)
    with open_blob(Path(done.update), outline=held.outline) as blob:
        for name, mask in masks.items():
            np.testing.assert_array_equal(blob.tensor(name, mask), 1.5 * mask)
    assert still.update(recipe, 3, (2,)).tolist() == [1.5, 1.5]


def changed(job, **changes):
    return dataclasses.replace(job, order=dataclasses.replace(job.order, **changes))


@pytest.mark.parametrize("rule", ["sgd", "still"])
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_masks_that_are_not_those_of_the_order_fail_it(tmp_path, rule, verb):
    arrays, masks, data = random_arrays(SPEC, Structure()), some_masks(SPEC, names=MASKED), DATA["d1"]
    recipe = dataclasses.replace(RECIPE, rule=rule)
    good = masked_job(tmp_path / "good", SPEC, arrays, masks, recipe, verb)
    other = masked_job(tmp_path / "other", SPEC, arrays, some_masks(SPEC, seed=4, names=MASKED), recipe, verb)
    (structure,) = good.order.structures

    def fails(job, reason, words):
        failed = perform(job, data, pinned=True)
        assert isinstance(failed, Failed), words
        assert (failed.reason, words in failed.detail) == (reason, True), failed

    assert isinstance(perform(good, data, pinned=True), Done)
    fails(dataclasses.replace(good, masks=other.masks), "data", "structure names")
    fails(dataclasses.replace(good, masks=""), "data", "masks")
    fails(dataclasses.replace(good, masks=str(tmp_path / "gone")), "data", "No such file")
    fails(dataclasses.replace(good, masks=good.spec), "data", "")
    fails(dataclasses.replace(good, masks=good.shells[0]), "data", "")
    lies = dataclasses.replace(structure, masks="ab" * 32)
    fails(changed(good, structures=(lies,)), "data", "structure names")
    lies = dataclasses.replace(structure, kept={**structure.kept, "f.weight": 1})
    fails(changed(good, structures=(lies,)), "data", "do not keep")
    lies = dataclasses.replace(structure, masks="")
    fails(changed(good, structures=(lies,)), "data", "names no masks")
    lies = dataclasses.replace(structure, widths={"a": (5,)})
    fails(changed(good, structures=(lies,)), "data", "the limit is")
    if rule == "still" and verb == "train":
        return
    for name, count in (("x", 1), ("f.bias", 1), ("f.weight", 10**9)):
        lies = dataclasses.replace(structure, kept={name: count})
        fails(changed(good, structures=(lies,)), "unsupported", "could be kept")
    fails(dataclasses.replace(good, shells=other.shells), "data", "needs outline")
    fails(changed(good, structures=(Structure(),)), "data", "needs outline")
    bias = masked_job(tmp_path / "bias", SPEC, arrays, {"f.bias": np.ones(12, np.bool_)}, recipe, verb)
    fails(bias, "unsupported", "f.bias")
    if verb == "evaluate":
        fails(changed(good, structures=(structure, Structure())), "unsupported", "")


def test_the_same_path_with_other_masks_is_read_again(tmp_path):
    arrays = random_arrays(SPEC, Structure())
    first = masked_job(tmp_path, SPEC, arrays, some_masks(SPEC))
    read_masks(first.masks, SPEC, first.order.structures[0])
    second = masked_job(tmp_path, SPEC, arrays, some_masks(SPEC, density=0.6))
    held = read_masks(second.masks, SPEC, second.order.structures[0])
    assert masked(held.masks) == second.order.structures[0]
    with pytest.raises(DigestMismatch):
        read_masks(second.masks, SPEC, first.order.structures[0])


def test_a_model_of_which_only_some_layers_are_masked(tmp_path):
    arrays, data = random_arrays(SPEC, Structure()), DATA["d1"]
    dense = perform(masked_job(tmp_path / "a", SPEC, arrays, some_masks(SPEC, 1.0), RECIPE), data, pinned=True)
    for names in (("c.weight",), ("o.weight",), ("c.weight", "f.weight")):
        masks = some_masks(SPEC, 1.0, names=names)
        job = masked_job(tmp_path / "-".join(names), SPEC, arrays, masks, RECIPE)
        done = perform(job, data, pinned=True)
        assert done.metrics["loss"] == pytest.approx(dense.metrics["loss"], rel=1e-5)
        held = read_masks(job.masks, SPEC, masked(masks))
        check_update(Path(done.update), SPEC, done.structure, held)
        assert {entry.name for entry in held.entries if entry.mask} == set(names)
