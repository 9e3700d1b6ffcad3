"""A second reader of the wire, written from wire/SPEC.md alone: plain Python, nothing of ours, no msgpack, no numpy.

It is slow and takes only what the text allows. Section numbers are those of SPEC.md. Everything wrong is a `Wrong` whose
first word is the error's name in section 9.
"""

from __future__ import annotations

import math
import re
import struct


class Wrong(Exception):
    """The bytes are not as SPEC.md says."""


def wrong(name, why=""):
    raise Wrong(f"{name} {why}")


# --- section 1: msgpack ----------------------------------------------------------------------------------------------


class Reader:
    """Reads msgpack objects one after another."""

    def __init__(self, data, place=0):
        self.data = data
        self.place = place

    def take(self, count):
        if self.place + count > len(self.data):
            wrong("Malformed", "cut off")
        part = self.data[self.place : self.place + count]
        self.place += count
        return part

    def number(self, form):
        (value,) = struct.unpack(">" + form, self.take(struct.calcsize(form)))
        return value

    def object(self, depth=0):
        if depth > 32:
            wrong("Malformed", "too deep")
        mark = self.take(1)[0]
        if mark <= 0x7F:
            return mark
        if mark >= 0xE0:
            return mark - 256
        if mark <= 0x8F:
            return self.map(mark & 15, depth)
        if mark <= 0x9F:
            return [self.object(depth + 1) for _ in range(mark & 15)]
        if mark <= 0xBF:
            return self.text(mark & 31)
        simple = {0xC0: None, 0xC2: False, 0xC3: True}
        if mark in simple:
            return simple[mark]
        numbers = {
            0xCA: "f",
            0xCB: "d",
            0xCC: "B",
            0xCD: "H",
            0xCE: "I",
            0xCF: "Q",
            0xD0: "b",
            0xD1: "h",
            0xD2: "i",
            0xD3: "q",
        }
        if mark in numbers:
            return self.number(numbers[mark])
        if mark in (0xC4, 0xC5, 0xC6):
            return bytes(self.take(self.number({0xC4: "B", 0xC5: "H", 0xC6: "I"}[mark])))
        if mark in (0xD9, 0xDA, 0xDB):
            return self.text(self.number({0xD9: "B", 0xDA: "H", 0xDB: "I"}[mark]))
        if mark in (0xDC, 0xDD):
            return [self.object(depth + 1) for _ in range(self.number({0xDC: "H", 0xDD: "I"}[mark]))]
        if mark in (0xDE, 0xDF):
            return self.map(self.number({0xDE: "H", 0xDF: "I"}[mark]), depth)
        return wrong("Malformed", f"mark {mark:#x}")

    def text(self, count):
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            return wrong("Malformed", "not UTF-8")

    def map(self, count, depth):
        result = {}
        for _ in range(count):
            key = self.object(depth + 1)
            if not isinstance(key, str) or key in result:
                wrong("Malformed", f"key {key!r}")
            result[key] = self.object(depth + 1)
        return result


def document(data):
    reader = Reader(data)
    value = reader.object()
    if reader.place != len(data):
        wrong("Malformed", "bytes after the document")
    return value


# --- section 1: types ------------------------------------------------------------------------------------------------


def an_int(low, high):
    def check(value):
        if type(value) is not int or not low <= value <= high:
            wrong("Malformed", f"{value!r} is no int {low}..{high}")
        return value

    return check


def a_float(low=-math.inf, high=math.inf):
    def check(value):
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            wrong("Malformed", f"{value!r} is no float {low}..{high}")
        return float(value)

    return check


def a_str(low, high, pattern=r"(?s:.*)"):
    def check(value):
        if type(value) is not str or not low <= len(value) <= high or not re.fullmatch(pattern, value):
            wrong("Malformed", f"{value!r} does not match {pattern}")
        return value

    return check


def one_of(*words):
    def check(value):
        if type(value) is not str or value not in words:
            wrong("Malformed", f"{value!r} is none of {words}")
        return value

    return check


def a_bool(value):
    return value if type(value) is bool else wrong("Malformed", "no bool")


def some_bytes(value):
    return value if type(value) is bytes and len(value) <= 32768 else wrong("Malformed", "no bytes")


def a_list(item, low, high):
    def check(value):
        if type(value) is not list or not low <= len(value) <= high:
            wrong("Malformed", "no list, or of a wrong length")
        return [item(v) for v in value]

    return check


def a_map(key, item):
    def check(value):
        if type(value) is not dict:
            wrong("Malformed", "no map")
        return {key(k): item(v) for k, v in value.items()}

    return check


def or_null(inner):
    return lambda value: None if value is None else inner(value)


NEEDED = object()


