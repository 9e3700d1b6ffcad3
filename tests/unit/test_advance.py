"""One step of a run: what devices may say without stopping it."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator.advance import Task, advance, load_state
from coordinator.algorithm import DeviceView
from coordinator.shells import write
from tests.support.models import small_cnn
from wire.messages import Reply, Usage
from wire.spec import encode, tensor_shapes
from wire.spool import Spool

SPEC = small_cnn()
TOKEN = "ab" * 8
VIEWS = (DeviceView("a", 1 << 40, 10), DeviceView("b", 1 << 40, 10))


def stepped(spool, algo, state, number, replies=(), params=None, **more):
    return advance(
        Task(
            spool=str(spool.root), spec=spool.add_bytes(encode(SPEC)).digest, algo=algo, params=params or {}, recipe={},
            seed=3, state=state, replies=replies, round=number,
            **{"devices": VIEWS, **more},
        )
    )  # fmt: skip


def told(spool, draft, value):
    """Move every weight by the same number."""
    shapes = tensor_shapes(SPEC, draft.structure)
    update = {name: np.full(shape, value, np.float32) for name, shape in shapes.items()}
    ref = write(spool, "update", update, {})
    return Reply(TOKEN, draft.device, TOKEN, draft.structure, ref, "", 10, {}, Usage())


@pytest.mark.parametrize("algo", ["fedavg", "nestfl", "fledge", "fedmp", "heterofl", "fjord", "perfedavg", "fiarse"])
def test_updates_that_add_up_to_more_than_there_is_are_left_out_and_the_run_goes_on(algo, tmp_path):
    spool = Spool(tmp_path)
    outcome = stepped(spool, algo, "", 1)
    for number in range(2, 5):
        before = load_state(spool, outcome.state, SPEC)
        replies = tuple(told(spool, draft, 3e38) for draft in outcome.drafts)
        outcome = stepped(spool, algo, outcome.state, number, replies)
        after = load_state(spool, outcome.state, SPEC)
        assert all(np.isfinite(array).all() for array in after.weights.values())
        assert len(outcome.drafts) == 2
        if outcome.note:
            assert "not finite" in outcome.note
            for name, array in before.weights.items():
                assert np.array_equal(array, after.weights[name])
    assert outcome.note
    good = tuple(told(spool, draft, 0.5) for draft in stepped(spool, algo, "", 1).drafts)
    assert not stepped(spool, algo, stepped(spool, algo, "", 1).state, 2, good).note


def test_an_answer_knows_its_turn(tmp_path):
    spool, params = Spool(tmp_path), {"stages": "further"}
    outcome = stepped(spool, "prunefl", "", 1, params=params)
    replies = tuple(replace(told(spool, draft, 0.1), usage=Usage(seconds=2.0)) for draft in outcome.drafts)
    outcome = stepped(spool, "prunefl", outcome.state, 2, replies, params, turns={"a": 9.0})
    (row,) = load_state(spool, outcome.state, SPEC).scalars["prunefl"]["seen"]
    assert row == ["", 2.0, 7.0, 0.0, 54, 648, 48]


@pytest.mark.parametrize("algo", ["fedavg", "prunefl"])
def test_who_was_not_drawn_is_asked_only_where_that_is_wanted(algo, tmp_path):
    spool, asked, outcome, replies = Spool(tmp_path), [], None, ()
    params = {} if algo == "fedavg" else {"initial.rounds": 3.0, "initial.start": 99.0}
    for number in range(1, 6):
        drawn = "ab"[number % 2]
        views = tuple(replace(view, drawn=view.name == drawn) for view in VIEWS)
        outcome = stepped(spool, algo, outcome.state if outcome else "", number, replies, params, devices=views)
        replies = tuple(told(spool, draft, 0.1) for draft in outcome.drafts)
        asked.append("".join(draft.device for draft in outcome.drafts))
    # The first device stays until the stage is over, and is not asked beyond the draw in the round after.
    assert asked == (["b", "a", "b", "a", "b"] if algo == "fedavg" else ["b", "b", "b", "a", "b"])
