"""Modules that are rare and in order: they come out as they are, or with an error that says what they lack."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_runtime.engines import open_engine
from edge_runtime.models.export import export
from tests.support.engines import NAMES
from tests.support.masked_module import check_narrow, random_widths
from tests.unit.test_export_lies import Made
from wire.errors import SpecError


def mean_over_channels(m, x):
    return m.last(torch.cat([m.one(x), m.other(x)], 1).mean(1))


def pool_over_steps(m, x):
    return m.last(F.max_pool1d(torch.cat([m.one(x).transpose(1, 2), m.other(x).transpose(1, 2)], 2), 2).flatten(1))


def maximum_over_steps(m, x):
    value = torch.cat([m.one(x).transpose(1, 2), m.other(x).transpose(1, 2)], 2)
    return m.last(F.adaptive_max_pool1d(value, 1).flatten(1))


def lines(how, features):
    return Made(how, one=nn.Conv1d(2, 4, 3), other=nn.Conv1d(2, 3, 3), last=nn.Linear(features, 3)), (2, 8)


def filters_over_a_single_channel():
    def how(m, x):
        return m.last(m.filters(torch.cat([m.one(x), m.other(x)], 1)).flatten(1))

    layers = {"filters": nn.Conv2d(5, 5, 3, groups=5), "last": nn.Linear(5, 3)}
    return Made(how, one=nn.Conv2d(1, 4, 3), other=nn.Conv2d(1, 1, 3), **layers), (1, 5, 5)


def tied():
    module = Made(lambda m, x: m.last(m.inner(m.words(x)).mean(1)), words=nn.Embedding(9, 4), inner=nn.Linear(4, 4))
    module.last = nn.Linear(4, 9)
    module.last.weight = module.words.weight
    return module, (5,)


CASES = {
    "a mean over channels of two parts": lambda: lines(mean_over_channels, 6),
    "a pool along the axis of two parts": lambda: lines(pool_over_steps, 18),
    "a maximum along the axis of two parts": lambda: lines(maximum_over_steps, 6),
    "filters over a part of one channel": filters_over_a_single_channel,
    "words that are outputs too": tied,
}


@pytest.mark.parametrize("name", CASES)
def test_it_comes_out_and_compact_is_masked_in_every_engine(name):
    torch.manual_seed(3)
    (module, shape), rng = CASES[name](), np.random.default_rng(3)
    made = export(module, shape)
    words = any(node.op == "embedding" for node in made.spec.nodes)
    for narrow in random_widths(made.spec, rng):
        x = (rng.integers(9, size=(6, *shape)) if words else rng.standard_normal((6, *shape))).astype(np.float32)
        for engine in NAMES:
            y = rng.integers(made.spec.classes, size=6)
            found = check_narrow(module, made, narrow, x, y, open_engine(engine))
            assert found.outputs <= 1e-5
            assert found.gradients <= max(1e-5, 10 * found.own)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, lengths):
        return self.layer(x) + lengths


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (Two, (4,), "its argument 'lengths' has no default; nearest supported form: a forward with one input"),
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), (1, 2, 2), "nothing in it can be trained"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), (2,) * 5, r"no room for it: length 5 is above 4"),
    ],
)
def test_what_no_spec_can_be_is_refused_by_name(make, shape, words):
    with pytest.raises(SpecError, match=words):
        export(make(), shape)
