"""Hostile bytes beyond the stored attacks: cut at every byte, every field wrong in every way, bombs and their memory."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgpack
import pytest

from edge_runtime import config
from tests import golden
from wire import chunks, codec, errors, job, messages, spec, tensor, zoo
from wire.errors import Malformed, PeerError, TooLarge, Unsupported
from wire.schema import CONTAINERS_MAX, Limit, to_plain, unpack

HERE = Path(golden.__file__).parent
VECTORS = {name: bytes.fromhex(value) for name, value in json.loads((HERE / "wire.json").read_text("utf-8")).items()}
SPOKEN = [name for name in VECTORS if name.startswith("message:")]
BLOBS = [name for name in VECTORS if name.startswith("blob:")]
DEEP = [[]]
for _ in range(1000):
    DEEP = [DEEP]


def kind_of(name):
    return msgpack.unpackb(VECTORS[name])["k"]


@pytest.mark.parametrize("name", SPOKEN)
def test_a_message_that_is_cut_at_any_byte_is_malformed(name):
    data, cls = VECTORS[name], codec.KINDS[kind_of(name)]
    for end in range(len(data)):
        with pytest.raises(Malformed):
            codec.decode(data[:end], cls)


@pytest.mark.parametrize("name", [f"model:{name}" for name in zoo.MODELS])
def test_a_model_that_is_cut_at_any_byte_is_malformed(name):
    for end in range(0, len(VECTORS[name]), 1 + len(VECTORS[name]) // 4096):
        with pytest.raises(Malformed):
            spec.decode(VECTORS[name][:end])


@pytest.mark.parametrize("name", BLOBS)
def test_a_blob_that_is_cut_at_any_byte_is_malformed(name, tmp_path):
    path = tmp_path / "blob"
    path.write_bytes(VECTORS[name])
    for end in reversed(range(len(VECTORS[name]))):
        os.truncate(path, end)
        with pytest.raises(Malformed):
            tensor.open_blob(path)


# Wrong values by the annotation alone: what is not listed for a type is right for it.
ANY = (None, True, 1, 1.5, "x", b"x", [], {}, DEEP)
RIGHT = {bool: (True,), int: (1,), float: (1, 1.5), str: ("x",), bytes: (b"x",)}
FAR = (-(2**63), 2**64 - 1)


def wrong_values(hint: Any) -> list[tuple[str, Any]]:
    """Give (path below the field, value) for everything that a field of this type must refuse."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limit = next(note for note in arguments[1:] if isinstance(note, Limit))
        return wrong_values(arguments[0]) + [("", value) for value in out_of_bounds(arguments[0], limit)]
    if origin is Literal:
        return [("", value) for value in (*ANY, "X" * 200, f"{arguments[0]} ")]
    if origin in (typing.Union, types.UnionType):
        inner = next(option for option in arguments if option is not type(None))
        return [(path, value) for path, value in wrong_values(inner) if value is not None]
    if origin is tuple:
        within = [(f"[0]{path}", [value]) for path, value in wrong_values(arguments[0]) if path == ""]
        return [("", value) for value in ANY if not isinstance(value, list)] + within
    if origin is Mapping:
        within = [(f".k{path}", {"k": value}) for path, value in wrong_values(arguments[1])]
        return [("", value) for value in ANY if not isinstance(value, dict)] + within
    if dataclasses.is_dataclass(hint):
        return [("", value) for value in ANY if not isinstance(value, dict)]
    floats = (math.nan, math.inf, -math.inf) if hint is float else ()
    return [("", v) for v in (*ANY, *floats) if not any(v is right for right in RIGHT[hint])]


