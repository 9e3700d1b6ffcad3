"""Hostile bytes, each made from a golden vector by one lie: {name: {"reader", "hex", "error"}}.

Readers: ``message:KIND``, ``blob`` and ``model``; ``masks``, ``shell`` and ``update`` of the masked model in `cases`. The
error is the name that SPEC.md gives.
"""

from __future__ import annotations

import struct

import msgpack
import zstandard


def attacks(golden):
    """Make them all."""
    found = {}
    for make in (_messages, _containers, _tensors, _models, _masked):
        for name, reader, data, error in make({key: bytes.fromhex(value) for key, value in golden.items()}):
            found[name] = {"reader": reader, "hex": data.hex(), "error": error}
    return found


def _changed(data, **changes):
    plain = msgpack.unpackb(data)
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = plain
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        if value is None:
            del place[last]
        else:
            place[int(last) if last.isdigit() else last] = value
    return msgpack.packb(plain)


def _messages(golden):
    order, reply, ack = (golden[f"message:{kind}"] for kind in ("order", "reply", "ack"))
    yield "message-empty", "message:order", b"", "Malformed"
    yield "message-cut-off", "message:order", order[:-1], "Malformed"
    yield "message-trailing", "message:order", order + b"\xc0", "Malformed"
    yield "message-not-a-map", "message:order", b"\x93\x01\x02\x03", "Malformed"
    yield "message-other-kind", "message:reply", order, "Malformed"
    yield "message-version-2", "message:order", _changed(order, v=2), "Unsupported"
    yield "message-version-true", "message:order", _changed(order, v=True), "Unsupported"
    yield "message-version-text", "message:order", _changed(order, v="1"), "Unsupported"
    yield "message-key-twice", "message:ack", b"\x82\xa1v\x01\xa1v\x01", "Malformed"
    yield "message-int-keys", "message:ack", b"\x82\x01\x01\xa1v\x01", "Malformed"
    yield "message-extension", "message:ack", b"\x81\xa1v\xd4\x01\x00", "Malformed"
    yield "message-timestamp", "message:ack", b"\x81\xa1v\xd6\xff\x00\x00\x00\x00", "Malformed"
    yield "message-not-utf8", "message:ack", b"\x81\xa1v\xa1\xff", "Malformed"
    yield "message-list-claims-4-billion", "message:ack", b"\x81\xa1v\xdd\xff\xff\xff\xff", "Malformed"
    yield "message-map-claims-4-billion", "message:ack", b"\xdf\xff\xff\xff\xff", "Malformed"
    yield "message-bytes-claim-4-billion", "message:ack", b"\x81\xa1v\xc6\xff\xff\xff\xff", "Malformed"
    yield "message-nested-deep", "message:ack", b"\x91" * 4000 + b"\xc0", "Malformed"
    yield "message-nested-claims", "message:ack", b"\xdc\xff\xff" * 1000, "Malformed"
    yield "order-missing-id", "message:order", _changed(order, id=None), "Malformed"
    yield "order-id-upper-case", "message:order", _changed(order, id="0123456789ABCDEF"), "Malformed"
    yield "order-id-newline", "message:order", _changed(order, id="0123456789abcde\n"), "Malformed"
    yield "order-device-slash", "message:order", _changed(order, device="a/b"), "Malformed"
    yield "order-device-wildcard", "message:order", _changed(order, device="#"), "Malformed"
    yield "order-round-negative", "message:order", _changed(order, round=-1), "Malformed"
    yield "order-round-huge", "message:order", _changed(order, round=2**63), "Malformed"
    yield "order-round-float", "message:order", _changed(order, round=1.0), "Malformed"
    yield "order-round-true", "message:order", _changed(order, round=True), "Malformed"
    yield "order-verb-unknown", "message:order", _changed(order, verb="exec"), "Malformed"
    yield "order-no-shells", "message:order", _changed(order, shells=[]), "Malformed"
    yield "order-65-shells", "message:order", _changed(order, shells=65 * [msgpack.unpackb(order)["spec"]]), "Malformed"
    yield "order-digest-short", "message:order", _changed(order, spec__digest="ab"), "Malformed"
    yield "order-blob-empty", "message:order", _changed(order, spec__size=0), "Malformed"
    yield "order-piece-0", "message:order", _changed(order, spec__piece=0), "Malformed"
    yield "order-too-many-pieces", "message:order", _changed(order, spec__size=2**53, spec__piece=1), "TooLarge"
    yield "order-rate-nan", "message:order", _changed(order, recipe__rate=float("nan")), "Malformed"
    yield "order-rate-infinite", "message:order", _changed(order, recipe__rate=float("inf")), "Malformed"
    yield "order-widths-zero", "message:order", _changed(order, structures__0__widths={"a": [0]}), "Malformed"
    yield "order-widths-no-map", "message:order", _changed(order, structures__0__widths=[1]), "Malformed"
    masked = golden["message:order-masked"]
    yield "order-masks-a-list", "message:order", _changed(masked, masks=[]), "Malformed"
    yield "order-masks-empty", "message:order", _changed(masked, masks__size=0), "Malformed"
    yield "order-kept-negative", "message:order", _changed(masked, structures__0__kept={"a": -1}), "Malformed"
    yield "order-kept-a-list", "message:order", _changed(masked, structures__0__kept=[1]), "Malformed"
    yield "order-masks-digest-long", "message:order", _changed(masked, structures__0__masks="a" * 65), "Malformed"
    yield "order-steps-negative", "message:order", _changed(masked, recipe__steps=-1), "Malformed"
    yield "order-loss-unknown", "message:order", _changed(masked, recipe__loss="hinge"), "Malformed"
    yield "order-form-ones", "message:order", _changed(masked, recipe__form="ones"), "Malformed"
    yield "reply-metric-nan", "message:reply", _changed(reply, metrics={"loss": float("nan")}), "Malformed"
    yield "reply-metric-name", "message:reply", _changed(reply, metrics={"a b": 1.0}), "Malformed"
    yield "reply-samples-text", "message:reply", _changed(reply, samples="12"), "Malformed"
    yield "reply-usage-null", "message:reply", _changed(reply, usage=[]), "Malformed"
    yield "ack-have-text", "message:ack", _changed(ack, have="ff"), "Malformed"


