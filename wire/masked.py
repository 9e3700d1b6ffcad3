"""What masked weights take, and the stretches that run over them: the sparse part of `wire.memory`, in plain Python.

It is counted as the compiled core holds them. A device without a build of the core has a twin that takes more; like all that
a device does otherwise than predicted, it is learnt there as the scale of the predictions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from wire.native.stages import CHUNK, POOL_MAX, Shape, sizes, stages_of
from wire.spec import ModelSpec, Node, Structure, node_shapes

FLOAT = 4
ALIGN = 64

_COLUMNS = 64
"""Columns of a matrix in the smallest blocks that an index is cut into; for a convolution see `channels_at_once`."""

_FIRST_CACHE = 24 << 10
"""Bytes of it that the input of a tile may take."""

_TILE = (4, 7)
"""Rows and columns of a convolution's output that are made together, at most."""


@dataclass(frozen=True, slots=True)
class Masked:
    """What is kept of masked weights.

    Attributes:
        kept: Name of a linear layer's or a convolution's weight to how many are kept.
        dense: Those of them that are held dense all the same: weight, gradient and the rule's copies.
    """

    kept: Mapping[str, int]
    dense: Collection[str] = ()


def maskable(spec: ModelSpec) -> tuple[str, ...]:
    """Name the tensors that may be masked, in the spec's order.

    They are the weights of linear layers and convolutions that one node alone uses, with a bias that it alone uses: what
    engines take. Biases, norms, convolutions in groups and linear layers over many steps are never masked.
    """
    uses = [name for node in spec.nodes for name in node.params.values()]
    shapes = node_shapes(spec, Structure())
    plain = (node for node in spec.nodes if node.op in ("linear", "conv2d") and node.attrs.get("groups", 1) == 1)
    layers = [node.params for node in plain if node.op == "conv2d" or len(shapes[node.name]) == 1]
    found = {roles["weight"] for roles in layers if all(uses.count(name) == 1 for name in roles.values())}
    return tuple(tensor.name for tensor in spec.tensors if tensor.name in found)


def channels_at_once(kernel: int, side: int = max(_TILE)) -> int:
    """Count the input channels of which a tile's part stays in the first cache: an index has no smaller blocks.

    Args:
        kernel: Height and width of the kernel.
        side: Of the image; the larger it is, the fewer channels.
    """
    rows, columns = (min(side, most) + kernel - 1 for most in _TILE)
    return max(1, _FIRST_CACHE // (rows * columns * ALIGN))


def index_bytes(shape: Sequence[int], kept: int) -> int:
    """Bound what a sparse weight's index takes: one or two bytes for a matrix, six for a convolution, and the starts."""
    rows, columns = shape[:2]
    if len(shape) == 2:
        starts, each = -(-columns // _COLUMNS) * (rows + 1), 1 if columns <= 256 else 2
    else:
        channels = channels_at_once(max(shape[2:]))
        starts, each = -(-columns // channels) * (rows + 1) + -(-rows // channels) * (columns + 1), 6
    return FLOAT * starts + each * kept + 2 * ALIGN


def contracted(
    nodes: Sequence[Node],
    sparse: set[str],
    panels: dict[str, tuple[int, int]],
    values: tuple[Mapping[str, Shape], int],
) -> list[Node]:
    """Make one node of each longest chain that begins with a sparse layer, and note what it takes, by name (`_stretch`)."""
    readers = Counter(name for node in nodes for name in node.inputs)
    found: list[Node] = []
    chain: list[Node] = []
    chains: dict[str, list[Node]] = {}
    reached: set[str] = set()  # values that weights reach: only these have gradients
    for node in nodes:
        layer = node.op in ("linear", "conv2d") and node.params["weight"] in sparse
        pools = node.op == "max_pool2d" and node.attrs["kernel"] == node.attrs["stride"] <= POOL_MAX
        follows = bool(chain) and node.inputs == (chain[-1].name,) and readers[node.inputs[0]] == 1
        if follows and (layer or pools or node.op in ("relu", "flatten")):
            chain.append(node)
            del chains[found.pop().name]
        elif layer:
            chain = [node]
        else:
            chain = []
            found.append(node)
            reached.update([node.name] if node.params or reached.intersection(node.inputs) else ())
            continue
        reached.add(node.name)
        found.append(Node(node.name, "stretch", chain[0].inputs))
        chains[node.name] = chain
    for name, whole in chains.items():
        panels[name] = _stretch(whole, values, input_gradient=not reached.isdisjoint(whole[0].inputs))
    return found


def _stretch(
    chain: Sequence[Node], values: tuple[Mapping[str, Shape], int], *, input_gradient: bool
) -> tuple[int, int]:
    """Count the buffers of a stretch: those of an evaluation, and what a training pass takes beyond; they stay in between."""
    shapes, batch = values
    weights: dict[str, Shape] = {}
    for node in chain:
        if node.params:
            kernel = (node.attrs["kernel"],) * 2 if node.op == "conv2d" else ()
            weights[node.params["weight"]] = (shapes[node.name][0], shapes[node.inputs[0]][0], *kernel)
    stages, _ = stages_of(chain, shapes[chain[0].inputs[0]], weights)
    evaluation = sizes(stages, min(batch, CHUNK), train=False).total
    training = sizes(stages, batch, train=True, input_gradient=input_gradient, watched=True).total
    return evaluation, training - evaluation


def aligned(shape: Sequence[int]) -> int:
    """Give the bytes of a float32 array, rounded up to where the next one may begin."""
    size = prod(shape) * FLOAT
    return -(-size // ALIGN) * ALIGN
