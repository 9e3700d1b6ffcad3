"""Plans of the native engine: no array is overwritten while somebody is still to read it, and little room is lost."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from edge_runtime.models.lower import lowered
from edge_runtime.models.trace import calls_of
from tests.support.random_models import drawn
from wire import zoo
from wire.errors import SpecError, Unsupported
from wire.masked import Masked, maskable
from wire.native.arena import Slot, place
from wire.native.plan import Asked, Plan, entries, lacks, plan
from wire.segments import places
from wire.spec import AxisGroup, ModelSpec, Node, Structure, tensor_shapes


def _slots(found: Plan) -> list[Slot]:
    slots = {id(slot): slot for slot, _ in (*entries(found), found.output)}
    if found.gradient is not None:
        slots[id(found.gradient[0])] = found.gradient[0]
    return [slot for slot in slots.values() if not slot.outside]


def _live(slots: list[Slot], now: int) -> list[Slot]:
    return [slot for slot in slots if slot.born <= now <= slot.last]


def _check(found: Plan) -> None:
    """Hold a plan against what it promises, turn by turn."""
    slots = _slots(found)
    assert all(slot.start >= 0 and slot.start + slot.size <= found.length for slot in slots)
    for now in range(len(found.turns) + 1):
        line = sorted(_live(slots, now), key=lambda slot: slot.start)
        for one, other in pairwise(line):
            assert one.start + one.size <= other.start
    for now, turn in enumerate(found.turns):
        seen = [*turn.x, turn.y, turn.dy, *turn.dx, *turn.saved.values(), *turn.scratch.values(), *turn.adds.values()]
        for one in seen:
            assert one is None or one[0].outside or one[0].born <= now <= one[0].last


def _models() -> Iterator[ModelSpec]:
    for name in zoo.MODELS:
        yield zoo.by_name(name)
    for seed in range(40):
        module, shape, _, _ = drawn(seed)
        yield lowered(calls_of(module, shape), "drawn").spec


def _asked(spec: ModelSpec, batch: int) -> Iterator[Asked]:
    yield Asked(batch)
    yield Asked(batch, backward=False)
    yield Asked(batch, views=True)
    if cuts := places(spec.nodes):
        yield Asked(batch, cuts=cuts[:: max(1, len(cuts) // 3)])


def test_no_array_is_overwritten_while_it_is_wanted() -> None:
    checked = 0
    for spec in _models():
        if lacks(spec):
            continue
        for asked in _asked(spec, 5):
            _check(plan(spec, Structure(), asked))
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("name", ["lenet-5", "conv-2", "resnet-18", "mobilenet-v3-small", "vgg-11"])
def test_little_room_is_lost_between_arrays(name: str) -> None:
    found = plan(zoo.by_name(name), Structure(), Asked(16))
    slots = _slots(found)
    least = max(sum(slot.size for slot in _live(slots, now)) for now in range(len(found.turns) + 1))
    assert least <= found.length <= 1.2 * least


def test_a_chain_by_hand() -> None:
    """Kept arrays are stacked in order, passing ones share the other end."""
    kept, passing, kept_too, late = (
        Slot((32,), 0, 3),
        Slot((16,), 0, 1),
        Slot((16,), 1, 2),
        Slot((48,), 2, 2),
    )
    length = place([kept, passing, kept_too, late], [False, False, True, True])
    assert length == 96
    assert (kept.start, kept_too.start) == (0, 32)
    assert (passing.start, late.start) == (80, 48)


def test_masked_layers_run_as_one_node_with_room_of_their_own() -> None:
    spec = zoo.by_name("lenet-300-100")
    shapes = tensor_shapes(spec, Structure())
    kept = dict.fromkeys(maskable(spec), 100)
    assert all(name in shapes for name in kept)
    found = plan(spec, Structure(), Asked(20), Masked(kept))
    assert [node.op for node in found.nodes] == ["stretch"]
    assert found.panels > 0
    whole = plan(spec, Structure(), Asked(20), Masked(kept, tuple(kept)))
    assert [node.op for node in whole.nodes] == [node.op for node in spec.nodes]
    assert whole.panels == 0


def test_what_is_missing_is_refused_by_name() -> None:
    spec = zoo.by_name("digits-mlp")
    nodes = (*spec.nodes, Node("odd", "fourier", (spec.nodes[-1].name,)))
    other = ModelSpec("odd", spec.input_shape, spec.classes, (*spec.groups, AxisGroup("more", 1)), spec.tensors, nodes)
    assert lacks(other) == ("fourier",)
    with pytest.raises(Unsupported, match="native engine has no fourier"):
        plan(other, Structure(), Asked(1))


def test_masks_and_segments_exclude_each_other() -> None:
    spec = zoo.by_name("lenet-5")
    with pytest.raises(SpecError, match="with masks"):
        plan(spec, Structure(), Asked(4, cuts=places(spec.nodes)[:1]), Masked({maskable(spec)[0]: 5}))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["lenet-5", "conv-2", "resnet-18"])
def test_a_stretch_writes_where_it_reads_nothing(name: str, batch: int) -> None:
    spec = zoo.by_name(name)
    found = plan(spec, Structure(), Asked(batch), Masked(dict.fromkeys(maskable(spec), 1)))
    turns = [turn for turn in found.turns if found.nodes[turn.at].op == "stretch"]
    assert turns
    for turn in turns:
        read = [slot for slot, _ in ([turn.dy] if turn.backward and turn.dy else turn.x)]
        written = [seen[0] for seen in (turn.dx if turn.backward else [turn.y]) if seen]
        for into in written:
            for one in read:
                assert one.outside or one.start + one.size <= into.start or into.start + into.size <= one.start
