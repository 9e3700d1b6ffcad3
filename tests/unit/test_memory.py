"""The liveness walk by hand, the fit, and what the probe reads. The measured side is in tests/device."""

from __future__ import annotations

import itertools
import resource
import subprocess
import sys
import time
from math import prod

import pytest

from coordinator.fitting import Means, fit
from edge_runtime.memory import guard, plan, probe
from tests.support.models import linear, small_cnn, widths
from wire import memory
from wire.errors import SpecError
from wire.heap import BASE, heap
from wire.messages import BlobRef, Order, Recipe
from wire.spec import Axis, AxisGroup, ModelSpec, Node, Structure, TensorSpec, tensor_shapes
from wire.walk import Walk, peak
from wire.zoo import by_name

WHOLE = Structure()
PLAIN = Recipe(batch=16)
CLIPPED = Recipe(batch=16, clip=1.0)


def mlp(inputs=256, hidden=1024, classes=16):
    """linear, relu, linear: every size a multiple of 64 bytes."""
    tensors = (
        TensorSpec("a.weight", (Axis("h"), Axis(inner=inputs))),
        TensorSpec("a.bias", (Axis("h"),)),
        TensorSpec("b.weight", (Axis("classes"), Axis("h"))),
        TensorSpec("b.bias", (Axis("classes"),)),
    )
    nodes = (
        Node("a", "linear", ("input",), {"weight": "a.weight", "bias": "a.bias"}),
        Node("r", "relu", ("a",)),
        Node("b", "linear", ("r",), {"weight": "b.weight", "bias": "b.bias"}),
    )
    groups = (AxisGroup("h", hidden), AxisGroup("classes", classes, prunable=False))
    return ModelSpec("mlp", (inputs,), classes, groups, tensors, nodes)


def beside(spec, batch, *, backward=True, masked=None):
    """Give what is taken beside the arrays, which has tests of its own."""
    return heap(Walk(spec, WHOLE, batch, backward=backward, masked=masked))


def test_walk_by_hand():
    a, b = 4 * (256 * 1024 + 1024), 4 * (1024 * 16 + 16)
    kept = beside(mlp(), 16)
    x, h, out = 4 * 16 * 256, 4 * 16 * 1024, 4 * 16 * 16
    # Instant 6, backward of a: weights, gradients, a's new gradient, the batch twice, the gradient of a's output, the logits.
    assert memory.predict(mlp(), WHOLE, CLIPPED).peak == kept + 2 * (a + b) + a + 2 * x + h + out
    # Without held gradients, and with momentum.
    assert memory.predict(mlp(), WHOLE, PLAIN).peak == kept + max((a + b) + a + 2 * x + h + out, 2 * (a + b))
    momentum = Recipe(batch=16, clip=1.0, momentum=0.9)
    assert memory.predict(mlp(), WHOLE, momentum).peak == kept + 3 * (a + b) + a + 2 * x + h + out
    # Evaluation: the reading of the weights, whose file is open until all are read, takes more than any activation.
    assert memory.predict_evaluation(mlp(), WHOLE, 16).peak == beside(mlp(), 16, backward=False) + 2 * (a + b)
    assert memory.predict_evaluation(mlp(), WHOLE, 4096).peak > a + b + 256 * (2 * x + h)


def test_activations_dominate_at_a_large_batch():
    spec = small_cnn()
    batch = 4096
    c, p = 4 * batch * 6 * 36, 4 * batch * 6 * 9
    # Backward of the pool: its input, its indices and both gradients are alive.
    floor = c + 2 * p + p + c
    peak = memory.predict(spec, WHOLE, Recipe(batch=batch, clip=1.0)).peak - beside(spec, batch)
    assert floor < peak < 2.5 * floor


def test_bound_scale_and_still():
    found = memory.predict(mlp(), WHOLE, CLIPPED)
    assert found.bound == int(1.1 * found.peak) + (8 << 20)
    assert memory.predict(mlp(), WHOLE, CLIPPED, scale=1.5).bound == int(1.1 * 1.5 * found.peak) + (8 << 20)
    assert memory.predict(mlp(), WHOLE, Recipe(rule="still")).peak < 2 << 20


