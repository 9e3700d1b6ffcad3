"""Every reader of bytes from outside, as something that a fuzzer can feed: seeds, a way to damage them, and a call.

A call returns, or raises one of the errors that say who is to blame for such bytes; anything else is a find.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordinator import config as coordinator_config
from edge_runtime import config as edge_config
from edge_runtime.data import Source, csv, idx, images, npz
from edge_runtime.data.parts import divide
from tests import golden
from tests.support import mutate
from tests.support.messages import an_order
from wire import chunks, codec, errors, forms, job, spec, tensor, topics
from wire.masks import mask_digest
from wire.messages import BlobRef, Usage
from wire.outline import outline_of
from wire.spec import Structure

ELEMENTS_MAX = 1 << 20
"""What a blob may unfold to here: the bound is the caller's, and a small one keeps a run quick."""
WIRE = (errors.PeerError, errors.SpecError)
TOML = b"""federation = "home"
device = "pi-1"
[broker]
url = "mqtt://localhost:1883"
[data]
source = "npz"
path = "x"
validation = 0.1
shape = [1, 8, 8]
labels = ["a", "b"]
[memory]
budget = "48 MiB"
[worker]
threads = 2
seconds_warm = 1e3
[conditions]
battery_min = 20
metered = ["wlan1"]
hours = ["22:00-06:00", "12-13"]
"""
RUN_TOML = b"""algo = "fedavg"
federation = "home"
model = "lenet-5"
[round]
devices = 4
quorum = 2
seconds = 60.0
[recipe]
rate = 0.1
[params]
x = 0x10
"""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: For the command line.
        seeds: Good bytes to begin with.
        damage: ``(data, other, rng) -> data``, see `mutate`.
        read: Reads bytes; may only raise `expected`.
        expected: The errors that say who is to blame.
        attacks: Bytes that are bad already; they are damaged less often.
    """

    name: str
    seeds: tuple[bytes, ...]
    damage: Callable[..., bytes]
    read: Callable[[bytes], Any]
    expected: tuple[type[Exception], ...] = WIRE
    attacks: tuple[bytes, ...] = ()


def targets(folder: Path, rng: Any) -> dict[str, Target]:
    """Make all of them; files are written in `folder`."""
    vectors = {name: bytes.fromhex(value) for name, value in _stored("wire.json").items()}
    hostile = _stored("attacks.json")
    bad = {
        room: [bytes.fromhex(case["hex"]) for case in hostile.values() if case["reader"].startswith(room)]
        for room in ("message", "blob", "model")
    }
    found = [_message(kind, cls, vectors, bad["message"]) for kind, cls in codec.KINDS.items()]
    good = [data for name, data in vectors.items() if name.startswith("model:")]
    found.append(Target("model", tuple(good), mutate.document, spec.decode, attacks=tuple(bad["model"])))
    found += [
        _blobs(folder, [d for name, d in vectors.items() if name.startswith(("blob:", "packed:"))], bad["blob"], rng)
    ]
    found += [_outlined(folder, rng), _frames(), _topics(), _sidecar(folder), _bitmaps()]
    found += [_settings("device-toml", TOML, folder, edge_config.load), _settings("run-toml", RUN_TOML, folder, _run)]
    found += _data(folder)
    return {target.name: target for target in found}


def _stored(name: str) -> Any:
    return json.loads(Path(golden.__file__).with_name(name).read_text("utf-8"))


def _run(path: Path) -> object:
    return coordinator_config.load(path, {})


def _message(kind: str, cls: type[Any], vectors: dict[str, bytes], bad: list[bytes]) -> Target:
    seeds = [data for name, data in vectors.items() if name.startswith(f"message:{kind}")]
    return Target(kind, tuple(seeds), mutate.document, lambda data: codec.decode(data, cls), attacks=tuple(bad))


def _fresh(folder: Path, data: bytes, name: str) -> Path:
    """Write a new file: an old one may still be mapped by a view."""
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def random_blob(path: Path, rng: Any) -> dict[str, Any]:
    """Write a blob of random tensors in every encoding that the writer knows; gives the masks that a reader would hold."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    arrays, masks, known, bases, held = {}, {}, {}, {}, {}
    for i in range(rng.randrange(1, 5)):
        name = f"t{i}"
        shape = rng.choice(
            [(), (0, 3), (1,), (7,), (64, 9), (300,), (5, 4, 3, 3), (2000,), (3, 70_000)][: rng.choice((8, 9))]
        )
        arrays[name] = numbers.standard_normal(shape).astype(rng.choice(("float32", "float32", "float64", "int32")))
        if rng.random() < 0.8:
            density = rng.choice((0, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9, 0.99, 1))
            masks[name] = mask = numbers.random(shape) < density
            old = mask ^ (numbers.random(shape) < 0.02)
            way = rng.randrange(4)
            if way == 0:
                known[name] = mask_digest(mask)
            elif way == 1:
                bases[name] = old
            held |= {mask_digest(m): m for m in (mask, old)}
    form = rng.choice(("", *forms.FORMS))
    coding = tensor.Coding(known=known, bases=bases, form=form, pack=rng.random() < 0.8)
    tensor.write_blob(path, "update", arrays, masks=masks, coding=coding, meta={"round": 1})
    return held


