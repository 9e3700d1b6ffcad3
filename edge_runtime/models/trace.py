"""Tracing a torch module into plain calls: torch.fx gives the steps, running them once gives their shapes.

Only what `edge_runtime.models.forms` lists passes; everything else is refused by name here, before anything is lowered.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from edge_runtime.models.calls import Call, refused
from edge_runtime.models.forms import FUNCTIONS, METHODS, MODULES, Form, bound, read
from wire.errors import SpecError

Tensor = torch.Tensor
_CASTS = ("long", "int", "to", "type")
BATCH = 3
"""Samples that are passed through while tracing; literal batch sizes of a module show when it is run with another number."""


@dataclass(slots=True)
class _Trace:
    """A module's graph while it is being read.

    Attributes:
        module: In evaluation mode, the caller's own copy.
        graph: Its steps.
        shape: Of one sample.
        values: What each step gave.
        paths: First name of every parameter and buffer, by identity.
        live: Steps that the output depends on.
    """

    module: nn.Module
    graph: fx.Graph
    shape: tuple[int, ...]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    live: set[fx.Node] = field(default_factory=set)


def calls_of(module: nn.Module, shape: Sequence[int]) -> list[Call]:
    """Trace a module.

    Args:
        module: Any; it is copied, so that its mode and statistics stay as they are.
        shape: Of one sample, without the batch axis.

    Returns:
        The steps that the output depends on, in order; the first is the input, the last the output.

    Raises:
        SpecError: It cannot be traced or run, or does what no spec can.
    """
    module = copied(module)
    graph = _graph(module)
    for name, array in (*module.named_parameters(), *module.named_buffers()):
        if array.is_floating_point() and array.dtype != torch.float32:
            raise refused(name, str(array.dtype), "weights of another type than float32", "module.float()")
    trace = _Trace(module.eval(), graph, tuple(shape))
    named = (*module.named_parameters(), *module.named_buffers())
    trace.paths.update({id(array): name for name, array in reversed(named)})
    _run(trace)
    _mark(trace)
    for node in graph.nodes:
        _check_in_place(trace, node)
    told = (n for n in graph.nodes if n in trace.live and (n.op == "output" or _is_tensor(trace.values[n])))
    found = [_call(trace, node) for node in told]
    if [call.op for call in found].count("input") != 1:
        raise refused("", "forward", "it does not read one tensor of samples", "a forward with one input")
    return _without_detours(found)


def copied(module: nn.Module) -> nn.Module:
    """Copy a module to this machine's own memory.

    Raises:
        SpecError: It cannot be copied, or has no weights yet.
    """
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise refused(path, "ScriptModule", "it is compiled already", "the module that it was made of")
        if any(nn.parameter.is_lazy(a) for a in (*part.parameters(recurse=False), *part.buffers(recurse=False))):
            raise refused(path, type(part).__name__, "it has no sizes yet", "the same module, run it once on samples")
    try:
        return copy.deepcopy(module).cpu()
    except Exception as error:  # whatever a stranger's attributes raise
        problem = f"it cannot be copied ({error})"
        raise refused("", type(module).__name__, problem, "a module with weights and plain attributes alone") from error


def _graph(module: nn.Module) -> fx.Graph:
    """Trace in training mode, so that dropout is there, and with the defaults of all arguments but the first."""
    try:
        module.train()
        parameters = list(inspect.signature(module.forward).parameters.values())
        defaults = {p.name: p.default for p in parameters[1:] if p.default is not inspect.Parameter.empty}
        graph: fx.Graph = fx.Tracer().trace(module, concrete_args=defaults or None)
    except Exception as error:
        # Whatever a stranger's forward raises when it is given a proxy: the branch that it wanted to take, mostly.
        raise refused(
            "", "forward", f"torch.fx cannot trace it ({error})", "a forward without branches or loops over values"
        ) from error
    return graph


def _run(trace: _Trace) -> None:
    """Pass samples through, step by step, and keep what each gives."""
    with torch.no_grad():
        for node in trace.graph.nodes:
            try:
                trace.values[node] = _value(trace, node)
            except SpecError:
                raise
            except Exception as error:
                problem = f"it fails on samples of {trace.shape}: {error}"
                raise refused(
                    path_of(node), named(trace, node), problem, "samples of the shape that it takes"
                ) from error


def _value(trace: _Trace, node: fx.Node) -> Any:
    def known(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda inner: trace.values[inner])

    args, kwargs = known(node.args), known(node.kwargs)
    if node.op == "placeholder":
        if node is next(iter(trace.graph.nodes)):
            return _samples(trace, node)
        if not node.args and not str(node.target).startswith("*"):
            raise refused("", "forward", f"its argument {node.target!r} has no default", "a forward with one input")
        return node.args[0] if node.args else None
    if node.op == "get_attr":
        return _attribute(trace.module, str(node.target))
    if node.op == "call_module":
        return trace.module.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return args[0] if node.op == "output" else node.target(*args, **kwargs)  # type: ignore[operator] # a function, because of the node's op


def _attribute(module: nn.Module, path: str) -> Any:
    (*folders, last) = path.split(".")
    return getattr(module.get_submodule(".".join(folders)), last)


def _samples(trace: _Trace, node: fx.Node) -> Tensor:
    """Make samples: numbers, or words where an embedding reads them."""
    generator = torch.Generator().manual_seed(0)
    words = [m.num_embeddings for m in trace.module.modules() if isinstance(m, nn.Embedding)]
    direct = any(_module(trace, user, nn.Embedding) for user in node.users)
    if words and (direct or any(_casts(user) for user in node.users)):
        made = torch.randint(0, min(words), (BATCH, *trace.shape), generator=generator)
        return made if direct else made.float()
    return torch.rand((BATCH, *trace.shape), generator=generator)


def _module(trace: _Trace, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(trace.module.get_submodule(str(node.target)), kind)


def _casts(node: fx.Node) -> bool:
    """Whether a step changes the type of its input."""
    return node.op == "call_method" and node.target in _CASTS


def _mark(trace: _Trace) -> None:
    """Find what the output depends on."""
    waiting = [node for node in trace.graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in trace.live:
            trace.live.add(node)
            waiting += node.all_input_nodes


def _check_in_place(trace: _Trace, node: fx.Node) -> None:
    """Refuse what overwrites a value that something else still reads, because a spec's values never change."""
    inside = node.kwargs.get("inplace") is True
    if node.op == "call_module":
        inside = getattr(trace.module.get_submodule(str(node.target)), "inplace", False) is True
    name = named(trace, node)
    inside = inside or (node.op != "call_module" and name.endswith("_") and not name.endswith("__"))
    if inside and node.args and isinstance(node.args[0], fx.Node):
        order = {other: place for place, other in enumerate(trace.graph.nodes)}
        later = any(order[user] > order[node] for user in node.args[0].users)
        if later or node not in trace.live:
            raise refused(path_of(node), name, "it overwrites a value that is read again", "the same without in-place")


