"""Other sparse training on CPUs, layer by layer: torch.sparse always, SparseProp and PruneFL's extension where installed.

Nothing of them is part of this repository. To have them compared, put their modules on PYTHONPATH:

- SparseProp (Nikdan et al., ICML 2023): ``pip install sparseprop``, or its repository, github.com/IST-DASLab/sparseprop,
  built by its setup.py against the same Python; the module is ``backend``. It needs AVX2.
- PruneFL (Jiang et al., TNNLS 2022): github.com/jiangyuang/PruneFL, ``python setup.py install`` with the C++ standard
  that the installed torch asks for; the module is ``sparse_conv2d``. Its linear layers are torch's own COO products.

Each is met in the accounting of the layout that it reads: matrix products with the batch last against our ``chain``,
convolutions in torch's layout against our ``whole``. Where a peer could be timed in two ways, the faster one counts.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from edge_runtime.kernels.library import Library
from tests.bench._layers import BATCH, ERROR, LAYERS, Results, Task, dense, fastest
from tests.bench._paired import faster, take_turns

Peer = tuple[Callable[[], None], Callable[[], Results]]
"""One training step of the layer, and its latest results."""

DENSITIES = (0.3, 0.1, 0.01)
_ROUNDS = 5
_LEAST = 0.002
_STACK_MAX = 2_000_000
"""Non-zeros above which SparseProp's private copies outgrow a stack of 8 MiB and its process dies."""


def against_peers(library: Library) -> Iterator[dict[str, Any]]:
    """Time ours against every peer that is installed.

    Yields:
        ``peer``, ``layer``, ``density``, the accounting ``ours`` and how many times ``faster`` ours is. A peer's result that
        is wrong ends it all.
    """
    warnings.simplefilter("ignore")  # sparse CSR tells of its beta state, PruneFL's extension of old names
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise RuntimeError("peers bring threads of their own; set OMP_NUM_THREADS=1")
    for layer in LAYERS:
        for density in DENSITIES:
            task = Task.of(layer, density)
            run, results = dense(task)
            run()
            right = results()
            _, ours = fastest(library, task)
            for name, make in (_convolutions() if layer.kernel else _matrices()).items():
                peer, given = make(task)
                peer()
                error = given().differ(right)
                assert error < ERROR, (name, layer.name, density, error)
                way = "whole" if layer.kernel else "chain"
                times = take_turns({"peer": peer, "ours": getattr(ours, way)}, _ROUNDS, _LEAST)
                yield {
                    "peer": name,
                    "layer": layer.name,
                    "density": density,
                    "ours": way,
                    "faster": faster(times, "ours", "peer"),
                    "seconds": {side: float(np.median(took)) for side, took in times.items()},
                }


def missing() -> list[str]:
    """Name the peers that are not installed."""
    peers = {"SparseProp": "backend", "PruneFL": "sparse_conv2d"}
    return [name for name, module in peers.items() if _module(module) is None]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _matrices() -> Mapping[str, Callable[[Task], Peer]]:
    found = {"torch.sparse CSR, raw": _csr_raw, "torch.sparse CSR, autograd": _csr_autograd, "PruneFL": _prunefl_linear}
    return found | ({"SparseProp": _sparseprop_linear} if _module("backend") else {})


def _convolutions() -> Mapping[str, Callable[[Task], Peer]]:
    found: dict[str, Callable[[Task], Peer]] = {"torch.sparse CSR, unfolded": _csr_unfolded}
    found |= {"SparseProp": _sparseprop_conv} if _module("backend") else {}
    return found | ({"PruneFL": _prunefl_conv} if _module("sparse_conv2d") else {})


def _tensors(task: Task, *, last: bool) -> tuple[torch.Tensor, ...]:
    """Give weight (as a matrix), bias, x and dy; with `last` the batch last."""
    (w, b, x, dy) = (torch.from_numpy(a) for a in (task.weight, task.bias, task.x, task.dy))
    w = w.reshape(len(w), -1)
    return (w, b, x.t().contiguous(), dy.t().contiguous()) if last else (w, b, x, dy)


def _csr(matrix: torch.Tensor) -> torch.Tensor:
    """Give a matrix in torch's CSR with 32-bit indices, which its library takes without copying."""
    wide = matrix.to_sparse_csr()
    parts = (wide.crow_indices().int(), wide.col_indices().int(), wide.values())
    return torch.sparse_csr_tensor(*parts, size=matrix.shape)


def _csr_raw(task: Task) -> Peer:
    """Products by hand: the transposed copy is kept, and not charged for following the weights."""
    w, b, x, dy = _tensors(task, last=True)
    rows, columns = _csr(w), _csr(w.t().contiguous())
    empty = torch.sparse_csr_tensor(rows.crow_indices(), rows.col_indices(), torch.zeros_like(rows.values()), w.shape)
    got: list[Any] = []

    def run() -> None:
        got[:] = (
            torch.mm(rows, x).add_(b[:, None]),
            torch.mm(columns, dy),
            torch.sparse.sampled_addmm(empty, dy, x.t(), beta=0.0),
            dy.sum(1),
        )

    return run, lambda: Results(got[0].t().numpy(), got[1].t().numpy(), got[2].to_dense().numpy(), got[3].numpy())


@torch.inference_mode(mode=False)
def _csr_autograd(task: Task) -> Peer:
    w, b, x, dy = (t.clone() for t in _tensors(task, last=True))
    weight = _csr(w).requires_grad_()
    x.requires_grad_()
    bias = b[:, None].clone().requires_grad_()
    got: list[Any] = []

    @torch.inference_mode(mode=False)
    def run() -> None:
        y = torch.sparse.mm(weight, x) + bias
        got[:] = [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy)]

    def results() -> Results:
        dw = got[2].to_dense().numpy() * task.mask
        return Results(got[0].t().numpy(), got[1].t().numpy(), dw, got[3].ravel().numpy())

    return run, results