def test_when_gradients_are_held():
    assert not memory.holds_gradients(PLAIN, 16)
    assert not memory.holds_gradients(PLAIN, 99)
    assert memory.holds_gradients(PLAIN, 8)
    assert memory.holds_gradients(CLIPPED, 16)
    assert memory.holds_gradients(Recipe(batch=16, knobs={"widths": 1.0}), 16)


@pytest.mark.parametrize(
    ("knobs", "held"),
    [
        ({"widths": 1.0, "mutual": 1.0}, 2 * 4 * 32 * 4),
        ({"widths": 1.0, "distil": 0.5}, 4 * 32 * 4),
        ({"widths": 1.0}, 0),
        ({"mutual": 1.0}, 0),
    ],
)
def test_what_widths_say_to_each_other_is_held_of_a_whole_batch(knobs, held):
    spec, structure = small_cnn(), Structure(1, {"a": (2, 6), "b": (4, 12)}, "r")

    def peak_of(which, **more):
        return memory.predict(spec, which, Recipe(batch=32, knobs=more), 4).peak

    plain = {name: 0.0 if name != "widths" else value for name, value in knobs.items()}
    assert peak_of(structure, **knobs) - peak_of(structure, **plain) == held, "four classes, in float32"
    assert peak_of(structure.narrowed(0), **knobs) == peak_of(structure.narrowed(0), **plain)


def test_narrower_and_smaller_takes_less():
    spec, structure = small_cnn(channels=32, hidden=256), widths(a=(8, 16, 32), b=(64, 128, 256))
    peaks = [memory.predict(spec, structure.narrowed(k), CLIPPED, m).peak for k in range(3) for m in (1, 4, 16)]
    assert peaks[:3] == sorted(peaks[:3])
    assert peaks[::3] == sorted(peaks[::3])


