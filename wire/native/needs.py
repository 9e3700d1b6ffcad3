"""What each op of the native engine holds beside its inputs and its output: the one source for the engine and for predictions.

An op gets all its memory from the engine, at places that `wire.native.plan` laid out beforehand; it makes no array that is as
large as a batch or a weight itself. So what is said here is what a step takes, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from wire.spec import Node

Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """One node of a model as it will run.

    Attributes:
        node: The node.
        batch: Samples that go through at once.
        inputs: Shapes of what it reads, batch left out.
        output: Shape of what it gives, batch left out.
        params: Shapes of its weights by role, as the structure cuts them.
    """

    node: Node
    batch: int
    inputs: tuple[Dims, ...]
    output: Dims
    params: Mapping[str, Dims]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a node holds. All shapes are whole, the batch included; sizes must not shrink when the batch grows.

    Attributes:
        saves: Made by a training forward pass, read by the backward pass.
        forward: Scratch while it runs forward.
        backward: Scratch while it runs backward.
        reads_input: Its backward pass reads its inputs.
        reads_output: Its backward pass reads its output.
        over: Its forward pass may write the output over the first input, of the same shape. Not with `reads_input`.
        over_back: Its backward pass may write the gradient of the first input over that of its output.
        view: Its output is the first input's memory; nothing runs, forward or backward.
    """

    saves: Mapping[str, Dims] = field(default_factory=dict)
    forward: Mapping[str, Dims] = field(default_factory=dict)
    backward: Mapping[str, Dims] = field(default_factory=dict)
    reads_input: bool = False
    reads_output: bool = False
    over: bool = False
    over_back: bool = False
    view: bool = False


Say = Callable[[Facts], Needs]
"""An op's entry; plain arithmetic on shapes, microseconds."""
