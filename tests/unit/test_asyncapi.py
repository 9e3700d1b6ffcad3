"""The AsyncAPI document beside the code says what the code does: every topic, every message, every bound."""

from __future__ import annotations

import base64
import inspect
import json
import math
import re
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden.cases import MESSAGES
from tests.golden.make import ATTACKS, GOLDEN
from tests.support import asyncapi
from wire import codec, topics
from wire.schema import to_plain

DOCUMENT = json.loads(asyncapi.FILE.read_text("utf-8"))
HOSTILE = json.loads(ATTACKS.read_text("utf-8"))
SECTIONS = {"asyncapi", "info", "defaultContentType", "servers", "channels", "operations", "components"}
FUNCTIONS = {
    "lead": lambda f, d, i: topics.lead(f),
    "presence": lambda f, d, i: topics.presence(f, d),
    "piece": lambda f, d, i: topics.piece(f, "ab" * 32, i),
    "updatePiece": lambda f, d, i: topics.up_piece(f, d, "0123456789abcdef", i),
    **{
        kind: lambda f, d, i, kind=kind: topics.down(f, d, kind)
        for kind in ("order", "ack", "cancel", "cert", "signed")
    },
    **{kind: lambda f, d, i, kind=kind: topics.up(f, d, kind) for kind in ("reply", "refusal", "beat", "need", "csr")},
    **{
        f"{kind}ByInvitation": lambda f, d, i, kind=kind: topics.enrolment(f, "0123456789abcdef", kind)
        for kind in ("csr", "cert")
    },
}
TYPES = {
    "object": dict,
    "array": list,
    "string": (str, bytes),
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}


def resolve(reference):
    place = DOCUMENT
    assert reference.startswith("#/"), reference
    for step in reference.removeprefix("#/").split("/"):
        place = place[step]
    return place


def pattern_of(name):
    """Give the expression that a channel's topics match, as the document says."""
    channel = DOCUMENT["channels"][name]
    steps = [
        channel["parameters"][step[1:-1]]["x-pattern"].removeprefix("^").removesuffix("$")
        if step.startswith("{")
        else re.escape(step)
        for step in channel["address"].split("/")
    ]
    return re.compile("/".join(steps))


def matching(topic):
    return [name for name in DOCUMENT["channels"] if pattern_of(name).fullmatch(topic)]


def wrong(schema, value, path="$"):
    """Hold a value against a schema: the part of JSON Schema that the document uses; gives the first thing that is wrong."""
    if "$ref" in schema:
        return wrong(resolve(schema["$ref"]), value, path)
    if "anyOf" in schema:
        found = [wrong(option, value, path) for option in schema["anyOf"]]
        return None if None in found else found[0]
    kind = schema["type"]
    if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) != (kind == "boolean")):
        return f"{path}: no {kind}"
    if kind == "string" and isinstance(value, bytes) != (schema.get("format") == "binary"):
        return f"{path}: text and bytes are two types"
    if "const" in schema and value != schema["const"]:
        return f"{path}: not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{path}: none of {schema['enum']}"
    return out_of_bounds(schema, value, path) or wrong_inside(schema, value, path)


def out_of_bounds(schema, value, path):
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            return f"{path}: out of bounds"
        return None
    if value is None:
        return None
    what = {dict: "Properties", list: "Items"}.get(type(value), "Length")
    if not schema.get(f"min{what}", 0) <= len(value) <= schema.get(f"max{what}", math.inf):
        return f"{path}: of length {len(value)}"
    # Python's $ matches before a last newline, JSON Schema's does not.
    if "pattern" in schema and not re.fullmatch(schema["pattern"].removesuffix("$"), value):
        return f"{path}: does not match"
    return None


def wrong_inside(schema, value, path):
    if isinstance(value, list):
        return next((w for i, item in enumerate(value) if (w := wrong(schema["items"], item, f"{path}[{i}]"))), None)
    if not isinstance(value, dict):
        return None
    if missing := set(schema.get("required", ())) - set(value):
        return f"{path}: without {sorted(missing)}"
    known = schema.get("properties", {})
    for key, item in value.items():
        if "propertyNames" in schema and (found := wrong(schema["propertyNames"], key, f"{path}.{key}")):
            return found
        inner = known.get(key, schema.get("additionalProperties"))
        if inner is not None and (found := wrong(inner, item, f"{path}.{key}")):
            return found
    return None


def payload(kind):
    return DOCUMENT["components"]["messages"][kind]["payload"]


def test_the_file_is_what_the_code_says():
    assert asyncapi.FILE.read_text("utf-8") == asyncapi.text(), "write it again: python -m tests.support.asyncapi"


def test_the_form_is_that_of_asyncapi_3():
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert set(DOCUMENT) == SECTIONS
    assert {"title", "version"} <= set(DOCUMENT["info"])
    assert all({"host", "protocol"} <= set(server) for server in DOCUMENT["servers"].values())
    for channel in DOCUMENT["channels"].values():
        assert set(channel["parameters"]) == set(re.findall(r"{(\w+)}", channel["address"]))
        assert all(set(message) == {"$ref"} for message in channel["messages"].values())
    for name, operation in DOCUMENT["operations"].items():
        assert re.fullmatch(r"[A-Za-z0-9_-]+", name)
        assert operation["action"] in {"send", "receive"}
        inside = operation["channel"]["$ref"] + "/messages/"
        assert all(message["$ref"].startswith(inside) for message in operation["messages"])


