"""The compiled convolution against a naive one in float64: forward, both gradients, updates, refusals; on every build here."""

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.kernels.conv import ConvLayout
from edge_runtime.kernels.library import Image, Step, must
from edge_runtime.kernels.panels import address, buffer, floats
from tests.support import cores
from wire.errors import DeviceError
from wire.masks import packed

SHAPE, STARTS, INDEX = 1, 2, 3


@pytest.fixture(params=cores.CORES, ids=cores.name)
def library(request):
    yield cores.ready(request.param)
    request.param.threads(1)


@dataclass(frozen=True)
class Case:
    """A convolution and a batch; `halo` is what x has beyond its padding, and dy beyond what it needs."""

    batch: int
    channels: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    dilation: int
    sides: tuple[int, int]
    blocks: tuple[int, int]
    density: float
    halo: int
    seed: int

    @property
    def reach(self):
        return self.dilation * (self.kernel - 1)

    @property
    def out_sides(self):
        return tuple((side + 2 * self.padding - self.reach - 1) // self.stride + 1 for side in self.sides)


@st.composite
def cases(draw):
    kernel = draw(st.sampled_from([1, 2, 3, 5]))
    dilation = draw(st.integers(1, 2))
    padding = draw(st.integers(0, 3))
    least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
    side = st.integers(least, max(least, 19))
    small = st.integers(1, 6)
    return Case(
        batch=draw(st.integers(1, 40)),
        channels=(draw(small), draw(small)),
        kernel=kernel,
        stride=draw(st.integers(1, 3)),
        padding=padding,
        dilation=dilation,
        sides=(draw(side), draw(side)),
        blocks=(draw(small), draw(small)),
        density=draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        halo=draw(st.integers(0, 1)),
        seed=draw(st.integers(0, 999)),
    )


def naive(case, x, w, dy):
    """(y, dx, dw) by a loop over taps, in float64."""
    p, s, d = case.padding, case.stride, case.dilation
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    back = np.zeros_like(padded)
    height, width = case.out_sides
    y, dw = np.zeros(dy.shape), np.zeros_like(w)
    for i in range(case.kernel):
        for j in range(case.kernel):
            at = (..., slice(i * d, i * d + s * (height - 1) + 1, s), slice(j * d, j * d + s * (width - 1) + 1, s))
            y += np.einsum("nchw,oc->nohw", padded[at], w[:, :, i, j])
            dw[:, :, i, j] = np.einsum("nohw,nchw->oc", dy, padded[at])
            back[at] += np.einsum("nohw,oc->nchw", dy, w[:, :, i, j])
    return y, back[:, :, p : p + case.sides[0], p : p + case.sides[1]], dw


class Run:
    """A layout and its arrays in panels, ready for the library's calls."""

    def __init__(self, library, case):
        rng = np.random.default_rng(case.seed)
        outs, ins = case.channels
        mask = rng.random((outs, ins, case.kernel, case.kernel)) < case.density
        self.library, self.case = library, case
        self.layout = ConvLayout.of(library, packed(mask), (case.stride, case.padding, case.dilation), *case.blocks)
        must(library.calls.nk_conv_check(ctypes.byref(self.layout.call)), "layout")
        self.order = cores.order_of(self.layout, mask)
        self.weight = (rng.standard_normal(mask.shape) * mask).astype(np.float32)
        self.values = self.weight.ravel()[self.order]
        self.bias = rng.standard_normal(outs).astype(np.float32)
        self.x = rng.standard_normal((case.batch, ins, *case.sides)).astype(np.float32)
        self.dy = rng.standard_normal((case.batch, outs, *case.out_sides)).astype(np.float32)
        self.into = Image(ins, *case.sides, case.padding + case.halo)
        self.out = Image(outs, *case.out_sides, max(0, case.reach - case.padding) + case.halo)
        self.packed_x, self.packed_dy = self.pack(self.into, self.x), self.pack(self.out, self.dy)

    def pack(self, image, array):
        panels = buffer(floats(image, self.case.batch))
        must(self.library.calls.nk_pack(ctypes.byref(image), self.case.batch, address(array), address(panels)), "pack")
        return panels

    def unpack(self, sides, channels, panels):
        result = np.empty((self.case.batch, channels, *sides), np.float32)
        image = Image(channels, *sides, 0)
        must(self.library.calls.nk_unpack(ctypes.byref(image), len(result), address(panels), address(result)), "unpack")
        return result

    def forward(self, bias=True, relu=False):
        plain = Image(self.case.channels[0], *self.case.out_sides, 0)
        y = buffer(floats(plain, self.case.batch))
        y[:] = np.nan
        given = self.bias if bias else None
        arguments = (address(self.values), address(given), ctypes.byref(self.into), address(self.packed_x))
        code = self.library.calls.nk_conv_forward(
            ctypes.byref(self.layout.call), *arguments, self.case.batch, int(relu), address(y)
        )
        must(code, "forward")
        return self.unpack(self.case.out_sides, self.case.channels[0], y)

    def backward_input(self):
        dx = buffer(floats(Image(self.case.channels[1], *self.case.sides, 0), self.case.batch))
        dx[:] = np.nan
        images = (ctypes.byref(self.into), ctypes.byref(self.out))
        code = self.library.calls.nk_conv_backward_input(
            *(ctypes.byref(self.layout.call), address(self.values), *images),
            *(address(self.packed_dy), self.case.batch, address(dx)),
        )
        must(code, "backward input")
        return self.unpack(self.case.sides, self.case.channels[1], dx)

    def backward_weight(self, dvalues, step=None):
        code = self.library.calls.nk_conv_backward_weight(
            *(ctypes.byref(self.layout.call), address(self.values)),
            *(ctypes.byref(self.into), address(self.packed_x), ctypes.byref(self.out), address(self.packed_dy)),
            *(self.case.batch, address(dvalues), None if step is None else ctypes.byref(step)),
        )
        must(code, "backward weight")


def close(found, wanted):
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * scale)


