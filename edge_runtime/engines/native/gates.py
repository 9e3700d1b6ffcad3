"""One step of an LSTM or a GRU behind its products, by the compiled core: a function makes it, to be called by number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_runtime.engines.native.at import Array, At
from edge_runtime.kernels.library import Library, must, open_library

Step = Callable[[int], None]
"""Does step t."""


def core(of: Array) -> Library | None:
    """Give the compiled core if there is one and it can take such arrays."""
    return open_library() if of.dtype == np.float32 else None


def _address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


def _at(start: int | None, entries: int) -> int | None:
    return None if start is None else start + 4 * entries


def lstm_forward(library: Library, at: At, bias: Array) -> Step:
    """Read scratch ``more``, of the input, and ``gates``, of the output before; write output, and gates and cells."""
    (samples, steps, hidden), run = at.y.shape, library.calls.nk_lstm_forward
    given, asked, y = at.scratch["more"].ctypes.data, at.scratch["gates"].ctypes.data, at.y.ctypes.data
    offset, gates, cells = bias.ctypes.data, _address(at.saved.get("gates")), _address(at.saved.get("cells"))
    cell = at.scratch["cell"].ctypes.data

    def step(t: int) -> None:
        now = cell if cells is None else cells + 4 * t * samples * hidden
        before = None if not t else cell if cells is None else now - 4 * samples * hidden
        code = run(
            *(samples, hidden, given, asked if t else None, offset, before, now),
            *(_at(gates, 4 * t * hidden), 4 * steps * hidden, y + 4 * t * hidden, steps * hidden),
        )
        must(code, at.node.name)

    return step


def lstm_backward(library: Library, at: At) -> Step:
    """Read scratch ``hidden``, what comes back from the next step; turn saved gates into their gradients."""
    (samples, steps, hidden), run = at.y.shape, library.calls.nk_lstm_backward
    asked, carried, dy = at.scratch["hidden"].ctypes.data, at.scratch["cell"].ctypes.data, at.dy.ctypes.data
    gates, cells = at.saved["gates"].ctypes.data, at.saved["cells"].ctypes.data

    def step(t: int) -> None:
        now = cells + 4 * t * samples * hidden
        code = run(
            *(samples, hidden, dy + 4 * t * hidden, steps * hidden, asked if t + 1 < steps else None, now),
            *(now - 4 * samples * hidden if t else None, gates + 16 * t * hidden, 4 * steps * hidden, carried),
        )
        must(code, at.node.name)

    return step


def gru_forward(library: Library, at: At) -> Step:
    """Read scratch ``more``, of the input, and ``gates``, of the output before; write output, gates and inner."""
    (samples, steps, hidden), run = at.y.shape, library.calls.nk_gru_forward
    given, asked, y = at.scratch["more"].ctypes.data, at.scratch["gates"].ctypes.data, at.y.ctypes.data
    biases = [at.params[role].ctypes.data for role in ("bias_ih", "bias_hh")]
    gates, inner = _address(at.saved.get("gates")), _address(at.saved.get("inner"))

    def step(t: int) -> None:
        now = y + 4 * t * hidden
        code = run(
            *(samples, hidden, given, asked if t else None, *biases, now - 4 * hidden if t else None),
            *(_at(gates, 3 * t * hidden), 3 * steps * hidden, _at(inner, t * hidden), steps * hidden),
            *(now, steps * hidden),
        )
        must(code, at.node.name)

    return step


def gru_backward(library: Library, at: At) -> Step:
    """Read scratch ``hidden``, what comes back from the next step; turn saved gates and inner into their gradients."""
    (samples, steps, hidden), run = at.y.shape, library.calls.nk_gru_backward
    asked, carry, dz = (at.scratch[name].ctypes.data for name in ("hidden", "carry", "gates"))
    dy, y, gates, inner = (array.ctypes.data for array in (at.dy, at.y, at.saved["gates"], at.saved["inner"]))

    def step(t: int) -> None:
        here = 4 * t * hidden
        code = run(
            *(samples, hidden, dy + here, steps * hidden, asked if t + 1 < steps else None),
            *(y + here - 4 * hidden if t else None, steps * hidden, gates + 3 * here, 3 * steps * hidden),
            *(inner + here, steps * hidden, dz, carry),
        )
        must(code, at.node.name)

    return step