def _containers(golden):
    data = golden["blob:dense"]
    first_pad = data.index(b"\xc6")
    yield "blob-empty", "blob", b"", "Malformed"
    yield "blob-one-byte", "blob", b"\xdd", "Malformed"
    yield "blob-short-array", "blob", b"\x91" + data[5:], "Malformed"
    yield "blob-even", "blob", _count(data, 4), "Malformed"
    yield "blob-one-body-too-many", "blob", _count(data, 7), "Malformed"
    yield "blob-one-body-too-few", "blob", _count(data, 3), "Malformed"
    yield "blob-4-billion-items", "blob", _count(data, 2**32 - 1), "TooLarge"
    yield "blob-header-no-map", "blob", struct.pack(">BI", 0xDD, 1) + b"\x01", "Malformed"
    yield "blob-header-cut-off", "blob", data[:20], "Malformed"
    yield "blob-header-endless-text", "blob", data[:5] + b"\x81\xa1v\xdb\xff\xff\xff\xff", "Malformed"
    yield "blob-header-key-twice", "blob", struct.pack(">BI", 0xDD, 1) + b"\x82\xa1v\x01\xa1v\x01", "Malformed"
    yield "blob-cut-in-body", "blob", data[:-1], "Malformed"
    yield "blob-cut-in-mark", "blob", data[: first_pad + 3], "Malformed"
    yield "blob-trailing", "blob", data + b"\0", "Malformed"
    yield "blob-pad-not-0", "blob", data[: first_pad + 5] + b"\1" + data[first_pad + 6 :], "Malformed"
    (pad,) = struct.unpack_from(">I", data, first_pad + 1)
    longer = struct.pack(">BI", 0xC6, pad + 64) + bytes(pad + 64)
    yield "blob-pad-too-long", "blob", data[:first_pad] + longer + data[first_pad + 5 + pad :], "Malformed"
    body = first_pad + 5 + pad
    yield "blob-body-4-billion", "blob", data[: body + 1] + b"\xff" * 4 + data[body + 5 :], "Malformed"
    yield "blob-body-as-text", "blob", data[:body] + b"\xdb" + data[body + 1 :], "Malformed"


