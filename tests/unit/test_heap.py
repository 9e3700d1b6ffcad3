"""What training takes beside its arrays: new code, and a heap that does not shrink."""

from __future__ import annotations

import pytest

from tests.support.sequences import recurrent, windows
from wire import zoo
from wire.builders import Conv, cnn, mlp
from wire.heap import BASE, KIB, MAPPED, heap
from wire.masked import Masked
from wire.spec import Structure
from wire.walk import Walk, arrays, most

WHOLE = Structure()


def beside(spec, batch=2, masked=None):
    return heap(Walk(spec, WHOLE, batch, backward=True, masked=masked))


def test_a_tiny_model_takes_little_more_than_its_files() -> None:
    assert BASE <= beside(mlp("m", (4,), 2)) < BASE + 4 * KIB


def test_ops_that_a_warm_worker_has_not_run_bring_their_pages() -> None:
    def convs(norm: str) -> int:
        return beside(cnn("c", (1, 8, 8), 2, (Conv(4, norm=norm),), ()))  # type: ignore[arg-type] # one of the two

    assert 1000 * KIB < convs("batch") - convs("") < 1300 * KIB
    two = cnn("c", (1, 8, 8), 2, (Conv(4), Conv(4)), ())
    assert 150 * KIB < beside(two) - convs("") < 250 * KIB
    assert beside(windows()) > beside(recurrent("gru")) + (4 << 20)
    small = mlp("m", (16,), 4, (16,))
    assert 2 << 20 < beside(small, masked=Masked({"fc1.weight": 8})) - beside(small) < 4 << 20


def test_one_sample_is_convolved_without_the_library() -> None:
    """Measured: VGG-11 with one sample took 9 MiB less than with copies of its largest layer's weights."""
    vgg = zoo.by_name("vgg-11")
    one, two = (Walk(vgg, WHOLE, batch, backward=True) for batch in (1, 2))
    assert [len(walk.copies["conv8"]) for walk in (one, two)] == [1, 3]
    assert most(two, arrays(two)) - most(one, arrays(one)) > 8 << 20
    for large in (cnn("c", (1, 28, 28), 2, (Conv(4, 5, 2),), ()), cnn("c", (3, 84, 84), 2, (Conv(4),), ())):
        walk = Walk(large, WHOLE, 1, backward=True)
        assert len(walk.copies["conv1"]) == 3, "windows of five, and many values, are the library's"
    walk = Walk(cnn("c", (3, 8, 8), 2, (Conv(4),), ()), WHOLE, 1, backward=True)
    assert walk.copies == {"conv1": (4 * 3 * 9 * 64,)}


@pytest.mark.parametrize("batch", [8, 128])
def test_a_heap_keeps_its_own_peak_while_mapped_blocks_have_theirs(batch: int) -> None:
    spec = zoo.by_name("lenet-5")
    walk = Walk(spec, WHOLE, batch, backward=True)
    found = [array for array in arrays(walk) if array[0]]
    small, mapped = ([a for a in found if (a[0] < MAPPED) == few] for few in (True, False))
    apart = most(walk, small) + (most(walk, mapped) if mapped else 0)
    assert heap(walk) >= BASE + apart - most(walk, found)
    assert heap(walk) < (2 << 20) + apart
