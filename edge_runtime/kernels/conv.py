"""Convolutions for the compiled core: where the kept weights of one stand, and its calls.

A kept weight is a 16-bit code within its block of channels: (channel in the block) * kernel^2 + ky * kernel + kx. The list
is held twice: by (block of input channels, output channel) for the forward pass and the weights' gradient, and by (block of
output channels, input channel) for the gradient of the input, which finds the values through `places`. Together six bytes
for each kept weight, and four for each row of each block.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels.library import FOREIGN, Conv, Library, must
from edge_runtime.kernels.order import reordered
from edge_runtime.kernels.panels import address
from wire.errors import SpecError
from wire.masked import channels_at_once
from wire.masks import Bits

_CODES = 1 << 16
_ROW = 12
"""Kept weights that a row should have in a block."""
_WIDE = 64
_SPARSE = 0.03


@dataclass(frozen=True, slots=True)
class ConvLayout:
    """Where the kept weights of one masked convolution stand.

    Attributes:
        shape: ``(out channels, in channels, kernel, kernel)``.
        geometry: ``(stride, padding, dilation)``.
        blocks: ``(input, output)`` channels per block.
        starts: ``(in_blocks, out channels + 1)`` int32.
        codes: ``(kept,)`` uint16.
        starts_t: ``(out_blocks, in channels + 1)`` int32.
        codes_t: ``(kept,)`` uint16.
        places: ``(kept,)`` uint16: the value of a weight of the transposed list, counted from the first one of its pair
            of blocks.
        call: The same for the core's functions; points into the arrays above.
        library: The core.
    """

    shape: tuple[int, int, int, int]
    geometry: tuple[int, int, int]
    blocks: tuple[int, int]
    starts: NDArray[np.int32]
    codes: NDArray[np.uint16]
    starts_t: NDArray[np.int32]
    codes_t: NDArray[np.uint16]
    places: NDArray[np.uint16]
    call: Conv = field(repr=False, compare=False)
    library: Library = field(repr=False, compare=False)

    @classmethod
    def of(
        cls, library: Library, mask: Bits, geometry: tuple[int, int, int], in_block: int, out_block: int
    ) -> ConvLayout:
        """Build the layout of a mask.

        Args:
            library: The core.
            mask: ``(out channels, in channels, kernel, kernel)``.
            geometry: ``(stride, padding, dilation)``, of both sides.
            in_block: Input channels per block, for the forward pass and the weights' gradient.
            out_block: Output channels per block, for the gradient of the input.

        Returns:
            The layout. Cost: two passes over the bits and two over what is kept; nothing is made but the layout.

        Raises:
            SpecError: The kernel is not square, or the blocks are too large for 16-bit codes and places.
            DeviceError: The core does not run such a shape.
        """
        shape, taps = _checked(mask, geometry)
        outs, ins = shape[:2]
        in_block, out_block = min(in_block, ins), min(out_block, outs)
        if min(in_block, out_block) < 1 or max(in_block, out_block) * taps > _CODES:
            raise SpecError(f"blocks of {in_block} and {out_block} channels do not suit a kernel of {taps} weights")
        starts = np.empty((-(-ins // in_block), outs + 1), np.int32)
        starts_t = np.empty((-(-outs // out_block), ins + 1), np.int32)
        codes, codes_t, places = (np.empty(mask.kept, np.uint16) for _ in range(3))
        arrays = starts, codes, starts_t, codes_t, places
        sizes = (in_block, len(starts), out_block, len(starts_t), mask.kept)
        call = Conv(outs, ins, shape[2], *geometry, *sizes, *(array.ctypes.data for array in arrays))
        line = np.ascontiguousarray(mask.line)
        code = library.calls.nk_conv_lay(ctypes.byref(call), address(line), len(line))
        if code == FOREIGN:
            raise SpecError(f"blocks of {in_block} and {out_block} channels share more than {_CODES} kept weights")
        must(code, f"the layout of a convolution {shape}")
        for array in arrays:
            array.flags.writeable = False  # they are relied upon
        return cls(shape, geometry, (in_block, out_block), *arrays, call, library)

    @property
    def kept(self) -> int:
        """How many weights are kept."""
        return len(self.codes)

    @property
    def bytes_index(self) -> int:
        """Size of everything but the values."""
        return sum(a.nbytes for a in (self.starts, self.codes, self.starts_t, self.codes_t, self.places))

    def to_c_order(self, values: Floats) -> Floats:
        """See `edge_runtime.kernels.Layout.to_c_order`."""
        return reordered(self.library, self.starts, values, back=True)

    def from_c_order(self, values: Floats) -> Floats:
        """See `edge_runtime.kernels.Layout.from_c_order`."""
        return reordered(self.library, self.starts, values, back=False)


def _checked(mask: Bits, geometry: tuple[int, int, int]) -> tuple[tuple[int, int, int, int], int]:
    stride, padding, dilation = geometry
    if len(mask.shape) != 4 or mask.shape[2] != mask.shape[3] or 0 in mask.shape:
        raise SpecError(f"not the mask of a convolution with a square kernel: {mask.shape}")
    if stride < 1 or padding < 0 or dilation < 1:
        raise SpecError(f"no convolution has stride {stride}, padding {padding}, dilation {dilation}")
    outs, ins, side, _ = mask.shape
    return (outs, ins, side, side), side * side


def blocks(shape: tuple[int, int, int, int], side: int, density: float) -> list[tuple[int, int]]:
    """Name pairs of block sizes worth timing, the likeliest first.

    A block should be small enough for the input of a tile to stay in the first cache, and large enough for a row to have a
    dozen kept weights in it, or more time goes into partial sums than into products.

    Args:
        shape: Of the mask.
        side: Height and width of the input image.
        density: Share of the weights that is kept.

    Returns:
        At most four pairs ``(in_block, out_block)``. Any mask of this density fits them (and of half as much again).
    """
    outs, ins, kernel, _ = shape
    taps = kernel * kernel
    near = channels_at_once(kernel, side)
    base = min(max(near, round(_ROW / max(density * taps, 1e-9))), max(near, _WIDE))
    sizes = (
        [base, max(ins, outs), base // 2, 2 * base]
        if density < _SPARSE
        else [base, 2 * base, max(near, base // 2), near]
    )
    few = 1.5 * density * outs * ins * taps + 64 < _CODES  # the whole mask fits one pair of blocks
    found: list[tuple[int, int]] = []
    for size in sizes:
        pair = _fitted((min(max(1, size), ins), min(max(1, size), outs)), taps, few)
        if pair not in found:
            found.append(pair)
    return found


def _fitted(pair: tuple[int, int], taps: int, few: bool) -> tuple[int, int]:
    """Make a pair of blocks small enough for codes, and for places unless there are few weights in all.

    That is never smaller than `channels_at_once`, on which the bound of an index's memory rests (`wire.masked`).
    """
    ins, outs = (min(size, max(1, _CODES // taps)) for size in pair)
    while not few and ins * outs * taps > _CODES:
        ins, outs = (ins, (outs + 1) // 2) if outs >= ins else ((ins + 1) // 2, outs)
    return ins, outs
