"""What convolutions and pools hold in the native engine.

A dense convolution takes one of two ways. Where its output has places enough, the compiled core works straight from the planes
of some samples, laid out with their borders (`windows_dense.h`). Else, and without the compiled core, it is a matrix product
with columns: every window of some samples as a column of a matrix (Chellapilla, Puri and Simard, 2006). As many samples are
taken at once as stay within `ROOM_BYTES`, one at least; without the compiled core perhaps only some lines of one sample. A
depthwise convolution lays out a plane at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from wire.native.needs import Dims, Facts, Needs, Say
from wire.ops import Attrs, group_count

ROOM_BYTES = 1 << 20
"""For the samples that are taken at once: 1 MiB, or what one takes; for columns half the weight, where that is more."""
PART_BYTES = 1 << 16
"""Of a weight's gradient, so many bytes of rows are added up at once where columns are not all there at the same time."""
PLACES = 512
"""Columns that are enough: more make a product no faster."""

_FLOAT = 4
_ROWS = 8
_MARGIN = 64
_ROWS_OF_PRODUCT = 64
_FEW = 32
_FEW_OF_ONE = 64


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows that slide over planes; over lines as well, which are planes of height 1.

    Attributes:
        sides: Of a plane.
        out: How many windows there are, by side.
        kernel: A window's sides.
        stride: From one to the next.
        padding: Zeros around the plane.
    """

    sides: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def taps(self) -> int:
        """Values in a window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def places(self) -> int:
        """How many windows a plane has."""
        return self.out[0] * self.out[1]


@dataclass(frozen=True, slots=True)
class Dense:
    """A group of a dense convolution.

    Attributes:
        of: Its windows.
        channels: Of its input.
        outs: Of its output.
    """

    of: Windows
    channels: int
    outs: int

    @property
    def width(self) -> int:
        """Weights of one channel of the output."""
        return self.channels * self.of.taps

    @property
    def direct(self) -> bool:
        """Whether the compiled core does it without columns."""
        return self.of.places >= (_FEW if self.of.taps > 1 else _FEW_OF_ONE)

    def lot(self, batch: int) -> int:
        """Count the samples of a batch that are taken at once where there is a compiled core."""
        if self.direct:
            fixed, each = self._floats(0), self._floats(1) - self._floats(0)
            return max(1, min(batch, ROOM_BYTES // (_FLOAT * each), (1 << 30) // (fixed + each)))
        budget = max(ROOM_BYTES // _FLOAT, self.outs * self.width // 2)
        each = (self.width + self.outs) * self.of.places
        return max(1, min(batch, budget // each, PLACES // self.of.places))

    @property
    def part(self) -> int:
        """Rows of the weights' gradient that are added up at once in columns; with fewer than some, products are slow."""
        fine = PART_BYTES // (_FLOAT * self.width)
        return min(self.outs, max(1, fine) if self.direct else max(_ROWS_OF_PRODUCT, fine))

    def room(self, batch: int) -> int:
        """Count the floats of the scratch."""
        if self.direct:
            return max(self._floats(self.lot(batch)), (self.width + self.outs) * self.of.out[1])
        return self.lot(batch) * (self.width + self.outs) * self.of.places

    def _floats(self, samples: int) -> int:
        """Count the floats of so many samples, as `windows_dense.h` lays them out."""
        lines, pitch, plane, most = _flat(self.of)
        reach = (self.of.kernel[1] - 1) // self.of.stride[1]
        gap = _rounded(most + reach)
        planes = _rounded(samples * self.channels * plane) + _MARGIN
        runs = gap + samples * self.outs * (_rounded(_run(self.of, pitch)) + gap) + gap + _MARGIN
        longest = _rounded(lines * pitch) + _MARGIN
        terms = _rounded(self.of.taps * max(self.outs, self.channels))
        return planes + runs + _ROWS * longest + (_ROWS + 1) * terms


def windows(attrs: Attrs, shape: Dims, out: Dims) -> Windows:
    """Give the windows of a convolution or a pool from shapes of its input and output, batch left out."""
    if "size" in attrs:
        return Windows(_sides(shape), _sides(out), (1, 1), (1, 1), (0, 0))
    along = attrs["kernel"], attrs["stride"], attrs.get("padding", 0)
    down = along if len(shape) == 3 else (1, 1, 0)
    kernels, strides, paddings = zip(down, along, strict=True)
    return Windows(_sides(shape), _sides(out), kernels, strides, paddings)


def _sides(shape: Dims) -> tuple[int, int]:
    return (shape[1], shape[2]) if len(shape) == 3 else (1, shape[1])


def is_depthwise(groups: int, channels: int) -> bool:
    """Tell whether every channel has a kernel of its own."""
    return groups == channels > 1


def depth_floats(of: Windows) -> int:
    """Count the floats of a depthwise convolution's scratch, as `windows_depth.h` lays it out."""
    lines, pitch, plane, most = _flat(of)
    return plane + _MARGIN + _rounded(most) + _rounded(lines * pitch) + _MARGIN + of.taps


def _flat(of: Windows) -> tuple[int, int, int, int]:
    """Give lines, their pitch, the floats of a plane, and where the last tap stands, as in `windows_flat.h`."""
    reach = [(kernel - 1) // stride for kernel, stride in zip(of.kernel, of.stride, strict=True)]
    (kernel, stride, padding), (side, wide) = (of.kernel[1], of.stride[1], of.padding[1]), (of.sides[1], of.out[1])
    wide, pitch = wide + reach[1], 1
    for part in range(min(kernel, stride)):
        first = max(0, -((part - padding) // stride))
        last = max(first, min(wide, -((part - padding - side) // stride)))
        pitch = max(pitch, last, wide - first)
    lines = of.out[0] + reach[0]
    parts = prod(min(kernel, stride) for kernel, stride in zip(of.kernel, of.stride, strict=True))
    return lines, pitch, parts * (lines * pitch + reach[1]), reach[0] * pitch + reach[1]


def _run(of: Windows, pitch: int) -> int:
    return (of.out[0] - 1) * pitch + of.out[1]


def _rounded(length: int) -> int:
    return -(-length // 16) * 16


def _conv(facts: Facts) -> Needs:
    weight, shape = facts.params["weight"], facts.inputs[0]
    of, groups = windows(facts.node.attrs, shape, facts.output), group_count(facts.node.attrs, shape[0], weight[1])
    moved = {"bias": facts.params["bias"]}
    if is_depthwise(groups, shape[0]):
        plane = {"plane": (depth_floats(of),)}
        return Needs(forward=plane, backward=plane | moved | {"weight": weight}, reads_input=True)
    dense = Dense(of, weight[1], weight[0] // groups)
    room = {"room": (dense.room(facts.batch),)}
    moved["weight"] = (dense.outs, *weight[1:])
    if dense.direct or dense.lot(facts.batch) < facts.batch:
        moved["part"] = (dense.part, dense.width)
    return Needs(forward=room, backward=room | moved, reads_input=True)


def _most(facts: Facts) -> Needs:
    return Needs(saves={"place": (facts.batch, *facts.output)})


def _mean(_: Facts) -> Needs:
    return Needs()


NEEDS: Mapping[str, Say] = {
    "conv2d": _conv,
    "conv1d": _conv,
    "max_pool2d": _most,
    "max_pool1d": _most,
    "avg_pool2d": _mean,
    "avg_pool1d": _mean,
    "adaptive_avg_pool2d": _mean,
    "adaptive_avg_pool1d": _mean,
}
"""By the name of the op."""