def _count(data, items):
    return struct.pack(">BI", 0xDD, items) + data[5:]


def container(header, bodies):
    """Write a container as SPEC.md section 5 says, whatever the header says."""
    data = struct.pack(">BI", 0xDD, 1 + 2 * len(bodies)) + msgpack.packb(header)
    for body in bodies:
        pad = -(len(data) + 10) % 64
        data += struct.pack(">BI", 0xC6, pad) + bytes(pad) + struct.pack(">BI", 0xC6, len(body)) + body
    return data


def _one(bodies, **entry):
    tensor = {"name": "w", "dtype": "float32", "shape": [2, 5], "encoding": "dense", "kept": 10, **entry}
    tensor.setdefault("parts", list(range(len(bodies))))
    return container({"v": 1, "kind": "update", "meta": {}, "tensors": [tensor]}, bodies)


def _tensors(golden):
    ten, two, one = bytes(40), bytes(8), bytes(4)
    yield "header-version-2", "blob", container({"v": 2, "kind": "update"}, []), "Unsupported"
    yield "header-without-meta", "blob", container({"v": 1, "kind": "update", "tensors": []}, []), "Malformed"
    yield "header-kind-path", "blob", container({"v": 1, "kind": "../x", "meta": {}, "tensors": []}, []), "Malformed"
    yield "tensor-float16", "blob", _one([bytes(20)], dtype="float16"), "Unsupported"
    yield "tensor-object", "blob", _one([ten], dtype="object"), "Unsupported"
    yield "tensor-encoding-pickle", "blob", _one([ten], encoding="pickle"), "Unsupported"
    yield "tensor-name-twice", "blob", _twice(ten), "Malformed"
    yield "tensor-name-empty", "blob", _one([ten], name=""), "Malformed"
    yield "tensor-shape-negative", "blob", _one([ten], shape=[-2, -5]), "Malformed"
    yield "tensor-shape-overflows", "blob", _one([ten], shape=[2**32, 2**32], kept=10), "TooLarge"
    yield "tensor-shape-overflows-with-0", "blob", _one([b""], shape=[0, 2**53], kept=0), "TooLarge"
    yield "tensor-shape-9-dimensions", "blob", _one([one], shape=[1] * 9, kept=1), "Malformed"
    yield "tensor-shape-larger-than-body", "blob", _one([ten], shape=[3, 5], kept=15), "Malformed"
    yield "tensor-kept-lies", "blob", _one([ten], kept=9), "Malformed"
    yield "tensor-parts-shared", "blob", _one([ten, ten], encoding="bitmap", parts=[0, 0]), "Malformed"
    yield "tensor-parts-beyond", "blob", _one([ten], parts=[1]), "Malformed"
    yield "tensor-parts-missing", "blob", _one([ten], encoding="bitmap", parts=[0, 1]), "Malformed"
    yield "tensor-body-unused", "blob", _one([ten, ten], parts=[0]), "Malformed"
    yield "tensor-dense-with-mask", "blob", _one([ten], mask="ab" * 32), "Malformed"
    bitmap = {"encoding": "bitmap", "kept": 2}
    yield "bitmap-popcount-more", "blob", _one([b"\x07\0", two], **bitmap), "Malformed"
    yield "bitmap-popcount-fewer", "blob", _one([b"\x01\0", two], **bitmap), "Malformed"
    yield "bitmap-padding-bits", "blob", _one([b"\x01\x04", two], **bitmap), "Malformed"
    yield "bitmap-too-short", "blob", _one([b"\x03", two], **bitmap), "Malformed"
    yield "bitmap-too-long", "blob", _one([b"\x03\0\0", two], **bitmap), "Malformed"
    yield "bitmap-of-a-terabyte", "blob", _one([b"\x03", two], shape=[2**20, 2**20], **bitmap), "TooLarge"
    index = {"encoding": "index", "kept": 2}
    yield "index-row-beyond", "blob", _one([_u2(0, 2), _u2(0, 0), two], **index), "Malformed"
    yield "index-column-beyond", "blob", _one([_u2(0, 1), _u2(0, 5), two], **index), "Malformed"
    yield "index-unsorted", "blob", _one([_u2(1, 0), _u2(0, 0), two], **index), "Malformed"
    yield "index-unsorted-columns", "blob", _one([_u2(1, 1), _u2(4, 3), two], **index), "Malformed"
    yield "index-repeated", "blob", _one([_u2(1, 1), _u2(3, 3), two], **index), "Malformed"
    yield "index-short", "blob", _one([_u2(1), _u2(3, 4), two], **index), "Malformed"
    yield "index-wide", "blob", _one([_u2(0, 0, 1, 0), _u2(3, 4), two], **index), "Malformed"
    yield "index-more-than-elements", "blob", _one([_u2(0), _u2(0), bytes(44)], encoding="index", kept=11), "Malformed"
    yield from _gaps()
    yield from _packed()
    yield from _forms()
    yield "values-without-mask", "blob", _one([two], encoding="values", kept=2), "Malformed"
    yield "values-mask-unknown", "blob", _one([two], encoding="values", kept=2, mask="ab" * 32), "MaskUnknown"