def record(**fields):
    """A map of fields: either a check, or a pair of a check and a default."""

    def check(value):
        if type(value) is not dict:
            wrong("Malformed", "no map")
        result = {}
        for name, field in fields.items():
            inner, default = field if isinstance(field, tuple) else (field, NEEDED)
            if name in value:
                result[name] = inner(value[name])
            elif default is NEEDED:
                wrong("Malformed", f"{name} is missing")
            else:
                result[name] = default
        return result

    return check


natural, positive = an_int(0, 2**53), an_int(1, 2**53)
amount, fraction = a_float(0, 1e18), a_float(0, 1)
name = a_str(1, 64, r"[A-Za-z0-9_.-]+")
digest, token = a_str(64, 64, r"[0-9a-f]+"), a_str(16, 16, r"[0-9a-f]+")
text = a_str(0, 2000)

# --- section 3: messages ---------------------------------------------------------------------------------------------

caps = record(
    runtime=name,
    engines=a_list(name, 0, 8),
    bytes_budget=natural,
    threads=positive,
    samples=natural,
    classes=(natural, 0),
    input_shape=(a_list(positive, 0, 4), []),
)
_blob_fields = record(digest=digest, size=positive, piece=(an_int(1, 1_048_576), 61_440))


def blob(value):
    result = _blob_fields(value)
    if -(-result["size"] // result["piece"]) > 262_144:
        wrong("TooLarge", "too many pieces")
    return result


structure = record(
    capacity=(natural, 0),
    widths=(a_map(name, a_list(positive, 1, 64)), {}),
    ranking=(a_str(0, 64), ""),
    masks=(a_str(0, 64), ""),
    kept=(a_map(name, natural), {}),
)
recipe = record(
    rule=(name, "sgd"),
    epochs=(positive, 1),
    batch=(an_int(1, 65_536), 32),
    rate=(amount, 0.05),
    momentum=(fraction, 0.0),
    decay=(amount, 0.0),
    clip=(amount, 0.0),
    seed=(natural, 0),
    knobs=(a_map(name, a_float()), {}),
    form=(one_of("", "bfloat16", "float16", "int8"), ""),
    steps=(natural, 0),
    loss=(one_of("cross_entropy", "binary_cross_entropy", "sum", "mean_squared_error"), "cross_entropy"),
)
usage = record(
    bytes_base=(natural, 0),
    bytes_peak=(natural, 0),
    bytes_budget=(natural, 0),
    seconds=(amount, 0.0),
    micro_batch=(natural, 0),
    engine=(a_str(0, 64), ""),
)
REASONS = ("memory", "oom", "crash", "stalled", "data", "unsupported", "nonfinite", "cancelled", "busy")
MESSAGES = {
    "lead": record(state=one_of("online", "offline"), boot=token, run=token, keepalive=(a_float(0.5, 3600), 20.0)),
    "presence": record(
        device=name, state=one_of("online", "lost", "bye"), boot=token, seq=natural, caps=(or_null(caps), None)
    ),
    "beat": record(boot=token, seq=natural, order=(a_str(0, 16), ""), done=(fraction, 0.0), bytes_peak=(natural, 0)),
    "order": record(
        id=token,
        run=token,
        round=natural,
        device=name,
        verb=one_of("train", "score", "calibrate", "evaluate"),
        spec=blob,
        shells=a_list(blob, 1, 64),
        structures=a_list(structure, 1, 64),
        recipe=recipe,
        bytes_peak=(natural, 0),
        seconds=(amount, 0.0),
        masks=(or_null(blob), None),
    ),
    "reply": record(
        order=token,
        device=name,
        boot=token,
        structure=structure,
        update=or_null(blob),
        keep=a_str(0, 64),
        samples=natural,
        metrics=a_map(name, a_float()),
        usage=usage,
    ),
    "refusal": record(
        order=token,
        device=name,
        boot=token,
        reason=one_of(*REASONS),
        detail=(text, ""),
        bytes_needed=(natural, 0),
        bytes_free=(natural, 0),
    ),
    "ack": record(order=token, state=one_of("more", "committed", "unwanted"), have=(some_bytes, b"")),
    "need": record(blob=digest, order=token),
    "cancel": record(order=token, why=(text, "")),
    "signed": record(body=some_bytes, signer=some_bytes, signature=some_bytes),
    "csr": record(device=name, csr=some_bytes, secret=(some_bytes, b"")),
    "cert": record(
        request=digest,
        state=one_of("granted", "expired", "used", "unknown", "name", "early", "malformed"),
        certificate=(some_bytes, b""),
        seconds=(amount, 0),
        detail=(text, ""),
    ),
}


def message(data, kind):
    """Read one message of a kind; gives its fields, defaults filled in."""
    if len(data) > 65_536:
        wrong("TooLarge", "message")
    value = document(data)
    if type(value) is not dict:
        wrong("Malformed", "no map")
    if type(value.get("v")) is not int or value["v"] != 1:
        wrong("Unsupported", "version")
    if value.get("k") != kind:
        wrong("Malformed", "kind")
    return MESSAGES[kind](value)
