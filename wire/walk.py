"""The liveness walk: which arrays of one pass over a model live when, in plain Python.

With N nodes, node i runs forward at instant i, the loss is taken at N, and node i runs backward at 2 N - i. An array lives
from the instant that makes it to the last that reads it; the peak is the instant with the largest sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod

from wire.masked import FLOAT, Masked, aligned, contracted
from wire.ops import STATISTICS
from wire.segments import Cuts, check, laid
from wire.spec import ModelSpec, Node, Structure, node_shapes, tensor_shapes

INDEX = 8
BLOCK = 16
_DENSE_BLOCK = 1 << 19
"""Bytes of a dense masked weight's gradient at a time; its mask takes as many."""

_SAVES_INPUT = (
    *("linear", "conv2d", "max_pool2d", "avg_pool2d", "group_norm"),
    *("hard_sigmoid", "hard_swish", "mul"),
    *("conv1d", "max_pool1d", "avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool1d"),
    *("batch_norm", "layer_norm", "relu6", "gelu", "silu", "lstm", "gru", "attention"),
)
_SAVES_OUTPUT = ("relu", "tanh", "sigmoid", "softmax", "lstm", "gru")
_CONVS = {"conv2d": 1, "conv1d": 2}
"""How often a convolution copies what it reads and makes."""

_FEW, _NARROW = 20_480, 3
"""Torch does a convolution of one sample of no more values than these, with windows no wider, without oneDNN."""

_VIEWS = ("flatten", "reshape")
"""Their output is their input's memory, and so is the gradient that they hand on; but a turned value is copied."""

_TURNS = ("transpose", "lstm", "gru")
"""Their output lies in memory in another order than its axes, and so does what is made of it entry by entry."""

_ALIKE = (
    *("relu", "relu6", "tanh", "sigmoid", "hard_sigmoid", "hard_swish", "gelu", "silu", "softmax", "dropout"),
    *("add", "mul"),
)

_OVERWRITTEN = ("linear", "conv2d", "conv1d", "batch_norm")


def overwritten(op: str, shape: Sequence[int]) -> bool:
    """Tell whether a relu may overwrite an op's output of this shape if nothing else reads it.

    The op's backward pass must not read it either, and it must be memory of its own: a linear layer over many steps gives a
    view, and to write into that would cost two copies in the backward pass.
    """
    return op in _OVERWRITTEN and (op != "linear" or len(shape) == 1)


Interval = tuple[int, int, int]
"""Bytes, the first instant and the last."""


class Walk:
    """The sizes and homes of all arrays of one pass.

    Attributes:
        nodes: The model's steps; a stretch is one, of op ``stretch``.
        end: The last instant.
        size: Value name to bytes for the whole batch.
        tensors: Tensor name to bytes.
        home: Value name to the value whose memory it shares.
        turned: Values that lie in another order than their axes.
        inside: Node name to bytes that are its own: saved for its backward pass, and taken by each pass while it runs.
        copies: Convolution's name to bytes of what it makes for itself in either direction.
        panels: Stretch name to bytes of its values and of their gradients.
        dense: Weights that are masked and dense.
        cuts: Where the pass is cut into segments that run again (`wire.segments`).
    """

    def __init__(
        self,
        spec: ModelSpec,
        structure: Structure,
        batch: int,
        *,
        backward: bool,
        masked: Masked | None = None,
        cuts: Cuts = (),
    ) -> None:
        check(spec.nodes, cuts)
        self.cuts = cuts if masked is None else ()  # stretches hold what they need throughout
        shapes = node_shapes(spec, structure)
        self.panels: dict[str, tuple[int, int]] = {}
        self.dense = frozenset(masked.dense) if masked is not None else frozenset()
        self.nodes: Sequence[Node] = spec.nodes
        if masked is not None:
            self.nodes = contracted(spec.nodes, set(masked.kept) - self.dense, self.panels, (shapes, batch))
        self.backward = backward
        self.size = {name: aligned((batch, *shape)) for name, shape in shapes.items()}
        tensors = tensor_shapes(spec, structure)
        sparse = {} if masked is None else {n: k for n, k in masked.kept.items() if n not in self.dense}
        self.tensors = {name: aligned((sparse[name],) if name in sparse else shape) for name, shape in tensors.items()}
        self.inside = {node.name: _inside(node, shapes, tensors, batch) for node in self.nodes}
        self.copies = {node.name: _copied(node, shapes, tensors, batch) for node in self.nodes if node.op in _CONVS}
        self.turned = _turned(self.nodes)
        self.home = _homes(self.nodes, self.turned, shapes)

    @property
    def end(self) -> int:
        """The last instant."""
        return 2 * len(self.nodes) if self.backward else len(self.nodes)

    def back(self, i: int) -> int:
        """Give the instant at which node i runs backward, or forward if nothing does."""
        return 2 * len(self.nodes) - i if self.backward else i


def peak(walk: Walk) -> int:
    """Give the largest sum of bytes that live together, weights and whatever is held throughout left out."""
    return most(walk, arrays(walk))