def _gaps():
    two = bytes(8)
    gaps = {"encoding": "gaps", "kept": 2}
    yield "gaps-beyond", "blob", _one([b"\0\x09", two], **gaps), "Malformed"
    yield "gaps-keep-fewer", "blob", _one([b"\0", two], **gaps), "Malformed"
    yield "gaps-more-than-can-be", "blob", _one([b"\0\0\0", two], **gaps), "Malformed"
    long = {"encoding": "gaps", "kept": 1, "shape": [600]}
    yield "gaps-end-in-a-skip", "blob", _one([b"\0\xff", bytes(4)], **long), "Malformed"
    yield "gaps-skip-beyond", "blob", _one([b"\xff\xff\x5a", bytes(4)], **long), "Malformed"
    yield "gaps-of-a-terabyte", "blob", _one([b"\0\0", two], **gaps, shape=[2**20, 2**20]), "TooLarge"
    rice = {"encoding": "rice", "kept": 2, "low": 1}
    yield "rice-keeps-fewer", "blob", _one([b"\1\0", two], **rice), "Malformed"
    yield "rice-bytes-behind", "blob", _one([b"\3\0\0", two], **rice), "Malformed"
    yield "rice-padding-bits", "blob", _one([b"\3\4", two], **rice), "Malformed"
    yield "rice-beyond", "blob", _one([b"\x41\0", two], **rice), "Malformed"
    yield "rice-too-short", "blob", _one([b"", two], **rice), "Malformed"
    yield "rice-low-25", "blob", _one([b"\3\0", two], **{**rice, "low": 25}), "Malformed"
    yield "rice-of-a-terabyte", "blob", _one([b"\3\0", two], **rice, shape=[2**20, 2**20]), "TooLarge"
    yield "delta-without-mask", "blob", _one([b"\0", two], encoding="delta", kept=2), "Malformed"
    yield "delta-mask-unknown", "blob", _one([b"\0", two], encoding="delta", kept=2, mask="ab" * 32), "MaskUnknown"
    like = {"v": 1, "kind": "update", "meta": {}, "like": bytes(32), "form": ""}
    yield "outline-unknown", "blob", container(like, [two]), "MaskUnknown"
    yield "outline-short", "blob", container({**like, "like": bytes(31)}, [two]), "Malformed"