def test_masked_walk_by_hand():
    spec, recipe = mlp(), Recipe(batch=18, clip=1.0, momentum=0.9)
    masked = memory.Masked({"a.weight": 16_000})
    values = 4 * (16_000 + 1024 + 1024 * 16 + 16)
    index = 16_000 + 4 * 4 * 1025 + 128  # one byte each, four blocks of 64 columns
    x, h, out = 4 * 18 * 256, 4 * 18 * 1024, 4 * 18 * 16
    # What a reads and makes, and twice the larger of its gradients; the ReLU is done on the way.
    panels = 4 * 20 * (256 + 1024 + 2 * 1024) + 4 * 64
    b = 4 * (1024 * 16 + 16)
    weights = values + index
    mask = 256 * 1024 // 8  # it is held throughout, and the order before had one as well
    read = 3 * (16_000 + 256 * 1024 // 255) + 24 * 16_000
    kept = beside(spec, 18, masked=masked)
    held = kept + mask + weights + 2 * values
    # Nodes: a and r as one, b. Instant 3, backward of b: its new gradient and those of both outputs, and what r made.
    by_b = 2 * x + panels + h + b + h + out
    by_a = 2 * x + panels + h
    step, load = held + max(by_a, by_b), kept + mask + max(index + mask + read, 1800 << 10, index + 8 * 16_000)
    assert memory.predict(spec, WHOLE, recipe, masked=masked).peak == max(step, load)
    assert by_b > by_a


def test_what_is_held_dense_counts_as_dense():
    spec = mlp(hidden=8192)
    names = {"a.weight": 10, "b.weight": 10}
    prices = [
        memory.predict(spec, WHOLE, Recipe(batch=16, momentum=0.9), masked=memory.Masked(names, dense)).peak
        for dense in ((), ("b.weight",), ("a.weight",), ("a.weight", "b.weight"))
    ]
    assert prices[0] < prices[1] < min(prices[2:])
    assert prices[2] - prices[0] > 8 * 256 * 8192 - (1800 << 10)  # weight and momentum; less the modules' loading
    whole = memory.predict(spec, WHOLE, Recipe(batch=16, momentum=0.9)).peak
    assert prices[3] == pytest.approx(whole, rel=0.15)  # a mask more, a gradient less
    first, every = (memory.predict_evaluation(spec, WHOLE, 16, 1.0, m).peak for m in (memory.Masked(names), None))
    first -= beside(spec, 16, backward=False, masked=memory.Masked(names))
    assert first - (1800 << 10) < (every - beside(spec, 16, backward=False)) / 3


def test_a_chain_of_convolutions_by_hand():
    spec = small_cnn(channels=6, hidden=12, side=6)
    masked = memory.Masked({"c.weight": 20, "f.weight": 30, "o.weight": 10})
    batch = 4096
    x, bordered, c, pooled, f = (4 * batch * rows for rows in (36, 64, 6 * 36, 6 * 9, 12))
    # c, r, p, flat and f run as one up to the tanh: what is read, what comes out of the pool, of which maxima a byte each,
    # and of f. Gradients stand in two places: one also holds that of c's output, the other that of f's input.
    buffers = bordered + pooled + pooled // 4 + f + c + pooled
    found = memory.predict(spec, WHOLE, Recipe(batch=batch), masked=masked).peak
    found -= beside(spec, batch, masked=masked)
    buffers += 2 * (f + f // 3)  # of o, behind the tanh
    # Two of: the outputs of f and the tanh, and their gradients; the logits. What was rounded up, and three indices.
    assert 0 <= found - (2 * x + buffers + 3 * f + f // 3) < 4096


def test_masks_of_nothing_and_of_a_ghost():
    spec = small_cnn()
    plain = memory.predict(spec, WHOLE, PLAIN)
    assert memory.predict(spec, WHOLE, PLAIN, masked=memory.Masked({})) == plain
    with pytest.raises(SpecError, match="ghost"):
        memory.predict(spec, WHOLE, PLAIN, masked=memory.Masked({"ghost": 1}))


def test_masked_prediction_is_quick_and_falls_with_density():
    spec = by_name("conv-2")
    sizes = {n: prod(s) for n, s in tensor_shapes(spec, WHOLE).items() if n.endswith("weight")}
    start, peaks = time.process_time(), []
    for percent in range(1, 101):
        masked = memory.Masked({n: size * percent // 100 for n, size in sizes.items()})
        peaks.append(memory.predict(spec, WHOLE, CLIPPED, masked=masked).peak)
    assert (time.process_time() - start) / 100 < 0.02
    # a block that has become large enough is mapped singly, and leaves no holes
    assert all(later > 0.99 * earlier for earlier, later in itertools.pairwise(peaks))


def test_fit_takes_the_widest_then_the_largest_micro_batch():
    spec, structure = mlp(inputs=1024, hidden=4096), widths(h=(512, 2048, 4096))
    every = [structure.narrowed(k) for k in range(3)]
    prices = {(k, m): memory.predict(spec, every[k], CLIPPED, m) for k in range(3) for m in (1, 2, 4, 8, 16)}
    for budget in sorted({p.bound + d for p in prices.values() for d in (-1, 0)}):
        fits = [key for key, p in prices.items() if p.bound <= budget]
        found = fit(spec, every, CLIPPED, Means(budget))
        if not fits:
            assert found is None
        else:
            assert found is not None
            assert (found.capacity, found.micro_batch) == max(fits)
            assert found.bytes_bound == prices[max(fits)].bound
    assert fit(spec, every, CLIPPED, Means(1 << 40, 2.0)).bytes_bound > prices[2, 16].bound
    assert memory.micro_batches(Recipe(batch=20)) == [20, 10, 5, 2, 1]


def test_uniform():
    assert memory.uniform(small_cnn(), 0.25).widths == {"a": (2,), "b": (3,)}


def test_prediction_is_quick():
    spec = small_cnn()
    start = time.process_time()
    for _ in range(20):
        memory.predict(spec, WHOLE, CLIPPED)
    assert (time.process_time() - start) / 20 < 0.02


def order(structure=WHOLE, verb="train", recipe=CLIPPED):
    ref = BlobRef("0" * 64, 1)
    return Order("0" * 16, "0" * 16, 1, "d", verb, ref, (ref,), (structure,), recipe)


def test_plan_on_the_device():
    spec = mlp()
    full = memory.predict(spec, WHOLE, CLIPPED)
    assert plan.plan(order(), spec, 0) == plan.Fits(16, full.bound)
    assert plan.plan(order(), spec, full.bound) == plan.Fits(16, full.bound)
    smaller = plan.plan(order(), spec, full.bound - 1)
    assert isinstance(smaller, plan.Fits)
    assert smaller.micro_batch == 8
    refused = plan.plan(order(), spec, 1 << 20)
    assert isinstance(refused, plan.Refused)
    assert refused.bytes_needed == memory.predict(spec, WHOLE, CLIPPED, 1).bound
    assert "mlp needs at least" in refused.detail
    evaluated = plan.plan(order(verb="evaluate"), spec, 0)
    assert evaluated == plan.Fits(16, memory.predict_evaluation(spec, WHOLE, 16).bound)


def tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_probe_reads_a_pi(tmp_path):
    root = tree(tmp_path, {"proc/meminfo": "MemTotal: 1000 kB\nMemAvailable:   600 kB\n"})
    assert (probe.total(root), probe.available(root), probe.group_room(root)) == (1024_000, 614_400, None)
    assert probe.budget(0, 100, root) == 614_300
    assert probe.budget(5000, 100, root) == 5000
    assert probe.budget(10**9, 10**9, root) == 0


_A = {"proc/self/cgroup": "0::/a\n", "G/a/memory.max": "9000", "G/a/memory.current": "7000"}


@pytest.mark.parametrize(
    ("files", "room"),
    [
        ({"proc/self/cgroup": "0::/a\n", "G/a/memory.max": "9000", "G/a/memory.current": "1000"}, 8000),
        ({"proc/self/cgroup": "0::/a\n", "G/a/memory.max": "max\n", "G/a/memory.current": "1"}, None),
        ({"proc/self/cgroup": "0::/a\n", "G/a/memory.max": "5", "G/a/memory.current": "9"}, 0),
        ({"proc/self/cgroup": "0::/\n"}, None),
        (
            {
                "proc/self/cgroup": "4:memory:/b\n0::/\n",
                "G/memory/b/memory.limit_in_bytes": "700",
                "G/memory/b/memory.usage_in_bytes": "300",
            },
            400,
        ),
        ({"proc/self/cgroup": "nonsense\n"}, None),
        ({**_A, "G/a/memory.stat": "file 7000\ninactive_file 3000\n"}, 5000),
        ({**_A, "G/a/memory.stat": "inactive_file 3000\n", "G/memory.max": "6500", "G/memory.current": "6000"}, 500),
        ({**_A, "G/a/memory.stat": "inactive_file 9999\n"}, 9000),
    ],
)
def test_probe_reads_control_groups(tmp_path, files, room):
    root = tree(tmp_path, {name.replace("G/", "sys/fs/cgroup/"): text for name, text in files.items()})
    assert probe.group_room(root) == room


def test_probe_on_a_machine_without_proc(tmp_path):
    assert (probe.total(tmp_path), probe.budget(0, 1, tmp_path), probe.budget(7, 1, tmp_path)) == (0, 0, 7)


def test_gauge_sees_a_block_come_and_go():
    gauge = guard.Gauge()
    block = bytearray(b"x" * (48 << 20))
    del block
    assert (40 << 20) < gauge.peak() < (140 << 20)
    gauge.begin("")
    assert gauge.peak() < (8 << 20)


def test_the_base_is_taken_once_per_engine():
    gauge = guard.Gauge()
    base, kept = (
        gauge.bytes_base,
        bytearray(b"x" * (64 << 20)),
    )  # too large for room that earlier tests have left in the heap
    gauge.begin("")
    assert gauge.bytes_base == base
    assert gauge.peak() > 20 << 20
    gauge.begin("torch")
    assert gauge.bytes_base > base + (20 << 20)
    assert gauge.peak() < 8 << 20
    del kept


def test_the_wall_stands_and_falls():
    code = """
import resource
from edge_runtime.memory import guard
guard.settle_allocator()
budget = 32 << 20
guard.wall(budget)
try:
    b = bytearray(budget + guard.WALL_SLACK + (16 << 20))
except MemoryError:
    print("stopped")
c = bytearray(budget)
guard.wall(0)
d = bytearray(budget + guard.WALL_SLACK + (16 << 20))
print(resource.getrlimit(resource.RLIMIT_DATA)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["stopped", str(resource.getrlimit(resource.RLIMIT_DATA)[1])]


def test_the_planning_side_loads_nothing_heavy():
    code = """
import sys
import wire.memory, edge_runtime.memory.plan, edge_runtime.memory.probe, edge_runtime.memory.guard
import edge_runtime.engines, edge_runtime.spawn
edge_runtime.engines.available()
print(sorted({"numpy", "torch", "psutil", "sqlite3"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


def test_a_linear_model_has_no_temporaries():
    assert memory.predict(linear(), WHOLE, Recipe(batch=1)).peak - BASE < 2048


def test_a_sequence_by_hand():
    """lstm over 8 steps of 16 values, 64 units, then the last step and a linear layer."""
    rows = Axis("h", outer=4)
    tensors = (
        *(TensorSpec("ih", (rows, Axis(inner=16))), TensorSpec("hh", (rows, Axis("h")))),
        *(TensorSpec("bi", (rows,)), TensorSpec("bh", (rows,))),
        *(TensorSpec("o.weight", (Axis("c"), Axis("h"))), TensorSpec("o.bias", (Axis("c"),))),
    )
    nodes = (
        Node("r", "lstm", ("input",), {"weight_ih": "ih", "weight_hh": "hh", "bias_ih": "bi", "bias_hh": "bh"}),
        Node("l", "last", ("r",)),
        Node("o", "linear", ("l",), {"weight": "o.weight", "bias": "o.bias"}),
    )
    spec = ModelSpec("s", (8, 16), 16, (AxisGroup("h", 64), AxisGroup("c", 16, prunable=False)), tensors, nodes)
    count = 32
    weights, head = 4 * (256 * 16 + 256 * 64 + 2 * 256), 4 * (16 * 64 + 16)
    x, states, gates = 4 * count * 8 * 16, 4 * count * 8 * 64, 4 * count * 8 * 256
    # Instant 6, backward of the layer: batch twice, gates and states, its output and that's gradient, its own copies, logits.
    held = 2 * x + gates + 2 * states + 2 * states + 4 * count * 16
    inside = 7 * weights // 2 + 7 * gates // 4 + 2 * states
    walk = Walk(spec, WHOLE, count, backward=True)
    assert peak(walk) == held + inside
    found = memory.predict(spec, WHOLE, Recipe(batch=count, clip=1.0)).peak
    assert found == heap(walk) + 2 * (weights + head) + held + inside
    assert heap(walk) > 8 << 20, "the library's own code"
    narrow = Structure(0, {"h": (16, 64)}, "ab" * 32)
    assert peak(Walk(spec, narrow, count, backward=True)) < (held + inside) / 3


def test_what_is_not_saved_is_gone_and_what_is_copied_counts():
    def taken(*nodes, shape=(64, 256), batch=64, backward=True):
        nodes = (*nodes, Node("o", "linear", ("f",), {"weight": "v", "bias": "u"}))
        last = ModelSpec("n", shape, 1, (AxisGroup("c", 1, prunable=False),), BARE, nodes)
        return peak(Walk(last, WHOLE, batch, backward=backward))

    size = 4 * 64 * 64 * 256
    norm = Node("n", "layer_norm", ("input",), {"weight": "w", "bias": "b"})
    plain = taken(norm, Node("f", "flatten", ("n",)))
    # The factors: what comes out is held in the place of what goes in.
    assert (
        taken(norm, Node("d", "dropout", ("n",), {}, {"permille": 100}), Node("f", "flatten", ("d",))) - plain == size
    )
    assert taken(norm, Node("t", "reshape", ("n",), {}, {"d0": 64 * 256}), Node("f", "flatten", ("t",))) - plain == 0
    turned = norm, Node("t", "transpose", ("n",), {}, {"first": 0, "second": 1}), Node("f", "flatten", ("t",))
    assert taken(*turned, backward=False) > taken(norm, Node("f", "flatten", ("n",)), backward=False)


_AXES = {"w": (Axis(inner=256),), "b": (Axis(inner=256),), "v": (Axis("c"), Axis(inner=64 * 256)), "u": (Axis("c"),)}
BARE = tuple(TensorSpec(name, axes) for name, axes in _AXES.items())