def _call(trace: _Trace, node: fx.Node) -> Call:
    """Read one step whose result is a tensor, or a tuple with tensors."""
    path, value = path_of(node), trace.values[node]
    batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == BATCH
    shape = tuple(value.shape[1:]) if batched else None
    if node.op == "placeholder":
        return Call(node.name, path, "input", shape=shape)
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node) or not isinstance(value, Tensor):
            raise refused("", "output", "it is not one tensor", "the logits alone")
        return Call(node.name, path, "output", (node.args[0].name,), shape=shape)
    if node.op == "get_attr":
        raise refused(
            str(node.target), "parameter", "it is read without a layer around it", "a Linear, Conv or Embedding module"
        )
    (inputs, options) = _arguments(trace, node)
    if node.op == "call_module":
        module = trace.module.get_submodule(str(node.target))
        form = MODULES.get(type(module))
        if form is None:
            raise refused(path, type(module).__name__, "this module is not on the list")
        if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001 - torch has no door to ask
            raise refused(path, type(module).__name__, "hooks change what it computes", "the module without hooks")
        (facts, params) = read(form, module, trace.paths)
        return Call(node.name, path, form.op, inputs, {**options, **facts}, params, shape, of_module=True)
    return Call(node.name, path, _op(trace, node, options), inputs, options, {}, shape)