def out_of_bounds(hint, limit):
    if hint in (int, float):
        far = FAR if hint is int else (-1.7e308, 1.7e308)
        near = [limit.low - 1, limit.high + 1] if hint is int else []
        return [value for value in (*far, *near) if not limit.low <= value <= limit.high]
    filler = {str: "a", bytes: b"a"}.get(hint)
    found = [] if filler is None else [filler * (int(limit.high) + 1)]
    if limit.low and filler is not None:
        found.append(filler * (int(limit.low) - 1))
    if limit.pattern is not None:
        found += [("0" * int(limit.low))[:-1] + bad for bad in ("\n", "\0", "/", "\u0661")]
    return found


def records(cls, plain, path=""):
    """List (class, path) of every map of a message."""
    yield cls, path
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        inner = [h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)]
        value = plain.get(field.name)
        if inner and isinstance(value, dict):
            yield from records(inner[0], value, f"{path}.{field.name}")
        elif inner and value:
            yield from records(inner[0], value[0], f"{path}.{field.name}[0]")


def changed(plain, path, key, value):
    """Give a message in which one key of one map is another value."""
    plain = msgpack.unpackb(msgpack.packb(plain))
    place = plain
    for step in path.replace("[0]", ".0").split(".")[1:]:
        place = place[0] if step == "0" else place[step]
    place[key] = value
    return msgpack.packb(plain)


@pytest.mark.parametrize("name", SPOKEN)
def test_every_field_that_is_wrong_is_named_with_its_path(name):
    plain, cls = msgpack.unpackb(VECTORS[name]), codec.KINDS[kind_of(name)]
    count = 0
    for record, path in records(cls, plain):
        hints = typing.get_type_hints(record, include_extras=True)
        for field in dataclasses.fields(record):
            for below, value in wrong_values(hints[field.name]):
                with pytest.raises(Malformed) as caught:
                    codec.decode(changed(plain, path, field.name, value), cls)
                assert caught.value.path == f"${path}.{field.name}{below}", value
                assert len(str(caught.value)) < 500
                count += 1
    assert count >= 15


@pytest.mark.parametrize("name", SPOKEN)
def test_every_field_that_must_be_there_is_missed_with_its_path(name):
    plain, cls = msgpack.unpackb(VECTORS[name]), codec.KINDS[kind_of(name)]
    for field in dataclasses.fields(cls):
        less = {key: value for key, value in plain.items() if key != field.name}
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            with pytest.raises(Malformed, match=rf"missing - at \$\.{field.name}$"):
                codec.decode(msgpack.packb(less), cls)
        else:
            codec.decode(msgpack.packb(less), cls)


@pytest.mark.parametrize("name", SPOKEN)
def test_a_newer_minor_version_is_read_and_another_major_one_is_named(name):
    plain, cls = msgpack.unpackb(VECTORS[name]), codec.KINDS[kind_of(name)]
    newer = plain
    for _, path in records(cls, plain):
        newer = msgpack.unpackb(changed(newer, path, "later", {"deep": [1, None, b"x"], "v": 2}))
    assert codec.decode(msgpack.packb(newer), cls) == codec.decode(VECTORS[name], cls)
    for version in (0, 2, -1, 2**64 - 1, None, "1", 1.0, True, [1], DEEP):
        with pytest.raises(Unsupported, match="this side speaks 1"):
            codec.decode(msgpack.packb(plain | {"v": version}), cls)
    assert codec.decode(codec.encode(codec.decode(VECTORS[name], cls)), cls) == codec.decode(VECTORS[name], cls)


@pytest.mark.parametrize("value", [DEEP, [DEEP], {"a": DEEP}, 2**64 - 1, "x" * 60_000, b"\0" * 60_000])
def test_a_kind_that_is_anything_at_all_is_refused_with_a_short_text(value):
    for data in (msgpack.packb({"v": 1, "k": value}), msgpack.packb({"v": value, "k": "ack"})):
        with pytest.raises(PeerError) as caught:
            codec.decode(data, messages.Ack)
        assert len(str(caught.value)) < 200