def arrays(walk: Walk, *, inside: bool = True) -> Iterator[Interval]:
    """Give all arrays of a pass, each with the instants of the plain timeline between which it lives.

    Args:
        walk: The pass.
        inside: With the copies that convolutions make for themselves, which no framework knows of.
    """
    yield from _activations(walk)
    yield from _temporaries(walk)
    yield from _gradients(walk)
    yield from _sums(walk)
    of_loss = walk.size[walk.nodes[-1].name] * (2 if walk.backward else 1)
    yield of_loss, len(walk.nodes), len(walk.nodes)
    if inside:
        yield from _copies(walk)


def saved(walk: Walk) -> list[int]:
    """Give the bytes that each node's forward pass makes and a backward pass reads again."""
    count = len(walk.nodes)
    found = [0] * count
    for size, birth, last in _activations(walk):
        if birth < count < last < 2 * count:
            found[birth] += size
    return found


def most(walk: Walk, intervals: Iterable[Interval]) -> int:
    """Give the largest sum of bytes of arrays that live together."""
    end = walk.end
    if walk.cuts:
        intervals, end = laid(walk.nodes, walk.cuts, walk.size, intervals)
    change = [0] * (end + 2)
    for size, birth, last in intervals:
        change[birth] += size
        change[last + 1] -= size
    return max(accumulate(change))


def _turned(nodes: Sequence[Node]) -> frozenset[str]:
    found: set[str] = set()
    for node in nodes:
        if node.op in _TURNS or (node.op in _ALIKE and node.inputs[0] in found):
            found.add(node.name)
    return frozenset(found)


