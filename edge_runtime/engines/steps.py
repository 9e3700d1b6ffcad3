"""The steps of a loaded model in the torch engine: its nodes, each with its function and its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from edge_runtime.engines.arrays import Floats
from edge_runtime.engines.masks import Backend, Held, Wires, chains
from edge_runtime.engines.ops import PHASED, RUN, Run
from edge_runtime.engines.phase import Phase
from edge_runtime.engines.stretches import through
from edge_runtime.engines.views import gathered
from edge_runtime.kernels import Stretch
from edge_runtime.kernels.kits import Kit
from wire.spec import ModelSpec, Node, Structure, node_shapes, nodes_within, tensor_shapes
from wire.walk import overwritten

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One node, ready to run: `params` are leaves by role, `frees` the values that nobody reads after it.

    A stretch stands as a node that has the inputs of its first node and the name of its last.
    """

    node: Node
    run: Run
    params: Mapping[str, Tensor]
    frees: tuple[str, ...]
    stretch: Stretch | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """What steps are made of.

    Attributes:
        params: By tensor name.
        held: How masked weights are held.
        wires: What stretches read of their engine.
        phase: What ops read of it.
        kit: Opens what runs masked weights, sparse and dense.
    """

    params: Mapping[str, Floats]
    held: Held
    wires: Wires
    phase: Phase
    kit: Callable[[], tuple[Kit, Backend]]


def build(spec: ModelSpec, structure: Structure, leaves: dict[str, Tensor], loaded: Loaded) -> tuple[Step, ...]:
    """Make the steps of a model; a leaf that a stretch holds is taken out of `leaves`.

    Args:
        spec: The model.
        structure: The part of it.
        leaves: By tensor name, compact, or as views of a wider engine's (see `views`).
        loaded: The rest.
    """
    shapes, tensors = node_shapes(spec, structure), tensor_shapes(spec, structure)
    last = {name: i for i, node in enumerate(spec.nodes) for name in node.inputs}
    readers = Counter(name for node in spec.nodes for name in node.inputs)
    made_by = {node.name: node.op for node in spec.nodes}
    found = {}
    if loaded.held.ways:
        found = {chain.first: chain for chain in chains(spec, shapes, loaded.kit(), loaded.held, loaded.params)}
    steps, end = [], -1
    for i, node in enumerate(nodes_within(spec, structure)):
        frees = tuple({n for n in node.inputs if last[n] == i})
        if i in found:
            stretch, end = found[i].stretch, found[i].last
            for name in stretch.params:
                leaves.pop(name, None)
            stands = Node(spec.nodes[end].name, "stretch", node.inputs)
            made_by[stands.name] = "stretch"  # it may read its output again
            steps.append(Step(stands, through(stretch, loaded.wires), {}, frees, stretch))
        if i <= end:
            continue
        run = PHASED[node.op](loaded.phase, i) if node.op in PHASED else RUN[node.op]
        # The backward of these does not read their output, so an only reader may overwrite it.
        source = node.inputs[0]
        alone = node.op == "relu" and readers[source] == 1
        if alone and overwritten(made_by.get(source, ""), shapes[source]):
            run = RUN["relu in place"]
        params = {role: leaves[name] for role, name in node.params.items()}
        compact = {role: tensors[name] for role, name in node.params.items()}
        if any(leaf.shape != compact[role] for role, leaf in params.items()):
            run = gathered(run, compact)
        steps.append(Step(node, run, params, frees))
    return tuple(steps)


def line(steps: tuple[Step, ...]) -> list[Stretch]:
    """Give a model's stretches if it is nothing but stretches, one behind the other."""
    found, before = [], "input"
    for step in steps:
        if step.stretch is None or step.node.inputs != (before,):
            return []
        found.append(step.stretch)
        before = step.node.name
    return found
