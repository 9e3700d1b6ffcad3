"""The issue's nine layers: dense by torch's raw operations, sparse at the C ABI, the results of both compared.

Both sides do the same work: output, gradient of the input, of the weights (the sparse side at the mask) and of the bias.
Neither pays for autograd or an optimizer. The sparse side is taken in two accountings:

``chain``: activations come and go as a layer within a stretch has them, in panels without a halo, so that a convolution
pays for the copies that add halos, and gets its bias's gradient from one of them;
``whole``: besides, the input, the output and both gradients are brought from and to torch's layout.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edge_runtime.kernels import panels
from edge_runtime.kernels.kits import NativeKit
from edge_runtime.kernels.library import Library, must, open_library, why_not
from tests.bench._paired import faster, keep_memory, take_turns
from wire.masks import packed
from wire.spec import Node

BATCH = 20
DENSITIES = (1.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01)
DENSITIES_AVX2 = (1.0, 0.7, 0.5, 0.3, 0.1, 0.05, 0.01)
ERROR = 2e-4
"""Largest difference between two results, relative to the largest entry: sums of up to 15,000 products in float32."""

_ROUNDS = 7
_LEAST = 0.003
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's sides.

    Attributes:
        out: Rows or output channels.
        into: Columns or input channels.
        kernel: Side of a convolution's kernel, its padding half of that and its stride 1; 0 for a linear layer.
        side: Height and width of a convolution's input and output.
    """

    out: int
    into: int
    kernel: int = 0
    side: int = 1

    @property
    def name(self) -> str:
        """For people."""
        if not self.kernel:
            return f"linear {self.into}->{self.out}"
        return f"conv {self.into}->{self.out} {self.kernel}x{self.kernel}@{self.side}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out, self.into, self.kernel, self.kernel) if self.kernel else (self.out, self.into)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (self.into, self.side, self.side) if self.kernel else (self.into,)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (self.out, self.side, self.side) if self.kernel else (self.out,)

    @property
    def node(self) -> Node:
        """The layer as the spec has it."""
        if not self.kernel:
            return Node("w", "linear", ("input",), {"weight": "w", "bias": "b"})
        attrs = {"kernel": self.kernel, "stride": 1, "padding": self.kernel // 2}
        return Node("w", "conv2d", ("input",), {"weight": "w", "bias": "b"}, attrs)


LAYERS = (
    Layer(2048, 3136),
    Layer(300, 784),
    Layer(100, 300),
    Layer(512, 512),
    Layer(62, 2048),
    Layer(32, 1, 5, 28),
    Layer(64, 32, 5, 14),
    Layer(128, 128, 3, 16),
    Layer(512, 512, 3, 4),
)


@dataclass(frozen=True, slots=True)
class Task:
    """What a layer is given: the same for whoever computes it.

    Attributes:
        layer: Its sides.
        mask: Random and uniform, of the weight's shape, bool.
        weight: Zero where the mask is false.
        bias: ``(out,)``.
        x: ``(batch, *input_shape)``.
        dy: ``(batch, *output_shape)``.
    """

    layer: Layer
    mask: Array
    weight: Array
    bias: Array
    x: Array
    dy: Array

    @classmethod
    def of(cls, layer: Layer, density: float) -> Task:
        """Draw one, the same at every call."""
        rng = np.random.default_rng(7)
        count = int(np.prod(layer.shape))
        mask = np.zeros(count, np.bool_)
        mask[rng.choice(count, round(density * count), replace=False)] = True
        mask = mask.reshape(layer.shape)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32)

        weight = np.where(mask, normal(*layer.shape), np.float32(0))
        x, dy = normal(BATCH, *layer.input_shape), normal(BATCH, *layer.output_shape)
        return cls(layer, mask, weight, normal(layer.out), x, dy)


@dataclass(frozen=True, slots=True)
class Results:
    """What a layer gives; `dw` is of the weight's shape, zero where the mask is false."""

    y: Array
    dx: Array
    dw: Array
    db: Array

    def differ(self, other: Results) -> float:
        """Give the largest difference, relative to the largest entry of the same result."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("y", "dx", "dw", "db")]
        return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def dense(task: Task) -> tuple[Callable[[], None], Callable[[], Results]]:
    """Give the layer by torch's raw operations, as a call to be timed and its latest results."""
    (w, b, x, dy) = (torch.from_numpy(a) for a in (task.weight, task.bias, task.x, task.dy))
    if task.layer.kernel:
        padding = task.layer.kernel // 2
        got: list[Any] = []

        def convolve() -> None:
            got[:] = [torch.ops.aten.convolution(x, w, b, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1)]
            got[1:] = torch.ops.aten.convolution_backward(
                dy, x, w, [task.layer.out], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, True]
            )

        return convolve, lambda: Results(got[0].numpy(), got[1].numpy(), got[2].numpy() * task.mask, got[3].numpy())
    y, dx, dw, db = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w), torch.empty_like(b)

    def multiply() -> None:
        torch.addmm(b, x, w.t(), out=y)
        torch.mm(dy, w, out=dx)
        torch.mm(dy.t(), x, out=dw)
        torch.sum(dy, 0, out=db)

    return multiply, lambda: Results(y.numpy(), dx.numpy(), dw.numpy() * task.mask, db.numpy())