def test_every_reference_leads_somewhere_and_every_schema_is_used():
    references = re.findall(r'"\$ref": "([^"]+)"', json.dumps(DOCUMENT))
    for reference in references:
        assert isinstance(resolve(reference), dict)
    used = {reference.rpartition("/")[2] for reference in references if "/schemas/" in reference}
    assert used == set(DOCUMENT["components"]["schemas"])
    assert set(DOCUMENT["components"]["messages"]) == {*codec.KINDS, "piece"}


def test_every_channel_has_one_who_sends_and_one_who_receives():
    for name in DOCUMENT["channels"]:
        operations = [o for o in DOCUMENT["operations"].values() if o["channel"]["$ref"] == f"#/channels/{name}"]
        assert sorted(o["action"] for o in operations) == ["receive", "send"]
        assert sorted(o["tags"][0]["name"] for o in operations) == ["coordinator", "device"]
        (sent,) = [o["bindings"]["mqtt"] for o in operations if o["action"] == "send"]
        assert sent["qos"] == 1
        assert sent["retain"] == (name in {"lead", "presence", "piece"})
    wills = {who: server["bindings"]["mqtt"]["lastWill"] for who, server in DOCUMENT["servers"].items()}
    assert {who: will["topic"] for who, will in wills.items()} == {
        "coordinator": DOCUMENT["channels"]["lead"]["address"],
        "device": DOCUMENT["channels"]["presence"]["address"],
    }


def test_spec_and_document_name_the_same_topics_and_who_retains_them():
    text = Path(topics.__file__).with_name("SPEC.md").read_text("utf-8")
    rows = re.findall(r"^\| (`e1/.*) \|$", text, re.MULTILINE)
    said = {}
    for row in rows:
        names, who, retained, _ = (cell.strip() for cell in row.split(" | "))
        first, *others = re.findall(r"`([^`]+)`", names)
        for topic in (first, *(other.replace("...", first.rpartition("/")[0]) for other in others)):
            said[topic] = (who.split()[0], retained == "yes")
    letters = {"federation": "F", "device": "D", "prefix": "H", "order": "X", "index": "I", "invitation": "T"}
    built = {
        re.sub(r"{(\w+)}", lambda found: letters[found[1]], c.address).replace("/u/0/", "/u/S/"): (c.sender, c.retain)
        for c in asyncapi.channels().values()
    }
    assert said == built


def test_every_function_that_builds_a_topic_has_a_channel():
    built = {
        name
        for name, function in inspect.getmembers(topics, inspect.isfunction)
        if function.__annotations__.get("return") == "str" and name not in {"valid_name", "all_up"}
    }
    assert built == {"lead", "piece", "presence", "down", "up", "up_piece", "enrolment"}
    assert set(FUNCTIONS) == set(DOCUMENT["channels"])


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(NAMES, NAMES, st.integers(0, 9_999_999))
def test_what_is_built_is_in_one_channel_and_is_parsed_as_that(federation, device, index):
    for name, build in FUNCTIONS.items():
        topic = build(federation, device, index)
        assert matching(topic) == [name]
        place = topics.parse(topic)
        parameters = DOCUMENT["channels"][name]["parameters"]
        assert place.device == (device if "device" in parameters else "")
        assert place.index == (index if "index" in parameters else -1)
        assert place.invitation == ("0123456789abcdef" if "invitation" in parameters else "")
        assert place.kind == {"updatePiece": "0123456789abcdef", "piece": "ab" * 16}.get(
            name, name.removesuffix("ByInvitation") if place.room in "duk" else ""
        )


@pytest.mark.parametrize(
    "topic", ["", "e1/f", "e2/f/m", "e1/f/b/aa/01", "e1/f/s/a b", "e1/f/u/0/d/x/1/2", "e1/f/d/d/reply"]
)
def test_foreign_topics_are_in_no_channel(topic):
    assert matching(topic) == []


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_messages_satisfy_their_schemas(name):
    plain = msgpack.unpackb(bytes.fromhex(json.loads(GOLDEN.read_text("utf-8"))[f"message:{name}"]))
    assert wrong(payload(plain["k"]), plain) is None
    assert wrong(payload(plain["k"]), plain | {"later": 1}) is None, "a newer peer may add keys"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith(("order-", "reply-", "ack-"))])
def test_hostile_fields_break_their_schemas(name):
    case = HOSTILE[name]
    plain = msgpack.unpackb(bytes.fromhex(case["hex"]))
    if case["error"] == "Malformed":  # the product of two fields is beyond JSON Schema
        assert wrong(payload(case["reader"].partition(":")[2]), plain) is not None


def test_defaults_in_the_document_are_those_of_the_classes():
    for kind, cls in codec.KINDS.items():
        message = next(m for m in MESSAGES.values() if type(m) is cls)
        needed = {key: value for key, value in to_plain(message).items() if key in resolve_required(kind)}
        read = codec.decode(msgpack.packb({"v": 1, "k": kind, **needed}), cls)
        for key, described in resolve(payload(kind)["$ref"])["properties"].items():
            if "default" in described:
                value = to_plain(getattr(read, key))
                assert described["default"] == (base64.b64encode(value).decode() if type(value) is bytes else value)


def resolve_required(kind):
    return resolve(payload(kind)["$ref"])["required"]
