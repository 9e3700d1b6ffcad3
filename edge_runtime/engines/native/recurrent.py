"""LSTM and GRU through time, step by step, each step over the whole batch.

Training holds what the gates of all steps became until the backward pass, which turns each into its gradient in place; the
weights' gradients are then one product for each gate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from edge_runtime.engines.native.at import Array, At, Op
from edge_runtime.engines.native.gates import Step, core, gru_backward, gru_forward, lstm_backward, lstm_forward

_ROWS = 256


def flat(array: Array) -> Array:
    """See (samples, steps, width) as a matrix."""
    return array.reshape(-1, array.shape[-1])


def column_sums(matrix: Array) -> Array:
    """Sum a matrix's rows, in double over sums of a few hundred; nothing is made that is as large as the matrix."""
    total = np.zeros(matrix.shape[1])
    for row in range(0, len(matrix), _ROWS):
        total += matrix[row : row + _ROWS].sum(axis=0)
    return total.astype(matrix.dtype)


def _by_gates(at: At, role: str, gates: list[Array], read: Array) -> None:
    """Hand a weight's gradient on: of each gate (rows, hidden) the product with what was read (rows, width)."""
    (hidden, width) = gates[0].shape[1], read.shape[1]
    room = at.scratch["weight"][: hidden * width].reshape(hidden, width)
    for place, gate in enumerate(gates):
        at.sink(role, np.matmul(gate.T, read, out=room), place * hidden)


def _columns(gates: Array, hidden: int) -> list[Array]:
    return [gates[..., start : start + hidden] for start in range(0, gates.shape[-1], hidden)]


def _ask(at: At, t: int) -> None:
    """Multiply the input of a step into scratch ``more``, and the output before it into ``gates``."""
    np.matmul(at.x[0][:, t], at.params["weight_ih"].T, out=at.scratch["more"])
    if t:
        np.matmul(at.y[:, t - 1], at.params["weight_hh"].T, out=at.scratch["gates"])


def _sigmoid(z: Array, room: Array, into: Array) -> None:
    """Give the sigmoid, exact to the last digits of small ones too; an exponential beyond all numbers gives 0 (`_quiet`)."""
    np.negative(z, out=room)
    np.exp(room, out=room)
    room += 1
    np.reciprocal(room, out=into)


def _lstm(at: At) -> None:
    bias = at.params["bias_ih"] + at.params["bias_hh"]
    library = core(at.y)
    step = _lstm_step(at, bias) if library is None else lstm_forward(library, at, bias)
    for t in range(at.y.shape[1]):
        _ask(at, t)
        step(t)


def _lstm_step(at: At, bias: Array) -> Step:
    y, gates, cells = at.y, at.saved.get("gates"), at.saved.get("cells")
    hidden = y.shape[2]
    z, more, part = (at.scratch[name] for name in ("gates", "more", "part"))

    def step(t: int) -> None:
        more[...] += bias
        if t:
            more[...] += z
        now = z if gates is None else gates[:, t]
        _sigmoid(more, z, now)
        (i, f, g, o) = _columns(now, hidden)
        np.tanh(more[:, 2 * hidden : 3 * hidden], out=g)
        cell = at.scratch["cell"] if cells is None else cells[t]
        np.multiply(i, g, out=part)
        if t:
            np.multiply(f, cell if cells is None else cells[t - 1], out=cell)
            cell += part
        else:
            np.copyto(cell, part)
        np.tanh(cell, out=part)
        np.multiply(o, part, out=y[:, t])

    return step


def _lstm_back(at: At) -> None:
    gates, weight = at.saved["gates"], at.params["weight_hh"]
    at.scratch["cell"].fill(0)
    library = core(at.y)
    step = _lstm_back_step(at) if library is None else lstm_backward(library, at)
    for t in reversed(range(at.y.shape[1])):
        if t + 1 < at.y.shape[1]:
            np.matmul(gates[:, t + 1], weight, out=at.scratch["hidden"])
        step(t)
    _hand_on(at, gates, None)


def _lstm_back_step(at: At) -> Step:
    gates, cells, dy = at.saved["gates"], at.saved["cells"], at.dy
    last, hidden = dy.shape[1] - 1, dy.shape[2]
    dz, slopes, dh, dc, part = (at.scratch[name] for name in ("gates", "slopes", "hidden", "cell", "part"))
    (di, df, dg, do), slope = _columns(dz, hidden), slopes[:, 2 * hidden : 3 * hidden]

    def step(t: int) -> None:
        z = gates[:, t]
        (i, f, g, o) = _columns(z, hidden)
        _came(dh, dy[:, t], first=t == last)
        np.tanh(cells[t], out=part)
        np.multiply(dh, part, out=do)
        np.multiply(dh, o, out=dh)
        np.add(dc, dh, out=dc)
        np.multiply(part, part, out=part)
        np.multiply(part, dh, out=part)
        np.subtract(dc, part, out=dc)
        np.multiply(dc, g, out=di)
        np.multiply(dc, i, out=dg)
        if t:
            np.multiply(dc, cells[t - 1], out=df)
        else:
            df.fill(0)
        np.multiply(dc, f, out=dc)
        np.subtract(1, z, out=slopes)  # of a sigmoid s (1 - s), of the tanh 1 - g g
        np.multiply(slopes, z, out=slopes)
        np.multiply(g, g, out=slope)
        np.subtract(1, slope, out=slope)
        np.multiply(dz, slopes, out=z)

    return step


