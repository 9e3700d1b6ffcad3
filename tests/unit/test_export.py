"""Torch modules as specs: outputs, groups, sizes, compact sub-models against the masked module, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.models.export import export, exported, give_back
from tests.support.masked_module import apart, check_narrow, loaded, random_widths
from tests.support.torch_models import MODELS
from wire.spec import Structure, decode, encode, parameter_count

NEAR = 1e-5


def trained(name, seed=0):
    """A module whose norms have seen something, so that their statistics and affines are no ones and zeros."""
    torch.manual_seed(seed)
    (make, shape) = MODELS[name]
    module = make()
    module.train()
    with torch.no_grad():
        for part in module.modules():
            if part.__class__.__name__.endswith("Norm2d") or part.__class__.__name__.endswith("Norm"):
                part.weight.add_(0.3 * torch.randn_like(part.weight))
                part.bias.add_(0.3 * torch.randn_like(part.bias))
        module(samples(name, 8, torch_too=True))
    return module, shape


def samples(name, count, torch_too=False, seed=1):
    rng = np.random.default_rng(seed)
    shape = (count, *MODELS[name][1])
    x = rng.integers(13, size=shape) if name == "words" else rng.standard_normal(shape)
    return torch.from_numpy(x.astype(np.float32)) if torch_too else x.astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_is_the_module(name):
    module, shape = trained(name)
    spec, arrays = exported(module, shape)
    made = export(module, shape)
    assert made.spec == spec == decode(encode(spec))
    assert set(arrays) == {t.name for t in spec.tensors}
    (whole,) = random_widths(spec, np.random.default_rng(0), 1)
    x = samples(name, 6)
    with torch.no_grad():
        wanted = module.eval()(torch.from_numpy(x)).numpy()
    assert apart(loaded(made, whole).forward(x), wanted) < NEAR


@pytest.mark.parametrize("name", MODELS)
def test_compact_is_masked(name):
    module, shape = trained(name)
    made = export(module, shape)
    assert not made.fixed
    rng = np.random.default_rng(3)
    for _ in range(4):
        for narrow in random_widths(made.spec, rng):
            y = rng.integers(made.spec.classes, size=6)
            found = check_narrow(module, made, narrow, samples(name, 6), y)
            assert max(found.outputs, found.gradients) < NEAR, narrow.structure
    assert narrow.structure != Structure()


LENET, ATTENTION, LSTM = (export(MODELS[name][0](), MODELS[name][1]) for name in ("lenet-5", "attention", "lstm"))


def count(made, **sizes):
    """Weights of a structure that keeps so many channels."""
    widths = {name.replace("_", "."): (size,) for name, size in sizes.items()}
    return parameter_count(made.spec, Structure(0, widths, "ab" * 32))


@given(a=st.integers(1, 6), b=st.integers(1, 16), c=st.integers(1, 120), d=st.integers(1, 84))
def test_weights_of_a_cut_lenet_are_as_counted_by_hand(a, b, c, d):
    closed = 25 * a + a + 25 * a * b + b + 25 * b * c + c + c * d + d + 10 * d + 10
    assert count(LENET, conv1=a, conv2=b, fc1=c, fc2=d) == closed


@given(e=st.integers(1, 8), h=st.integers(1, 4), u=st.integers(1, 12))
def test_weights_of_a_cut_attention_block_are_as_counted_by_hand(e, h, u):
    heads = 2 * h
    attention = 3 * heads * e + 3 * heads + e * heads + e
    closed = 3 * e + e + attention + 4 * e + (e * u + u) + (u * e + e) + 4 * e + 4
    assert count(ATTENTION, embed=e, attn_heads=h, up=u) == closed


@given(a=st.integers(1, 7), b=st.integers(1, 7))
def test_weights_of_a_cut_lstm_are_as_counted_by_hand(a, b):
    closed = 4 * a * (3 + a + 2) + 4 * b * (a + b + 2) + 4 * b + 4
    assert count(LSTM, lstm_0=a, lstm_1=b) == closed


def test_residual_blocks_share_and_stages_do_not():
    made = export(*trained("resnet"))
    sizes = {g.name: g.size for g in made.spec.groups if g.prunable}
    assert sizes == {"stem": 6, "layer1.0.conv1": 6, "layer1.1.conv1": 6, "layer2.conv1": 10, "layer2.conv2": 10}


def test_squeeze_and_excite_stands_upright_and_is_cut():
    made = export(*trained("squeeze-excite"))
    assert {g.name for g in made.spec.groups if g.prunable} == {"conv", "gate.0"}
    assert not {"reshape", "linear"} & {n.op for n in made.spec.nodes[:-1]}


def test_branches_are_split_and_none_is_fixed():
    made = export(*trained("inception"))
    assert {g.name for g in made.spec.groups if g.prunable} == {"a", "b", "c", "mix"}
    assert "concat" not in {n.op for n in made.spec.nodes}
    assert [n.name for n in made.spec.nodes if n.op == "conv2d"] == ["a", "b", "c", "mix.0", "mix.1", "mix.2"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_back_into_the_module(name):
    module, shape = trained(name)
    made = export(module, shape)
    other, _ = trained(name, seed=1)
    give_back(other, made, made.arrays)
    again = export(other, shape)
    assert all(np.array_equal(again.arrays[n], array) for n, array in made.arrays.items())


def test_the_module_stays_as_it_is():
    module, shape = trained("vgg")
    before = {n: a.clone() for n, a in module.state_dict().items()}
    module.train()
    export(module, shape)
    assert module.training
    assert all(torch.equal(before[n], a) for n, a in module.state_dict().items())


def test_a_shared_layer_is_one_tensor_and_joins_what_reads_it():
    first, shared = torch.nn.Linear(4, 5), torch.nn.Linear(5, 5)
    made = export(torch.nn.Sequential(first, shared, torch.nn.Tanh(), shared, torch.nn.Linear(5, 2)), (4,))
    assert [t.name for t in made.spec.tensors] == ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]
    assert {g.name: g.size for g in made.spec.groups} == {"0": 5, "classes": 2}


def test_one_layer_by_itself_is_a_model():
    (spec, arrays) = exported(torch.nn.Linear(4, 3), (4,))
    assert (spec.name, spec.classes, list(arrays)) == ("Linear", 3, ["0.weight", "0.bias"])
