"""What a traced module does, as plain records: no torch here, so that lowering it is arithmetic over names and shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wire.errors import SpecError
from wire.ops import OPS

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Param:
    """One array of a module.

    Attributes:
        path: Its name in ``state_dict``; of an array that several modules share the first one.
        array: Its values, a copy.
    """

    path: str
    array: Floats


@dataclass(frozen=True, slots=True)
class Call:
    """One step of a module's forward pass.

    Attributes:
        name: Unique.
        path: The module that does it, as in ``named_modules``; empty for the model itself.
        op: What is done, by a name of `edge_runtime.models.lower.LOWER`.
        inputs: Names of earlier calls, in the order of the arguments.
        options: The other arguments by torch's names; plain Python values.
        params: Arrays by role.
        shape: Of the result without the batch axis; None if that axis is not the first, or for no single tensor.
        of_module: Whether a module of torch does it, rather than a function.
    """

    name: str
    path: str
    op: str
    inputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    of_module: bool = False


NEAREST = {
    "LeakyReLU": "ReLU or SiLU",
    "leaky_relu": "relu or silu",
    "ELU": "SiLU",
    "elu": "silu",
    "SELU": "SiLU with a LayerNorm or GroupNorm before it",
    "PReLU": "ReLU",
    "Softplus": "SiLU",
    "Mish": "SiLU",
    "mish": "silu",
    "LogSoftmax": "leave it out: the loss takes logits",
    "log_softmax": "leave it out: the loss takes logits",
    "log": "leave it out: the loss takes logits",
    "BatchNorm3d": "BatchNorm2d over (channels, height, width)",
    "InstanceNorm1d": "GroupNorm(1, channels)",
    "InstanceNorm2d": "GroupNorm(1, channels)",
    "LocalResponseNorm": "GroupNorm(1, channels)",
    "RMSNorm": "LayerNorm",
    "rms_norm": "a LayerNorm module",
    "layer_norm": "a LayerNorm module",
    "batch_norm": "a BatchNorm module",
    "group_norm": "a GroupNorm module",
    "linear": "a Linear module",
    "conv1d": "a Conv1d module",
    "conv2d": "a Conv2d module",
    "embedding": "an Embedding module",
    "matmul": "a Linear module, or MultiheadAttention(x, x, x, need_weights=False)",
    "bmm": "a Linear module, or MultiheadAttention(x, x, x, need_weights=False)",
    "einsum": "a Linear module, or MultiheadAttention(x, x, x, need_weights=False)",
    "scaled_dot_product_attention": "MultiheadAttention(x, x, x, need_weights=False)",
    "TransformerEncoderLayer": "MultiheadAttention, LayerNorm and Linear modules with adds between them",
    "TransformerEncoder": "MultiheadAttention, LayerNorm and Linear modules with adds between them",
    "Transformer": "MultiheadAttention, LayerNorm and Linear modules with adds between them",
    "RNN": "GRU",
    "RNNCell": "GRU over the whole sequence",
    "LSTMCell": "LSTM over the whole sequence",
    "GRUCell": "GRU over the whole sequence",
    "Conv3d": "Conv2d",
    "ConvTranspose1d": "Conv1d",
    "ConvTranspose2d": "Conv2d",
    "Bilinear": "Linear",
    "Upsample": "leave it out: the closed list has no op that makes pictures larger",
    "interpolate": "leave it out: the closed list has no op that makes pictures larger",
    "PixelShuffle": "leave it out: the closed list has no op that makes pictures larger",
    "Dropout1d": "Dropout",
    "Dropout2d": "Dropout",
    "dropout2d": "dropout",
    "AlphaDropout": "Dropout",
    "FeatureAlphaDropout": "Dropout",
    "sub": "add, with the sign in the weights before it",
    "truediv": "mul, or the factor in the weights before it",
    "div": "mul, or the factor in the weights before it",
    "max": "MaxPool1d or MaxPool2d over the whole length",
    "amax": "MaxPool1d or MaxPool2d over the whole length",
    "sum": "mean, which adaptive_avg_pool computes",
    "stack": "cat",
    "chunk": "one layer for each part",
    "split": "one layer for each part",
    "detach": "leave it out: gradients pass everywhere",
    "pad": "padding of the convolution behind it",
    "ZeroPad2d": "padding of the convolution behind it",
    "pow": "mul of a value with itself",
    "exp": "silu or softmax",
    "sqrt": "leave it out",
    "EmbeddingBag": "Embedding, then the mean over the steps",
}
"""What to write instead of a thing that has no place on the closed list, by torch's name of it."""


def refused(path: str, op: str, problem: str, nearest: str = "") -> SpecError:
    """Say what cannot be exported, where, and what would do.

    Args:
        path: Of the module; empty for the model itself.
        op: Torch's name of what was met.
        problem: What is wrong with it.
        nearest: What to write instead; empty to look the op up.

    Returns:
        The error to raise.
    """
    nearest = nearest or NEAREST.get(op) or _likely(op)
    return SpecError(f"{path or 'the model itself'}: {op}: {problem}; nearest supported form: {nearest}")


def _likely(op: str) -> str:
    known = [name.replace("_", "") for name in OPS]
    close = difflib.get_close_matches(op.lower().replace("_", ""), known, n=1, cutoff=0.7)
    if close:
        return list(OPS)[known.index(close[0])]
    return f"one of {', '.join(OPS)}"