def _packed():
    two = bytes(8)
    frame = zstandard.ZstdCompressor(level=1).compress
    bits = {"encoding": "bitmap", "kept": 2, "shape": [800]}
    good = frame(b"\x03" + bytes(99))
    yield "packed-size-lies", "blob", _one([good, two], **bits, packed=99), "Malformed"
    yield "packed-frame-states-more", "blob", _one([frame(b"\x03" + bytes(100)), two], **bits, packed=100), "TooLarge"
    yield "packed-no-frame", "blob", _one([b"\x03" + bytes(50), two], **bits, packed=100), "Malformed"
    yield "packed-frame-cut-off", "blob", _one([good[:-1], two], **bits, packed=100), "Malformed"
    yield "packed-two-frames", "blob", _one([good + good, two], **bits, packed=100), "Malformed"
    bomb = frame(bytes(1 << 30))
    yield "packed-bomb", "blob", _one([bomb, two], **bits, packed=100), "TooLarge"
    yield "packed-bomb-that-says-so", "blob", _one([bomb, two], **bits, packed=1 << 30), "Malformed"
    silent = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(100))
    yield "packed-frame-without-size", "blob", _one([silent, two], **bits, packed=100), "TooLarge"
    yield "packed-rows", "blob", _one([good, _u2(0, 1), two], encoding="index", kept=2, packed=100), "Malformed"


def _forms():
    yield "form-unknown", "blob", _one([bytes(20)], form="float8"), "Unsupported"
    yield "form-of-integers", "blob", _one([bytes(20)], dtype="int32", form="bfloat16"), "Malformed"
    yield "form-length", "blob", _one([bytes(40)], form="float16"), "Malformed"
    yield "form-without-scales", "blob", _one([bytes(10)], form="int8"), "Malformed"
    ones = {"form": "ones", "kept": 10}
    yield "ones-with-a-lying-count", "blob", _one([b""], **{**ones, "kept": 9}), "Malformed"
    yield "ones-with-bytes", "blob", _one([bytes(10)], **ones), "Malformed"
    yield "ones-of-integers", "blob", _one([b""], **ones, dtype="int32"), "Malformed"
    yield "ones-of-more-than-the-bits-say", "blob", _one([b"\x07\0", b""], encoding="bitmap", **ones), "Malformed"
    yield "ones-of-a-gibibyte", "blob", _one([b""], form="ones", shape=[2**28 + 1], kept=2**28 + 1), "TooLarge"
    yield "ones-of-a-terabyte", "blob", _one([b""], form="ones", shape=[2**20, 2**20], kept=2**40), "TooLarge"
    yield "form-of-a-terabyte", "blob", _one([b"", b""], encoding="bitmap", shape=[2**20, 2**20], kept=0), "TooLarge"


def _of(kind, *tensors, **meta):
    """Write a container of (entry, bodies), the entry without what is as in the masked model of `cases`."""
    entries, bodies = [], []
    for entry, parts in tensors:
        places = list(range(len(bodies), len(bodies) + len(parts)))
        entries.append({"name": "o.weight", "dtype": "float32", "shape": [5, 7], "parts": places, **entry})
        bodies += parts
    return container({"v": 1, "kind": kind, "meta": meta, "tensors": entries}, bodies)


