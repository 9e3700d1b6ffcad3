"""Models of the zoo as one would write them in torch, to compare with: dense, and with weights times masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.optim
from torch import nn

from wire.spec import NORM_EPSILON, ModelSpec

Array = np.ndarray[Any, Any]
RATE = 0.01


class Plain(nn.Module):
    """A spec's graph of torch's own modules; a weight that has a mask is multiplied with it in every forward pass."""

    def __init__(self, spec: ModelSpec, arrays: Mapping[str, Array], masks: Mapping[str, Array] | None = None) -> None:
        super().__init__()
        self.nodes = spec.nodes
        self.parts = nn.ModuleDict()
        for node in spec.nodes:
            part = _part(node, arrays)
            if part is not None:
                self.parts[node.name.replace(".", "/")] = part
            mask = (masks or {}).get(node.params.get("weight", ""))
            if mask is not None:
                part.register_buffer("mask", torch.from_numpy(mask).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {"input": x}
        for node in self.nodes:
            inputs = [values[name] for name in node.inputs]
            if node.op == "add":
                values[node.name] = sum(inputs[1:], inputs[0])
                continue
            part = self.parts[node.name.replace(".", "/")]
            mask = getattr(part, "mask", None)
            if mask is None:
                values[node.name] = part(inputs[0])
            elif node.op == "linear":
                values[node.name] = F.linear(inputs[0], part.weight * mask, part.bias)
            else:
                values[node.name] = F.conv2d(inputs[0], part.weight * mask, part.bias, part.stride, part.padding)
        return values[self.nodes[-1].name]

    def weight(self, name: str) -> Array:
        """Give a tensor by its name in the spec."""
        for node in self.nodes:
            for role, tensor in node.params.items():
                if tensor == name:
                    return getattr(self.parts[node.name.replace(".", "/")], role).detach().numpy()
        raise KeyError(name)


def _part(node: Any, arrays: Mapping[str, Array]) -> nn.Module | None:
    attrs = node.attrs
    if node.op == "add":
        return None
    if node.params:
        weight, bias = (torch.from_numpy(np.array(arrays[node.params[role]])) for role in ("weight", "bias"))
        if node.op == "linear":
            part: nn.Module = nn.Linear(weight.shape[1], weight.shape[0])
        elif node.op == "conv2d":
            part = nn.Conv2d(weight.shape[1], weight.shape[0], attrs["kernel"], attrs["stride"], attrs["padding"])
        else:
            part = nn.GroupNorm(attrs["groups"], len(weight), NORM_EPSILON)
        part.weight, part.bias = nn.Parameter(weight), nn.Parameter(bias)
        return part
    plain: dict[str, Callable[[], nn.Module]] = {
        "relu": nn.ReLU,
        "flatten": nn.Flatten,
        "max_pool2d": lambda: nn.MaxPool2d(attrs["kernel"], attrs["stride"]),
        "avg_pool2d": lambda: nn.AvgPool2d(attrs["kernel"], attrs["stride"]),
    }
    return plain[node.op]()


def training(model: Plain, x: Array, y: Array) -> Callable[[], float]:
    """Give one training step with torch's own SGD."""
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