def _came(dh: Array, dy: Array, *, first: bool) -> None:
    if first:
        np.copyto(dh, dy)
    else:
        np.add(dh, dy, out=dh)


def _hand_on(at: At, gates: Array, inner: Array | None) -> None:
    """Give the gradients of input, weights and biases, of those of all steps' gates before their functions.

    Args:
        at: The node.
        gates: (samples, steps, gates); their first steps are overwritten.
        inner: Of the last gate's part that comes from the hidden state, where it is another; overwritten too.
    """
    hidden = at.y.shape[2]
    if at.dx[0] is not None:
        np.matmul(flat(gates), at.params["weight_ih"], out=flat(at.dx[0]))
    bias = column_sums(flat(gates))
    at.sink("bias_ih", bias.copy())
    if inner is not None:
        bias[-hidden:] = column_sums(flat(inner))
    at.sink("bias_hh", bias)
    _by_gates(at, "weight_ih", _columns(flat(gates), hidden), flat(at.x[0]))
    # A step reads the output of the one before; of a sample's first step that would be another sample's, so that it counts 0.
    gates[:, 0] = 0
    read = _columns(flat(gates)[1:], hidden)
    if inner is not None:
        inner[:, 0] = 0
        read[-1] = flat(inner)[1:]
    _by_gates(at, "weight_hh", read, flat(at.y)[:-1])


def _gru(at: At) -> None:
    library = core(at.y)
    step = _gru_step(at) if library is None else gru_forward(library, at)
    for t in range(at.y.shape[1]):
        _ask(at, t)
        step(t)


def _gru_step(at: At) -> Step:
    y, gates, inners = at.y, at.saved.get("gates"), at.saved.get("inner")
    hidden = y.shape[2]
    both, last = slice(0, 2 * hidden), slice(2 * hidden, 3 * hidden)
    z, more, part = (at.scratch[name] for name in ("gates", "more", "part"))
    bias, offset = at.params["bias_ih"].copy(), at.params["bias_hh"][last]
    bias[both] += at.params["bias_hh"][both]

    def step(t: int) -> None:
        inner = at.scratch["inner"] if inners is None else inners[:, t]
        more[...] += bias
        if t:
            np.add(z[:, last], offset, out=inner)
            more[:, both] += z[:, both]
        else:
            inner[...] = offset
        now = z if gates is None else gates[:, t]
        (r, u, n) = _columns(now, hidden)
        _sigmoid(more[:, both], z[:, both], now[:, both])
        np.multiply(r, inner, out=part)
        np.add(part, more[:, last], out=part)
        np.tanh(part, out=n)
        if t:
            np.subtract(y[:, t - 1], n, out=part)
        else:
            np.negative(n, out=part)
        np.multiply(part, u, out=part)
        np.add(part, n, out=y[:, t])

    return step


def _gru_back(at: At) -> None:
    weight, library = at.params["weight_hh"], core(at.y)
    step = _gru_back_step(at) if library is None else gru_backward(library, at)
    for t in reversed(range(at.y.shape[1])):
        if t + 1 < at.y.shape[1]:
            np.matmul(at.scratch["gates"], weight, out=at.scratch["hidden"])
        step(t)
    _hand_on(at, at.saved["gates"], at.saved["inner"])


def _gru_back_step(at: At) -> Step:
    gates, inners, dy = at.saved["gates"], at.saved["inner"], at.dy
    last, hidden = dy.shape[1] - 1, dy.shape[2]
    both = slice(0, 2 * hidden)
    dz, slopes, dh, carry, part = (at.scratch[name] for name in ("gates", "slopes", "hidden", "carry", "part"))
    (dr, du, dn), rest = _columns(dz, hidden), dz[:, both]

    def step(t: int) -> None:
        (r, u, n) = _columns(gates[:, t], hidden)
        inner, sigmoids = inners[:, t], gates[:, t, both]
        if t < last:
            np.add(dh, carry, out=dh)
        _came(dh, dy[:, t], first=t == last)
        if t:
            np.subtract(at.y[:, t - 1], n, out=du)
        else:
            np.negative(n, out=du)
        np.multiply(du, dh, out=du)
        np.multiply(dh, u, out=carry)
        np.subtract(dh, carry, out=dh)
        np.multiply(n, n, out=part)
        np.multiply(part, dh, out=part)
        np.subtract(dh, part, out=dh)  # the gradient of n before its tanh
        np.multiply(dh, inner, out=dr)
        np.multiply(dh, r, out=dn)
        np.copyto(inner, dn)
        np.copyto(n, dh)
        np.subtract(1, sigmoids, out=slopes)
        np.multiply(slopes, sigmoids, out=slopes)
        np.multiply(rest, slopes, out=rest)
        np.copyto(sigmoids, rest)

    return step


def _quiet(forward: Callable[[At], None]) -> Callable[[At], None]:
    """Let exponentials go beyond all numbers without a word; said once a pass, as it takes as long as a product."""

    def run(at: At) -> None:
        with np.errstate(over="ignore"):
            forward(at)

    return run


RECURRENT: Mapping[str, Op] = {"lstm": Op(_quiet(_lstm), _lstm_back), "gru": Op(_quiet(_gru), _gru_back)}
