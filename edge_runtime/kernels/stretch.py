"""A chain of nodes run by the compiled core, its activations in panels from end to end.

A convolution reads an image with a halo of zeros as wide as its padding, and so does the gradient of its input. ReLU and pool
write straight into that, so that nothing is copied only to be padded. Buffers are made at the first pass and used again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats
from edge_runtime.engines.update import apply
from edge_runtime.kernels import STRETCHABLE, Layout, Watch, check_goal
from edge_runtime.kernels.conv import ConvLayout
from edge_runtime.kernels.library import Image, Library, Step, must
from edge_runtime.kernels.linear import LinearLayout
from edge_runtime.kernels.panels import address, buffer, floats, image
from wire.errors import SpecError
from wire.spec import Node

Shape = tuple[int, ...]
_SIDE_MAX = 1 << 15


@dataclass(frozen=True, slots=True)
class _Stage:
    """A layer and what follows it at once, or a ReLU or a pool that stands alone.

    Attributes:
        layout: Of the layer's weight; None where there is none.
        names: Of its weight and bias.
        shape: Of what it reads, and
        made: of what the layer makes, and
        out: of what comes out behind the pool.
        kernel: Of the pool; 1 for none.
        relu: Whether there is one.
        halo: Of the image that comes out.
    """

    layout: LinearLayout | ConvLayout | None
    names: tuple[str, str]
    shape: Shape
    made: Shape
    out: Shape
    kernel: int = 1
    relu: bool = False
    halo: int = 0

    @property
    def pools(self) -> bool:
        """Whether the pass behind the layer is one of its own; a ReLU alone is done on the way."""
        return self.layout is None or self.kernel > 1 or self.halo > 0


class NativeStretch:
    """See `edge_runtime.kernels.Stretch`. For one thread; the core's own threads are set by `Library.threads`."""

    def __init__(
        self,
        library: Library,
        nodes: Sequence[Node],
        in_shape: Shape,
        params: Mapping[str, Floats],
        layouts: Mapping[str, Layout],
    ) -> None:
        """Take a chain and arrays that stay the caller's: they are read at every pass, and written by an `Update`.

        Raises:
            SpecError: A node cannot be run here, does not read the one before, or meets weights of another shape.
            DeviceError: A layout is not sound.
        """
        self._calls = library.calls
        self._shape = in_shape
        self._stages, self._out = _stages(nodes, in_shape, params, layouts)
        self._params = {
            name: params[name] for stage in self._stages if stage.layout is not None for name in stage.names
        }
        for stage in self._stages:
            if isinstance(stage.layout, LinearLayout):
                must(self._calls.nk_linear_check(ctypes.byref(stage.layout.call)), stage.names[0])
            elif stage.layout is not None:
                must(self._calls.nk_conv_check(ctypes.byref(stage.layout.call)), stage.names[0])
        self._buffers: dict[tuple[str, int], Floats] = {}
        self._batch = 0

    @property
    def params(self) -> Mapping[str, Floats]:
        """Trainable arrays by tensor name."""
        return self._params

    def forward(self, x: Floats, *, train: bool) -> Floats:
        """See `edge_runtime.kernels.Stretch.forward`."""
        batch = len(x)
        if x.shape[1:] != self._shape or not batch:
            raise SpecError(f"inputs of shape {x.shape}; this stretch takes one or more of {self._shape}")
        x = np.ascontiguousarray(x, np.float32)
        self._batch = 0
        if not train:
            self._buffers.clear()  # an evaluation has its own, and lets each go as soon as it was read
        first = self._stages[0]
        into = image(first.shape, _padding(first))
        held = self._buffer("x", 0, into, batch) if train else buffer(floats(into, batch))
        must(self._calls.nk_pack(ctypes.byref(into), batch, x.ctypes.data, held.ctypes.data), "packing")
        for place, stage in enumerate(self._stages):
            held = self._through(place, stage, held, batch, train)
        last = self._stages[-1]
        result = buffer(batch * prod(self._out)).reshape(batch, *self._out)
        out = image(last.out)
        must(self._calls.nk_unpack(ctypes.byref(out), batch, held.ctypes.data, result.ctypes.data), "unpacking")
        self._batch = batch if train else 0
        return result

    def backward(
        self,
        dy: Floats,
        *,
        grads: Mapping[str, Floats] | None,
        update: Update | None,
        input_gradient: bool,
        watch: Watch | None = None,
    ) -> Floats | None:
        """See `edge_runtime.kernels.Stretch.backward`."""
        batch, last = self._batch, self._stages[-1]
        if dy.shape != (batch, *self._out) or not batch:
            raise SpecError(f"a gradient of shape {dy.shape}; the latest training pass made {(batch, *self._out)}")
        check_goal(self._params, grads, update)
        self._batch = 0
        given, spare = self._gradients(batch, input_gradient)
        dy = np.ascontiguousarray(dy, np.float32)
        out = image(last.out)
        must(self._calls.nk_pack(ctypes.byref(out), batch, dy.ctypes.data, given.ctypes.data), "packing")
        for place in range(len(self._stages) - 1, -1, -1):
            wanted = input_gradient or place > 0
            given, spare = self._back(place, (given, spare), batch, wanted, (grads, update, watch))
        if not input_gradient:
            return None
        result = buffer(batch * prod(self._shape)).reshape(batch, *self._shape)
        into = image(self._stages[0].shape)
        must(self._calls.nk_unpack(ctypes.byref(into), batch, given.ctypes.data, result.ctypes.data), "unpacking")
        return result

    def _buffer(self, role: str, place: int, of: Image, batch: int) -> Floats:
        """Give memory that is kept until the next pass in its role, grown when the batch does."""
        length = floats(of, batch)
        held = self._buffers.get((role, place))
        if held is None or len(held) < length:
            held = self._buffers[role, place] = buffer(length)
        return held

    def _gradients(self, batch: int, input_gradient: bool) -> tuple[Floats, Floats]:
        """Give two buffers that each hold any gradient of an activation; they change places at every stage.

        Where the input's is not wanted, the first layer's stands in the place of what that layer made.
        """
        first, *others = self._stages
        whole = input_gradient or first.layout is None  # a pool without a layer makes its input's in any case
        images = [image(first.out), *(_gradient_images(first) if whole else ())]
        length = max(floats(of, batch) for of in (*images, *(of for one in others for of in _gradient_images(one))))
        for role in ("given", "spare"):
            held = self._buffers.get((role, 0))
            if held is None or len(held) < length:
                self._buffers[role, 0] = buffer(length)
        return self._buffers["given", 0], self._buffers["spare", 0]

    def _through(self, place: int, stage: _Stage, x: Floats, batch: int, train: bool) -> Floats:
        made, out = image(stage.made), image(stage.out, stage.halo)
        y = x
        if stage.layout is not None:
            weight, bias = (self._params[name].ctypes.data for name in stage.names)
            relu = int(stage.relu and not stage.pools)
            y = self._buffer("y", place, made, batch) if train else buffer(floats(made, batch))
            call = ctypes.byref(stage.layout.call)
            if isinstance(stage.layout, LinearLayout):
                code = self._calls.nk_linear_forward(call, weight, bias, x.ctypes.data, batch, relu, y.ctypes.data)
            else:
                into = ctypes.byref(image(stage.shape, _padding(stage)))
                code = self._calls.nk_conv_forward(call, weight, bias, into, x.ctypes.data, batch, relu, y.ctypes.data)
            must(code, stage.names[0])
        if not stage.pools:
            return y
        held = self._buffer("out", place, out, batch) if train else buffer(floats(out, batch))
        code = self._calls.nk_pool_forward(
            *(ctypes.byref(made), batch, stage.kernel, int(stage.relu)),
            *(y.ctypes.data, ctypes.byref(out), held.ctypes.data),
        )
        must(code, "a pool")
        return held

    def _back(
        self,
        place: int,
        pair: tuple[Floats, Floats],
        batch: int,
        wanted: bool,
        goal: tuple[Mapping[str, Floats] | None, Update | None, Watch | None],
    ) -> tuple[Floats, Floats]:
        """Take one stage's gradients; give the buffer that holds the gradient of its input, and the other one."""
        stage, (given, spare) = self._stages[place], pair
        before = self._buffers["x", 0] if place == 0 else self._held(place - 1)
        if stage.layout is None:
            self._unpool(place, pair, batch, image(stage.made), None)
            return spare, given
        weight, bias = stage.names
        grads, update, watch = goal
        dbias = np.zeros_like(self._params[bias]) if grads is None else grads[bias]
        dvalues = None if grads is None else grads[weight]
        step = _step(weight, update) if update is not None else None
        dx = spare if wanted else None
        if isinstance(stage.layout, ConvLayout):
            made = self._back_conv(place, pair, batch, wanted, (before, dvalues, dbias, step))
            if watch is not None:
                self._show(watch, stage, before, made, batch)
            result = given, spare
        else:
            y = self._buffers["y", place] if stage.relu else None
            code = self._calls.nk_linear_backward(
                *(ctypes.byref(stage.layout.call), self._params[weight].ctypes.data, before.ctypes.data),
                *(address(y), given.ctypes.data, batch, address(dx), address(dvalues), dbias.ctypes.data),
                None if step is None else ctypes.byref(step),
            )
            must(code, weight)
            if watch is not None:
                self._show(watch, stage, before, (given, image(stage.made)), batch)
            result = spare, given
        if update is not None:
            apply({bias: self._params[bias]}, {bias: dbias}, update)
        return result

    def _back_conv(
        self,
        place: int,
        pair: tuple[Floats, Floats],
        batch: int,
        wanted: bool,
        goal: tuple[Floats, Floats | None, Floats, Step | None],
    ) -> tuple[Floats, Image]:
        """Take a convolution's gradients; give where that of its output is, and how."""
        stage, (given, spare) = self._stages[place], pair
        before, dvalues, dbias, step = goal
        layout = stage.layout
        assert isinstance(layout, ConvLayout)
        into = image(stage.made, _back_halo(layout) if wanted else 0)
        if not wanted:  # without a halo it may take the place of what the layer made
            spare = self._buffers["y", place]
        self._unpool(place, (given, spare), batch, into, dbias)
        call, weight = ctypes.byref(layout.call), self._params[stage.names[0]].ctypes.data
        x, dy = image(stage.shape, _padding(stage)), ctypes.byref(into)
        if wanted:
            code = self._calls.nk_conv_backward_input(
                call, weight, ctypes.byref(x), dy, spare.ctypes.data, batch, given.ctypes.data
            )
            must(code, stage.names[0])
        code = self._calls.nk_conv_backward_weight(
            *(call, weight, ctypes.byref(x), before.ctypes.data, dy, spare.ctypes.data, batch, address(dvalues)),
            None if step is None else ctypes.byref(step),
        )
        must(code, stage.names[0])
        return spare, into

    def _show(self, watch: Watch, stage: _Stage, x: Floats, made: tuple[Floats, Image], batch: int) -> None:
        into = np.empty((batch, *stage.shape), np.float32)
        of = image(stage.shape, _padding(stage))
        must(self._calls.nk_unpack(ctypes.byref(of), batch, x.ctypes.data, into.ctypes.data), "unpacking")
        dy = np.empty((batch, *stage.made), np.float32)
        given, of = made
        must(self._calls.nk_unpack(ctypes.byref(of), batch, given.ctypes.data, dy.ctypes.data), "unpacking")
        watch(stage.names[0], into, dy)

    def _unpool(self, place: int, pair: tuple[Floats, Floats], batch: int, into: Image, dbias: Floats | None) -> None:
        """Bring the gradient behind a stage to what its layer made, from the first of a pair of buffers into the other."""
        stage = self._stages[place]
        y = self._buffers["y", place] if stage.layout is not None else self._input(place)
        made, out = image(stage.made), image(stage.out, stage.halo if stage.pools else 0)
        code = self._calls.nk_pool_backward(
            *(ctypes.byref(made), batch, stage.kernel, int(stage.relu), y.ctypes.data),
            *(ctypes.byref(out), self._held(place).ctypes.data, pair[0].ctypes.data),
            *(ctypes.byref(into), pair[1].ctypes.data, address(dbias)),
        )
        must(code, "a pool")

    def _held(self, place: int) -> Floats:
        return self._buffers["out" if self._stages[place].pools else "y", place]

    def _input(self, place: int) -> Floats:
        return self._held(place - 1) if place else self._buffers["x", 0]


