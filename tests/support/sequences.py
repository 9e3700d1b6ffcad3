"""Models with gates, heads and norms of batches: for tests of whatever cuts them."""

from __future__ import annotations

from wire.spec import Axis, AxisGroup, ModelSpec, Node, TensorSpec, check

STEPS, WIDTH, CLASSES = 5, 6, 3
GATES = {"lstm": 4, "gru": 3}
_HEADS, _HEAD = 4, 3


def recurrent(op: str, hidden: int = 8, second: int = 6) -> ModelSpec:
    """Two recurrent layers, one behind the other, and a linear one: groups a and b can be cut."""
    tensors, nodes, before = [], [], ("input", Axis(inner=WIDTH))
    for name in "ab":
        rows = Axis(name, outer=GATES[op])
        tensors += [
            TensorSpec(f"{name}.ih", (rows, before[1]), "fan", WIDTH),
            TensorSpec(f"{name}.hh", (rows, Axis(name)), "fan", hidden),
            TensorSpec(f"{name}.bih", (rows,), "fan", hidden),
            TensorSpec(f"{name}.bhh", (rows,), "fan", hidden),
        ]
        roles = {"weight_ih": f"{name}.ih", "weight_hh": f"{name}.hh"}
        roles |= {"bias_ih": f"{name}.bih", "bias_hh": f"{name}.bhh"}
        nodes.append(Node(name, op, (before[0],), roles))
        before = (name, Axis(name))
    tensors += [TensorSpec("o.weight", (Axis("c"), Axis("b")), "fan", second), TensorSpec("o.bias", (Axis("c"),))]
    nodes += [Node("l", "last", ("b",)), Node("o", "linear", ("l",), {"weight": "o.weight", "bias": "o.bias"})]
    groups = (AxisGroup("a", hidden), AxisGroup("b", second), AxisGroup("c", CLASSES, prunable=False))
    return check(ModelSpec(op, (STEPS, WIDTH), CLASSES, groups, tuple(tensors), tuple(nodes)))


