"""The second reader's other half: containers, tensors, rankings and shells (SPEC.md, sections 5 to 8)."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct

import zstandard

from tests.support.second_reader import Reader, a_list, a_map, a_str, an_int, name, natural, record, wrong

TYPES = {"float32": "f", "float64": "d", "uint8": "B", "int32": "i", "int64": "q", "uint32": "I"}
PARTS = {"dense": 1, "bitmap": 2, "index": 3, "gaps": 2, "rice": 2, "values": 1, "delta": 2}
header_of = record(
    kind=name,
    meta=a_map(a_str(0, 1 << 20), lambda value: value),
    tensors=a_list(
        record(
            name=a_str(1, 128, r"[A-Za-z0-9_./:-]+"),
            dtype=a_str(1, 16),
            shape=a_list(natural, 0, 8),
            encoding=a_str(1, 16),
            parts=a_list(natural, 1, 3),
            kept=natural,
            mask=(a_str(0, 64), ""),
            packed=(natural, 0),
            form=(a_str(0, 16), ""),
            low=(an_int(0, 24), 0),
        ),
        0,
        16_384,
    ),
)
outlined_of = record(
    kind=name,
    meta=a_map(a_str(0, 1 << 20), lambda value: value),
    like=lambda value: value if type(value) is bytes and len(value) == 32 else wrong("Malformed", "like"),
    form=(a_str(0, 16), ""),
)


def container(data):
    """Take a container apart; gives its header and its bodies."""
    if len(data) < 5 or data[0] != 0xDD:
        wrong("Malformed", "no 32-bit array")
    (items,) = struct.unpack(">I", data[1:5])
    if items % 2 == 0:
        wrong("Malformed", "even")
    if items // 2 > 49_152:
        wrong("TooLarge", "bodies")
    reader = Reader(data, 5)
    header = reader.object()
    if reader.place - 5 > 1_048_576:
        wrong("TooLarge", "header")
    if type(header) is not dict:
        wrong("Malformed", "no header")
    if type(header.get("v")) is not int or header["v"] != 1:
        wrong("Unsupported", "version")
    bodies = []
    for _ in range(items // 2):
        pad = _bin32(reader)
        if any(pad) or len(pad) > 63 or (reader.place + 5) % 64:
            wrong("Malformed", "padding")
        bodies.append(_bin32(reader))
    if reader.place != len(data):
        wrong("Malformed", "bytes after the last body")
    return (outlined_of if "like" in header else header_of)(header), bodies


def _bin32(reader):
    if reader.take(1)[0] != 0xC6:
        wrong("Malformed", "no 32-bit bytes")
    return reader.take(reader.number("I"))


def outlined(header, bodies, outlines):
    """Give the header and the bodies that a header with an outline stands for."""
    if header["like"] not in outlines:
        wrong("MaskUnknown", header["like"].hex())
    if len(bodies) != 1:
        wrong("Malformed", "one body")
    entries, cut, place = [], [], 0
    for index, (key, dtype, shape, kept, mask) in enumerate(outlines[header["like"]]):
        form = header["form"] if dtype == "float32" else ""
        length = _length(kept, dtype, form)
        cut.append(bodies[0][place : place + length])
        place += length
        encoding = "values" if mask else "dense"
        entries.append(
            {"name": key, "dtype": dtype, "shape": shape, "encoding": encoding, "parts": [index], "kept": kept}
            | {"mask": mask, "packed": 0, "form": form}
        )
    if place != len(bodies[0]):
        wrong("Malformed", "length of the body")
    return {**header, "tensors": entries}, cut


def tensors(data, masks=None, outlines=None):
    """Read a container; gives kind, meta and {name: (dtype, shape, values in C order, with zeros where nothing is kept)}.

    `masks` holds lists of booleans by digest, `outlines` lists of (name, dtype, shape, kept, mask) by digest.
    """
    header, bodies = container(data)
    if "like" in header:
        header, bodies = outlined(header, bodies, outlines or {})
    result, used, sparse = {}, 0, 0
    for entry in header["tensors"]:
        if entry["dtype"] not in TYPES or entry["encoding"] not in PARTS:
            wrong("Unsupported", entry["name"])
        if math.prod(max(1, length) for length in entry["shape"]) > 2**40:
            wrong("TooLarge", "shape")
        count = PARTS[entry["encoding"]]
        if entry["parts"] != list(range(used, used + count)) or used + count > len(bodies):
            wrong("Malformed", "parts")
        if entry["name"] in result:
            wrong("Malformed", "two tensors share a name")
        used += count
        sparse += math.prod(entry["shape"]) * (entry["encoding"] != "dense" or entry["form"] != "")
        result[entry["name"]] = (entry, [bodies[part] for part in entry["parts"]])
    if used != len(bodies):
        wrong("Malformed", "bodies that no tensor uses")
    if sparse > 2**28:
        wrong("TooLarge", "sparse")
    read = {
        key: (entry["dtype"], tuple(entry["shape"]), _values(entry, parts, masks or {}))
        for key, (entry, parts) in result.items()
    }
    return header["kind"], header["meta"], read


def _values(entry, parts, masks):
    count, kept, form = math.prod(entry["shape"]), entry["kept"], TYPES[entry["dtype"]]
    if entry["form"] not in ("", "bfloat16", "float16", "int8", "ones"):
        wrong("Unsupported", entry["form"])
    if entry["form"] and entry["dtype"] != "float32":
        wrong("Malformed", "form")
    if kept > count or len(parts[-1]) != _length(kept, entry["dtype"], entry["form"]):
        wrong("Malformed", "length of the values")
    values = _numbers(parts[-1], kept, form, entry["form"])
    if len(entry["mask"]) != (64 if entry["encoding"] in ("values", "delta") else 0):
        wrong("Malformed", "mask")
    parts = [_first(parts[0], entry, count), *parts[1:]]
    if entry["encoding"] == "dense":
        return list(values) if kept == count else wrong("Malformed", "kept")
    if entry["encoding"] == "bitmap":
        where = _bits(parts[0], count)
    elif entry["encoding"] == "index":
        where = _indices(parts[0], parts[1], entry["shape"], kept)
    elif entry["encoding"] == "gaps":
        where = _gaps(parts[0], count)
    elif entry["encoding"] == "rice":
        where = _rice(parts[0], count, kept, entry["low"])
    else:
        if entry["mask"] not in masks:
            wrong("MaskUnknown", entry["mask"])
        mask = masks[entry["mask"]]
        where = [place for place, keep in enumerate(mask) if keep] if len(mask) == count else wrong("DigestMismatch")
        if entry["encoding"] == "delta":
            where = sorted(set(where) ^ set(_gaps(parts[0], count)))
    if len(where) != kept:
        wrong("Malformed", "popcount")
    whole = [struct.unpack("<" + form, bytes(struct.calcsize("<" + form)))[0]] * count
    for place, value in zip(where, values, strict=True):
        whole[place] = value
    return whole


def _length(kept, dtype, form):
    if form == "ones":
        return 0
    if form == "int8":
        return 4 * -(-kept // 256) + kept
    return kept * (2 if form else struct.calcsize("<" + TYPES[dtype]))


def _numbers(data, kept, kind, form):
    if form == "ones":
        return itertools.repeat(1.0, kept)
    if form == "bfloat16":
        return struct.unpack(f"<{kept}f", b"".join(b"\0\0" + data[i : i + 2] for i in range(0, 2 * kept, 2)))
    if form == "float16":
        return struct.unpack(f"<{kept}e", data)
    if form == "int8":
        blocks = -(-kept // 256)
        scales = struct.unpack_from(f"<{blocks}f", data)
        codes = struct.unpack_from(f"<{kept}b", data, 4 * blocks)
        single = struct.Struct("<f")  # the product is a float32 as well
        return [single.unpack(single.pack(code * scales[i // 256]))[0] for i, code in enumerate(codes)]
    return struct.unpack(f"<{kept}{kind}", data)


def _first(part, entry, count):
    """Unpack the first part, where it is packed, and hold its length against what the shape allows."""
    packed, kind = entry["packed"], entry["encoding"]
    if kind == "rice":
        if (
            packed
            or entry["kept"] > 65_536
            or len(part) > -(-(count // 2 ** entry["low"] + entry["kept"]) // 8) - (-entry["low"] * entry["kept"] // 8)
        ):
            wrong("Malformed", "too long a code")
    elif kind in ("gaps", "delta"):
        if (packed or len(part)) > (entry["kept"] if kind == "gaps" else count) + count // 255:
            wrong("Malformed", "too many gaps")
    elif packed and (kind != "bitmap" or packed != -(-count // 8)):
        wrong("Malformed", "packed")
    if not packed:
        return part
    try:
        says = zstandard.get_frame_parameters(part)
        if says.content_size != packed or says.window_size > 8 << 20 or says.dict_id:
            wrong("TooLarge", "frame")
        return zstandard.ZstdDecompressor().decompress(part, allow_extra_data=False)
    except zstandard.ZstdError:
        wrong("Malformed", "no frame")


def _gaps(data, count):
    where, place = [], 0
    for gap in data:
        place += gap
        if gap < 255:
            where.append(place)
            place += 1
    if data and data[-1] == 255:
        wrong("Malformed", "ends in a skip")
    if where and where[-1] >= count:
        wrong("Malformed", "gap beyond the end")
    return where


def _rice(data, count, kept, low):
    split = len(data) - -(-low * kept // 8)
    if split < 0:
        wrong("Malformed", "too short a code")
    ones = _bits(data[:split], 8 * split)
    rest = _bits(data[split:], 8 * (len(data) - split))
    if len(ones) != kept or split != (ones[-1] // 8 + 1 if ones else 0) or (rest and rest[-1] >= low * kept):
        wrong("Malformed", "code")
    where, place, before = [], 0, -1
    for number, one in enumerate(ones):
        place += (one - before - 1) * 2**low + sum(2**b for b in range(low) if number * low + b in set(rest))
        where.append(place)
        place, before = place + 1, one
    if where and where[-1] >= count:
        wrong("Malformed", "code beyond the end")
    return where


def _bits(data, count):
    if len(data) != -(-count // 8):
        wrong("Malformed", "length of the bitmap")
    ones = [i for i in range(len(data) * 8) if data[i // 8] >> (i % 8) & 1]
    if ones and ones[-1] >= count:
        wrong("Malformed", "bits beyond the end")
    return ones


def _indices(rows, columns, shape, kept):
    sides = (shape[0] if shape else 1, math.prod(shape[1:]))
    lines = []
    for data, side in ((rows, sides[0]), (columns, sides[1])):
        form = "" if side <= 1 else "H" if side <= 65_536 else "I"
        if len(data) != (struct.calcsize("<" + form) * kept if form else 0):
            wrong("Malformed", "length of the indices")
        line = struct.unpack(f"<{kept}{form}", data) if form else (0,) * kept
        if any(index >= side for index in line):
            wrong("Malformed", "index out of range")
        lines.append(line)
    pairs = list(zip(*lines, strict=True))
    if any(a >= b for a, b in itertools.pairwise(pairs)):
        wrong("Malformed", "indices do not ascend")
    return [row * sides[1] + column for row, column in pairs]


def mask_digest(shape, mask):
    """Name a mask, given as a list of booleans (section 6)."""
    bits = bytearray(-(-len(mask) // 8))
    for place, keep in enumerate(mask):
        bits[place // 8] |= keep << (place % 8)
    return hashlib.sha256(b"\x92" + _pack_list(shape) + _pack_bin(bytes(bits))).hexdigest()


def outline_digest(lines):
    """Name an outline, given as a list of (name, dtype, shape, kept, mask) (section 6)."""
    packed = [
        b"\x95" + _pack_str(key) + _pack_str(dtype) + _pack_list(shape) + _pack_list([kept])[1:] + _pack_str(mask)
        for key, dtype, shape, kept, mask in lines
    ]
    return hashlib.sha256(_head(len(packed), 0x90, 15, (None, 0xDC, 0xDD)) + b"".join(packed)).digest()


def masks_digest(masks):
    """Name masks, given as {tensor: (shape, list of booleans)} (section 7)."""
    if not masks:
        return ""
    pairs = [b"\x92" + _pack_str(key) + _pack_str(mask_digest(*masks[key])) for key in sorted(masks)]
    return hashlib.sha256(_head(len(pairs), 0x90, 15, (None, 0xDC, 0xDD)) + b"".join(pairs)).hexdigest()


def ranking_digest(levels):
    """Name a ranking, given as {group: bytes} (section 7)."""
    pairs = [b"\x92" + _pack_str(group) + _pack_bin(levels[group]) for group in sorted(levels)]
    return hashlib.sha256(_head(len(pairs), 0x90, 15, (None, 0xDC, 0xDD)) + b"".join(pairs)).hexdigest()


def _head(length, fix, fix_max, marks):
    if length <= fix_max:
        return bytes([fix | length])
    for mark, form in zip(marks, "BHI", strict=True):
        if mark is not None and length < 1 << 8 * struct.calcsize(form):
            return bytes([mark]) + struct.pack(">" + form, length)
    return wrong("TooLarge")


def _pack_str(value):
    return _head(len(value), 0xA0, 31, (0xD9, 0xDA, 0xDB)) + value.encode()


def _pack_bin(value):
    return _head(len(value), 0, -1, (0xC4, 0xC5, 0xC6)) + value


def _pack_list(values):
    return _head(len(values), 0x90, 15, (None, 0xDC, 0xDD)) + b"".join(_pack_int(value) for value in values)


def _pack_int(value):
    return _head(value, 0, 127, (0xCC, 0xCD, 0xCE))


# --- section 8: shells -----------------------------------------------------------------------------------------------


def join_shells(axes, sizes, lines):
    """Put one tensor together from its shells.

    Args:
        axes: For each dimension (group, outer, inner).
        sizes: For each capacity {group: channels}; the last one is what is wanted.
        lines: For each capacity the tensor's line.

    Returns:
        {index tuple into the compact tensor: value}
    """
    result = {}
    for k, line in enumerate(lines):
        values = iter(line)
        for j in range(len(axes)) if k else [None]:
            if j is not None and sizes[k].get(axes[j][0], 1) == sizes[k - 1].get(axes[j][0], 1):
                continue
            ranges = []
            for d, (group, outer, inner) in enumerate(axes):
                new, old = sizes[k].get(group, 1), (sizes[k - 1].get(group, 1) if k else 0)
                low = old if d == j else 0
                high = old if j is not None and d < j else new
                total = sizes[-1].get(group, 1)
                ranges.append(
                    [(o * total + c) * inner + i for o in range(outer) for c in range(low, high) for i in range(inner)]
                )
            for index in _product(ranges):
                if index in result:
                    wrong("Malformed", "boxes overlap")
                result[index] = next(values, None)
                if result[index] is None:
                    wrong("Malformed", "a line is too short")
        if next(values, None) is not None:
            wrong("Malformed", "a line is too long")
    return result


def _product(ranges):
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for rest in _product(ranges[1:]):
            yield (first, *rest)
