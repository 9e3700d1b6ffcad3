"""One pass of the native engine laid out: in which order nodes run, and where in one arena every array lies.

The engine follows the plan to the letter, and the prediction of its memory is the plan's length. Segments that are run again
(`wire.segments`) run twice in its order of turns, the second time just before they run backward. A flatten or reshape has no
turn: it is another look at the same array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from wire.errors import SpecError, Unsupported
from wire.masked import Masked, contracted
from wire.native.arena import Slot, place
from wire.native.needs import Dims, Facts, Needs
from wire.native.registry import NEEDS
from wire.segments import Cuts, check, spans
from wire.spec import ModelSpec, Node, Structure, node_shapes, nodes_within, tensor_shapes

STRIDED = ("linear",)
"""Ops that read the weights of a narrower width where they stand; the others get compact copies in scratch."""

Seen = tuple[Slot, Dims]
"""An array, and the shape that it is seen in."""


@dataclass(slots=True)
class Turn:
    """One node's turn, forward or backward.

    Attributes:
        at: The node's place.
        backward: Which way.
        again: Whether it is the second forward turn of its node in this pass.
        view: Whether nothing runs: one reader's share of a gradient is added, no more.
        x: Its inputs.
        y: Its output.
        saved: What the forward turn keeps for the way back, by name; empty where there is no way back.
        scratch: By name.
        compact: Copies of weights of a narrower width, by role.
        dy: Gradient of its output.
        dx: Gradients of its inputs; None where nobody wants one.
        adds: Of those of `dx` that are one reader's share: where it is added.
    """

    at: int
    backward: bool
    again: bool = False
    view: bool = False
    x: list[Seen] = field(default_factory=list)
    y: Seen | None = None
    saved: dict[str, Seen] = field(default_factory=dict)
    scratch: dict[str, Seen] = field(default_factory=dict)
    compact: dict[str, Seen] = field(default_factory=dict)
    dy: Seen | None = None
    dx: list[Seen | None] = field(default_factory=list)
    adds: dict[int, Seen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """What kind of pass is wanted.

    Attributes:
        batch: Samples that go through at once.
        backward: Whether a backward pass follows.
        cuts: Where it is cut into segments that run again; not with masks.
        views: Whether the weights are views of wider ones.
    """

    batch: int
    backward: bool = True
    cuts: Cuts = ()
    views: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A pass.

    Attributes:
        asked: What was asked for.
        nodes: The model's steps; a stretch of masked layers is one, of op ``stretch``.
        shapes: Of every value, batch left out.
        turns: In the order in which they come. The loss is taken before the first backward one.
        output: The logits.
        gradient: Where the loss's gradient to them is put; None where nothing is trained.
        length: Of the arena, in entries.
        panels: Bytes of what stretches hold of their own.
    """

    asked: Asked
    nodes: tuple[Node, ...]
    shapes: Mapping[str, Dims]
    turns: tuple[Turn, ...]
    output: Seen
    gradient: Seen | None
    length: int
    panels: int


def plan(
    spec: ModelSpec,
    structure: Structure,
    asked: Asked,
    masked: Masked | None = None,
    stretches: Sequence[tuple[int, int]] | None = None,
) -> Plan:
    """Lay out one pass.

    Args:
        spec: The model.
        structure: The part of it.
        asked: The pass.
        masked: How masked weights are held; None for none.
        stretches: The first and the last node of each chain that runs as one, where that is known; None to tell from
            `masked`.

    Raises:
        Unsupported: The model has an op that the native engine lacks.
        SpecError: The model cannot be run, or not be cut there.

    Cost: some ten microseconds per node.
    """
    if missing := lacks(spec):
        raise Unsupported(f"the native engine has no {', '.join(missing)}; model {spec.name!r} needs the torch engine")
    check(spec.nodes, asked.cuts)
    if asked.cuts and masked is not None:
        raise SpecError("a model with masks is not cut into segments")
    shapes = node_shapes(spec, structure)
    panels: dict[str, tuple[int, int]] = {}
    nodes: Sequence[Node] = nodes_within(spec, structure)
    if masked is not None:
        sparse = set(masked.kept) - set(masked.dense)
        nodes = contracted(nodes, sparse, panels, (shapes, asked.batch))
    if stretches is not None:
        nodes = _joined(nodes, stretches)
    layout = _Layout(_Graph(spec, tuple(nodes), tensor_shapes(spec, structure), shapes), asked)
    held = 0
    for node in nodes:  # panels are counted for every beginning of a chain: the whole of it counts
        values, gradients = panels.get(node.name, (0, 0)) if node.op == "stretch" else (0, 0)
        held += values + gradients * asked.backward
    return layout.whole(held)