def _op(trace: _Trace, node: fx.Node, options: Mapping[str, Any]) -> str:
    """Name what a function or a method does."""
    form = _form(node)
    op = form.op if form else ""
    if op == "same" and (cast := _cast(trace, node)):
        read_as_words = all(_module(trace, user, nn.Embedding) for user in node.users)
        if cast not in (torch.int64, torch.int32) or not read_as_words or node.all_input_nodes[0].op != "placeholder":
            raise refused(
                path_of(node), str(node.target), f"a change of type to {cast}", "x.long() straight into an Embedding"
            )
    index = options.get("index")
    parts = index if isinstance(index, tuple) else (index,)
    if op == "getitem" and all(part is None or part is ... or part == slice(None) for part in parts):
        return "reshape"
    return op


def _form(node: fx.Node) -> Form | None:
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return FUNCTIONS.get(node.target) if callable(node.target) else None


def _cast(trace: _Trace, node: fx.Node) -> torch.dtype | None:
    """Give the type that a step's result has if its input has another."""
    (before, after) = (trace.values[n] for n in (node.all_input_nodes[0], node))
    return after.dtype if before.dtype != after.dtype else None


def _arguments(trace: _Trace, node: fx.Node) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Split a step's arguments into the tensors and all others, by torch's names."""
    name, path = named(trace, node), path_of(node)
    if node.op == "call_module":
        names = list(inspect.signature(trace.module.get_submodule(str(node.target)).forward).parameters)
    else:
        form = _form(node)
        if form is None:
            raise refused(path, name, "this op is not on the list")
        names = list(form.names)
    inputs: list[str] = []
    options: dict[str, Any] = {}
    try:
        pairs = list(bound(names, node.args, node.kwargs))
    except ValueError as error:
        raise refused(path, name, str(error), f"{name} with its plain arguments") from None
    for key, argument in pairs:
        held = list(argument) if isinstance(argument, (list, tuple)) else [argument]
        tensors = [a for a in held if isinstance(a, fx.Node) and _is_tensor(trace.values[a])]
        if tensors and len(tensors) == len(held):
            inputs += [t.name for t in tensors]
        elif tensors:
            raise refused(path, name, f"a tensor among the numbers of {key!r}", "numbers alone")
        else:
            options[key] = fx.node.map_arg(argument, lambda inner: trace.values[inner])
    return tuple(inputs), options


def _without_detours(calls: Sequence[Call]) -> list[Call]:
    """Leave out steps that change nothing, and of one reshape behind another the first if nothing else reads it."""
    aliases: dict[str, str] = {}
    kept: dict[str, Call] = {}
    readers = Counter(name for call in calls for name in call.inputs)
    for call in calls:
        inputs = tuple(aliases.get(name, name) for name in call.inputs)
        if call.op == "same":
            aliases[call.name] = inputs[0]
            readers[inputs[0]] += readers[call.name] - 1
            continue
        before = kept.get(inputs[0]) if inputs else None
        if call.op == "reshape" and before is not None and before.op == "reshape" and readers[before.name] == 1:
            inputs = before.inputs
            del kept[before.name]
        kept[call.name] = replace(call, inputs=inputs)
    return list(kept.values())


def _is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, or a tuple that holds one."""
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and not isinstance(value, torch.Size) and any(map(_is_tensor, value))
    )


def path_of(node: fx.Node) -> str:
    """Name the module whose forward a step stands in, or which it calls."""
    if node.op == "call_module":
        return str(node.target)
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""


def named(trace: _Trace, node: fx.Node) -> str:
    """Name what a step does, in torch's words."""
    if node.op == "call_module":
        return type(trace.module.get_submodule(str(node.target))).__name__
    return str(getattr(node.target, "__name__", node.target))
