"""The liveness walk against torch's own account of its tensors: over the zoo, batches, and widths."""

from __future__ import annotations

import pytest

from tests.support.tracked import peak_of_step
from wire import memory, zoo
from wire.builders import Conv, cnn
from wire.passes import options
from wire.segments import places
from wire.spec import Structure
from wire.walk import Walk, arrays, most

WHOLE = Structure()
SLOW = {"resnet-18", "mobilenet-v3-small"}
"""A group norm over meta tensors is taken apart in Python, which takes seconds: these have one case each."""

CASES = [
    *((name, batch, kept) for name in zoo.MODELS if name not in SLOW for batch in (1, 8, 128) for kept in (1.0, 0.4)),
    *(("resnet-18", 8, 0.4), ("mobilenet-v3-small", 8, 1.0)),
]
LOSS = 64 << 10
"""What labels, odds and the loss take, which the walk leaves out."""


@pytest.mark.parametrize(("name", "batch", "kept"), CASES)
def test_the_walk_has_every_tensor_that_torch_makes(name: str, batch: int, kept: float) -> None:
    spec = zoo.by_name(name)
    structure = memory.uniform(spec, kept) if kept < 1 else WHOLE
    walk = Walk(spec, structure, batch, backward=True)
    found, seen = most(walk, arrays(walk, inside=False)), peak_of_step(spec, structure, batch)
    assert seen - LOSS <= found <= seen + 256, "the walk has more than torch, or less"


@pytest.mark.parametrize(("name", "batch"), [("lenet-5", 8), ("vgg-11", 1), ("resnet-18", 8)])
def test_with_segments_the_walk_has_no_less_than_torch(name: str, batch: int) -> None:
    spec = zoo.by_name(name)
    known = places(spec.nodes)
    for cuts in {known, known[:1], *options(spec, WHOLE)[-1:]}:
        walk = Walk(spec, WHOLE, batch, backward=True, cuts=cuts)
        found, seen = most(walk, arrays(walk, inside=False)), peak_of_step(spec, WHOLE, batch, cuts=cuts)
        assert seen - LOSS <= found <= 1.2 * seen + 256, cuts


def test_the_oracle_sees_what_is_taken_away() -> None:
    """A model with a layer more, a larger batch, gradients that go at once: each must show, or the account is blind."""
    one, two = (cnn("c", (1, 8, 8), 4, (Conv(8),) * count, ()) for count in (1, 2))
    size = 4 * 64 * 8 * 64
    assert peak_of_step(two, WHOLE, 64) - peak_of_step(one, WHOLE, 64) >= size
    assert peak_of_step(one, WHOLE, 128) > 1.9 * peak_of_step(one, WHOLE, 64)
    wide = zoo.by_name("lenet-300-100")
    weights = 4 * 784 * 300
    assert (
        weights < peak_of_step(wide, WHOLE, 1) < 1.1 * weights
    )  # the one new gradient; those that are held are left out


def test_the_oracle_does_not_see_what_a_convolution_makes_for_itself() -> None:
    spec = cnn("c", (16, 8, 8), 4, (Conv(16), Conv(16)), ())
    walk = Walk(spec, WHOLE, 64, backward=True)
    assert most(walk, arrays(walk)) > 1.1 * peak_of_step(spec, WHOLE, 64)