def lacks(spec: ModelSpec) -> tuple[str, ...]:
    """Name the ops of a model that the native engine lacks, sorted. Cost: a look at each node."""
    return tuple(sorted({node.op for node in spec.nodes} - NEEDS.keys()))


def _joined(nodes: Sequence[Node], stretches: Sequence[tuple[int, int]]) -> list[Node]:
    """Put one node in the place of each chain, with the inputs of its first and the name of its last."""
    ends = dict(stretches)
    found: list[Node] = []
    i = 0
    while i < len(nodes):
        last = ends.get(i, -1)
        found.append(nodes[i] if last < 0 else Node(nodes[last].name, "stretch", nodes[i].inputs))
        i = max(i, last) + 1
    return found


@dataclass(frozen=True, slots=True)
class _Graph:
    """A model as it runs: its nodes, and the shapes of its tensors and values, batch left out."""

    spec: ModelSpec
    nodes: tuple[Node, ...]
    tensors: Mapping[str, Dims]
    shapes: Mapping[str, Dims]

    def needs(self, node: Node, batch: int) -> Needs:
        """Ask an op; a stretch has what it needs of its own."""
        if node.op == "stretch":
            return Needs()
        inputs = tuple(self.shapes[name] for name in node.inputs)
        params = {role: self.tensors[name] for role, name in node.params.items()}
        return NEEDS[node.op](Facts(node, batch, inputs, self.shapes[node.name], params))

    def trained(self) -> frozenset[str]:
        """Name the values that weights reach: only these have gradients."""
        found: set[str] = set()
        for node in self.nodes:
            if node.params or node.op == "stretch" or found.intersection(node.inputs):
                found.add(node.name)
        return frozenset(found)

    def gathered(self, node: Node) -> dict[str, Dims]:
        """Give the weights of which a narrower width needs a compact copy, by role."""
        axes = {tensor.name: tensor.axes for tensor in self.spec.tensors}
        runs = {role: any(axis.outer > 1 for axis in axes[name]) for role, name in node.params.items()}
        return {
            role: self.tensors[name]
            for role, name in node.params.items()
            if runs[role] or (len(self.tensors[name]) > 1 and node.op not in STRIDED)
        }