def _outlined(folder: Path, rng: Any) -> Target:
    """Blobs that are values alone, in every form, read by one who holds their outline."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    arrays = {"w": numbers.standard_normal((20, 30)).astype(np.float32), "b": np.ones(7, np.float32)}
    masks = {"w": numbers.random((20, 30)) < 0.1}
    outline = outline_of(arrays, masks)
    seeds = []
    for form in forms.FORMS:
        path = folder / "seed"
        coding = tensor.Coding(outline=outline, form=form)
        tensor.write_blob(path, "update", arrays, masks=masks, coding=coding)
        seeds.append(path.read_bytes())

    def read(data: bytes) -> None:
        with tensor.open_blob(_fresh(folder, data, "blob"), outline=outline) as blob:
            for name in blob.names:
                blob.tensor(name, masks.get(name))
            blob.require_finite()

    return Target("outline", tuple(seeds), mutate.blob, read, (*WIRE, errors.StoreError))


def _blobs(folder: Path, seeds: list[bytes], bad: list[bytes], rng: Any) -> Target:
    held: dict[str, Any] = {}
    seeds = list(seeds)
    for _ in range(60):
        path = folder / "seed"
        held |= random_blob(path, rng)
        seeds.append(path.read_bytes())
    reads = ("tensor", "sparse", "mask")

    def read(data: bytes) -> None:
        with tensor.open_blob(_fresh(folder, data, "blob"), elements_max=ELEMENTS_MAX) as blob:
            for call in (
                blob.require_finite,
                *(_reading(blob, what, name, held) for name in blob.names for what in reads),
            ):
                try:
                    call()
                except WIRE:  # the next way to read it is tried all the same
                    continue

    return Target("blob", tuple(seeds), mutate.blob, read, (*WIRE, errors.StoreError), tuple(bad))


def _reading(blob: tensor.Blob, what: str, name: str, held: dict[str, Any]) -> Callable[[], object]:
    return lambda: getattr(blob, what)(name, held.get(blob.entry(name).mask))


def _frames() -> Target:
    order = an_order("d1", 3)
    work = job.Job(order, "spec", ("a", "b"), "out", "", 1 << 24, 0, 1)
    done = job.Done(Structure(), "u", BlobRef("ab" * 32, 5), "", "", 3, {"loss": 0.5}, Usage())
    seeds = []
    for frame in (work, job.Ready("torch", 1, 2, 3, (1, 8, 8)), job.Progress(0.5, None, 3), done):
        stream = io.BytesIO()
        job.write_frame(stream, frame)
        seeds.append(stream.getvalue())

    def read(data: bytes) -> None:
        stream = io.BytesIO(data)
        while job.read_frame(stream) is not None:
            pass

    return Target("frame", (*seeds, b"".join(seeds)), mutate.framed, read)


def _topics() -> Target:
    built = [
        topics.lead("home"),
        topics.piece("home", "ab" * 32, 17),
        topics.presence("home", "pi"),
        topics.down("home", "pi", "ack"),
        topics.up("home", "pi", "reply"),
        topics.up_piece("home", "pi", "0123456789abcdef", 9_999_999),
    ]
    seeds = tuple(topic.encode() for topic in built)
    return Target("topic", seeds, mutate.plain, lambda data: topics.parse(data.decode("utf-8", "replace")))


def _sidecar(folder: Path) -> Target:
    """Two bytes of size, one of piece size, one of what is on disk; the rest is the sidecar."""

    def seed(size: int, piece: int, bits: bytes) -> bytes:
        return struct.pack(">HBB", size, piece, 255) + struct.pack(">4sQI", b"have", size + 1, piece + 1) + bits

    def read(data: bytes) -> None:
        size, piece, on_disk = struct.unpack(">HBB", data[:4].ljust(4, b"\0"))
        ref = BlobRef("ab" * 32, size + 1, piece + 1)
        path = _fresh(folder, bytes(min(on_disk * 300, 80_000)), "part")
        _fresh(folder, data[4:], "part.have")
        assembly = chunks.Assembly(ref, path)
        try:
            missing = assembly.missing(8)
            for index in (*missing, 0, ref.pieces - 1):
                assembly.put(index, bytes(chunks.piece_length(ref, index)))
            assembly.sync()
            have = chunks.Assembly(ref, path).have
            assert all(have[index >> 3] >> (index & 7) & 1 for index in missing)
            assembly.finish()
        finally:
            assembly.close()

    seeds = (
        seed(999, 63, b"\xff\x00"),
        seed(65_535, 0, bytes(8192)),
        seed(10, 255, b"\x01"),
        seed(4095, 7, b"\xaa" * 64),
    )
    return Target("sidecar", seeds, mutate.plain, read)


def _bitmaps() -> Target:
    """Two bytes of count; the rest is what a peer says that it has."""

    def read(data: bytes) -> None:
        count = 1 + int.from_bytes(data[:2], "big")
        push = chunks.Push(count)
        for have in (data[2:], data[3:], data[2:]):
            push.to_send()
            push.acked(have)
            assert all(0 <= index < count for index in chunks.next_window(have, count))
        push.rewind()
        assert 0 <= push.delivered <= count
        assert len(push.to_send()) == min(chunks.WINDOW_UP, count - push.delivered)

    seeds = (b"\x00\x0f\xff\xff", b"\x00\xff" + bytes(32), b"\x10\x00" + b"\xaa" * 513)
    return Target("bitmap", seeds, mutate.plain, read)


def _settings(name: str, seed: bytes, folder: Path, load: Callable[[Path], object]) -> Target:
    more = (b"a = " + b"[" * 3000, b"x = " + b"9" * 5000, b"threads = 0x" + b"f" * 5000, b"worker.threads = -1", seed)
    words = (
        b"seconds = 1" + b"0" * 400,
        b"\nseconds_warm = " + b"9" * 400,
        b"= 0x" + b"f" * 6000,
        b"[[broker]]",
        b"= nan",
    )

    def damage(data: bytes, other: bytes, rng: Any) -> bytes:
        lines = data.splitlines()
        if rng.random() < 0.4:
            return mutate.plain(data, other, rng)
        line = rng.randrange(len(lines) or 1)
        key = lines[line].partition(b"=")[0] if lines else b"x "
        values = (b"1e999", b"-1", b"[]", b"{}", b'"\\u0000"', b"0x" + b"f" * 6000, b"9" * 400, b"[" * 990 + b"]" * 990)
        return b"\n".join(
            [*lines[:line], rng.choice([key + b"= " + v for v in values] + list(words)), *lines[line + 1 :]]
        )

    return Target(
        name,
        (seed, seed, *more),
        damage,
        lambda data: load(_fresh(folder, data, f"{name}.toml")),
        (errors.ConfigError,),
    )


def _data(folder: Path) -> list[Target]:
    """The readers of data files: not a stranger's, but a download's."""
    source = Source("npz", "x", bytes_max=1 << 22)
    x, y = np.arange(96, dtype=np.uint8).reshape(6, 4, 4), np.arange(6) % 3
    files = []
    for save, more in (
        (np.savez, {}),
        (np.savez_compressed, {"x_test": x, "y_test": y, "classes": 3, "labels": ["a", "b", "c"]}),
    ):
        stream = io.BytesIO()
        save(stream, x=x, y=y, **more)
        files.append(stream.getvalue())
    table = b"a,b,class\n" + b"".join(b"%d,%d.5e3,%s\n" % (i, i, b"xyz"[i % 3 :][:1]) for i in range(9))
    tables = (table, table.replace(b",", b";"), b"1\t2\n3\t4\n", b'"a ""b""",1\n1e400,2\n-1,0x3\n')
    pixels = b"\0\0\x08\x03" + struct.pack(">3I", 6, 4, 4) + x.tobytes()
    pictures = [_picture(x[0], form) for form in ("PNG", "JPEG", "BMP", "PPM")]
    labels = b"\0\0\x08\x01" + struct.pack(">I", 6) + y.astype(np.uint8).tobytes()

    def read_idx(data: bytes) -> None:
        path = _fresh(folder, data, "train-images-idx3-ubyte")
        _fresh(folder, labels, "train-labels-idx1-ubyte")
        divide(idx.read(path, source), source)

    def read_csv(data: bytes) -> None:
        divide(csv.read(_fresh(folder, data, "x.csv"), source), source)

    return [
        Target(
            "npz",
            tuple(files),
            mutate.plain,
            lambda d: divide(npz.read(_fresh(folder, d, "x.npz"), source), source),
            (errors.DataError,),
        ),
        Target("csv", tables, mutate.plain, read_csv, (errors.DataError,)),
        Target("idx", (pixels, labels), mutate.plain, read_idx, (errors.DataError,)),
        Target(
            "picture",
            tuple(pictures),
            mutate.plain,
            lambda d: images.picture(_fresh(folder, d, "x.png"), (1, 4, 4)),
            (errors.DataError,),
        ),
    ]


def _picture(pixels: Any, form: str) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def only(found: dict[str, Target], names: list[str]) -> list[Target]:
    """Choose by name; all when none is given."""
    return [found[name] for name in names] if names else list(found.values())
