"""The chooser on a clock that the trials themselves move, its file, and its limits."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest

from edge_runtime.engines import Choice
from edge_runtime.engines.stretches import TORCH
from edge_runtime.engines.ways import Masked, Tools, decide
from edge_runtime.kernels import choose
from edge_runtime.kernels.choose import DENSE, Chooser, Layer, Timing, pick
from edge_runtime.kernels.kits import TwinKit
from wire.errors import BudgetExceeded, DeviceError, SpecError
from wire.masks import packed
from wire.spec import Node

LAYER = Layer("linear", (100, 50), (50,), (), 500, 20)


class Clock:
    """Trials take what they are said to take."""

    def __init__(self):
        self.now = 0.0
        self.made = []
        self.ran = []

    def __call__(self):
        return self.now

    def makers(self, **seconds):
        return {way: self.maker(way, took) for way, took in seconds.items()}

    def maker(self, way, took):
        def run():
            self.now += took
            self.ran.append(way)

        def make():
            self.made.append(way)
            return run

        return make


def chooser(clock, path=None, machine="m", threads=1):
    return Chooser(machine, path, threads, clock)


def test_every_way_is_timed_and_the_best_meets_all():
    clock = Clock()
    timing = chooser(clock).timing(LAYER, clock.makers(block64=0.004, block256=0.002, whole=0.003, dense=0.005))
    assert timing.seconds == pytest.approx({"block64": 0.004, "block256": 0.002, "whole": 0.003, "dense": 0.005})
    assert timing.sparse == "block256"
    assert timing.gain == pytest.approx(-0.003)
    assert clock.made == ["block64", "block256", "whole", "dense"]
    assert clock.now < 2 * choose.SECONDS


def test_what_is_known_is_not_timed_again():
    clock = Clock()
    chosen = chooser(clock)
    ways = {"whole": 0.002, "dense": 0.001}
    first = chosen.timing(LAYER, clock.makers(**ways))
    begun = clock.now
    near = Layer("linear", (100, 50), (50,), (), 510, 18)
    assert chosen.timing(near, clock.makers(**ways)).seconds == first.seconds
    assert chosen.timing(LAYER, clock.makers(dense=9.0)).seconds == {"dense": pytest.approx(0.001)}
    assert clock.now == begun
    more = chosen.timing(LAYER, clock.makers(block64=0.5, **ways))
    assert more.seconds["block64"] == pytest.approx(0.5)
    for other in (
        Layer("linear", (100, 50), (50,), (), 2500, 20),
        Layer("linear", (100, 50), (50,), (), 500, 64),
        Layer("linear", (100, 50), (50,), (), 500, 20, input_gradient=False),
        Layer("linear", (101, 50), (50,), (), 500, 20),
    ):
        assert other.key != LAYER.key
    assert [t.layer for t in chosen.timings()] == [LAYER]


def test_a_slow_layer_takes_two_runs_of_each_way_and_no_more():
    clock = Clock()
    timing = chooser(clock).timing(LAYER, clock.makers(whole=60.0, dense=90.0))
    assert clock.ran == ["whole", "dense", "dense", "whole"]
    assert timing.sparse == "whole"


def test_a_hopeless_way_runs_once():
    clock = Clock()
    timing = chooser(clock).timing(LAYER, clock.makers(dense=0.01, whole=0.05, block64=0.02))
    assert clock.ran.count("whole") == 1
    assert clock.ran.count("block64") > 2
    assert timing.seconds == pytest.approx({"dense": 0.01, "whole": 0.05, "block64": 0.02})


def test_one_way_alone_and_a_way_that_does_not_suit():
    clock = Clock()

    def never():
        raise SpecError("too many channels")

    chosen = chooser(clock)
    for _ in range(2):
        timing = chosen.timing(LAYER, {"block8": never, **clock.makers(dense=0.5)})
    assert clock.made == ["dense"]
    assert timing.seconds == {"dense": pytest.approx(0.5)}
    assert timing.sparse == ""
    assert timing.gain == math.inf
    assert pick({"w": timing}, lambda _: True) == {"w": DENSE}


def test_what_cannot_be_sparse_is_never_dense_without_leave():
    only, both = Timing(LAYER, {DENSE: 2.0}), Timing(LAYER, {DENSE: 1.0, "whole": 2.0})
    with pytest.raises(BudgetExceeded, match="'w'"):
        pick({"w": only}, lambda _: False)
    assert pick({"a": both, "w": only}, lambda names: len(names) < 2) == {"a": "whole", "w": DENSE}
    with pytest.raises(BudgetExceeded, match="'w'"):
        pick({"v": only, "w": only}, lambda names: len(names) < 2)
    for allowed, kind in ((False, BudgetExceeded), (True, SpecError)):
        with pytest.raises(kind, match="'w'"):
            pick({"a": both, "w": Timing(LAYER, {})}, lambda names, allowed=allowed: allowed or "w" not in names)


def test_a_way_that_fails_on_this_device_drops_out():
    def refuses():
        raise DeviceError("there is no memory for its scratch")

    for late in (False, True):
        clock = Clock()
        fails = {"block8": (lambda: refuses) if late else refuses}
        for ways in (fails | clock.makers(whole=0.1, dense=0.2), clock.makers(whole=0.1, dense=0.2) | fails):
            assert chooser(clock).timing(LAYER, ways).seconds == pytest.approx({"whole": 0.1, "dense": 0.2})
        assert chooser(clock).timing(LAYER, fails | clock.makers(dense=0.2)).seconds == pytest.approx({"dense": 0.2})
        assert chooser(clock).timing(LAYER, fails).seconds == {}


def test_where_nothing_runs_the_first_is_named_and_all_are_asked_again(tmp_path):
    def never():
        clock.made.append("x")
        raise SpecError("too many channels")

    clock = Clock()
    chosen = chooser(clock, tmp_path / "timings.json")
    assert [chosen.fastest("step", {"x": never, "y": never}) for _ in range(2)] == ["x", "x"]
    assert clock.made == ["x"] * 4
    assert chooser(clock, tmp_path / "timings.json").fastest("step", clock.makers(y=1.0, x=2.0)) == "y"


def test_dense_goes_where_it_gains_most_and_memory_allows():
    def timing(sparse, dense):
        seconds = {"whole": sparse} if dense is None else {"whole": sparse, DENSE: dense}
        return Timing(LAYER, seconds)

    timings = {"a": timing(5, 3), "b": timing(9, 2), "c": timing(1, 2), "d": timing(5, 4), "e": timing(8, None)}
    assert pick(timings, lambda _: True) == {"a": DENSE, "b": DENSE, "c": "whole", "d": DENSE, "e": "whole"}
    assert pick(timings, lambda names: len(names) < 2) == dict.fromkeys("acde", "whole") | {"b": DENSE}
    assert pick(timings, lambda names: "b" not in names and len(names) < 2)["a"] == DENSE
    assert set(pick(timings, lambda _: False).values()) == {"whole"}


def test_the_fastest_step_wins():
    clock = Clock()
    chosen = chooser(clock)
    for key, took, wins in (("a", {"mixed": 1.0, "sparse": 1.2, "dense": 1.1}, "mixed"), ("b", {"x": 3, "y": 2}, "y")):
        for _ in range(2):
            assert chosen.fastest(key, clock.makers(**took)) == wins
    assert clock.made == ["mixed", "sparse", "dense", "x", "y"]
    assert chosen.timings() == ()


def test_when_time_is_over_the_rest_is_left_out_for_good():
    clock = Clock()
    chosen = chooser(clock)
    ways = {"dense": 1.0, "block256": 1.1, "whole": 1.2, "block128": 1.3, "block64": 1.4}
    for _ in range(2):
        assert set(chosen.timing(LAYER, clock.makers(**ways)).seconds) == {"dense", "block256", "whole"}
    assert clock.made == ["dense", "block256", "whole"]


def test_timings_outlive_the_process_on_the_same_machine(tmp_path):
    path, clock = tmp_path / "timings.json", Clock()
    ways = {"whole": 0.002, "dense": 0.001}
    first = chooser(clock, path).timing(LAYER, clock.makers(**ways))
    assert chooser(clock, path).fastest("step", clock.makers(mixed=1.0, all=2.0)) == "mixed"
    begun = clock.now
    again = chooser(clock, path)
    assert again.timing(LAYER, clock.makers(**ways)) == first
    assert again.timings() == (first,)
    assert again.fastest("step", clock.makers(mixed=1.0, all=2.0)) == "mixed"
    assert clock.now == begun
    for other in (chooser(clock, path, "other"), chooser(clock, path, threads=2)):
        assert other.timings() == ()
    assert [entry.name for entry in tmp_path.iterdir()] == ["timings.json"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 1}',
        b'{"format": 1, "entries": {"k": {"seconds": {}}}}',
        b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {"dense": "fast"}}}}',
        b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {"dense": -1}}}}',
        b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {"dense": NaN}}}}',
        b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {}, "layer": {"op": "linear"}}}}',
        b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {}, "layer": 7}}}',
        b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {"dense": 1' + b"0" * 400 + b"}}}}",
        *(
            b'{"format": 1, "entries": {"k": {"asked": [], "seconds": {"dense": 1}, "layer": {"op": "linear", "shape": [9], '
            b'"input_shape": [3], "details": [], "batch": 1, "input_gradient": true, "kept": ' + kept + b"}}}}"
            for kept in (b"1e999", b"1" + b"0" * 400, b"-1")
        ),
        b"[" * 100_000,
        b" " * (choose.BYTES_FILE + 1),
        b"\xff\xfe",
    ],
)
def test_a_broken_file_costs_only_the_timing(tmp_path, caplog, data):
    path, clock = tmp_path / "timings.json", Clock()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        chosen = chooser(clock, path)
    assert "are dropped" in caplog.text
    chosen.timing(LAYER, clock.makers(whole=1.0, dense=2.0))
    assert len(chooser(clock, path).timings()) == 1


def test_a_file_of_a_later_format_is_left_out_and_a_folder_does_not_matter(tmp_path, caplog):
    path, clock = tmp_path / "timings.json", Clock()
    path.write_text(json.dumps({"format": 2, "entries": {}}))
    assert chooser(clock, path).timings() == ()
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        chooser(clock, tmp_path).timing(LAYER, clock.makers(whole=1.0, dense=2.0))
        chooser(clock, tmp_path / "no" / "where").timing(LAYER, clock.makers(whole=1.0, dense=2.0))
    assert "cannot be read" in caplog.text
    assert "cannot be kept" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["timings.json"]


def test_an_entry_without_seconds_is_none(tmp_path):
    path, clock = tmp_path / "timings.json", Clock()
    full = {"asked": ["x"], "seconds": {"x": 1.0}}
    path.write_text(
        json.dumps({"format": 1, "entries": {"m t1 a": {"asked": ["x", "y"], "seconds": {}}, "m t1 b": full}})
    )
    chosen = chooser(clock, path)
    assert chosen.fastest("b", clock.makers(x=1.0)) == "x"
    assert clock.made == []
    assert chosen.fastest("a", clock.makers(x=2.0, y=1.0)) == "y"


def test_two_processes_keep_each_others_timings(tmp_path):
    path, clock = tmp_path / "timings.json", Clock()
    one, other = chooser(clock, path), chooser(clock, path)
    sides = [Layer("linear", (side, side), (side,), (), 1, 20) for side in (1, 2, 3)]
    one.timing(sides[0], clock.makers(whole=0.1, dense=0.2))
    other.timing(sides[1], clock.makers(whole=0.1, dense=0.2))
    one.timing(sides[2], clock.makers(whole=0.1))
    other.timing(sides[2], clock.makers(dense=0.2))
    timings = chooser(clock, path).timings()
    assert [t.layer for t in timings] == sides
    assert timings[2].seconds == pytest.approx({"whole": 0.1, "dense": 0.2})
    assert other.timings() == timings


def test_a_file_that_can_neither_be_written_nor_removed_costs_only_the_file(tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    chosen, clock = chooser(Clock(), tmp_path / "timings.json"), Clock()
    assert chosen.timing(LAYER, clock.makers(whole=0.1)).sparse == "whole"
    assert "cannot be kept" in caplog.text


def test_entries_are_bounded_and_the_oldest_go(tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "ENTRIES", 3)
    path, clock = tmp_path / "timings.json", Clock()
    chosen = chooser(clock, path)
    for side in range(1, 6):
        chosen.timing(Layer("linear", (side, side), (side,), (), 1, 20), clock.makers(whole=0.1, dense=0.2))
    kept = [t.layer.shape[0] for t in chosen.timings()]
    assert kept == [t.layer.shape[0] for t in chooser(clock, path).timings()] == [3, 4, 5]


def test_a_trial_moves_no_weight():
    class Still:
        def __init__(self):
            self.params, self.calls = {"w": np.ones(3, np.float32)}, []

        def forward(self, x, *, train):
            self.calls.append((x.shape, train))
            return np.zeros((len(x), 2), np.float32)

        def backward(self, dy, *, grads, update, input_gradient):
            self.calls.append((dy.shape, update.rate, grads, input_gradient))

    stretch = Still()
    run = choose.trial(stretch, (4, 5), 6, input_gradient=False)
    run()
    assert stretch.calls == [((6, 4, 5), False), ((6, 4, 5), True), ((6, 2), 0.0, None, False)]


def test_this_machine_has_a_name(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name\t: Cortex-A72\nCPU part : 0xd08\n\nHardware : BCM2835\n")
    assert choose._cpu(path) == "Cortex-A72 BCM2835 0xd08"
    assert isinstance(choose._cpu(tmp_path / "none"), str)
    assert "kit 1" in choose.machine("kit 1", "torch 9")


def test_timings_of_other_kernels_are_not_ours(monkeypatch):
    names = set()
    for say in ("aaaa", "bbbb", OSError("gone")):

        def digest(say=say):
            if isinstance(say, OSError):
                raise say
            return say

        choose._sources.cache_clear()
        monkeypatch.setattr(choose.source, "digest", digest)
        names.add(choose.machine("kit 1", "torch 9"))
    choose._sources.cache_clear()
    assert len(names) == 3


class Refusing:
    """A kit whose layouts are there in name only."""

    name = "refusing"

    def ways(self, *_):
        return ("rows",)

    def layout(self, way, *_):
        raise SpecError(f"{way}: too many channels")


def tools(kit):
    found = Tools(TORCH)
    found.__dict__["kit"] = kit
    return found


def linear(name, mask):
    return Masked(
        Node(name, "linear", ("input",), {"weight": f"{name}.w", "bias": f"{name}.b"}), packed(mask), (3,), first=False
    )


FULL = np.ones((4, 3), bool)
HALF = FULL & (np.arange(3) > 1)


def test_a_full_mask_is_sparse_where_memory_allows_no_dense_one():
    layers = {name: linear(name, FULL) for name in "ab"}
    assert decide(layers, Choice(4), tools(TwinKit())) == [{"a": DENSE, "b": DENSE}]
    assert decide(layers, Choice(4, allows=lambda names: not names), tools(TwinKit())) == [{"a": "rows", "b": "rows"}]
    for held in decide(layers, Choice(4, allows=lambda names: len(names) < 2), tools(TwinKit())):
        assert "rows" in held.values()
    pinned = decide(layers, Choice(4, {"b": DENSE}, lambda names: "a" not in names), tools(TwinKit()))
    assert pinned == [{"b": DENSE, "a": "rows"}]


@pytest.mark.parametrize("mask", [FULL, HALF])
def test_a_layout_that_is_refused_makes_no_tensor_dense_without_leave(mask):
    layers = {"a": linear("a", mask)}
    assert decide(layers, Choice(4), tools(Refusing())) == [{"a": DENSE}]
    with pytest.raises(BudgetExceeded, match="'a'"):
        decide(layers, Choice(4, allows=lambda names: not names), tools(Refusing()))


def test_a_way_without_seconds_is_not_taken_for_the_fastest(monkeypatch):
    def fails(*_):
        raise SpecError("not this one")

    monkeypatch.setattr("edge_runtime.engines.ways._dense", fails)
    layers = {name: linear(name, HALF) for name in "ab"}
    assert decide(layers, Choice(4), tools(TwinKit())) == [{"a": "rows", "b": "rows"}]
