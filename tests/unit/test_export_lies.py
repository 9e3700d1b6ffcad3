"""Modules that are not what they seem: what comes out is the module, or an error that names it, and nothing in between."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_runtime.models.export import export
from wire.errors import SpecError


class Made(nn.Module):
    """Layers by name, and a function that uses them."""

    def __init__(self, how, **layers):
        super().__init__()
        self.how = how
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.how(self, x)


def two(how, last=3):
    """Two linear layers; the second starts at zero, so that nothing before it shows in the outputs."""
    module = Made(how, first=nn.Linear(4, 4), other=nn.Linear(4, 4), last=nn.Linear(4, last))
    nn.init.zeros_(module.last.weight)
    return module


def test_one_value_twice_in_a_concat_keeps_both_slices_of_what_reads_it():
    module = Made(
        lambda m, x: m.last(m.norm(torch.cat([m.conv(x)] * 2, 1)).flatten(1)),
        conv=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(8), last=nn.Linear(72, 3),
    )  # fmt: skip
    made = export(module, (1, 5, 5))
    found = sorted((s.start, s.stop) for s in made.sources.values() if s.path == "norm.running_mean")
    assert found == [(0, 4), (4, 8)]


def aliased(module, x):
    value = module.first(x)
    same = value
    same += module.other(x)
    return module.last(value)


def test_what_the_first_weights_hide_is_found_with_others():
    with pytest.raises(SpecError, match="the spec's outputs are not the module's"):
        export(two(aliased), (4,))


def without_gradients(module, x):
    with torch.no_grad():
        value = module.first(x)
    return module.last(F.relu(value))


def test_weights_that_no_gradient_reaches_are_refused_and_frozen_ones_are_noted():
    with pytest.raises(SpecError, match=r"first\.weight: no_grad: .*nearest supported form: leave it out"):
        export(two(without_gradients), (4,))
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    module[0].weight.requires_grad_(False)
    assert export(module, (4,)).notes == ("0.weight: it is frozen (requires_grad=False), but the spec's is trained",)


class Fails(nn.Module):
    """Runs while it is traced, and not in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        if not self.training:
            raise KeyError("labels")
        return self.layer(x)


def locked():
    module = nn.Sequential(nn.Linear(4, 3))
    module.lock = threading.Lock()
    return module


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 3, device="meta")), (4,), "meta"),
        (
            lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 3))),
            (4,),
            "ScriptModule: .*the module that it was made of",
        ),
        (locked, (4,), "cannot be copied"),
        (Fails, (4,), "fails on 5 samples.*labels"),
        (lambda: Made(lambda m, x: {"logits": m.a(x)}, a=nn.Linear(4, 3)), (4,), "output: it is not one tensor"),
        (lambda: Made(lambda m, x: [m.a(x), m.a(x)], a=nn.Linear(4, 3)), (4,), "output: it is not one tensor"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), (4,), r"0: LazyLinear: .*run it once"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveMaxPool2d(0), nn.Flatten()), (1, 5, 5), "1: .*pool2d: "),
        (
            lambda: Made(lambda m, x: m.b(m.a(x)[0][:, -1]), a=nn.LSTM(4, 4, 2, True, True, 1.0), b=nn.Linear(4, 3)),
            (5, 4),
            "a: lstm: dropout=1 drops everything",
        ),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:Lazy modules are a new feature", "ignore:.torch.jit.*deprecated", "ignore:.*zero-element"
)
def test_what_cannot_be_traced_is_an_error_that_names_it(make, shape, words):
    with pytest.raises(SpecError, match=words):
        export(make(), shape)


def test_dropout_that_is_rounded_away_is_noted():
    made = export(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0002), nn.Linear(4, 3)), (4,))
    assert made.notes == ("1: dropout of 0.0002 is rounded to 0",)
