"""The fuzzer itself: the same seed gives the same damage, and what goes wrong in a reader is found, kept and shown again."""

from __future__ import annotations

import os
import random
import signal
import time

import msgpack
import pytest

from tests.golden.cases import MESSAGES
from tests.long import fuzz
from tests.support import mutate
from tests.support.targets import Target
from wire import codec
from wire.errors import Malformed


def a_target(read):
    return Target("sample", (b"abc",), mutate.plain, read, (Malformed,))


def tried(read, data=b"x"):
    score = fuzz.Score()
    with fuzz.limits():
        fuzz.attempt(a_target(read), data, score, base=fuzz.peak())
    return score


def refuse(data):
    raise Malformed("no")


def spin(data):
    until = time.monotonic() + 5
    while time.monotonic() < until:
        pass


def test_an_extension_in_a_document_is_damaged_like_all_else():
    data = msgpack.packb([msgpack.ExtType(5, b"abc"), {"a": msgpack.ExtType(7, b"x")}, 1])
    made = {mutate.document(data, data, random.Random(seed)) for seed in range(500)}
    assert len(made) > 400
    assert any(b"\xc7\x03\x05abc" in one and one != data for one in made), "and stays itself elsewhere"


def test_a_value_and_an_expected_error_are_no_finds():
    assert (tried(len).inputs, tried(len).refused, tried(len).finds) == (1, 0, {})
    assert (tried(refuse).refused, tried(refuse).finds) == (1, {})


def test_any_other_exception_is_a_find_with_its_input():
    score = tried(lambda data: {}[data], b"key")
    ((place, (what, data)),) = score.finds.items()
    assert place.startswith("KeyError at test_fuzz.py:")
    assert (what.startswith(place), data) == (True, b"key")


def test_an_input_that_takes_too_long_is_stopped_and_found(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS_MAX", 0.05)
    began = time.monotonic()
    assert "TooSlow" in next(iter(tried(spin).finds))
    assert time.monotonic() - began < 4


def test_memory_that_grows_is_found(monkeypatch):
    monkeypatch.setattr(fuzz, "peak", iter([0, 65 << 20]).__next__)
    assert "65 MiB" in tried(len).finds["memory"][0]


def test_memory_beyond_all_bounds_is_refused_by_the_system():
    assert "MemoryError" in next(iter(tried(lambda data: bytes(2 * fuzz.ADDRESSES_MAX)).finds))


@pytest.mark.parametrize(
    ("read", "word"),
    [(lambda data: os.kill(os.getpid(), signal.SIGKILL), "dies of signal 9"), (lambda data: {}[data], "KeyError")],
)
def test_a_process_that_dies_leaves_its_input_behind(read, word, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert fuzz.guarded([a_target(read)], seed=1, seconds=0.2) == 1
    (path,) = tmp_path.glob("fuzz-sample-*.bin")
    assert word in (printed := capfd.readouterr().out)
    assert f"python -m tests fuzz --target sample --input {path.name}" in printed


def test_the_same_seed_damages_in_the_same_way_and_all_of_it_is_refused_or_read():
    data, other = (codec.encode(MESSAGES[name]) for name in ("order", "reply"))
    for damage in (mutate.plain, mutate.document, mutate.framed, mutate.blob):
        runs = [[damage(data, other, rng) for _ in range(50)] for rng in (random.Random(7), random.Random(7))]
        assert runs[0] == runs[1]
        assert sum(made != data for made in runs[0]) > 40


def test_the_writer_that_can_lie_tells_the_truth_when_asked():
    rng = random.Random(3)
    for name, message in MESSAGES.items():
        data = codec.encode(message)
        plain = mutate.packed(mutate.opened(data), rng, 0.0)
        assert msgpack.unpackb(plain) == msgpack.unpackb(data), name


def test_the_command_runs_and_shows_one_input_again(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--seconds", "0.3", "--seed", "5", "--target", "ack", "--target", "topic"]) == 0
    assert "no finds" in capfd.readouterr().out
    (tmp_path / "x").write_bytes(codec.encode(MESSAGES["ack"]))
    assert fuzz.main(["--target", "ack", "--input", "x"]) == 0
    assert "ack: read in" in capfd.readouterr().out
