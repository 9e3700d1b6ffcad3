"""What runs stretches on this machine: the compiled core where there is a build of it, else its twin in torch.

A `Kit` is the one door to layouts and stretches; who uses it never learns which it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels import Layout, Stretch
from edge_runtime.kernels.library import ABI, Library, open_library, why_not
from wire.errors import SpecError
from wire.masks import Bits
from wire.spec import Node

Shape = tuple[int, ...]

BLOCKS = (256, 128, 64)
"""Columns of a block that are worth a trial, likeliest first; the inputs of a block stay in a small core's first cache."""


class Kit(Protocol):
    """Makes layouts of masks, and stretches over them."""

    @property
    def name(self) -> str:
        """What it is, with all that its speed depends on."""

    def ways(self, node: Node, shape: Shape, input_shape: Shape, density: float) -> tuple[str, ...]:
        """Name the layouts worth a trial for a layer, the safest guess first; none where it cannot be sparse.

        Args:
            node: A linear layer or a convolution.
            shape: Of its dense weight.
            input_shape: Of one sample.
            density: Share of the weights that is kept.
        """

    def layout(self, way: str, node: Node, mask: Bits) -> Layout:
        """Build a layout by its name.

        Raises:
            SpecError: It cannot be built for this mask.
        """

    def stretch(
        self, nodes: Sequence[Node], input_shape: Shape, params: Mapping[str, Floats], layouts: Mapping[str, Layout]
    ) -> Stretch:
        """Make a stretch that reads and writes these arrays.

        Raises:
            SpecError: A node cannot be done.
        """


@dataclass(frozen=True, slots=True)
class NativeKit:
    """The compiled core. See `Kit`; attribute `library` is its build."""

    library: Library

    @property
    def name(self) -> str:
        """Instruction set and interface."""
        return f"native {self.library.isa} {ABI}"

    def ways(self, node: Node, shape: Shape, input_shape: Shape, density: float) -> tuple[str, ...]:
        """See `Kit.ways`: blocks of columns, or of channels."""
        if node.op == "linear":
            columns = shape[1]
            cut = [f"block{block}" for block in BLOCKS if block < columns]
            return (*cut[:1], "whole", *cut[1:])
        if shape[2] != shape[3]:
            return ()
        from edge_runtime.kernels.conv import blocks

        found = blocks(cast("Any", shape), input_shape[1], density)
        return tuple(f"block{ins}x{outs}" for ins, outs in found)

    def layout(self, way: str, node: Node, mask: Bits) -> Layout:
        """See `Kit.layout`."""
        if node.op == "linear":
            from edge_runtime.kernels.linear import LinearLayout

            return LinearLayout.of(self.library, mask, mask.shape[1] if way == "whole" else int(way[5:]))
        from edge_runtime.kernels.conv import ConvLayout

        block, out = map(int, way[5:].split("x"))
        geometry = node.attrs["stride"], node.attrs["padding"], node.attrs.get("dilation", 1)
        return ConvLayout.of(self.library, mask, geometry, block, out)

    def stretch(
        self, nodes: Sequence[Node], input_shape: Shape, params: Mapping[str, Floats], layouts: Mapping[str, Layout]
    ) -> Stretch:
        """See `Kit.stretch`."""
        from edge_runtime.kernels.stretch import NativeStretch

        return cast("Stretch", NativeStretch(self.library, nodes, input_shape, params, layouts))


@dataclass(frozen=True, slots=True)
class TwinKit:
    """The twin in torch. See `Kit`."""

    name: str = "twin"

    def ways(self, node: Node, shape: Shape, input_shape: Shape, density: float) -> tuple[str, ...]:
        """See `Kit.ways`: C order is the only one."""
        del node, shape, input_shape, density
        return ("rows",)

    def layout(self, way: str, node: Node, mask: Bits) -> Layout:
        """See `Kit.layout`."""
        del way, node
        from edge_runtime.kernels.twin import CLayout

        return CLayout.of(mask)

    def stretch(
        self, nodes: Sequence[Node], input_shape: Shape, params: Mapping[str, Floats], layouts: Mapping[str, Layout]
    ) -> Stretch:
        """See `Kit.stretch`."""
        from edge_runtime.kernels.twin import TwinStretch

        return TwinStretch(nodes, input_shape, params, cast("Any", layouts))


@dataclass(frozen=True, slots=True)
class NoKit:
    """What a device has that has neither a build of the core nor torch: no layout, so that all weights are held dense."""

    name: str = "none"

    def ways(self, node: Node, shape: Shape, input_shape: Shape, density: float) -> tuple[str, ...]:
        """See `Kit.ways`: there is none."""
        del node, shape, input_shape, density
        return ()

    def layout(self, way: str, node: Node, mask: Bits) -> Layout:
        """See `Kit.layout`."""
        raise SpecError(f"no layout {way!r} of {mask.shape} for {node.name!r}: {why_not()}")

    def stretch(
        self, nodes: Sequence[Node], input_shape: Shape, params: Mapping[str, Floats], layouts: Mapping[str, Layout]
    ) -> Stretch:
        """See `Kit.stretch`."""
        del input_shape, params, layouts
        raise SpecError(f"node {nodes[0].name!r} cannot run sparse: {why_not()}")


def open_bare(threads: int = 1) -> Kit:
    """Give the best kit of a device without torch; as `open_kit` otherwise."""
    library = open_library()
    if library is None:
        return NoKit()
    library.threads(threads)
    return NativeKit(library)


def open_kit(threads: int = 1) -> Kit:
    """Give the best kit of this machine. Cost: a few milliseconds the first time.

    Args:
        threads: Cores that it may use, for the whole process.
    """
    library = open_library()
    if library is None:
        return TwinKit()
    library.threads(threads)
    return NativeKit(library)