def check(run):
    y, dx, dw = naive(run.case, run.x, run.weight, run.dy)
    biased = y + run.bias[:, None, None]
    close(run.forward(bias=False), y)
    close(run.forward(), biased)
    close(run.forward(relu=True), np.maximum(biased, 0))
    close(run.backward_input(), dx)
    gradient = np.full(len(run.values), 3, np.float32)
    run.backward_weight(gradient)
    close(gradient, dw.ravel()[run.order] + 3)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), threads=st.sampled_from([1, 1, 3]))
def test_as_naive(library, case, threads):
    library.threads(threads)
    check(Run(library, case))


PLAIN = Case(20, (5, 6), 3, 1, 1, 1, (8, 8), (4, 3), 0.5, 0, 0)


@pytest.mark.parametrize(
    "case",
    [
        *(
            replace(PLAIN, sides=(side, side), kernel=5, padding=2, blocks=(6, 6))
            for side in (1, 2, 4, 7, 14, 16, 28, 33)
        ),
        *(replace(PLAIN, batch=batch) for batch in (1, 4, 5, 8, 12, 13, 16, 17, 24, 28, 40)),
        *(replace(PLAIN, stride=2, batch=batch, sides=(17, 15)) for batch in (4, 8, 20)),
        replace(PLAIN, channels=(1, 1), kernel=11, stride=4, padding=2, sides=(40, 37)),
        replace(PLAIN, channels=(40, 30), blocks=(1, 40), density=1.0),  # rows and blocks of more than one chunk
        replace(PLAIN, channels=(30, 70), blocks=(70, 30), density=1.0, stride=2),  # more than one sieve to a row
        replace(PLAIN, padding=5, kernel=1, stride=3),  # more padding than reach
    ],
)
def test_shapes(library, case):
    check(Run(library, case))


def test_empty_rows(library):
    run = Run(library, replace(PLAIN, density=0.02, seed=4))
    assert (np.diff(run.layout.starts) == 0).any()
    check(run)


@pytest.mark.parametrize(
    ("momentum", "decay", "pull"), [(0, 0, 0), (0.9, 0, 0), (0.5, 0.01, 0), (0.9, 0.01, 0.1), (0, 0, 0.1)]
)
def test_update(library, momentum, decay, pull):
    run = Run(library, PLAIN)
    rng = np.random.default_rng(1)
    velocity, anchor = (rng.standard_normal(len(run.values)).astype(np.float32) for _ in range(2))
    w, v, a = (array.astype(np.float64) for array in (run.values, velocity, anchor))
    g = naive(run.case, run.x, run.weight, run.dy)[2].ravel()[run.order]
    g = momentum * v + g + decay * w + pull * (w - a)
    given = (address(velocity) if momentum else None, address(anchor) if pull else None)
    run.backward_weight(None, Step(0.1, momentum, decay, pull, *given))
    close(run.values, w - 0.1 * g)
    close(velocity, g if momentum else v)


