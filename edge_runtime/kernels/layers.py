"""The layers of a stretch of the compiled core: their arrays, held against their layouts."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels import Layout
from edge_runtime.kernels.conv import ConvLayout
from edge_runtime.kernels.library import Image
from edge_runtime.kernels.linear import LinearLayout
from edge_runtime.kernels.panels import floats, image
from wire.errors import SpecError
from wire.native.stages import Stage
from wire.spec import Node

_SIDE_MAX = 1 << 15


@dataclass(frozen=True, slots=True)
class Layer:
    """A stage's layer as the core is given it.

    Attributes:
        node: Its node.
        layout: Of its weight; `call` points into its arrays.
        values: Kept values of its weight.
        bias: Its bias.
        dbias: Where the gradient of the bias is summed up for an update; zero between passes.
    """

    node: Node
    layout: LinearLayout | ConvLayout
    values: Floats
    bias: Floats
    dbias: Floats

    @property
    def call(self) -> ctypes.Structure:
        """What the core's functions take."""
        return self.layout.call

    @property
    def conv(self) -> bool:
        """Whether it is a convolution."""
        return self.node.op == "conv2d"

    @property
    def weight(self) -> str:
        """Name of its weight."""
        return self.node.params["weight"]


def layer_of(stage: Stage, node: Node, params: Mapping[str, Floats], layouts: Mapping[str, Layout]) -> Layer:
    """Take a layer's arrays, which stay the caller's.

    Raises:
        SpecError: They do not fit its layout, or the layout not its node.
    """
    layout, values, bias = layouts[node.params["weight"]], params[node.params["weight"]], params[node.params["bias"]]
    fits = isinstance(layout, LinearLayout) and node.op == "linear"
    if isinstance(layout, ConvLayout) and node.op == "conv2d":
        span = max(stage.padding, stage.back_halo)
        fits = layout.geometry == (node.attrs["stride"], stage.padding, node.attrs.get("dilation", 1))
        if not all(_runs(one) for one in (image(stage.shape, span), image(stage.made, span))):
            raise SpecError(f"node {node.name!r}: an image of {stage.shape} is beyond what the compiled core can run")
    if not fits or values.shape != (layout.kept,) or bias.shape != stage.made[:1]:
        raise SpecError(
            f"node {node.name!r}: {values.shape} values and {bias.shape} bias in a layout of {layout.shape}"
        )
    for array in (values, bias):
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise SpecError(f"node {node.name!r}: weights that are not contiguous float32")
    return Layer(node, cast("LinearLayout | ConvLayout", layout), values, bias, np.zeros(bias.shape, np.float32))


def _runs(of: Image) -> bool:
    """Tell whether offsets within a panel of an image are numbers of 32 bits; the core refuses it otherwise."""
    return max(of.height, of.width) <= _SIDE_MAX and floats(of, 16) < 1 << 31