def _homes(nodes: Sequence[Node], turned: frozenset[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name the value whose memory each one lives in: a flatten is a view, a relu may overwrite what only it reads."""
    readers = Counter(name for node in nodes for name in node.inputs)
    made_by = {node.name: node.op for node in nodes}
    home = {"input": "input"}
    for node in nodes:
        source = node.inputs[0]
        alone = node.op == "relu" and readers[source] == 1
        in_place = alone and overwritten(made_by.get(source, ""), shapes[source])
        view = node.op in _VIEWS and source not in turned
        home[node.name] = home[source] if view or in_place else node.name
    return home


def _inside(
    node: Node, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[int, ...]], batch: int
) -> tuple[int, int, int]:
    """Count what an op has of its own: bytes saved, bytes while it runs forward, and backward.

    A recurrent layer keeps its gates and its states of every step, and a copy of its input. Attention keeps queries, keys and
    values, what it made of them and a copy of that; odds of all pairs of steps are made in blocks, and are counted whole.
    """
    if node.op == "dropout":
        return aligned((batch, *shapes[node.name])), 0, 0
    if node.op == "embedding":
        words = 2 * aligned((batch, *shapes[node.inputs[0]]))
        return words, 0, 0
    if node.op in ("max_pool2d", "max_pool1d"):
        return aligned((batch, *shapes[node.name])) * INDEX // FLOAT, 0, 0
    if node.op in ("lstm", "gru"):
        (steps, hidden), rows = shapes[node.name], tensors[node.params["bias_ih"]][0]
        gates, states = aligned((batch, steps, rows)), aligned((batch, steps, hidden))
        weights = sum(aligned(tensors[name]) for name in node.params.values())
        read = aligned((batch, *shapes[node.inputs[0]]))
        if node.op == "gru":
            return gates + 4 * states + read, max(weights, gates), 2 * weights + gates + 2 * states
        # Measured: the library packs all weights for each direction, makes the gates' gradients nearly twice, and gives its
        # states of every step the room of its inputs if these are wider.
        wider = max(0, read - states)
        padded = gates // hidden * -(-hidden // BLOCK) * BLOCK
        backward = 7 * weights // 2 + 7 * padded // 4 + 2 * states + 3 * wider
        return gates + 2 * states + wider, 2 * weights, backward
    if node.op == "attention":
        steps, inner = shapes[node.name][0], tensors[node.params["weight_out"]][1]
        each, pairs = aligned((batch, steps, inner)), aligned((batch, inner // node.attrs["head"], steps, steps))
        return 5 * each, pairs, pairs + 6 * each
    return 0, 0, 0


def _activations(walk: Walk) -> Iterator[Interval]:
    """Values live to their last reader, forward or (if its backward pass reads them again) backward."""
    # The batch twice: as the rule gathered it, and the engine's aligned copy.
    yield 2 * walk.size["input"], 0, walk.end
    last = {"input": walk.end}
    for i, node in enumerate(walk.nodes):
        for name in node.inputs:
            reads = walk.back(i) if node.op in _SAVES_INPUT else i
            last[walk.home[name]] = max(last.get(walk.home[name], 0), reads)
        output = walk.back(i) if node.op in _SAVES_OUTPUT else i
        last[walk.home[node.name]] = max(last.get(walk.home[node.name], 0), output)
        if walk.inside[node.name][0]:
            yield walk.inside[node.name][0], i, walk.back(i)
        if node.op == "stretch":
            values, gradients = walk.panels[node.name]
            yield values + gradients * walk.backward, 0, walk.end
    last[walk.home[walk.nodes[-1].name]] = walk.end  # whoever takes the loss holds the logits
    for i, node in enumerate(walk.nodes):
        if walk.home[node.name] == node.name:
            yield walk.size[node.name], i, last[node.name]


def _temporaries(walk: Walk) -> Iterator[Interval]:
    """What an op needs only while it runs, such as a layer's new gradient before it is added."""
    for i, node in enumerate(walk.nodes):
        if node.op in ("linear", *_CONVS):
            weights = sum(walk.tensors[name] for name in node.params.values())
            if node.params["weight"] in walk.dense:
                weights = 2 * weights if node.op == "conv2d" else min(2 * weights, 2 * _DENSE_BLOCK)
            if walk.backward:
                yield weights, walk.back(i), walk.back(i)
        (_, forward, backward) = walk.inside[node.name]
        if node.op == "layer_norm" and node.inputs[0] in walk.turned:  # it norms a copy
            forward, backward = forward + walk.size[node.inputs[0]], backward + walk.size[node.inputs[0]]
        if node.op in ("embedding", "attention"):
            backward += sum(walk.tensors[name] for name in node.params.values())
        yield forward, i, i
        if walk.backward:
            yield backward, walk.back(i), walk.back(i)
        if node.op == "mul" and walk.backward:  # a gate's gradient is as large as what it weighs, until it is summed
            yield walk.size[node.name], walk.back(i), walk.back(i)


def _copies(walk: Walk) -> Iterator[Interval]:
    """What a convolution makes for itself in either direction."""
    for i, node in enumerate(walk.nodes):
        for size in walk.copies.get(node.name, ()):
            yield size, i, i
            if walk.backward:
                yield size, walk.back(i), walk.back(i)


def _copied(
    node: Node, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, tuple[int, ...]], batch: int
) -> tuple[int, ...]:
    """Count a convolution's copies in its library's layout, or, where it is done without that, its windows side by side."""
    before, after, kernel = shapes[node.inputs[0]], shapes[node.name], node.attrs["kernel"]
    few = batch == 1 and prod(before) <= _FEW and node.attrs.get("groups", 1) == 1
    if few and (node.op == "conv1d" or kernel <= _NARROW):
        as_it_is = kernel == 1 and node.attrs["stride"] == 1 and not node.attrs["padding"]
        return () if as_it_is else (aligned((before[0], kernel ** len(after[1:]), *after[1:])),)
    weights = sum(aligned(tensors[name]) for name in node.params.values())
    ends = ((node.inputs[0], before), (node.name, after))
    return weights, *(_CONVS[node.op] * aligned((batch, _blocked(n, s[0]), *s[1:])) for n, s in ends)


def _gradients(walk: Walk) -> Iterator[Interval]:
    """Gradients of activations live from their last reader's backward instant to their own maker's."""
    if not walk.backward:
        return
    trained = {"input": False}
    born = {walk.nodes[-1].name: len(walk.nodes)}
    for i, node in enumerate(walk.nodes):
        trained[node.name] = bool(node.params) or node.op == "stretch" or any(trained[name] for name in node.inputs)
        for name in node.inputs:
            born[name] = min(born.get(name, walk.end), walk.back(i))
    for i, node in enumerate(walk.nodes):
        for name in node.inputs:  # an earlier reader's share is made before it is added to the later one's
            if trained[name] and node.op != "add" and born[name] < walk.back(i):
                yield walk.size[name], walk.back(i), walk.back(i)
    for i, node in enumerate(walk.nodes):
        # A flatten hands the same memory on, so that its own gradient ends one instant before its input's begins.
        end = walk.back(i) - (node.op in _VIEWS)
        if trained[node.name]:
            yield walk.size[node.name], min(born.get(node.name, end), end), end


def several(nodes: Iterable[Node]) -> dict[str, list[int]]:
    """Give the weights that are used more than once, with the places of the nodes that do; running statistics left out."""
    uses: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for role, name in node.params.items():
            if role not in STATISTICS:
                uses.setdefault(name, []).append(i)
    return {name: places for name, places in uses.items() if len(places) > 1}


def _sums(walk: Walk) -> Iterator[Interval]:
    """Of a weight that is used again, the gradient so far: it waits for the next share, and their sum is made beside both."""
    for name, places in several(walk.nodes if walk.backward else ()).items():
        yield walk.tensors[name], walk.back(places[-1]) + 1, walk.back(places[0])
        for i in places[:-1]:
            yield walk.tensors[name], walk.back(i), walk.back(i)


def _blocked(name: str, channels: int) -> int:
    """Round up: convolutions take channels in blocks of 16, except the one or three of a picture."""
    return channels if name == "input" and channels <= 3 else -(-channels // BLOCK) * BLOCK
