"""The topics and messages as an AsyncAPI 3 document, built from the code: ``wire/asyncapi.json``.

``python -m tests.support.asyncapi`` writes the file again. Schemas come from the annotations of `wire.messages`, addresses
from the functions of `wire.topics`. Only who speaks where stands here; `tests/unit/test_asyncapi.py` checks that this is all.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import wire
from wire import VERSION, codec, messages, topics
from wire.schema import Limit, to_plain

FILE = Path(wire.__file__).with_name("asyncapi.json")
MSGPACK, BYTES = "application/vnd.msgpack", "application/octet-stream"
NAME, HEX32, TOKEN, INDEX = "[A-Za-z0-9_-]{1,64}", "[0-9a-f]{32}", "[0-9a-f]{16}", "0|[1-9][0-9]{0,6}"
PARAMETERS = {
    "federation": ("Name of the federation.", NAME),
    "device": ("Name of the device, which is its user name at the broker as well.", NAME),
    "prefix": ("The first 32 hex digits of the blob's SHA-256.", HEX32),
    "order": ("Id of the order whose update this is.", TOKEN),
    "index": ("Number of the piece, from 0.", INDEX),
    "invitation": ("Id of the invitation.", TOKEN),
}
F, D = "{federation}", "{device}"
BINDING = "0.2.0"


@dataclasses.dataclass(frozen=True)
class Channel:
    """One kind of topic.

    Attributes:
        address: As `wire.topics` builds it, with parameters in braces.
        message: Key under ``components.messages``.
        sender: Who publishes: ``coordinator`` or ``device``; the other one receives.
        retain: Whether the broker keeps the last message.
        about: One sentence.
    """

    address: str
    message: str
    sender: str
    retain: bool
    about: str


def channels() -> dict[str, Channel]:
    """List every kind of topic by its id in the document."""
    found = {
        "lead": Channel(topics.lead(F), "lead", "coordinator", True, "The coordinator's retained state."),
        "presence": Channel(topics.presence(F, D), "presence", "device", True, "A device's retained state."),
        "piece": Channel(
            topics.piece(F, "{prefix}", "{index}"),  # type: ignore[arg-type]  # a parameter instead of a number
            "piece",
            "coordinator",
            True,
            "One piece of a published blob; an empty payload deletes it.",
        ),
        "updatePiece": Channel(
            topics.up_piece(F, D, "{order}", "{index}"),  # type: ignore[arg-type]  # a parameter instead of a number
            "piece",
            "device",
            False,
            "One piece of a device's update.",
        ),
    }
    for kind, sender, about in (("csr", "device", "asks for"), ("cert", "coordinator", "gives or refuses")):
        topic = topics.enrolment(F, "{invitation}", kind)
        found[f"{kind}ByInvitation"] = Channel(topic, kind, sender, False, f"A {sender} {about} a first certificate.")
    for kind in ("order", "ack", "cancel", "cert", "signed"):
        found[kind] = Channel(topics.down(F, D, kind), kind, "coordinator", False, _about(codec.KINDS[kind]))
    for kind in ("reply", "refusal", "beat", "need", "csr"):
        found[kind] = Channel(topics.up(F, D, kind), kind, "device", False, _about(codec.KINDS[kind]))
    return found


def document() -> dict[str, Any]:
    """Build the whole document; the same code gives the same document."""
    schemas: dict[str, Any] = {}
    spoken = {kind: _message(kind, cls, schemas) for kind, cls in codec.KINDS.items()}
    piece = {"type": "string", "format": "binary", "minLength": 1, "maxLength": 1 << 20}
    spoken["piece"] = {
        "name": "piece",
        "title": "Piece",
        "summary": "Bytes [index * piece, (index + 1) * piece) of a blob; the last one is shorter.",
        "contentType": BYTES,
        "payload": piece,
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "nestling",
            "version": f"{VERSION}.0.0",
            "description": "Federated learning on small devices over MQTT 5. The normative text is SPEC.md beside this "
            "file. Made by `python -m tests.support.asyncapi`; not written by hand.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": MSGPACK,
        "servers": {who: _server(who) for who in ("coordinator", "device")},
        "channels": {name: _channel(channel) for name, channel in channels().items()},
        "operations": dict(pair for name, channel in channels().items() for pair in _operations(name, channel)),
        "components": {"messages": spoken, "schemas": dict(sorted(schemas.items()))},
    }


def _server(who: str) -> dict[str, Any]:
    channel, state = ("lead", "offline") if who == "coordinator" else ("presence", "lost")
    return {
        "host": "{broker}",
        "protocol": "mqtt",
        "protocolVersion": "5.0",
        "description": f"The broker as a {who} connects to it; its last will is its `{channel}` with state `{state}`.",
        "variables": {"broker": {"default": "localhost:1883", "description": "Host and port; 8883 with TLS."}},
        "bindings": {
            "mqtt": {
                "cleanSession": False,
                "lastWill": {"topic": channels()[channel].address, "qos": 1, "retain": True, "message": f"{channel}"},
                "bindingVersion": BINDING,
            }
        },
    }


def _channel(channel: Channel) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", channel.address)
    return {
        "address": channel.address,
        "description": channel.about,
        "messages": {channel.message: {"$ref": f"#/components/messages/{channel.message}"}},
        "parameters": {
            name: {"description": PARAMETERS[name][0], "x-pattern": f"^(?:{PARAMETERS[name][1]})$"} for name in names
        },
    }


def _operations(name: str, channel: Channel) -> list[tuple[str, dict[str, Any]]]:
    receiver = "device" if channel.sender == "coordinator" else "coordinator"
    return [
        (
            f"{who}{verb.title()}s{name[0].upper()}{name[1:]}",
            {
                "action": verb,
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{channel.message}"}],
                "summary": f"A {who} {verb}s: {channel.about}",
                "tags": [{"name": who}],
                "bindings": {
                    "mqtt": {"qos": 1, "bindingVersion": BINDING}
                    | ({"retain": channel.retain} if verb == "send" else {})
                },
            },
        )
        for who, verb in ((channel.sender, "send"), (receiver, "receive"))
    ]


def _message(kind: str, cls: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    record = _record(cls, schemas)
    head = {
        "v": {"type": "integer", "const": VERSION, "description": "Major version; any other is refused."},
        "k": {"type": "string", "const": kind, "description": "Kind of the message."},
    }
    schemas[cls.__name__] = {
        **record,
        "properties": head | record["properties"],
        "required": [*head, *record["required"]],
    }
    return {
        "name": kind,
        "title": cls.__name__,
        "summary": _about(cls),
        "contentType": MSGPACK,
        "payload": {"$ref": f"#/components/schemas/{cls.__name__}"},
        "x-bytes-max": messages.MESSAGE_BYTES,
    }


def _record(cls: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Describe a dataclass. Unknown keys are ignored, so additional properties are allowed."""
    hints = typing.get_type_hints(cls, include_extras=True)
    words = _attributes(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        described = _schema(hints[field.name], schemas)
        if field.default is not dataclasses.MISSING:
            described["default"] = _jsonable(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            described["default"] = _jsonable(field.default_factory())
        else:
            required.append(field.name)
        properties[field.name] = {"description": words[field.name], **described} if field.name in words else described
    return {"type": "object", "description": _about(cls), "properties": properties, "required": required}


def _schema(hint: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Describe one annotation; dataclasses go to `schemas` and are named."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _schema(arguments[0], schemas)
        for note in arguments[1:]:
            found |= _bounds(note, found.get("type", ""))
        return found
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        options = [{"type": "null"} if option is type(None) else _schema(option, schemas) for option in arguments]
        return {"anyOf": options}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], schemas)}
    if origin is Mapping:
        keys, values = (_schema(argument, schemas) for argument in arguments)
        return {"type": "object", "propertyNames": keys, "additionalProperties": values}
    if dataclasses.is_dataclass(hint):
        if hint.__name__ not in schemas:
            schemas[hint.__name__] = _record(hint, schemas)
        return {"$ref": f"#/components/schemas/{hint.__name__}"}
    if hint is bytes:
        return {"type": "string", "format": "binary", "contentMediaType": BYTES}
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[hint]}


def _bounds(limit: Limit, kind: str) -> dict[str, Any]:
    number = kind in {"integer", "number"}
    least, most = {"string": ("minLength", "maxLength"), "array": ("minItems", "maxItems")}.get(
        kind, ("minimum", "maximum") if number else ("minProperties", "maxProperties")
    )
    found = {word: value for word, value in ((least, limit.low), (most, limit.high)) if value is not None}
    return found | ({"pattern": f"^(?:{limit.pattern})$"} if limit.pattern is not None else {})


def _jsonable(value: Any) -> Any:
    return value.decode("ascii") if isinstance(value, bytes) else to_plain(value)


def _about(cls: Any) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _attributes(cls: Any) -> dict[str, str]:
    """Read what a docstring says of each attribute."""
    _, _, text = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    block = re.match(r"(?: .*\n?|\n(?= ))*", text)
    items = re.split(r"^ {4}(?=\w+: )", block.group() if block else "", flags=re.MULTILINE)
    return {name: " ".join(words.split()) for name, _, words in (item.partition(": ") for item in items if item)}


def text() -> str:
    """Give the file's text."""
    return json.dumps(document(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
    print(f"{FILE.name}: {len(channels())} channels, {len(codec.KINDS)} kinds of message")