class _Layout:
    """Turns and arrays as they are found."""

    def __init__(self, graph: _Graph, asked: Asked) -> None:
        self._graph, self._asked = graph, asked
        self._needs = [graph.needs(node, asked.batch) for node in graph.nodes]
        self._trained = graph.trained()
        self._turns: list[Turn] = []
        self._slots: list[Slot] = []
        outside = Slot((asked.batch, *graph.shapes["input"]), 0, 0, outside=True)
        self._values: dict[str, Seen] = {"input": (outside, outside.shape)}
        self._names: dict[int, list[str]] = {id(outside): ["input"]}
        self._gradients: dict[str, Seen] = {}
        self._saved: dict[int, dict[str, Seen]] = {}
        self._last = {name: i for i, node in enumerate(graph.nodes) for name in node.inputs}
        self._read_again = self._reads()

    def whole(self, held: int) -> Plan:
        """Lay out the whole pass."""
        graph, asked, count = self._graph, self._asked, len(self._graph.nodes)
        first = asked.cuts[-1] + 1 if asked.cuts and asked.backward else 0
        self._forward(range(first), keeps=False)
        self._forward(range(first, count), keeps=asked.backward)
        output = self._values[graph.nodes[-1].name]
        self._use(output, len(self._turns))
        gradient = None
        if asked.backward and graph.nodes[-1].name in self._trained:
            gradient = self._gradients[graph.nodes[-1].name] = self._new(output[1])
            self._backward(range(first, count))
            for start, end in reversed(list(spans(asked.cuts))):
                self._forward(range(start, end + 1), keeps=True, again=True)
                self._backward(range(start, end + 1))
        length = place(self._slots, [turn.backward for turn in self._turns])
        return Plan(asked, graph.nodes, graph.shapes, tuple(self._turns), output, gradient, length, held)

    def _reads(self) -> frozenset[str]:
        """Name the values that a backward turn reads, and those that cross into a segment that runs again."""
        if not self._asked.backward:
            return frozenset()
        found = {self._graph.nodes[cut].name for cut in self._asked.cuts}
        for node, needs in zip(self._graph.nodes, self._needs, strict=True):
            found.update(node.inputs if needs.reads_input else (), [node.name] if needs.reads_output else ())
        return frozenset(found)

    def _new(self, shape: Dims) -> Seen:
        slot = Slot(shape, len(self._turns), len(self._turns))
        self._slots.append(slot)
        return slot, shape

    @staticmethod
    def _use(seen: Seen, now: int) -> Seen:
        seen[0].last = max(seen[0].last, now)
        return seen

    def _taken(self, names: Iterable[str]) -> list[Seen]:
        return [self._use(self._values[name], len(self._turns)) for name in names]

    def _forward(self, places: range, *, keeps: bool, again: bool = False) -> None:
        for i in places:
            node, needs = self._graph.nodes[i], self._needs[i]
            shape = (self._asked.batch, *self._graph.shapes[node.name])
            if needs.view:
                slot = self._values[node.inputs[0]][0]
                self._values[node.name] = slot, shape
                self._names[id(slot)].append(node.name)
                continue
            turn = Turn(i, backward=False, again=again, x=self._taken(node.inputs))
            over = needs.over and self._may_go(i, turn.x)
            turn.y = self._use((turn.x[0][0], shape) if over else self._new(shape), len(self._turns))
            self._values[node.name] = turn.y
            self._names.setdefault(id(turn.y[0]), []).append(node.name)
            if keeps and node.name in self._trained:
                turn.saved = self._saved[i] = {name: self._new(dims) for name, dims in needs.saves.items()}
            self._scratch(turn, needs.forward)
            self._turns.append(turn)

    def _may_go(self, i: int, x: Sequence[Seen]) -> bool:
        """Tell whether nobody reads the first input's array behind node i."""
        slot = x[0][0]
        if slot.outside or any(other is slot for other, _ in x[1:]):
            return False
        return all(self._last.get(name, -1) <= i and name not in self._read_again for name in self._names[id(slot)])

    def _scratch(self, turn: Turn, wanted: Mapping[str, Dims]) -> None:
        turn.scratch = {name: self._new(dims) for name, dims in wanted.items()}
        if self._asked.views:
            gathered = self._graph.gathered(self._graph.nodes[turn.at])
            turn.compact = {role: self._new(dims) for role, dims in gathered.items()}

    def _backward(self, places: range) -> None:
        for i in reversed(places):
            node, needs = self._graph.nodes[i], self._needs[i]
            if node.name not in self._gradients:  # nobody wants it
                continue
            dy = self._gradients.pop(node.name)
            if needs.view:
                self._handed_on(i, dy)
                continue
            turn = Turn(i, backward=True, dy=self._use(dy, len(self._turns)))
            turn.x = self._taken(node.inputs if needs.reads_input else ())
            turn.y = self._taken([node.name])[0] if needs.reads_output else None
            turn.saved = self._saved.pop(i, {})
            for seen in turn.saved.values():
                self._use(seen, len(self._turns))
            over = needs.over_back
            for j, name in enumerate(node.inputs):
                shape = (self._asked.batch, *self._graph.shapes[name])
                if name not in self._trained:
                    turn.dx.append(None)
                elif name in self._gradients:
                    turn.adds[j] = self._use(self._gradients[name], len(self._turns))
                    turn.dx.append(self._new(shape))
                else:
                    share = (dy[0], shape) if over and j == 0 else self._new(shape)
                    self._gradients[name] = self._use(share, len(self._turns))
                    turn.dx.append(share)
            self._scratch(turn, needs.backward)
            self._turns.append(turn)

    def _handed_on(self, i: int, dy: Seen) -> None:
        """Give a view's gradient to what it is a view of."""
        name = self._graph.nodes[i].inputs[0]
        share = dy[0], (self._asked.batch, *self._graph.shapes[name])
        if name not in self._trained:
            return
        if name not in self._gradients:
            self._gradients[name] = share
            return
        now = len(self._turns)
        into = self._use(self._gradients[name], now)
        self._turns.append(Turn(i, backward=True, view=True, dy=self._use(dy, now), dx=[share], adds={0: into}))


def entries(found: Plan) -> Iterable[Seen]:
    """Give every array of a plan, as often as a turn sees it."""
    for turn in found.turns:
        one = [seen for seen in (turn.y, turn.dy, *turn.dx, *turn.adds.values()) if seen is not None]
        yield from chain(turn.x, one, turn.saved.values(), turn.scratch.values(), turn.compact.values())