def _masked(golden):
    eye = _bits(0, 8, 16, 24, 32)
    whole = {"name": "o.bias", "shape": [5], "encoding": "dense", "kept": 5}, [bytes(20)]
    known = {"encoding": "values", "kept": 5, "mask": _digest_of_masks(golden)}
    yield from _masks(eye, known)
    bitmap = {"encoding": "bitmap", "kept": 5}
    moved = {**known}, [bytes(20)]
    other = {"encoding": "values", "kept": 5, "mask": "ab" * 32}, [bytes(20)]
    like = {"v": 1, "kind": "update", "meta": {}, "form": ""}
    right = msgpack.unpackb(_header(golden["blob:masked-update"]))["like"]
    yield "shell-of-another-mask", "shell", _of("shell", other, whole), "Malformed"
    yield "shell-with-a-mask-of-its-own", "shell", _of("shell", (bitmap, [eye, bytes(20)]), whole), "Malformed"
    dense = {"encoding": "dense", "kept": 35}, [bytes(140)]
    yield "shell-of-all-weights", "shell", _of("shell", dense, whole), "Malformed"
    yield "shell-without-a-tensor", "shell", _of("shell", moved), "Malformed"
    more = {**whole[0], "name": "x"}, whole[1]
    yield "shell-with-a-tensor-more", "shell", _of("shell", moved, whole, more), "Malformed"
    yield "shell-of-capacity-1", "shell", _of("shell", moved, whole, capacity=1), "Malformed"
    yield (
        "shell-of-another-outline",
        "shell",
        container({**like, "kind": "shell", "like": bytes(32)}, []),
        "MaskUnknown",
    )
    yield "update-of-another-mask", "update", _of("update", other, whole), "DigestMismatch"
    yield "update-of-a-mask-that-is-not", "update", _of("update", ({**whole[0], **known}, [bytes(20)])), "MaskUnknown"
    yield "update-of-another-outline", "update", container({**like, "like": bytes(32)}, [bytes(40)]), "MaskUnknown"
    yield "update-of-too-few-values", "update", container({**like, "like": right}, [bytes(36)]), "Malformed"
    yield "update-of-two-bodies", "update", container({**like, "like": right}, [bytes(40), b""]), "Malformed"
    yield "update-of-another-kind", "update", _of("keep", moved, whole), "Malformed"
    yield "update-of-a-foreign-tensor", "update", _of("update", ({**dense[0], "name": "x"}, dense[1])), "Malformed"
    yield "update-of-another-shape", "update", _of("update", ({**dense[0], "shape": [7, 5]}, dense[1])), "Malformed"
    yield "update-of-integers", "update", _of("update", ({**dense[0], "dtype": "int32"}, dense[1])), "Malformed"
    nan = struct.pack("<5f", 0, 0, float("nan"), 0, 0)
    yield "update-that-is-no-number", "update", _of("update", (known, [nan])), "NonFinite"
    huge = {"encoding": "dense", "form": "ones", "shape": [2**28], "kept": 2**28}, [b""]
    yield "update-of-a-gibibyte", "update", _of("update", huge), "TooLarge"
    yield from _extras(moved, eye, dense, nan)


def _masks(eye, known):
    ones = {"encoding": "bitmap", "kept": 5, "form": "ones"}
    yield "masks-of-a-foreign-shape", "masks", _of("masks", ({**ones, "shape": [7, 5]}, [eye, b""])), "Malformed"
    yield "masks-of-a-foreign-tensor", "masks", _of("masks", ({**ones, "name": "x"}, [eye, b""])), "Malformed"
    yield "masks-of-another-kind", "masks", _of("update", (ones, [eye, b""])), "Malformed"
    yield "masks-with-a-lying-count", "masks", _of("masks", ({**ones, "kept": 6}, [eye, b""])), "Malformed"
    other = _bits(0, 8, 16, 24, 33)
    yield "masks-of-another-digest", "masks", _of("masks", (ones, [other, b""])), "DigestMismatch"
    yield "masks-of-nothing", "masks", _of("masks"), "DigestMismatch"
    bias = {**ones, "name": "o.bias", "shape": [5]}, [b"\x1f", b""]
    yield "masks-of-one-tensor-more", "masks", _of("masks", (ones, [eye, b""]), bias), "DigestMismatch"
    yield "masks-by-their-digest", "masks", _of("masks", ({**known, "form": "ones"}, [b""])), "MaskUnknown"
    bomb = {"encoding": "dense", "form": "ones", "shape": [2**28], "kept": 2**28}, [b""]
    yield "masks-of-a-gibibyte", "masks", _of("masks", bomb), "TooLarge"


def _extras(moved, eye, dense, nan):
    sparse = {"name": "z/o.weight", "encoding": "bitmap", "kept": 5}
    for what, change, error in (
        ("unknown-tensor", {"name": "z/x"}, "Malformed"),
        ("about-an-extra", {"name": "z/z/o.weight"}, "Malformed"),
        ("about-nothing", {"name": "z/"}, "Malformed"),
        ("of-another-shape", {"shape": [7, 5]}, "Malformed"),
        ("of-integers", {"dtype": "int32"}, "Malformed"),
        ("with-a-lying-count", {"kept": 4}, "Malformed"),
    ):
        yield f"extra-{what}", "update", _of("update", moved, ({**sparse, **change}, [eye, bytes(20)])), error
    known = {**moved[0], "name": "z/o.weight"}
    yield "extra-by-the-masks-digest", "update", _of("update", moved, (known, [bytes(20)])), "MaskUnknown"
    yield "extra-that-is-no-number", "update", _of("update", moved, (sparse, [eye, nan])), "NonFinite"
    yield "extra-twice", "update", _of("update", *2 * [({**dense[0], "name": "z/o.weight"}, dense[1])]), "Malformed"