NUMBERS = {
    "lead": ["keepalive"],
    "beat": ["done"],
    "order": ["seconds", "recipe.rate", "recipe.momentum", "recipe.decay", "recipe.clip", "recipe.knobs.widths"],
    "reply": ["metrics.loss", "usage.seconds"],
    "cert": ["seconds"],
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(kind, path) for kind, paths in NUMBERS.items() for path in paths])
def test_nan_and_infinity_are_refused_as_32_and_as_64_bits(where, value):
    kind, path = where
    *parents, last = path.split(".")
    below = "".join(f".{parent}" for parent in parents)
    data = changed(msgpack.unpackb(VECTORS[f"message:{kind}"]), below, last, value)
    single = msgpack.packb(value, use_single_float=True)
    for bad in (data, data.replace(msgpack.packb(value), single)):
        with pytest.raises(Malformed, match="finite number") as caught:
            codec.decode(bad, codec.KINDS[kind])
        assert caught.value.path == f"$.{path}"


def test_every_number_of_a_message_is_covered_by_the_list_above():
    floats = set()
    for kind, cls in codec.KINDS.items():
        plain = to_plain(codec.decode(VECTORS[next(n for n in SPOKEN if kind_of(n) == kind)], cls))
        for record, path in records(cls, plain):
            for name, hint in typing.get_type_hints(record).items():
                if hint is float:
                    floats.add((kind, f"{path}.{name}".removeprefix(".")))
                elif hint == Mapping[str, float]:
                    floats.add((kind, f"{path}.{name}.*".removeprefix(".")))
    listed = {(kind, path) for kind, paths in NUMBERS.items() for path in paths}
    assert {
        (kind, path.replace(".widths", ".*").replace("metrics.loss", "metrics.*")) for kind, path in listed
    } == floats


def test_blame_is_with_the_peer_for_its_bytes_and_never_for_what_is_our_own():
    for data in (b"", b"\xc1", bytes(messages.MESSAGE_BYTES + 1), msgpack.packb({"v": 2})):
        with pytest.raises(PeerError) as caught:
            codec.decode(data, messages.Ack)
        assert caught.value.blame == "peer"
    blames = {name: kind.blame for name, kind in vars(errors).items() if isinstance(kind, type)}
    peers = {name for name, blame in blames.items() if blame == "peer"}
    assert peers == {"PeerError", "Malformed", "TooLarge", "Unsupported", "DigestMismatch", "MaskUnknown", "NonFinite"}
    assert blames["StoreError"] == "disk"
    assert blames["ConfigError"] == "operator"


def test_a_file_that_cannot_be_read_is_the_disks_fault_and_its_bytes_are_the_peers(tmp_path):
    with pytest.raises(errors.StoreError):
        tensor.open_blob(tmp_path / "nothing")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(PeerError):
        tensor.open_blob(tmp_path / "junk")


def test_what_a_document_may_claim_is_bounded_by_its_bytes():
    with pytest.raises(Malformed, match=r"items to come in \d+ bytes"):
        unpack(b"\xdc\x40\x00" * 900 + b"\x01" * 900, spec.SPEC_BYTES, spec.NODES_MAX)
    maps = b"\xdc\x40\x00" + b"\x80" * 16_384
    with pytest.raises(TooLarge, match=str(CONTAINERS_MAX)):
        unpack(b"\x9f" + 15 * maps, spec.SPEC_BYTES, spec.NODES_MAX)
    assert len(unpack(b"\x97" + 7 * maps, spec.SPEC_BYTES, spec.NODES_MAX)) == 7
    odd = [1, -1, 2**40, -(2**40), 0.5, "x" * 40, "y" * 300, b"z" * 70_000, {"a": [None, True]}, [], {}]
    many = [odd] * 4 + [list(range(0, 40_000, 7))] * 3 + [[{}] * 16_000] * 3
    assert unpack(msgpack.packb(many), spec.SPEC_BYTES, spec.NODES_MAX) == many