def _csr_unfolded(task: Task) -> Peer:
    """A convolution as a CSR product over unfolded inputs; torch.sparse has no other."""
    w, b, x, dy = _tensors(task, last=False)
    rows, columns = _csr(w), _csr(w.t().contiguous())
    empty = torch.sparse_csr_tensor(rows.crow_indices(), rows.col_indices(), torch.zeros_like(rows.values()), w.shape)
    layer, got = task.layer, []
    kernel, padding = (layer.kernel,) * 2, layer.kernel // 2

    def run() -> None:
        unfolded = F.unfold(x, kernel, padding=padding).permute(1, 2, 0).reshape(w.shape[1], -1)
        turned = dy.reshape(BATCH, layer.out, -1).permute(1, 2, 0).reshape(layer.out, -1)
        y = torch.mm(rows, unfolded).add_(b[:, None])
        dx = torch.mm(columns, turned).reshape(w.shape[1], -1, BATCH).permute(2, 0, 1)
        got[:] = (
            y.reshape(layer.out, layer.side, layer.side, BATCH).permute(3, 0, 1, 2).contiguous(),
            F.fold(dx, (layer.side,) * 2, kernel, padding=padding),
            torch.sparse.sampled_addmm(empty, turned, unfolded.t(), beta=0.0),
            turned.sum(1),
        )

    return run, lambda: Results(
        got[0].numpy(), got[1].numpy(), got[2].to_dense().numpy().reshape(layer.shape), got[3].numpy()
    )


def _prunefl_linear(task: Task) -> Peer:
    """What its linear layer calls: COO products, and a dense gradient of the weight."""
    w, b, x, dy = _tensors(task, last=True)
    weight, bias = w.to_sparse().coalesce(), b[:, None]
    got: list[Any] = []

    def run() -> None:
        got[:] = (torch.sparse.addmm(bias, weight, x), torch.mm(weight.t(), dy), dy.mm(x.t()), dy.sum(1))

    return run, lambda: Results(got[0].t().numpy(), got[1].t().numpy(), got[2].numpy() * task.mask, got[3].numpy())


@torch.inference_mode(mode=False)
def _prunefl_conv(task: Task) -> Peer:
    extension, layer = _module("sparse_conv2d"), task.layer
    w, b, x, dy = (t.clone() for t in _tensors(task, last=False))
    weight = w.to_sparse().coalesce()
    sides = ((layer.kernel,) * 2, (1, 1), (layer.kernel // 2,) * 2)
    got: list[Any] = []

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def run() -> None:
        y, unfolded, scratch = extension.forward(x, weight, sides[0], b, sides[1], sides[2])
        got[:] = [y, *extension.backward(dy, x, weight, *sides, unfolded, scratch, (True, True, True))]

    return run, lambda: Results(
        got[0].numpy(), got[1].numpy(), got[2].numpy().reshape(layer.shape) * task.mask, got[3].numpy()
    )


def _sparseprop_linear(task: Task) -> Peer:
    """Its raw functions, which take the batch last; above its limit the process would die."""
    backend, (w, b, x, dy) = _module("backend"), _tensors(task, last=True)
    assert int(task.mask.sum()) <= _STACK_MAX, "SparseProp cannot do this many"
    rows = _csr(w)
    starts, columns, values = rows.crow_indices(), rows.col_indices(), rows.values()
    bias, got = b[:, None], []

    def run() -> None:
        y, dx, dw = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(values)
        backend.sparse_linear_vectorized_forward(x, starts, columns, values, y)
        backend.sparse_linear_vectorized_backward(x, starts, columns, values, dy, dx, dw)
        got[:] = (y.add_(bias), dx, dw, dy.sum(1))

    def results() -> Results:
        dw = np.zeros(task.mask.shape, np.float32)
        dw[task.mask] = got[2].numpy()
        return Results(got[0].t().numpy(), got[1].t().numpy(), dw, got[3].numpy())

    return run, results


def _sparseprop_conv(task: Task) -> Peer:
    """Its mode that is right at every batch, vectorised over output columns; it reads torch's layout."""
    backend, layer = _module("backend"), task.layer
    w, b, x, dy = (torch.from_numpy(a) for a in (task.weight, task.bias, task.x, task.dy))
    out, into, kernel, kept = layer.out, layer.into, layer.kernel, int(task.mask.sum())
    index = [
        torch.zeros(out + 1, dtype=torch.int32),
        torch.zeros((into + 1) * out, dtype=torch.int16),
        torch.zeros(kept, dtype=torch.uint8),
        torch.zeros(kept, dtype=torch.uint8),
    ]
    values, padding, got = torch.zeros(kept), kernel // 2, []
    backend.sparsify_conv2d(out, into, kernel, w, *index, values)
    bias = b[None, :, None, None]

    def run() -> None:
        y, dx, dw = torch.zeros_like(dy), torch.zeros_like(x), torch.zeros_like(values)
        backend.sparse_conv2d_vectorized_forward_over_on_stride_1(x, *index, values, y, kernel, padding)
        backend.sparse_conv2d_vectorized_backward_over_on_stride_1(x, *index, values, dy, dx, dw, kernel, padding)
        got[:] = (y.add_(bias), dx, dw, dy.sum((0, 2, 3)))

    def results() -> Results:
        dense_dw = torch.zeros(layer.shape)
        backend.densify_conv2d(out, into, kernel, dense_dw, *index, got[2])
        return Results(got[0].numpy(), got[1].numpy(), dense_dw.numpy(), got[3].numpy())

    return run, results
