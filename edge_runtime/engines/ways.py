"""How the masked weights of a model are held: what an order says, what memory allows, and what was timed here."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.engines import Choice
from edge_runtime.engines.arrays import Floats
from edge_runtime.engines.masks import Backend, check_masks
from edge_runtime.kernels import Layout
from edge_runtime.kernels.choose import DENSE, Chooser, Layer, Timing, Trial, machine, pick, trial
from edge_runtime.kernels.kits import Kit
from edge_runtime.kernels.panels import buffer
from wire.errors import BudgetExceeded, SpecError
from wire.masks import Bits, unpacked
from wire.spec import ModelSpec, Node, Structure, digest, node_shapes, tensor_shapes

_CLOSE = 1.5
_OVERHEAD = 5e-4
"""A whole step is tried where its layers together take at most so many times the best's, and so many seconds each more."""


class Tools:
    """What the engines of a process share; opened when a mask first comes."""

    def __init__(self, backend: Backend, threads: int = 1, timings: Path | None = None) -> None:
        self.backend, self._threads, self._timings = backend, threads, timings
        self._made: dict[str, tuple[str, Masked, Layout]] = {}

    @functools.cached_property
    def kit(self) -> Kit:
        """What runs stretches."""
        return self.backend.kit(self._threads)

    def release(self, masks: Mapping[str, Bits]) -> None:
        """Let go of what was made of other masks than these, with those masks, before anything new takes memory."""
        self._made = {name: known for name, known in self._made.items() if known[1].mask is masks.get(name)}

    def layouts(self, wanted: Mapping[str, tuple[str, Masked]]) -> dict[str, Layout]:
        """Give the layouts of a model's sparse tensors; those of the model before are used again where nothing differs.

        Between two changes of the masks, order after order has the very same bits for them, and equal layers.

        Args:
            wanted: By tensor name the way to hold it and the layer.
        """
        again = {}
        for name, (way, masked) in wanted.items():
            known = self._made.get(name)
            if known is not None and known[:2] == (way, masked):
                again[name] = known
        self._made = again  # what is not wanted any more is gone before anything new is made
        made = {}
        for name, (way, masked) in wanted.items():
            held = again.get(name) or (way, masked, self.kit.layout(way, masked.node, masked.mask))
            made[name] = held[2]
            self._made[name] = held
        return made

    @functools.cached_property
    def chooser(self) -> Chooser:
        """What times them."""
        return Chooser(machine(self.kit.name, self.backend.name), self._timings, self._threads)


@dataclass(frozen=True, slots=True)
class Masked:
    """One masked layer.

    Attributes:
        node: Its node.
        mask: What is kept of its weight.
        input_shape: Of one sample.
        first: Whether it reads the model's input, to which no gradient is wanted.
    """

    node: Node
    mask: Bits
    input_shape: tuple[int, ...]
    first: bool

    def ways(self, kit: Kit) -> tuple[str, ...]:
        """Name the layouts that are worth a trial."""
        density = self.mask.kept / max(1, self.mask.size)
        return kit.ways(self.node, self.mask.shape, self.input_shape, density)

    def layer(self, batch: int) -> Layer:
        """Describe it to the chooser."""
        details = tuple(value for _, value in sorted(self.node.attrs.items()))
        return Layer(self.node.op, self.mask.shape, self.input_shape, details, self.mask.kept, batch, not self.first)


def decide(layers: Mapping[str, Masked], choice: Choice, tools: Tools) -> list[dict[str, str]]:
    """Give the ways to hold a model's masked tensors that a whole step may have to decide between, the likeliest first.

    They are each layer's fastest, all sparse and all dense, without those that are hopeless by their layers' times. It is
    one where nothing is left to time.

    Raises:
        SpecError: The choice names a way that is not there, or a tensor can be held in none.
        BudgetExceeded: A tensor has no layout here, and the choice does not allow that it is dense.
    """
    ways: dict[str, str] = {}
    free: dict[str, Masked] = {}
    for name, masked in layers.items():
        known = masked.ways(tools.kit)
        asked = choice.ways.get(name, choice.ways.get("", ""))
        beside = {other for other, way in ways.items() if way == DENSE}
        if asked == "sparse" and not known and not choice.allows(frozenset({name, *beside})):
            raise BudgetExceeded(f"weights {name!r} have no layout here, and no memory was granted to hold them dense")
        if asked == "sparse":
            asked = known[0] if known else DENSE
        if asked and asked != DENSE and asked not in known:
            raise SpecError(f"weights {name!r} cannot be held as {asked!r}; known are {', '.join((DENSE, *known))}")
        if asked:
            ways[name] = asked
        else:
            free[name] = masked
    given = frozenset(name for name, way in ways.items() if way == DENSE)
    timings = _timings(free, given, choice, tools)
    found = [
        pick(timings, lambda names: choice.allows(names | given)),
        {name: timing.sparse or DENSE for name, timing in timings.items()},
    ]
    if choice.allows(given | timings.keys()):
        found.append(dict.fromkeys(timings, DENSE))
    took = [sum(timings[name].seconds.get(way, math.inf) for name, way in one.items()) for one in found]
    limit = _CLOSE * min(took) + _OVERHEAD * len(timings)
    return [{**ways, **one} for place, one in enumerate(found) if one not in found[:place] and took[place] <= limit]