BOMBS = {
    "5 MB of empty maps": "b'\\xdd\\x00\\x4c\\x4b\\x40' + b'\\x80' * 5_000_000",
    "a megabyte of empty maps": "b'\\x9f' + (b'\\xdc\\x40\\x00' + b'\\x80' * 16_384) * 15",
    "64 KiB of empty maps": "b'\\x9f' + (b'\\xdc\\x04\\x00' + b'\\x80' * 1024) * 15",
    "nested 10,000 deep": "b'\\x91' * 10_000 + b'\\xc0'",
    "a list of 4 G": "b'\\xdd\\xff\\xff\\xff\\xff'",
    "a map of 4 G": "b'\\xdf\\xff\\xff\\xff\\xff'",
    "bytes of 4 G": "b'\\xc6\\xff\\xff\\xff\\xff'",
    "1,000 nested lists of 16,384": "b'\\xdc\\x40\\x00' * 1000",
    "1,000 nested lists of 1,024": "b'\\xdc\\x04\\x00' * 1000",
    "1,000 nested maps of 8,192": "(b'\\xde\\x20\\x00\\xa1v') * 1000",
}
PROGRAM = """
import io, json, pathlib, re, struct
from wire import codec, job, messages, spec
from wire.errors import NestlingError
def frame(data):
    return job.read_frame(io.BytesIO(struct.pack(">I", len(data)) + data))
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text("ascii"))[1])
def error_of(read, data):
    try:
        read(data)
    except NestlingError as error:
        return type(error).__name__
readers = {"ack": lambda data: codec.decode(data, messages.Ack), "model": spec.decode, "frame": frame}
before = peak()
for name, bomb in BOMBS:
    for reader, read in readers.items():
        print(json.dumps([name, reader, error_of(read, bomb), peak() - before]))
"""


def test_bombs_are_refused_in_bounded_memory():
    # One process for all of them, and growth is counted from its beginning: none can hide behind the one before it.
    bombs = "[" + ", ".join(f"({name!r}, {data})" for name, data in BOMBS.items()) + "]"
    command = [sys.executable, "-c", f"BOMBS = {bombs}\n{PROGRAM}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=HERE.parents[1])
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3 * len(BOMBS)
    for name, reader, what, grown in results:
        assert what in {"Malformed", "TooLarge"}, (name, reader)
        assert grown < 16 << 20, f"{name}: {reader} says {what} after {grown >> 20} MiB more"


def test_a_frame_in_which_everything_is_wrong_is_still_only_malformed():
    assert {cls.__name__ for cls in job.FRAMES} == {"Job", "Ready", "Progress", "Done", "Failed"}
    for value in (DEEP, 2**64 - 1, math.nan, "x" * 60_000):
        body = msgpack.packb({"k": value, "order": value})
        with pytest.raises(Malformed) as caught:
            job.read_frame(io.BytesIO(len(body).to_bytes(4, "big") + body))
        assert len(str(caught.value)) < 200


def test_a_damaged_sidecar_that_is_too_long_is_replaced_as_a_whole(tmp_path):
    ref, path = messages.BlobRef("ab" * 32, 20, 5), tmp_path / "part"
    chunks.sidecar_of(path).write_bytes(b"have" + bytes(100))
    path.write_bytes(b"")
    with contextlib.closing(chunks.Assembly(ref, path)) as assembly:
        assembly.put(1, b"bbbbb")
        assembly.sync()
    assert chunks.Assembly(ref, path).have == b"\x02"


@pytest.mark.parametrize("text", ["9" * 400, "0x" + "f" * 6000, "9" * 5000, "[" * 3000, "-1", "'9e999'"])
def test_numbers_without_end_in_a_settings_file_are_the_operators(text, tmp_path):
    path = tmp_path / "device.toml"
    for key in ("memory.budget", "worker.seconds_warm", "worker.threads"):
        path.write_text(f'device = "a"\nbroker.url = "mqtt://b"\n{key} = {text}\n', "utf-8")
        with pytest.raises(errors.ConfigError) as caught:
            config.load(path)
        assert len(str(caught.value)) < 500
