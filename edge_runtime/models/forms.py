"""Which of torch's modules, functions and methods have a place on the closed list, and under which name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn

from edge_runtime.models.calls import Param

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """One module, function or method of torch.

    Attributes:
        op: Its name in `edge_runtime.models.lower.LOWER`.
        names: Of a function, its arguments in order, the last one with a ``*`` if it takes the rest; of a module, the
            attributes that say what it computes.
    """

    op: str
    names: tuple[str, ...] = ()


_WINDOW = ("kernel_size", "stride", "padding")
_CONV = (*_WINDOW, "dilation", "groups", "padding_mode", "in_channels", "out_channels")
_MAX = (*_WINDOW, "dilation", "ceil_mode", "return_indices")
_RECURRENT = ("input_size", "hidden_size", "num_layers", "batch_first", "dropout", "bidirectional", "proj_size")
_BATCH_NORM = ("num_features", "eps", "momentum", "track_running_stats")

MODULES: Mapping[type[nn.Module], Form] = {
    nn.Linear: Form("linear", ("in_features", "out_features")),
    nn.Conv1d: Form("conv1d", _CONV),
    nn.Conv2d: Form("conv2d", _CONV),
    nn.BatchNorm1d: Form("batch_norm", _BATCH_NORM),
    nn.BatchNorm2d: Form("batch_norm", _BATCH_NORM),
    nn.GroupNorm: Form("group_norm", ("num_groups", "num_channels", "eps")),
    nn.LayerNorm: Form("layer_norm", ("normalized_shape", "eps")),
    nn.ReLU: Form("relu"),
    nn.ReLU6: Form("relu6"),
    nn.GELU: Form("gelu", ("approximate",)),
    nn.SiLU: Form("silu"),
    nn.Tanh: Form("tanh"),
    nn.Sigmoid: Form("sigmoid"),
    nn.Hardsigmoid: Form("hard_sigmoid"),
    nn.Hardswish: Form("hard_swish"),
    nn.Softmax: Form("softmax", ("dim",)),
    nn.Dropout: Form("dropout", ("p",)),
    nn.MaxPool1d: Form("max_pool1d", _MAX),
    nn.MaxPool2d: Form("max_pool2d", _MAX),
    nn.AvgPool1d: Form("avg_pool1d", (*_WINDOW, "ceil_mode")),
    nn.AvgPool2d: Form("avg_pool2d", (*_WINDOW, "ceil_mode", "divisor_override")),
    nn.AdaptiveAvgPool1d: Form("adaptive_avg_pool1d", ("output_size",)),
    nn.AdaptiveAvgPool2d: Form("adaptive_avg_pool2d", ("output_size",)),
    nn.AdaptiveMaxPool1d: Form("adaptive_max_pool1d", ("output_size", "return_indices")),
    nn.AdaptiveMaxPool2d: Form("adaptive_max_pool2d", ("output_size", "return_indices")),
    nn.Flatten: Form("reshape"),
    nn.Unflatten: Form("reshape"),
    nn.Identity: Form("same"),
    nn.Embedding: Form("embedding", ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")),
    nn.LSTM: Form("lstm", _RECURRENT),
    nn.GRU: Form("gru", _RECURRENT),
    nn.MultiheadAttention: Form("attention", ("embed_dim", "num_heads", "dropout", "batch_first", "add_zero_attn")),
}
"""By exact type: what inherits from one of these may compute something else."""

_ONE = ("input", "inplace")
_SOFTMAX = ("input", "dim", "_stacklevel", "dtype")
_POOL = ("input", "kernel_size", "stride", "padding")
_MAX_POOL = (*_POOL, "dilation", "ceil_mode", "return_indices")
_AVG_POOL = (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")
_SWAP = Form("transpose", ("input", "dim0", "dim1"))
_MEAN = Form("mean", ("input", "dim", "keepdim"))
_CAT = Form("cat", ("tensors", "dim"))
_ADD, _MUL = Form("add", ("input", "other", "alpha")), Form("mul", ("input", "other"))
_SAME = Form("same", ("input", "*rest"))

FUNCTIONS: Mapping[Callable[..., Any], Form] = {
    **dict.fromkeys((torch.relu, F.relu, torch.relu_), Form("relu", _ONE)),
    F.relu6: Form("relu6", _ONE),
    F.gelu: Form("gelu", ("input", "approximate")),
    F.silu: Form("silu", _ONE),
    **dict.fromkeys((torch.tanh, F.tanh), Form("tanh", _ONE)),
    **dict.fromkeys((torch.sigmoid, F.sigmoid), Form("sigmoid", _ONE)),
    F.hardsigmoid: Form("hard_sigmoid", _ONE),
    F.hardswish: Form("hard_swish", _ONE),
    torch.softmax: Form("softmax", ("input", "dim", "dtype")),
    F.softmax: Form("softmax", _SOFTMAX),
    **dict.fromkeys((F.dropout, torch.dropout), Form("dropout", ("input", "p", "training", "inplace"))),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), Form("max_pool1d", _MAX_POOL)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), Form("max_pool2d", _MAX_POOL)),
    F.avg_pool1d: Form("avg_pool1d", _AVG_POOL),
    F.avg_pool2d: Form("avg_pool2d", _AVG_POOL),
    F.adaptive_avg_pool1d: Form("adaptive_avg_pool1d", ("input", "output_size")),
    F.adaptive_avg_pool2d: Form("adaptive_avg_pool2d", ("input", "output_size")),
    F.adaptive_max_pool1d: Form("adaptive_max_pool1d", ("input", "output_size", "return_indices")),
    F.adaptive_max_pool2d: Form("adaptive_max_pool2d", ("input", "output_size", "return_indices")),
    torch.flatten: Form("reshape", ("input", "start_dim", "end_dim")),
    torch.reshape: Form("reshape", ("input", "shape")),
    torch.squeeze: Form("reshape", ("input", "dim")),
    torch.unsqueeze: Form("reshape", ("input", "dim")),
    **dict.fromkeys((torch.transpose, torch.swapaxes), _SWAP),
    torch.permute: Form("permute", ("input", "dims")),
    torch.mean: _MEAN,
    **dict.fromkeys((torch.cat, torch.concat), _CAT),
    **dict.fromkeys((operator.add, operator.iadd, torch.add), _ADD),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul), _MUL),
    operator.getitem: Form("getitem", ("input", "index")),
    **dict.fromkeys((torch.zeros, torch.zeros_like), Form("zeros", ("*rest",))),
}

METHODS: Mapping[str, Form] = {
    **dict.fromkeys(("relu", "relu_"), Form("relu", _ONE)),
    **dict.fromkeys(("tanh", "tanh_"), Form("tanh", _ONE)),
    **dict.fromkeys(("sigmoid", "sigmoid_"), Form("sigmoid", _ONE)),
    "softmax": Form("softmax", ("input", "dim", "dtype")),
    "flatten": Form("reshape", ("input", "start_dim", "end_dim")),
    "unflatten": Form("reshape", ("input", "dim", "sizes")),
    **dict.fromkeys(("view", "reshape"), Form("reshape", ("input", "*shape"))),
    **dict.fromkeys(("squeeze", "unsqueeze"), Form("reshape", ("input", "dim"))),
    **dict.fromkeys(("transpose", "swapaxes"), _SWAP),
    "permute": Form("permute", ("input", "*dims")),
    "mean": _MEAN,
    **dict.fromkeys(("add", "add_"), _ADD),
    **dict.fromkeys(("mul", "mul_"), _MUL),
    **dict.fromkeys(("contiguous", "clone", "to", "float", "long", "int", "type"), _SAME),
    "new_zeros": Form("zeros", ("*rest",)),
}


def read(form: Form, module: nn.Module, paths: Mapping[int, str]) -> tuple[Options, dict[str, Param]]:
    """Read what a module on the list computes.

    Args:
        form: Of its type.
        module: The module.
        paths: First name of every parameter and buffer of the whole model, by identity.

    Returns:
        Its facts by attribute, and its arrays by their names within it.
    """
    arrays = dict([*module.named_parameters(), *module.named_buffers()])
    params = {
        name: Param(paths[id(array)], array.detach().cpu().numpy().copy())
        for name, array in arrays.items()
        if array.is_floating_point()
    }
    return {name: getattr(module, name, None) for name in form.names}, params


def bound(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give a call's arguments their names.

    Args:
        names: As in `Form`.
        args: By position.
        kwargs: By name.

    Raises:
        ValueError: One has no name.
    """
    rest = names[-1][1:] if names and names[-1].startswith("*") else ""
    plain = names[:-1] if rest else names
    yield from zip(plain, args, strict=False)
    if rest:
        yield rest, tuple(args[len(plain) :])
    elif len(args) > len(plain):
        raise ValueError(f"{len(args)} arguments, of which {len(plain)} are known")
    for name, value in kwargs.items():
        if name not in plain and not rest:
            raise ValueError(f"argument {name!r} is not known")
        yield name, value