def test_wrong_shapes_are_refused(library):
    run = Run(library, PLAIN)
    values = np.zeros(len(run.values), np.float32)
    for image in ("into", "out"):
        right = getattr(run, image)
        for channels, height, width, halo in ((9, 8, 8, 1), (right.channels, 9, 8, 1), (right.channels, 8, 7, 1)):
            setattr(run, image, Image(channels, height, width, halo))
            with pytest.raises(DeviceError, match="shape"):
                run.backward_input()
            with pytest.raises(DeviceError, match="shape"):
                run.backward_weight(values)
        setattr(run, image, right)
    run.out = Image(run.out.channels, run.out.height, run.out.width, 0)
    with pytest.raises(DeviceError, match="shape"):  # the halo is too narrow
        run.backward_input()
    run.into = Image(run.into.channels, run.into.height, run.into.width, 0)
    with pytest.raises(DeviceError, match="shape"):
        run.backward_weight(values)
    with pytest.raises(DeviceError, match="shape"):  # neither a gradient nor an update
        Run(library, PLAIN).backward_weight(None)
    with pytest.raises(DeviceError, match="shape"):  # momentum without velocity
        Run(library, PLAIN).backward_weight(None, Step(0.1, 0.9, 0, 0, None, None))


def spoiled(layout, name, position, value):
    """Give the code for a layout one number of which is another."""
    array = getattr(layout, name).copy()
    array.flat[position] = value
    call = type(layout.call).from_buffer_copy(layout.call)
    setattr(call, name, array.ctypes.data)
    return call, array


@pytest.mark.parametrize(
    ("name", "position", "value", "code"),
    [
        ("starts", 0, 1, STARTS),
        ("starts", 0, -1, STARTS),
        ("starts", 3, 1 << 30, STARTS),
        ("starts", -1, 10, STARTS),
        ("starts_t", 2, -5, STARTS),
        ("starts_t", -1, 1 << 20, STARTS),
        ("codes", 0, 4 * 9, INDEX),
        ("codes", -1, 2 * 9, INDEX),  # the last block has two channels
        ("codes", 3, 0, INDEX),
        ("codes_t", 0, 3 * 9, INDEX),
        ("codes_t", -1, 2 * 9, INDEX),
        ("places", 0, 65535, INDEX),
        ("places", -1, 0, INDEX),
    ],
)
def test_bad_indices_are_refused(library, name, position, value, code):
    layout = ConvLayout.of(library, packed(np.random.default_rng(0).random((5, 6, 3, 3)) < 0.6), (1, 1, 1), 4, 3)
    assert library.calls.nk_conv_check(ctypes.byref(layout.call)) == 0
    call, _kept_alive = spoiled(layout, name, position, value)
    assert library.calls.nk_conv_check(ctypes.byref(call)) == code


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, 0)
            for name in ("out_channels", "in_channels", "kernel", "stride", "dilation", "in_block", "out_block")
        ),
        *(("in_blocks", 3), ("out_blocks", 1), ("in_block", 20000), ("kernel", 1 << 20), ("padding", -1), ("kept", -1)),
    ],
)
def test_bad_sizes_are_refused(library, name, value):
    layout = ConvLayout.of(library, packed(np.random.default_rng(0).random((5, 6, 3, 3)) < 0.6), (1, 1, 1), 4, 3)
    call = type(layout.call).from_buffer_copy(layout.call)
    setattr(call, name, value)
    assert library.calls.nk_conv_check(ctypes.byref(call)) == SHAPE


def test_every_single_spoiled_index_is_refused(library):
    layout = ConvLayout.of(library, packed(np.random.default_rng(2).random((3, 4, 2, 2)) < 0.5), (1, 1, 1), 3, 2)
    for name in ("starts", "codes", "starts_t", "codes_t", "places"):
        right = getattr(layout, name)
        for position in range(right.size):
            for off in (-1, 1, 7):
                call, _kept_alive = spoiled(
                    layout, name, position, right.flat[position].astype(np.int64) + off & 0xFFFF
                )
                assert library.calls.nk_conv_check(ctypes.byref(call)), (name, position, off)