def agree(
    model: tuple[ModelSpec, Structure],
    masks: Mapping[str, Bits],
    choice: Choice,
    tools: Tools,
    step: Callable[[Mapping[str, Masked], Mapping[str, str]], Trial],
) -> tuple[dict[str, Masked], dict[str, str]]:
    """Give a model's masked layers and the way to hold each: by choice, or by the time that layers and whole steps take.

    Args:
        model: The model and the part of it that is loaded.
        masks: What is kept, by tensor name.
        choice: What is given, and what memory allows.
        tools: Of the engine.
        step: Makes ready a whole training step that holds these layers in these ways, and moves nothing.

    Raises:
        SpecError, BudgetExceeded: As `check_masks` and `decide` do.
    """
    spec, structure = model
    shapes = node_shapes(spec, structure)
    nodes = check_masks(spec, tensor_shapes(spec, structure), masks)
    layers = {
        name: Masked(node, masks[name], shapes[node.inputs[0]], first=node.inputs[0] == "input")
        for name, node in nodes.items()
    }
    candidates = decide(layers, choice, tools)
    if len(candidates) == 1:
        return layers, candidates[0]
    makers = {str(place): functools.partial(step, layers, one) for place, one in enumerate(candidates)}
    return layers, candidates[int(tools.chooser.fastest(_step_key(spec, layers, candidates, choice.batch), makers))]


def _step_key(
    spec: ModelSpec, layers: Mapping[str, Masked], candidates: Sequence[Mapping[str, str]], batch: int
) -> str:
    """Name a choice between whole steps for the chooser."""
    parts = [masked.layer(batch).key for _, masked in sorted(layers.items())]
    parts += [repr(sorted(ways.items())) for ways in candidates]
    return "step " + hashlib.sha256("\n".join([digest(spec), *parts]).encode()).hexdigest()[:32]


def _timings(layers: Mapping[str, Masked], given: frozenset[str], choice: Choice, tools: Tools) -> dict[str, Timing]:
    """Time layers. With nothing pruned an index has nothing to gain, but memory may forbid to do without."""
    timings = {
        name: _timing(name, one, choice, tools, sparse=one.mask.kept < one.mask.size) for name, one in layers.items()
    }
    bound = {name for name, timing in timings.items() if not timing.sparse}
    if bound and not choice.allows(given | bound):
        timings |= {name: _timing(name, layers[name], choice, tools, sparse=True) for name in layers if name in bound}
    return timings


def _timing(name: str, masked: Masked, choice: Choice, tools: Tools, *, sparse: bool) -> Timing:
    kit = tools.kit
    makers: dict[str, Callable[[], Trial]] = {}
    ways = masked.ways(kit) if sparse else ()
    if choice.allows(frozenset({name})):
        makers[DENSE] = functools.partial(_dense, masked, tools.backend, choice.batch)
    for way in ways:
        makers[way] = functools.partial(_sparse, way, masked, kit, choice.batch)
    return tools.chooser.timing(masked.layer(choice.batch), makers)


def _sparse(way: str, masked: Masked, kit: Kit, batch: int) -> Trial:
    node, layout = masked.node, kit.layout(way, masked.node, masked.mask)
    weight, bias = node.params["weight"], node.params["bias"]
    params = {weight: _filled((layout.kept,)), bias: _filled(layout.shape[:1])}
    stretch = kit.stretch([node], masked.input_shape, params, {weight: layout})
    return trial(stretch, masked.input_shape, batch, input_gradient=not masked.first)


def _dense(masked: Masked, backend: Backend, batch: int) -> Trial:
    node, shape = masked.node, masked.mask.shape
    params = {node.params["weight"]: _filled(shape), node.params["bias"]: _filled(shape[:1])}
    stretch = backend.dense([node], masked.input_shape, params, unpacked(masked.mask))
    return trial(stretch, masked.input_shape, batch, input_gradient=not masked.first)


def _filled(shape: tuple[int, ...]) -> Floats:
    """Make weights whose memory begins where a cache line does, as an engine's do."""
    array = buffer(math.prod(shape))
    array.fill(0.5)
    return array.reshape(shape)