def _stages(
    nodes: Sequence[Node], shape: Shape, params: Mapping[str, Floats], layouts: Mapping[str, Layout]
) -> tuple[tuple[_Stage, ...], Shape]:
    """Give the stages and the shape of what comes out."""
    stages: list[_Stage] = []
    for place, node in enumerate(nodes):
        if node.op not in STRETCHABLE:
            raise SpecError(f"node {node.name!r}: a stretch has no {node.op}")
        if place and node.inputs != (nodes[place - 1].name,):
            raise SpecError(f"node {node.name!r} does not read the one before it")
        latest = stages[-1] if stages else None
        if node.op == "flatten":
            shape = (prod(shape),)
        elif node.op in ("linear", "conv2d"):
            stage = _layer(node, shape, params, layouts)
            if latest is not None:
                stages[-1] = replace(latest, halo=_padding(stage))
            stages.append(stage)
            shape = stage.out
        elif node.op == "relu":
            if latest is not None and latest.out == shape:
                stages[-1] = replace(latest, relu=True)  # behind a pool as good as before it
            else:
                stages.append(_Stage(None, ("", ""), shape, shape, shape, relu=True))
        else:
            kernel = node.attrs["kernel"]
            if node.attrs["stride"] != kernel or len(shape) != 3 or min(shape[1:]) < kernel:
                raise SpecError(f"node {node.name!r}: a stretch pools {shape} in windows side by side only")
            pooled = (shape[0], shape[1] // kernel, shape[2] // kernel)
            if latest is not None and latest.kernel == 1 and isinstance(latest.layout, ConvLayout):
                stages[-1] = replace(latest, kernel=kernel, out=pooled)
            else:
                stages.append(_Stage(None, ("", ""), shape, shape, pooled, kernel=kernel))
            shape = pooled
    if not stages:
        raise SpecError("a stretch without a layer")
    return tuple(stages), shape


def _layer(node: Node, shape: Shape, params: Mapping[str, Floats], layouts: Mapping[str, Layout]) -> _Stage:
    names = node.params["weight"], node.params["bias"]
    layout = layouts.get(names[0])
    if isinstance(layout, LinearLayout) and node.op == "linear":
        (made, read) = layout.shape
        out: Shape = (made,)
        fits = shape == (read,)
    elif isinstance(layout, ConvLayout) and node.op == "conv2d":
        stride, padding, dilation = layout.geometry
        outs, ins, side, _ = layout.shape
        sides = tuple((n + 2 * padding - dilation * (side - 1) - 1) // stride + 1 for n in shape[1:])
        fits = (
            len(shape) == 3 and shape[0] == ins and (stride, padding) == (node.attrs["stride"], node.attrs["padding"])
        )
        fits, out = fits and min(sides) > 0, (outs, *sides)
    else:
        raise SpecError(f"node {node.name!r}: its weight {names[0]!r} has no layout for the compiled core")
    values, bias = params[names[0]], params[names[1]]
    if isinstance(layout, ConvLayout) and not all(
        _runs(one) for one in (image(shape, _span(layout)), image(out, _span(layout)))
    ):
        raise SpecError(f"node {node.name!r}: an image of {shape} is beyond what the compiled core can run")
    if not fits or values.shape != (layout.kept,) or bias.shape != out[:1]:
        raise SpecError(
            f"node {node.name!r}: {values.shape} values and {bias.shape} bias of {layout.shape} read {shape}"
        )
    for array in (values, bias):
        if array.dtype != np.float32 or not array.flags.c_contiguous:
            raise SpecError(f"node {node.name!r}: weights that are not contiguous float32")
    return _Stage(layout, names, shape, out, out)


def _span(layout: ConvLayout) -> int:
    """Give the widest halo of an image that the layer reads."""
    return max(layout.geometry[1], _back_halo(layout))


def _runs(of: Image) -> bool:
    """Tell whether offsets within a panel of an image are numbers of 32 bits; the core refuses it otherwise."""
    return max(of.height, of.width) <= _SIDE_MAX and floats(of, 16) < 1 << 31


def _padding(stage: _Stage) -> int:
    """Give the halo of the image that a stage reads."""
    return stage.layout.geometry[1] if isinstance(stage.layout, ConvLayout) else 0


def _back_halo(layout: ConvLayout) -> int:
    """Give the halo that the gradient of a convolution's output needs for that of its input."""
    _, padding, dilation = layout.geometry
    return max(0, dilation * (layout.shape[2] - 1) - padding)


def _gradient_images(stage: _Stage) -> tuple[Image, Image, Image]:
    halo = _back_halo(stage.layout) if isinstance(stage.layout, ConvLayout) else 0
    return image(stage.shape), image(stage.made, halo), image(stage.out)


def _step(name: str, update: Update) -> Step:
    velocity = update.velocity[name] if update.momentum and update.velocity is not None else None
    anchor = update.anchor[name] if update.pull and update.anchor is not None else None
    return Step(update.rate, update.momentum, update.decay, update.pull, address(velocity), address(anchor))
