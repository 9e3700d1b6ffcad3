"""What training takes beside its arrays: the pages that the first use of an op brings in, and holes between small blocks.

A worker's base is taken after it has trained two tiny models (`edge_runtime.warm`). Whatever an order needs that these did not
is paged in, or made, at its first step, and stays. The figures were measured op by op, as what a process grew by at the first
step of a model that had no other new op.

An allocator maps blocks of a mebibyte and more singly and gives them back at once. The smaller ones share a heap, which stays
as large as it once was while anything lies at its end, so that its own peak counts in full when the mapped blocks have
theirs. Blocks that live longer leave holes between them that the next ones do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

from wire.walk import Walk, arrays, most

KIB = 1 << 10

BASE = 256 * KIB
"""What any order takes: its files' names, the shapes of its model, the pages of what writes its answer."""

MAPPED = 1 << 20
"""Blocks from this size on are mapped singly (`edge_runtime.memory.guard`)."""

_HOLES = 3
"""Holes take a third of the heap's own peak (measured, none to a half in chains of layers, up to three quarters where there
are branches), and two thirds of its weights, which every order makes anew among what the one before has left."""

_SPARSE = 2600 * KIB
"""The compiled core, and the modules that call it."""

_CONV, _POINT = 180 * KIB, 550 * KIB
"""Machine code and descriptions of each convolution, made for its shapes; once, the kernel for windows of one."""

_OPS = (
    (250, ("add",)),
    (350, ("silu", "conv1d")),
    (400, ("mul",)),
    (600, ("max_pool1d", "sigmoid", "hard_sigmoid", "hard_swish", "relu6", "softmax", "dropout", "embedding")),
    (800, ("avg_pool2d", "avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool1d", "tanh")),
    (1200, ("batch_norm", "group_norm", "layer_norm")),
    (1350, ("gelu",)),
    (3500, ("attention",)),
    (4200, ("gru",)),
    (8800, ("lstm",)),
)
_PAGES: Mapping[str, int] = {op: size * KIB for size, ops in _OPS for op in ops}
"""By op, once for a model. Where a layer's sizes call for another kernel of the same op, it is more."""


def heap(walk: Walk) -> int:
    """Give what is taken beside the arrays in the middle of a step. Cost: that of four more walks."""
    return lasting(walk) + holes(walk)


def lasting(walk: Walk) -> int:
    """Give what stays between steps too, logits among it. Cost: a look at each node."""
    found = sum(_PAGES.get(op, 0) for op in {node.op for node in walk.nodes})
    windows = [node for node in walk.nodes if node.op in ("conv2d", "conv1d")]
    single = [node for node in windows if node.attrs.get("kernel", 1) == 1 and node.attrs.get("groups", 1) == 1]
    found += _POINT * bool(single) + _CONV * (len(windows) - len(single))
    logits = walk.size[walk.nodes[-1].name] if walk.backward else 0
    return BASE + found + logits + _SPARSE * bool(walk.panels or walk.dense)


def holes(walk: Walk) -> int:
    """Give what lies free among the small blocks of a step. Once these have gone, it is there for others, or given back."""
    found = [interval for interval in arrays(walk) if interval[0]]
    small = most(walk, [interval for interval in found if interval[0] < MAPPED])
    mapped = most(walk, [interval for interval in found if interval[0] >= MAPPED])
    passing = most(walk, [i for i in found if i[0] < MAPPED and not (i[1] == 0 and i[2] == walk.end)])
    weights = sum(size for size in walk.tensors.values() if size < MAPPED)
    kept = small + mapped - most(walk, found)
    return kept + (passing + 2 * weights) // _HOLES