def _header(data):
    """Cut the header out of a container."""
    unpacker = msgpack.Unpacker()
    unpacker.feed(data[5:])
    unpacker.skip()
    return data[5 : 5 + unpacker.tell()]


def _digest_of_masks(golden):
    """Give the digest of the mask of `cases`, as an update with extras names it."""
    return msgpack.unpackb(_header(golden["blob:update-with-extras"]))["tensors"][0]["mask"]


def _bits(*places):
    data = bytearray(5)
    for place in places:
        data[place // 8] |= 1 << place % 8
    return bytes(data)


def _u2(*numbers):
    return struct.pack(f"<{len(numbers)}H", *numbers)


def _twice(body):
    entry = {"name": "w", "dtype": "float32", "shape": [10], "encoding": "dense", "kept": 10}
    entries = [{**entry, "parts": [0]}, {**entry, "parts": [1]}]
    return container({"v": 1, "kind": "update", "meta": {}, "tensors": entries}, [body, body])


def _models(golden):
    cnn = golden["model:digits-cnn"]
    yield "model-cut-off", "model", cnn[:-1], "Malformed"
    yield "model-no-map", "model", b"\x90", "Malformed"
    yield "model-no-nodes", "model", _changed(cnn, nodes=[]), "Malformed"
    yield "model-op-unknown", "model", _changed(cnn, nodes__0__op="exec"), "SpecError"
    yield "model-stride-0", "model", _changed(cnn, nodes__0__attrs__stride=0), "SpecError"
    yield "model-padding-huge", "model", _changed(cnn, nodes__0__attrs__padding=2**53), "SpecError"
    yield "model-attr-foreign", "model", _changed(cnn, nodes__0__attrs__dilation=2), "SpecError"
    yield "model-param-missing", "model", _changed(cnn, nodes__0__params__bias=None), "SpecError"
    yield "model-input-unknown", "model", _changed(cnn, nodes__0__inputs=["relu1"]), "SpecError"
    yield "model-two-inputs", "model", _changed(cnn, nodes__1__inputs=["conv1", "conv1"]), "SpecError"
    yield "model-node-named-input", "model", _changed(cnn, nodes__0__name="input"), "SpecError"
    yield "model-group-unknown", "model", _changed(cnn, tensors__0__axes__0__group="nobody"), "SpecError"
    yield "model-group-twice", "model", _changed(cnn, groups__1__name="conv1"), "SpecError"
    yield "model-tensor-unused", "model", _changed(cnn, nodes__2__params__weight="conv1.weight"), "SpecError"
    yield "model-classes-lie", "model", _changed(cnn, classes=11), "SpecError"
    yield "model-classes-prunable", "model", _changed(cnn, groups__3__prunable=True), "SpecError"
    yield "model-axis-not-cut", "model", _changed(cnn, tensors__1__axes__0={"inner": 32}), "SpecError"
    yield "model-group-of-2-to-the-53", "model", _changed(cnn, groups__2__size=2**53), "SpecError"
    gated = golden["model:mobilenet-v3-small"]
    yield "model-groups-do-not-meet", "model", _changed(gated, nodes__3__attrs__groups=8), "SpecError"
    yield "model-groups-2-to-the-53", "model", _changed(gated, nodes__3__attrs__groups=2**53), "SpecError"
    yield "model-filters-not-cut", "model", _changed(gated, tensors__4__axes__0={"inner": 16}), "SpecError"
    yield "model-factor-foreign", "model", _changed(gated, nodes__11__inputs=["block1.act2", "stem"]), "SpecError"
    yield "model-7-dimensions", "model", _changed(cnn, tensors__0__axes=7 * [{}]), "Malformed"