def turned(size: int = 24) -> ModelSpec:
    """A convolution over the steps, a norm of batches, and a linear layer for each step, which reads it turned: group e."""
    tensors = (
        *(TensorSpec("k.weight", (Axis("e"), Axis(inner=WIDTH), Axis(inner=3)), "fan", 3 * WIDTH),),
        *(TensorSpec("k.bias", (Axis("e"),)), TensorSpec("n.weight", (Axis("e"),), "ones")),
        *(TensorSpec("n.bias", (Axis("e"),)), TensorSpec("n.mean", (Axis("e"),))),
        *(TensorSpec("n.variance", (Axis("e"),), "ones"), TensorSpec("q.weight", (Axis("e"), Axis("e")), "fan", size)),
        *(TensorSpec("q.bias", (Axis("e"),)), TensorSpec("o.weight", (Axis("c"), Axis("e")), "fan", size)),
        TensorSpec("o.bias", (Axis("c"),)),
    )
    window = {"kernel": 3, "stride": 1, "padding": 1}
    nodes = (
        Node("s", "transpose", ("input",), {}, {"first": 0, "second": 1}),
        Node("k", "conv1d", ("s",), {"weight": "k.weight", "bias": "k.bias"}, window),
        Node("n", "batch_norm", ("k",), {role: f"n.{role}" for role in ("weight", "bias", "mean", "variance")}),
        Node("t", "transpose", ("n",), {}, {"first": 0, "second": 1}),
        Node("q", "linear", ("t",), {"weight": "q.weight", "bias": "q.bias"}),
        Node("h", "tanh", ("q",)),
        Node("l", "last", ("h",)),
        Node("o", "linear", ("l",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("e", size), AxisGroup("c", CLASSES, prunable=False))
    return check(ModelSpec("turned", (STEPS, WIDTH), CLASSES, groups, tensors, nodes))


def attended(*, cut_width: bool = False) -> ModelSpec:
    """A linear layer for each step, attention by 4 heads of 3 beside it, a norm, and a linear layer over all steps.

    Group heads can be cut; with `cut_width` also e, what each step holds, of which a flatten makes 5 runs.
    """
    tensors = (
        *(TensorSpec("p.weight", (Axis("e"), Axis(inner=WIDTH)), "fan", WIDTH), TensorSpec("p.bias", (Axis("e"),))),
        TensorSpec("m.in", (Axis("heads", _HEAD, 3), Axis("e")), "fan", 8),
        TensorSpec("m.bin", (Axis("heads", _HEAD, 3),), "fan", 8),
        TensorSpec("m.out", (Axis("e"), Axis("heads", _HEAD)), "fan", 12),
        TensorSpec("m.bout", (Axis("e"),)),
        *(TensorSpec("n.weight", (Axis("e"),), "ones"), TensorSpec("n.bias", (Axis("e"),))),
        *(TensorSpec("o.weight", (Axis("c"), Axis("e", 1, STEPS)), "fan", 40), TensorSpec("o.bias", (Axis("c"),))),
    )
    roles = {"weight_in": "m.in", "bias_in": "m.bin", "weight_out": "m.out", "bias_out": "m.bout"}
    nodes = (
        Node("p", "linear", ("input",), {"weight": "p.weight", "bias": "p.bias"}),
        Node("m", "attention", ("p",), roles, {"head": _HEAD}),
        Node("s", "add", ("p", "m")),
        Node("n", "layer_norm", ("s",), {"weight": "n.weight", "bias": "n.bias"}),
        Node("f", "flatten", ("n",)),
        Node("o", "linear", ("f",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (
        AxisGroup("e", 8, prunable=cut_width),
        AxisGroup("heads", _HEADS),
        AxisGroup("c", CLASSES, prunable=False),
    )
    return check(ModelSpec("attended", (STEPS, WIDTH), CLASSES, groups, tensors, nodes))


def normed(permille: int = 0) -> ModelSpec:
    """A linear layer 3 -> 4, batch norm, relu, dropout, and a linear layer -> 2: group a can be cut."""
    tensors = [
        *(TensorSpec("a.weight", (Axis("a"), Axis(inner=3)), "fan", 3), TensorSpec("a.bias", (Axis("a"),))),
        *(TensorSpec("n.weight", (Axis("a"),), "ones"), TensorSpec("n.bias", (Axis("a"),))),
        *(TensorSpec("n.mean", (Axis("a"),)), TensorSpec("n.variance", (Axis("a"),), "ones")),
        *(TensorSpec("o.weight", (Axis("c"), Axis("a")), "fan", 4), TensorSpec("o.bias", (Axis("c"),))),
    ]
    nodes = (
        Node("a", "linear", ("input",), {"weight": "a.weight", "bias": "a.bias"}),
        Node("n", "batch_norm", ("a",), {role: f"n.{role}" for role in ("weight", "bias", "mean", "variance")}),
        Node("r", "relu", ("n",)),
        Node("d", "dropout", ("r",), {}, {"permille": permille}),
        Node("o", "linear", ("d",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    groups = (AxisGroup("a", 4), AxisGroup("c", 2, prunable=False))
    return check(ModelSpec("normed", (3,), 2, groups, tuple(tensors), nodes))


def windows(hidden: int = 64, shape: tuple[int, int] = (9, 128), classes: int = 6) -> ModelSpec:
    """An LSTM over windows of sensors as `har-cnn` reads them, (channels, steps), and a linear layer behind its last step."""
    rows, (channels, _) = Axis("units", outer=GATES["lstm"]), shape
    tensors = (
        TensorSpec("lstm.ih", (rows, Axis(inner=channels)), "fan", hidden),
        TensorSpec("lstm.hh", (rows, Axis("units")), "fan", hidden),
        *(TensorSpec("lstm.bih", (rows,), "fan", hidden), TensorSpec("lstm.bhh", (rows,), "fan", hidden)),
        *(TensorSpec("out.weight", (Axis("c"), Axis("units")), "fan", hidden), TensorSpec("out.bias", (Axis("c"),))),
    )
    roles = {"weight_ih": "lstm.ih", "weight_hh": "lstm.hh", "bias_ih": "lstm.bih", "bias_hh": "lstm.bhh"}
    nodes = (
        Node("turn", "transpose", ("input",), {}, {"first": 0, "second": 1}),
        Node("lstm", "lstm", ("turn",), roles),
        Node("last", "last", ("lstm",)),
        Node("out", "linear", ("last",), {"weight": "out.weight", "bias": "out.bias"}),
    )
    groups = (AxisGroup("units", hidden), AxisGroup("c", classes, prunable=False))
    return check(ModelSpec("har-lstm", shape, classes, groups, tensors, nodes))


def language(words: int = 5000, width: int = 32, steps: int = 20) -> ModelSpec:
    """Words that are looked up, an LSTM over them, and a linear layer that says which word is next: the LSTM can be cut."""
    rows = Axis("units", outer=GATES["lstm"])
    tensors = (
        TensorSpec("look.weight", (Axis(inner=words), Axis(inner=width)), "fan", width),
        *(
            TensorSpec("lstm.ih", (rows, Axis(inner=width)), "fan", width),
            TensorSpec("lstm.bih", (rows,), "fan", width),
        ),
        *(TensorSpec("lstm.hh", (rows, Axis("units")), "fan", width), TensorSpec("lstm.bhh", (rows,), "fan", width)),
        *(TensorSpec("out.weight", (Axis("c"), Axis("units")), "fan", width), TensorSpec("out.bias", (Axis("c"),))),
    )
    roles = {"weight_ih": "lstm.ih", "weight_hh": "lstm.hh", "bias_ih": "lstm.bih", "bias_hh": "lstm.bhh"}
    nodes = (
        Node("look", "embedding", ("input",), {"weight": "look.weight"}),
        Node("lstm", "lstm", ("look",), roles),
        Node("last", "last", ("lstm",)),
        Node("out", "linear", ("last",), {"weight": "out.weight", "bias": "out.bias"}),
    )
    groups = (AxisGroup("units", width), AxisGroup("c", 10, prunable=False))
    return check(ModelSpec("language", (steps,), 10, groups, tensors, nodes))


MODELS = {
    "lstm": (recurrent("lstm"), {"a": (3, 5, 8), "b": (2, 4, 6)}),
    "gru": (recurrent("gru"), {"a": (3, 5, 8), "b": (2, 4, 6)}),
    "attention": (attended(), {"heads": (1, 3, 4)}),
    "attention, all cut": (attended(cut_width=True), {"heads": (1, 3, 4), "e": (2, 5, 8)}),
}
"""Model and three widths of all that can be cut."""
