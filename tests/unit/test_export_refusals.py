"""What no spec can hold is refused by its path, its op and what to write instead; what cannot be cut says so, and why."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edge_runtime.models.export import export
from wire.errors import SpecError


class Inside(nn.Module):
    """One thing between two linear layers, at the path ``body.part``."""

    def __init__(self, part, size=4):
        super().__init__()
        self.first, self.body, self.last = nn.Linear(4, size), nn.ModuleDict({"part": part}), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.body["part"](self.first(x)))


class Does(nn.Module):
    """A function on what a first layer gives, in the forward of the module at the path ``body.part``."""

    def __init__(self, function):
        super().__init__()
        self.function, self.free = function, nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.function(self, x)


def does(function):
    return Inside(Does(function))


PARTS = {
    "activation": (Inside(nn.LeakyReLU()), (4,), r"body\.part: LeakyReLU: .*nearest supported form: ReLU or SiLU"),
    "tanh gelu": (Inside(nn.GELU("tanh")), (4,), r"body\.part: gelu: approximate='tanh'.*approximate=\"none\""),
    "log softmax": (does(lambda _, x: F.log_softmax(x, 1)), (4,), r"body\.part: log_softmax: .*the loss takes logits"),
    "softmax of steps": (Inside(nn.Softmax(1)), (5, 4), r"body\.part: softmax: dim=1.*transpose"),
    "number": (does(lambda _, x: x * 2.0), (4,), r"body\.part: mul: with the number 2\.0.*weights before it"),
    "minus": (does(lambda _, x: x - x.relu()), (4,), r"body\.part: sub: .*nearest supported form: add"),
    "broadcast": (does(lambda _, x: x + x.mean(1, keepdim=True)), (4,), r"body\.part: mean: over dim=1 of 2 axes"),
    "parameter": (does(lambda part, x: x + part.free), (4,), r"body\.part\.free: parameter: .*Linear, Conv or Embedding"),
    "branch": (does(lambda _, x: x if x.sum() > 0 else -x), (4,), r"forward: torch\.fx cannot trace it.*without branches"),
    "matmul": (does(lambda _, x: torch.einsum("bi,bi->bi", x, x)), (4,), r"body\.part: einsum: .*MultiheadAttention"),
    "chunk": (does(lambda _, x: x.chunk(1, 1)[0]), (4,), r"body\.part: chunk: .*one layer for each part"),
    "detach": (does(lambda _, x: x.detach()), (4,), r"body\.part: detach: .*gradients pass everywhere"),
    "first step": (does(lambda _, x: x[:, 0]), (5, 4), r"body\.part: getitem: index .*the last step; or mean"),
    "cast": (does(lambda _, x: x.double().float()), (4,), r"body\.part: double: "),
    "batch moves": (does(lambda _, x: x.transpose(0, 1)), (5, 4), r"body\.part: transpose: .*samples on the first axis"),
    "batch mixes": (does(lambda _, x: x.reshape(-1, 4).relu()), (5, 4), r"body\.part: (reshape|relu): "),
    "functional": (does(lambda part, x: F.layer_norm(x, (4,))), (4,), r"body\.part: layer_norm: .*a LayerNorm module"),
    "dropout of maps": (Inside(nn.Dropout2d()), (4, 4, 4), r"body\.part: Dropout2d: .*: Dropout"),
    "all dropped": (Inside(nn.Dropout(1.0)), (4,), r"body\.part: dropout: p=1 drops everything"),
    "epsilon": (Inside(nn.LayerNorm(4, eps=1e-3)), (4,), r"body\.part: layer_norm: eps=0\.001.*eps=1e-05"),
    "no statistics": (Inside(nn.BatchNorm1d(4, track_running_stats=False)), (4,), r"track_running_stats=True, or a GroupNorm"),
    "unheard of": (does(lambda _, x: x.cumsum(1)), (5, 4), r"body\.part: cumsum: .*one of linear, conv2d"),
    "double": (Inside(nn.ReLU()).double(), (4,), r"first\.weight: torch\.float64: .*module\.float\(\)"),
    "encoder": (Inside(nn.TransformerEncoderLayer(4, 2)), (5, 4), r"EncoderLayer: .*MultiheadAttention"),
    "wrong input": (Inside(nn.ReLU()), (5,), r"first: Linear: it fails on samples of \(5,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_refusals_name_path_op_and_nearest_form(name):
    (module, shape, words) = PARTS[name]
    with pytest.raises(SpecError, match=words) as found:
        export(module, shape)
    assert re.search(r"^[^:]+: [^:]+: .+; nearest supported form: .+", str(found.value))


LAYERS = {
    "dilation": (nn.Conv2d(2, 2, 3, dilation=2), (2, 8, 8), r"conv2d: dilation=.*dilation=1 and a larger kernel"),
    "oblong": (nn.Conv2d(2, 2, (3, 1)), (2, 8, 8), r"conv2d: kernel_size=\(3, 1\).*one whole number"),
    "wide padding": (nn.Conv2d(2, 2, 1, padding=1), (2, 8, 8), r"conv2d: padding 1 of kernel 1.*below the kernel"),
    "reflected": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 8, 8), r"conv2d: padding_mode='reflect'"),
    "two filters each": (nn.Conv2d(2, 4, 3, groups=2), (2, 8, 8), r"conv2d: 2 filters for each of 2 .*then a convolution"),
    "transposed": (nn.ConvTranspose2d(2, 2, 2), (2, 8, 8), r"ConvTranspose2d: .*: Conv2d"),
    "padded pool": (nn.MaxPool2d(3, 2, padding=1), (2, 8, 8), r"max_pool2d: padding=1.*padding=0"),
    "over the edge": (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 8, 8), r"max_pool2d: ceil_mode=True.*ceil_mode=False"),
    "uneven maxima": (nn.AdaptiveMaxPool2d(3), (2, 8, 8), r"adaptive_max_pool2d: sides \[8\] to 3.*a multiple"),
    "norm of pictures": (nn.LayerNorm((2, 8, 8)), (2, 8, 8), r"layer_norm: over axes.*GroupNorm\(1, channels\)"),
    "instances": (nn.InstanceNorm2d(2), (2, 8, 8), r"InstanceNorm2d: .*: GroupNorm\(1, channels\)"),
    "steps first": (nn.LSTM(2, 3), (8, 2), r"lstm: batch_first=False.*batch_first=True"),
    "two ways": (nn.GRU(2, 3, batch_first=True, bidirectional=True), (8, 2), r"gru: bidirectional=True.*bidirectional=False"),
    "plain recurrent": (nn.RNN(2, 3, batch_first=True), (8, 2), r"RNN: .*: GRU"),
    "padding word": (nn.Embedding(5, 2, padding_idx=0), (8,), r"embedding: padding_idx=0.*padding_idx=None"),
}  # fmt: skip


class Ends(nn.Module):
    """A layer, then what makes classes of anything."""

    def __init__(self, layer, pick):
        super().__init__()
        self.layer, self.pick = layer, pick

    def forward(self, x):
        y = self.layer(x)
        return (y[0] if self.pick else y).flatten(1)


@pytest.mark.parametrize("name", LAYERS)
def test_options_of_layers_are_refused_by_name(name):
    (layer, shape, words) = LAYERS[name]
    with pytest.raises(SpecError, match=f"^layer: {words}"):
        export(Ends(layer, isinstance(layer, nn.RNNBase)), shape)


class Attends(nn.Module):
    def __init__(self, two=False, **options):
        super().__init__()
        self.two = two
        self.part = nn.MultiheadAttention(4, 2, **options)
        self.other, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        keys = self.other(x) if self.two else x
        return self.last(self.part(x, keys, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "batch_first=False"), ({"batch_first": True, "dropout": 0.1}, "dropout=0.1"),
     ({"batch_first": True, "add_zero_attn": True}, "add_zero_attn"),
     ({"batch_first": True, "add_bias_kv": True}, "bias_k"),
     ({"batch_first": True, "kdim": 4, "vdim": 4, "bias": False}, "")],
)  # fmt: skip
def test_attention_is_over_itself_and_plain(options, words):
    if words:
        with pytest.raises(SpecError, match=f"part: attention: .*{words}"):
            export(Attends(**options), (5, 4))
    else:
        assert "part.in_proj_bias" in export(Attends(**options), (5, 4)).spec.nodes[0].params.values()


def test_attention_over_two_values_is_refused():
    module = Attends(two=True, batch_first=True)
    with pytest.raises(SpecError, match="part: attention: query, key and value are not one"):
        export(module, (5, 4))


class Overwrites(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.first, self.relu, self.last, self.how = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), how

    def forward(self, x):
        return self.last(self.how(self, self.first(x)))


def _lost(part, x):
    part.relu(x)
    return x


@pytest.mark.parametrize(
    "how",
    [lambda part, x: part.relu(x) + x, _lost, lambda _, x: x.relu_() + x, lambda _, x: F.relu(x, inplace=True) + x],
)
def test_a_value_that_is_overwritten_and_read_again(how):
    with pytest.raises(
        SpecError, match="overwrites a value that is read again; nearest supported form: the same without"
    ):
        export(Overwrites(how), (4,))


@pytest.mark.parametrize(
    "how",
    [
        lambda _, x: F.dropout(x, 0.5),  # forgets module.training
        lambda _, x: x.view(3, 4),  # as many samples as are traced with
    ],
)
def test_what_tracing_cannot_see_shows_when_both_are_run(how):
    with pytest.raises(SpecError, match=r"outputs are not the module's|fails on 5 samples"):
        export(Overwrites(how), (4,))


def test_hooks_are_refused():
    module = Overwrites(lambda _, x: x)
    module.first.register_forward_hook(lambda *_: None)
    with pytest.raises(SpecError, match="first: Linear: hooks"):
        export(module, (4,))


def fixed(module, shape):
    made = export(module, shape)
    whole = {g.name for g in made.spec.groups if not g.prunable} - {"classes"}
    assert whole == set(made.fixed)
    return {name: (reason.path, reason.why) for name, reason in made.fixed.items()}


class Two(nn.Module):
    """A layer of channels, something, a linear layer."""

    def __init__(self, part, out):
        super().__init__()
        self.first, self.part, self.last = nn.Conv2d(4, 4, 1), part, nn.Linear(out, 2)

    def forward(self, x):
        return self.last(self.part(self.first(x)).flatten(1))


def test_what_runs_but_is_not_cut_says_why():
    assert fixed(Two(nn.Flatten(2), 36), (4, 3, 3)) == {}  # of one flatten behind another only the last counts
    (group,) = fixed(Two(nn.Sequential(nn.Flatten(2), nn.ReLU()), 36), (4, 3, 3)).items()
    assert group == ("first", ("part.0", "is brought into the literal shape (4, 9)"))
    (group,) = fixed(Inside(nn.Softmax(-1)), (4,)).items()
    assert group == ("first", ("body.part", "feeds a softmax, whose sum runs over all of them"))


class Sums(nn.Module):
    """What is read by two layers of one size, joined as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how
        self.norm, self.last = nn.LayerNorm(8), nn.LazyLinear(2)

    def forward(self, x):
        return self.last(self.how(self, x, self.a(x), self.b(x)))


def test_a_sum_with_the_input_and_a_norm_over_a_concat_are_not_cut():
    module = Sums(lambda _, x, a, b: x + a * b)
    module(torch.zeros(2, 4))
    assert fixed(module, (4,)) == {"a": ("", "meets an axis that is never cut, such as the input's")}
    module = Sums(lambda part, x, a, b: part.norm(torch.cat([a, b], 1)))
    module(torch.zeros(2, 4))
    why = "is concatenated for layer_norm, which is neither linear nor a convolution and cannot be split"
    assert fixed(module, (4,)) == dict.fromkeys("ab", ("norm", why))
    module = Sums(lambda _, x, a, b: torch.cat([a, b], 1))
    module(torch.zeros(2, 4))
    assert fixed(module, (4,)) == {}


def test_notes_say_what_is_not_as_in_the_module():
    made = export(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Dropout(0.33333), nn.Softmax(-1)), (4,), "mine")
    assert made.spec.name == "mine"
    assert made.notes == (
        "0: it has no bias, so the spec has one of zeros, which is trained",
        "1: dropout of 0.33333 is rounded to 0.333",
        "the model itself: it ends in a softmax, but the loss takes logits: training will take the softmax twice",
    )
