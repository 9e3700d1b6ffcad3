"""A chain of nodes run by the compiled core, its activations in panels from end to end.

A convolution reads an image with a halo of zeros as wide as its padding, and so does the gradient of its input. ReLU and pool
write straight into that, so that nothing is copied only to be padded. Buffers are made at the first pass and used again, and
so are the lists of calls that a pass consists of: a pass is one crossing into the core.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats, Labels
from edge_runtime.kernels import Layout, Watch, check_goal
from edge_runtime.kernels import lists as do
from edge_runtime.kernels.layers import layer_of
from edge_runtime.kernels.library import Image, Library, must
from edge_runtime.kernels.lists import Prepared, Steps, Writer
from edge_runtime.kernels.panels import buffer, image
from wire.errors import DataError, DeviceError, SpecError
from wire.native.stages import CHUNK, Shape, Sizes, sizes, stages_of
from wire.spec import Node

Goal = tuple[Mapping[str, Floats] | None, Update | None, Watch | None]


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
        self._stages, self._out = stages_of(nodes, in_shape, {name: one.shape for name, one in layouts.items()})
        layers = {place: stage.layer for place, stage in enumerate(self._stages) if stage.layer is not None}
        names = [name for node in layers.values() for name in (node.params["weight"], node.params["bias"])]
        self._params = {name: params[name] for name in names}
        self._layers = {place: layer_of(self._stages[place], node, params, layouts) for place, node in layers.items()}
        for layer in self._layers.values():
            check = self._calls.nk_conv_check if layer.conv else self._calls.nk_linear_check
            must(check(ctypes.byref(layer.call)), layer.weight)
        self._memory: dict[tuple[str, int], NDArray[Any]] = {}
        self._lists: dict[tuple[object, ...], Prepared] = {}
        self._steps = Steps(names)
        self._batch = 0

    @property
    def params(self) -> Mapping[str, Floats]:
        """Trainable arrays by tensor name."""
        return self._params

    @property
    def in_shape(self) -> Shape:
        """Of one input."""
        return self._shape

    @property
    def out_shape(self) -> Shape:
        """Of one output."""
        return self._out

    @property
    def bytes_held(self) -> int:
        """Size of what stays between passes: buffers of activations and gradients."""
        return sum(array.nbytes for array in self._memory.values())

    def forward(self, x: Floats, *, train: bool, out: Floats | None = None) -> Floats:
        """See `edge_runtime.kernels.Stretch.forward`; `out` is written to."""
        x = self._taken(x)
        self._batch = 0
        result = _room(out, (len(x), *self._out))
        if train:
            self._forward(x, result, ("forward", len(x)))
            self._batch = len(x)
            return result
        self._let_go()  # an evaluation has its own, and lets it go
        for start in range(0, len(x), CHUNK):
            part = x[start : start + CHUNK]
            self._forward(part, result[start : start + CHUNK], ("evaluation", len(part)))
        self._let_go()
        return result

    def backward(
        self,
        dy: Floats,
        *,
        grads: Mapping[str, Floats] | None,
        update: Update | None,
        input_gradient: bool,
        watch: Watch | None = None,
        into: Floats | None = None,
    ) -> Floats | None:
        """See `edge_runtime.kernels.Stretch.backward`; `into` is written to."""
        batch = self._batch
        if dy.shape != (batch, *self._out) or not batch:
            raise SpecError(f"a gradient of shape {dy.shape}; the latest training pass made {(batch, *self._out)}")
        check_goal(self._params, grads, update)
        result = _room(into, (batch, *self._shape)) if input_gradient else None
        self._batch = 0
        dy = np.ascontiguousarray(dy, np.float32)
        found = self._list(("backward", batch, input_gradient, watch is not None, update is not None))
        self._aim(found, grads, update)
        found.point("dy", "a", dy)
        if result is not None:
            found.point("dx", "b", result)
        self._back(found, 0, batch, watch)
        return result

    def learn(self, x: Floats, labels: Labels, scale: float, goal: Goal) -> tuple[Floats, float]:
        """Do a whole training step of a model that is this stretch, with cross-entropy, in one crossing.

        Args:
            x: Inputs ``(n, *in_shape)``.
            labels: int64 ``(n,)``.
            scale: Of the gradient.
            goal: Gradients to add to or an update, one of the two; and who is shown what passes through, if anybody.

        Returns:
            The logits ``(n, classes)``, and the mean loss, not scaled.

        Raises:
            SpecError: A shape is another, or a gradient, velocity or anchor is missing.
            DataError: A label is no class.
        """
        x = self._taken(x)
        if labels.shape != (len(x),) or len(self._out) != 1:
            raise SpecError(f"labels of shape {labels.shape} for outputs of {(len(x), *self._out)}")
        labels = np.ascontiguousarray(labels, np.int64)
        grads, update, watch = goal
        found = self._list(("learn", len(x), False, watch is not None, update is not None))
        if update is None or grads is not None or not self._steps.known(update):
            check_goal(self._params, grads, update)
            self._aim(found, grads, update)
        self._batch = 0
        found.point("x", "a", x)
        found.point("loss", "b", labels)
        found.calls[found.marks["loss"]].scale = scale
        logits: Floats = self._memory["logits", 0][: labels.size * self._out[0]].reshape(len(x), -1)
        try:
            if watch is None:
                found.run(self._calls)
            else:
                found.run(self._calls, 0, found.marks["dy"])
                self._back(found, found.marks["dy"], len(x), watch)
        except DeviceError:
            if 0 <= labels.min() <= labels.max() < self._out[0]:
                raise
            raise DataError(f"a sample has a label that is none of the model's {self._out[0]} classes") from None
        return logits.copy(), float(self._memory["loss", 0][0])

    def _taken(self, x: Floats) -> Floats:
        if x.shape[1:] != self._shape or not len(x):
            raise SpecError(f"inputs of shape {x.shape}; this stretch takes one or more of {self._shape}")
        return np.ascontiguousarray(x, np.float32)

    def _let_go(self) -> None:
        self._memory.clear()
        self._lists.clear()

    def _forward(self, x: Floats, result: Floats, key: tuple[object, ...]) -> None:
        found = self._list(key)
        found.point("x", "a", x)
        found.point("y", "b", result)
        found.run(self._calls)

    def _aim(self, found: Prepared, grads: Mapping[str, Floats] | None, update: Update | None) -> None:
        if update is not None:
            self._steps.fill(update)
        elif grads is not None:
            found.aim(grads)

    def _back(self, found: Prepared, first: int, batch: int, watch: Watch | None) -> None:
        """Run a way back; with a watch, stop behind each layer to show what passed through it."""
        if watch is None:
            found.run(self._calls, first)
            return
        at = first
        for place, (_, end) in zip(reversed(range(len(self._stages))), found.spans, strict=True):
            found.run(self._calls, at, end)
            at = end
            self._show(watch, place, batch, found)
        found.run(self._calls, at)

    def _show(self, watch: Watch, place: int, batch: int, found: Prepared) -> None:
        stage = self._stages[place]
        layer = self._layers.get(place)
        if layer is None:
            return
        shown = Writer(batch)
        x, dy = np.empty((batch, *stage.shape), np.float32), np.empty((batch, *stage.made), np.float32)
        call = found.calls[found.marks[f"stage {place}"]]
        given = Image.from_address(call.second) if layer.conv else image(stage.made)
        shown.add(do.UNPACK, "unpacking", [image(stage.shape, stage.padding)], [None, x], a=call.b)
        shown.add(do.UNPACK, "unpacking", [given], [None, dy], a=call.c if layer.conv else call.d)
        shown.done().run(self._calls)
        watch(layer.weight, x, dy)

    def _list(self, key: tuple[object, ...]) -> Prepared:
        """Give a list of calls, made when it is first asked for.

        Args:
            key: Its kind and the batch; and of a way back, whether the input's gradient is wanted, whether somebody watches,
                and whether an update moves the weights.
        """
        found = self._lists.get(key)
        if found is not None:
            return found
        kind, batch = str(key[0]), int(str(key[1]))
        wanted, watched, fused = (bool(word) for word in (*key[2:], False, False, False)[:3])
        train = kind != "evaluation"
        held = sizes(self._stages, batch, train=train, input_gradient=wanted, watched=watched)
        self._make(held, batch, whole=kind == "learn")
        writer = Writer(batch)
        if kind != "backward":
            self._write_forward(writer, held, learn=kind == "learn")
        if kind == "learn":
            logits, dlogits = self._memory["logits", 0], self._memory["dlogits", 0]
            arrays = [logits, None, dlogits, self._memory["loss", 0]]
            writer.add(do.CROSS_ENTROPY, "labels", [], arrays, mark="loss", size=self._out[0])
        if kind in ("learn", "backward"):
            self._write_backward(writer, held, (kind == "learn", wanted, watched, fused))
        found = self._lists[key] = writer.done()
        return found

    def _make(self, held: Sizes, batch: int, *, whole: bool) -> None:
        """Make the buffers of a pass, or larger ones than there are; then no list is right any more."""
        wanted = {("x", 0): held.first}
        wanted |= {("out", place): length for place, length in enumerate(held.outs)}
        wanted |= {("pair", place): length for place, length in enumerate(held.pair)}
        if whole:
            wanted |= {("logits", 0): batch * prod(self._out), ("dlogits", 0): batch * prod(self._out)}
        for key, length in wanted.items():
            if key not in self._memory or len(self._memory[key]) < length:
                self._memory[key] = buffer(length)
                self._lists.clear()
        for place, length in enumerate(held.places):
            if len(self._memory.get(("places", place), ())) < length:
                self._memory["places", place] = np.empty(length, np.uint8)
                self._lists.clear()
        if whole and ("loss", 0) not in self._memory:
            self._memory["loss", 0] = np.zeros(1)

    def _write_forward(self, writer: Writer, held: Sizes, *, learn: bool) -> None:
        first, last = self._stages[0], self._stages[-1]
        x = self._memory["x", 0]
        writer.add(do.PACK, "packing", [image(first.shape, first.padding)], [None, x], mark="x")
        larger = int(held.pair[1] > held.pair[0])
        for place, stage in enumerate(self._stages):
            out, y, layer = self._memory["out", place], x, self._layers.get(place)
            places = self._memory["places", place] if held.places[place] else None
            if layer is not None and stage.at_once:
                images = [image(stage.shape, stage.padding), image(stage.made), image(stage.out, stage.halo)]
                arrays = [layer.values, layer.bias, x, out, places]
                how: dict[str, Any] = {"layer": layer.call, "size": stage.kernel, "relu": int(stage.relu)}
                writer.add(do.CONV_POOL_FORWARD, layer.weight, images, arrays, **how)
                x = out
                continue
            if layer is not None:
                y = self._memory["pair", larger] if stage.pools else out
                images = [image(stage.shape, stage.padding)] if layer.conv else []
                what, arrays = (do.CONV_FORWARD if layer.conv else do.LINEAR_FORWARD), [layer.values, layer.bias, x, y]
                relu = int(stage.relu and not stage.pools)
                writer.add(what, layer.weight, images, arrays, layer=layer.call, relu=relu)
            if stage.pools:
                self._write_pool(writer, do.POOL_FORWARD, place, [], [y, out, places])
            x = out
        result = self._memory["logits", 0] if learn else None
        writer.add(do.UNPACK, "unpacking", [image(last.out)], [x, result], mark="y")

    def _write_backward(self, writer: Writer, held: Sizes, how: tuple[bool, ...]) -> None:
        learn, wanted, watched, fused = how
        pair = self._memory["pair", 0], self._memory["pair", 1]
        given, last = self._memory["dlogits", 0] if learn else None, image(self._stages[-1].out)
        writer.add(do.PACK, "packing", [last], [given, pair[held.roles[-1]]], mark="dy")
        result = pair[0]
        for place in reversed(range(len(self._stages))):
            begun, stage, layer = len(writer), self._stages[place], self._layers.get(place)
            mine, other = pair[held.roles[place]], pair[1 - held.roles[place]]
            asked = wanted or place > 0
            result = other
            if layer is None:
                self._write_unpool(writer, place, (mine, other), image(stage.made))
            elif stage.at_once and not asked and not watched:
                self._write_at_once(writer, place, mine, fused)
            elif layer.conv:
                self._write_conv(writer, place, (mine, other), asked, fused)
                result = mine
            else:
                self._write_linear(writer, place, (mine, other), asked, fused)
            if fused and layer is not None:
                arrays = [layer.bias, layer.dbias]
                update = self._steps.of[layer.node.params["bias"]]
                writer.add(do.SETTLE, layer.weight, [], arrays, size=layer.bias.size, update=update)
            writer.span(begun)
        if wanted:
            writer.add(do.UNPACK, "unpacking", [image(self._stages[0].shape)], [result, None], mark="dx")

    def _write_linear(self, writer: Writer, place: int, pair: tuple[Floats, Floats], asked: bool, fused: bool) -> None:
        layer = self._layers[place]
        y = self._memory["out", place] if self._stages[place].relu else None
        arrays = [layer.values, self._before(place), y, pair[0], pair[1] if asked else None, None, layer.dbias]
        self._write_weights(writer, place, [], arrays, fused)
        if not fused:
            writer.goal("f", layer.weight)
            writer.goal("g", layer.node.params["bias"])

    def _write_conv(self, writer: Writer, place: int, pair: tuple[Floats, Floats], asked: bool, fused: bool) -> None:
        stage, layer = self._stages[place], self._layers[place]
        into = image(stage.made, stage.back_halo if asked else 0)
        self._write_unpool(writer, place, pair, into)
        if not fused:
            writer.goal("e", layer.node.params["bias"])
        images = [image(stage.shape, stage.padding), into]
        if asked:
            arrays = [layer.values, pair[1], pair[0]]
            writer.add(do.CONV_BACKWARD_INPUT, layer.weight, images, arrays, layer=layer.call)
        self._write_weights(writer, place, images, [layer.values, self._before(place), pair[1], None], fused)
        if not fused:
            writer.goal("d", layer.weight)

    def _write_at_once(self, writer: Writer, place: int, given: Floats, fused: bool) -> None:
        """Take a pooled convolution's gradients, where none of its input is wanted."""
        stage, layer = self._stages[place], self._layers[place]
        images = [image(stage.shape, stage.padding), image(stage.made), image(stage.out, stage.halo)]
        held = self._memory["out", place], self._memory["places", place], given
        arrays = [layer.values, self._before(place), *held, layer.dbias, None]
        how: dict[str, Any] = {"layer": layer.call, "size": stage.kernel, "relu": int(stage.relu)}
        how |= {"update": self._steps.of[layer.weight]} if fused else {}
        writer.add(do.CONV_POOL_BACKWARD, layer.weight, images, arrays, mark=f"stage {place}", **how)
        if not fused:
            writer.goal("f", layer.node.params["bias"])
            writer.goal("g", layer.weight)

    def _write_weights(
        self, writer: Writer, place: int, images: list[Image], arrays: list[Floats | None], fused: bool
    ) -> None:
        layer = self._layers[place]
        what = do.CONV_BACKWARD_WEIGHT if layer.conv else do.LINEAR_BACKWARD
        update = {"update": self._steps.of[layer.weight]} if fused else {}
        writer.add(what, layer.weight, images, arrays, mark=f"stage {place}", layer=layer.call, **update)

    def _write_unpool(self, writer: Writer, place: int, pair: tuple[Floats, Floats], into: Image) -> None:
        """Bring the gradient behind a stage to what its layer made, from the first of a pair into the other."""
        layer = self._layers.get(place)
        arrays = [self._memory.get(("places", place)), self._memory["out", place], *pair]
        dbias = layer.dbias if layer is not None else None
        self._write_pool(writer, do.POOL_BACKWARD, place, [into], [*arrays, dbias])

    def _write_pool(
        self, writer: Writer, what: int, place: int, into: list[Image], arrays: list[NDArray[Any] | None]
    ) -> None:
        stage = self._stages[place]
        images = [image(stage.made), image(stage.out, stage.halo if stage.pools else 0), *into]
        writer.add(what, "a pool", images, arrays, size=stage.kernel, relu=int(stage.relu))

    def _before(self, place: int) -> Floats:
        """Give what a stage read."""
        found: Floats = self._memory["out", place - 1] if place else self._memory["x", 0]
        return found


def _room(given: Floats | None, shape: Shape) -> Floats:
    """Give the memory that was offered, or new one.

    Raises:
        SpecError: It is of another shape or type, or not contiguous: the core would write all the same.
    """
    if given is None:
        return buffer(prod(shape)).reshape(shape)
    if given.shape != shape or given.dtype != np.float32 or not (given.flags.c_contiguous and given.flags.writeable):
        said = f"{given.dtype}{given.shape}, or not contiguous, or not to be written"
        raise SpecError(f"memory for a result of shape {shape} is {said}")
    return given