class Sparse:
    """The layer at the C ABI in one layout.

    Attributes:
        layout: Where the kept values stand.
    """

    def __init__(self, library: Library, task: Task, way: str) -> None:
        kit = NativeKit(library)
        layer = task.layer
        self.layout: Any = kit.layout(way, layer.node, packed(task.mask))
        check = library.calls.nk_conv_check if layer.kernel else library.calls.nk_linear_check
        must(check(ctypes.byref(self.layout.call)), layer.name)
        self._task, self._calls = task, library.calls
        padding = layer.kernel // 2
        self._in, self._out = panels.image(layer.input_shape), panels.image(layer.output_shape)
        self._in_halo, self._out_halo = (panels.image(s, padding) for s in (layer.input_shape, layer.output_shape))
        self._arrays: dict[str, Array] = {
            "values": panels.buffer(self.layout.kept),
            "dvalues": panels.buffer(self.layout.kept),
            "bias": task.bias.copy(),
            "dbias": np.zeros(layer.out, np.float32),
            **{name: panels.buffer(panels.floats(self._in, BATCH)) for name in ("x", "dx")},
            **{name: panels.buffer(panels.floats(self._out, BATCH)) for name in ("y", "dy")},
            "x_halo": panels.buffer(panels.floats(self._in_halo, BATCH)),
            "dy_halo": panels.buffer(panels.floats(self._out_halo, BATCH)),
            **{f"torch_{n}": np.ascontiguousarray(a) for n, a in (("x", task.x), ("dy", task.dy))},
            "torch_y": np.empty_like(task.dy),
            "torch_dx": np.empty_like(task.x),
        }
        self._arrays["values"][:] = self.layout.from_c_order(task.weight[task.mask])
        for image, name in ((self._in, "x"), (self._out, "dy")):
            must(self._calls.nk_pack(image, BATCH, self._at(f"torch_{name}"), self._at(name)), name)
        self._forward, self._backward = self._convolution() if layer.kernel else self._linear()
        pack_x = self._bound("nk_pack", self._in_halo, BATCH, "torch_x", "x_halo" if layer.kernel else "x")
        self._packs = (
            pack_x,
            self._bound("nk_pack", self._out, BATCH, "torch_dy", "dy"),
            self._bound("nk_unpack", self._out, BATCH, "y", "torch_y"),
            self._bound("nk_unpack", self._in, BATCH, "dx", "torch_dx"),
        )

    def chain(self) -> None:
        """Run it as a layer within a stretch."""
        for call in (*self._forward, *self._backward):
            call()

    def whole(self) -> None:
        """Run it from and to torch's layout; its input gets its halo on the way in."""
        pack_x, pack_dy, unpack_y, unpack_dx = self._packs
        pack_x()
        self._forward[-1]()
        unpack_y()
        pack_dy()
        for call in self._backward:
            call()
        unpack_dx()

    def results(self, run: Callable[[], None]) -> Results:
        """Run once, from gradients of zero, and give what came out."""
        for name in ("dvalues", "dbias"):
            self._arrays[name].fill(0)
        run()
        for image, name in ((self._out, "y"), (self._in, "dx")):
            must(self._calls.nk_unpack(image, BATCH, self._at(name), self._at(f"torch_{name}")), name)
        dw = np.zeros(self._task.weight.shape, np.float32)
        dw[self._task.mask] = self.layout.to_c_order(self._arrays["dvalues"])
        arrays = (self._arrays["torch_y"], self._arrays["torch_dx"], dw)
        return Results(*(a.copy() for a in arrays), self._arrays["dbias"].copy())

    def _at(self, name: str) -> int | None:
        return panels.address(self._arrays[name])

    def _bound(self, function: str, *args: Any) -> Callable[[], None]:
        """Bind a function of the core to arguments; a name stands for an array."""
        call = getattr(self._calls, function)
        found = [self._at(a) if isinstance(a, str) else ctypes.byref(a) if _struct(a) else a for a in args]

        def run() -> None:
            if code := call(*found):
                must(code, function)

        return run

    def _linear(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        layout = self.layout.call
        forward = self._bound("nk_linear_forward", layout, "values", "bias", "x", BATCH, 0, "y")
        into = ("dx", "dvalues", "dbias", None)
        return [forward], [self._bound("nk_linear_backward", layout, "values", "x", None, "dy", BATCH, *into)]

    def _convolution(self) -> tuple[list[Callable[[], None]], list[Callable[[], None]]]:
        layout, plain, halo = self.layout.call, self._in, self._in_halo
        out, grown = self._out, self._out_halo
        forward = [
            self._bound("nk_pool_forward", plain, BATCH, 1, 0, "x", halo, "x_halo", None),
            self._bound("nk_conv_forward", layout, "values", "bias", halo, "x_halo", BATCH, 0, "y"),
        ]
        to_halo = (out, BATCH, 1, 0, None, out, "y", "dy", grown, "dy_halo", "dbias")
        weight = ("values", halo, "x_halo", grown, "dy_halo", BATCH, "dvalues", None)
        backward = [
            self._bound("nk_pool_backward", *to_halo),
            self._bound("nk_conv_backward_weight", layout, *weight),
            self._bound("nk_conv_backward_input", layout, "values", halo, grown, "dy_halo", BATCH, "dx"),
        ]
        return forward, backward


def _struct(value: Any) -> bool:
    return isinstance(value, ctypes.Structure)


def fastest(library: Library, task: Task) -> tuple[str, Sparse]:
    """Build the layer in the layout that a short trial finds fastest, as the chooser would."""
    density = float(task.mask.mean())
    ways = NativeKit(library).ways(task.layer.node, task.layer.shape, task.layer.input_shape, density)
    best: tuple[str, Sparse] | None = None
    for way in ways:
        candidate = Sparse(library, task, way)
        if best is not None:
            times = take_turns({"old": best[1].chain, "new": candidate.chain}, 3, _LEAST / 3)
            if faster(times, "new", "old") <= 1.0:
                continue
        best = (way, candidate)
    assert best is not None, task.layer
    return best


def against_dense(library: Library) -> Iterator[dict[str, Any]]:
    """Time every layer at every density against dense.

    Yields:
        ``layer`` and ``density``, the layout's ``way``, how many times faster ``chain`` and ``whole`` are, and ``seconds``
        by name. A wrong result ends it all.
    """
    for layer in LAYERS:
        for density in DENSITIES if library.isa == "avx512" else DENSITIES_AVX2:
            task = Task.of(layer, density)
            run, results = dense(task)
            run()
            way, ours = fastest(library, task)
            for one in (ours.chain, ours.whole):
                error = ours.results(one).differ(results())
                assert error < ERROR, (layer.name, density, way, error)
            times = take_turns({"dense": run, "chain": ours.chain, "whole": ours.whole}, _ROUNDS, _LEAST)
            yield {
                "layer": layer.name,
                "density": density,
                "kept": ours.layout.kept,
                "bytes": ours.layout.bytes_index + 4 * ours.layout.kept,
                "way": way,
                **{name: faster(times, name, "dense") for name in ("chain", "whole")},
                "seconds": {name: float(np.median(took)) for name, took in times.items()},
            }


def two_threads(library: Library) -> Iterator[dict[str, Any]]:
    """Time every layer at a few densities with one thread and with two, by the wall, each in the layout that suits it.

    Yields:
        ``layer``, ``density``, ``one`` and ``two``: the least seconds of many turns, since others use the machine.
    """
    kit = NativeKit(library)
    for layer in LAYERS:
        for density in (0.3, 0.1, 0.05):
            task, least = Task.of(layer, density), {"1": math.inf, "2": math.inf}
            for way in kit.ways(layer.node, layer.shape, layer.input_shape, density):
                ours = Sparse(library, task, way)

                def threaded(count: int, ours: Sparse = ours) -> Callable[[], None]:
                    def run() -> None:
                        library.calls.nk_threads(count)
                        ours.chain()

                    return run

                times = take_turns({count: threaded(int(count)) for count in least}, _ROUNDS, _LEAST, time.perf_counter)
                least = {count: min(seconds, *times[count]) for count, seconds in least.items()}
            yield {"layer": layer.name, "density": density, "one": least["1"], "two": least["2"]}
    library.threads(1)


def main(what: str) -> None:
    """Print findings as JSON lines: what a child process of `tests.bench.kernels` does."""
    torch.set_num_threads(1)
    keep_memory()
    library = open_library()
    assert library is not None, why_not()
    library.threads(1)
    if what == "peers":
        from tests.bench._peers import against_peers

        found = against_peers(library)
    else:
        found = {"dense": against_dense, "threads": two_threads}[what](library)
    for one in found:
        print(json.dumps({"isa": library.isa, **one}), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
