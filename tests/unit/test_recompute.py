"""Segments that run again in the backward pass: the same bits, less memory, and a walk that says how much."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Arrays
from edge_runtime.engines.native.at import At, Op
from edge_runtime.engines.native.registry import OPS
from edge_runtime.worker import perform
from tests.support.engines import make, predicted
from tests.support.models import batch, random_arrays, small_cnn, widths
from tests.support.orders import dataset, job, some_masks
from tests.support.sequences import attended, normed, recurrent, turned
from wire import memory, zoo
from wire.builders import Conv, cnn, resnet
from wire.errors import DataError, SpecError
from wire.job import Done, Failed, Job
from wire.messages import Recipe
from wire.passes import options
from wire.segments import Cuts, Timeline, check, places
from wire.spec import ModelSpec, Node, Structure
from wire.walk import Walk

pytestmark = pytest.mark.usefixtures("every_engine")

WHOLE = Structure()
DEEP = cnn("deep", (1, 8, 8), 4, tuple(Conv(6, norm="batch") for _ in range(5)), (8,))
MODELS = {
    "chain": small_cnn(),
    "batch norms": DEEP,
    "blocks": resnet("blocks", (1, 8, 8), 4, ((4, 2), (6, 2))),
    "dropout": normed(300),
    "lstm": recurrent("lstm"),
    "an lstm that rounds otherwise without a gradient": recurrent("lstm", 16, 16),
    "values that are handed on turned": turned(),
    "attention": attended(),
}


def trained(spec: ModelSpec, cuts: Cuts, update: Update | None, structure: Structure | None = None) -> Arrays:
    """Give all that three passes leave behind, after a narrower width has had one too."""
    engine = make()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE))
    engine.recompute(cuts)
    engine.seed(3, 4)
    x, y = batch(spec, 6)
    found = {}
    for step in range(3):
        found[f"loss {step}"] = np.float32(engine.forward_backward(x, y, update=update))
    if structure is not None and update is None:
        found["narrow"] = np.float32(engine.narrow(structure).forward_backward(x, y))
    found |= {f"grad {name}": array for name, array in engine.grads.items()} if update is None else {}
    return {**found, **engine.params, "logits": engine.logits}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True], ids=["added", "fused"])
def test_every_bit_is_the_same(name: str, fused: bool) -> None:
    spec = MODELS[name]
    known = places(spec.nodes)
    assert known, "a model that cannot be cut proves nothing"
    structure = memory.uniform(spec, 0.5)

    def update() -> Update | None:
        velocity = {name: np.zeros_like(array) for name, array in random_arrays(spec, WHOLE).items()}
        return Update(0.01, 0.9, 1e-3, velocity=velocity) if fused else None

    plain = trained(spec, (), update(), structure)
    for cuts in {known[:1], known[-1:], known[::2], known}:
        cut = trained(spec, cuts, update(), structure)
        assert plain.keys() == cut.keys()
        assert all(np.array_equal(plain[key], cut[key]) for key in plain), cuts


def test_a_model_is_cut_where_one_value_crosses_that_nobody_overwrites() -> None:
    assert places(small_cnn().nodes) == (1, 2, 4, 5)  # not before the relu, which overwrites; not behind the flatten
    blocks = MODELS["blocks"]
    for i in places(blocks.nodes):
        crossing = {n.name for n in blocks.nodes[: i + 1]} & {name for n in blocks.nodes[i + 1 :] for name in n.inputs}
        assert crossing == {blocks.nodes[i].name}
    shared = (
        Node("a", "linear", ("input",), {"weight": "w", "bias": "b"}),
        Node("t", "tanh", ("a",)),
        Node("b", "linear", ("t",), {"weight": "w", "bias": "b"}),
    )
    assert places(shared) == ()  # one weight on both sides would move between its two gradients


@pytest.mark.parametrize("cuts", [(0,), (3,), (6,), (2, 2), (4, 2), (99,)])
def test_cuts_elsewhere_are_refused(cuts: Cuts) -> None:
    spec = small_cnn()
    engine = make()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE))
    for refused in (
        lambda: check(spec.nodes, cuts),
        lambda: engine.recompute(cuts),
        lambda: memory.predict(spec, WHOLE, Recipe(), cuts=cuts),
    ):
        with pytest.raises(SpecError, match="cannot be cut"):
            refused()


def test_masks_are_not_cut() -> None:
    spec = small_cnn()
    engine = make()
    engine.load(spec, WHOLE, random_arrays(spec, WHOLE), some_masks(spec))
    with pytest.raises(SpecError, match="masks"):
        engine.recompute((2,))


def test_cuts_stay_for_a_narrower_width_and_go_with_another_model() -> None:
    """An order that is cut to a narrower width while it runs goes on as it was; the other model has no node 11."""
    engine = make()
    engine.load(DEEP, WHOLE, random_arrays(DEEP, WHOLE))
    engine.recompute((5, 11))
    narrow = memory.uniform(DEEP, 0.5)
    engine.load(DEEP, narrow, random_arrays(DEEP, narrow))
    x, y = batch(DEEP, 4)
    engine.forward_backward(x, y)
    other = small_cnn()
    engine.load(other, WHOLE, random_arrays(other, WHOLE))
    engine.forward_backward(*batch(other, 4))


def test_a_pass_that_fails_leaves_the_weights_and_the_engine_as_they_were() -> None:
    spec = attended()
    engine = make()
    arrays = random_arrays(spec, WHOLE)
    engine.load(spec, WHOLE, arrays)
    engine.recompute(places(spec.nodes)[::2])
    x, y = batch(spec, 4)
    with pytest.raises((DataError, IndexError, RuntimeError)):
        engine.forward_backward(x, y + 1000, update=Update(0.1))
    assert all(np.array_equal(engine.params[name], array) for name, array in arrays.items())
    assert engine.forward_backward(x, y) == engine.forward_backward(x, y)


def failing_when_run_again(name: str, patch: pytest.MonkeyPatch) -> None:
    """Let segments fail as they run again."""
    calls = []

    def counted(steps: object, x: object) -> object:
        calls.append(steps)
        if len(calls) > len(places(DEEP.nodes)[::3]) + 1:
            raise MemoryError("while it ran again")
        return whole(steps, x)

    def norm(at: At) -> None:
        if at.phase.follows == 0.0 and not calls:
            calls.append(at)
            raise MemoryError("while it ran again")
        op.forward(at)

    if name == "torch":
        from edge_runtime.engines import again  # the engine's package loads torch, which is heavy for a test's head

        whole = again.through
        patch.setattr(again, "through", counted)
    else:
        op = OPS["batch_norm"]
        patch.setitem(OPS, "batch_norm", Op(norm, op.backward))


def test_running_statistics_move_once_even_if_a_segment_fails_to_run_again(every_engine, monkeypatch) -> None:
    engine = make()
    engine.load(DEEP, WHOLE, random_arrays(DEEP, WHOLE))
    engine.recompute(places(DEEP.nodes)[::3])
    failing_when_run_again(every_engine, monkeypatch)
    with pytest.raises(MemoryError):
        engine.forward_backward(*batch(DEEP, 6))
    monkeypatch.undo()
    assert engine._phase.follows > 0.0
    before = {name: array.copy() for name, array in engine.params.items() if name.endswith("mean")}
    engine.forward_backward(*batch(DEEP, 6))
    assert all(not np.array_equal(engine.params[name], array) for name, array in before.items())


def test_the_timeline_by_hand() -> None:
    """Four nodes in a chain, cut behind the second: forward 0..3, loss 4, backward 5 6, again 7 8, backward 9 10."""
    nodes = [Node(name, "tanh", (before,)) for name, before in zip("abcd", ("input", *"abc"), strict=True)]
    line = Timeline(nodes, (1,), dict.fromkeys("abcd", 100))
    assert line.end == 10
    assert list(line.laid((7, 0, 8))) == [(7, 0, 10)]  # held throughout
    assert list(line.laid((100, 0, 7))) == [
        (100, 0, 1),
        (100, 7, 9),
    ]  # a's, that its reader saves: in the segment alone
    assert list(line.laid((100, 1, 6))) == [
        (100, 1, 6),
        (100, 8, 8),
    ]  # b's, that crosses, and is read behind the cut alone
    assert list(line.laid((100, 1, 7))) == [(100, 1, 6), (100, 8, 9)]  # b's, if its own backward pass reads it as well
    assert list(line.laid((100, 2, 6))) == [(100, 2, 6)]
    assert list(line.laid((5, 1, 1))) == [(5, 1, 1), (5, 8, 8)]  # what b needs while it runs
    assert list(line.laid((100, 6, 7))) == [(100, 6, 10)]  # the gradient that the segment was given
    assert list(line.laid((100, 7, 8))) == [(100, 9, 10)]


@pytest.mark.parametrize("name", ["resnet-18", "vgg-11", "mobilenet-v3-small"])
def test_options_take_less_and_less_and_run_more_again(name: str) -> None:
    spec = zoo.by_name(name)
    found = options(spec, WHOLE)
    assert found
    assert [cuts[-1] for cuts in found] == sorted(cuts[-1] for cuts in found)
    peaks = [memory.predict(spec, WHOLE, Recipe(batch=32), cuts=cuts).peak for cuts in ((), *found)]
    assert min(peaks[1:]) < 0.9 * peaks[0]
    assert Walk(spec, WHOLE, 4, backward=True, cuts=found[-1]).cuts == found[-1]


def test_a_worker_takes_the_cuts_of_its_job_and_refuses_wrong_ones(tmp_path) -> None:
    spec, nested = small_cnn(), widths(a=(3, 6), b=(6, 12))
    recipe = Recipe(batch=8, momentum=0.9, epochs=2)
    updates = []
    for number, cuts in enumerate(((), (2, 4))):
        made = job(tmp_path / str(number), spec, random_arrays(spec, WHOLE), [nested], recipe, micro=8)
        done = perform(_with(made, cuts), dataset(spec))
        assert isinstance(done, Done), done
        updates.append(done.update_ref.digest)
    assert updates[0] == updates[1]
    refused = perform(_with(made, (3,)), dataset(spec))
    assert isinstance(refused, Failed)
    assert (refused.reason, "cannot be cut" in refused.detail) == ("unsupported", True)


def test_a_worker_that_chooses_runs_again_what_does_not_fit(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = cnn("deep", (1, 16, 16), 4, tuple(Conv(16, norm="batch") for _ in range(8)), (8,))
    recipe = Recipe(batch=64, steps=1)
    whole, kind = predicted(spec, WHOLE, recipe).bound, type(make())
    seen: list[Cuts] = []
    plain = kind.recompute
    monkeypatch.setattr(kind, "recompute", lambda engine, cuts: (seen.append(cuts), plain(engine, cuts))[1])
    made = job(tmp_path, spec, random_arrays(spec, WHOLE, scale=0.1), [WHOLE], recipe, budget=whole - 1)
    done = perform(made, dataset(spec, train=64))
    assert isinstance(done, Done), done
    assert seen[0], "batch norms: the whole batch with recomputation comes before half of it"
    assert done.usage.micro_batch == 64
    assert done.usage.bytes_peak < predicted(spec, WHOLE, recipe).peak


def test_nothing_more_is_loaded_for_it(every_engine: str) -> None:
    """Gradients that are handed to torch's own `backward` load its symbolic shapes (35 MB), its checkpoint the compiler."""
    code = (
        "import sys, numpy as np\n"
        "from edge_runtime.engines import open_engine\n"
        "from tests.support.models import small_cnn, random_arrays\n"
        "from wire.spec import Structure\n"
        f"spec = small_cnn(); engine = open_engine({every_engine!r})()\n"
        "engine.load(spec, Structure(), random_arrays(spec, Structure()))\n"
        "x, y = np.zeros((4, *spec.input_shape), np.float32), np.zeros(4, np.int64)\n"
        "engine.forward_backward(x, y); before = set(sys.modules)\n"
        "engine.recompute((2, 4)); engine.forward_backward(x, y)\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.strip() == "[]"


def _with(made: Job, cuts: Cuts) -> Job:
    return dataclasses.replace(made, cuts=cuts)
