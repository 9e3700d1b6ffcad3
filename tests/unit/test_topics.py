"""Topics: what is built is parsed, what is foreign is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire import topics
from wire.errors import ConfigError, Malformed
from wire.topics import Place

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)


@given(NAMES, NAMES, st.integers(0, 9_999_999))
def test_what_is_built_is_parsed(federation, device, index):
    digest, order = "ab" * 32, "0123456789abcdef"
    assert topics.parse(topics.lead(federation)) == Place("m")
    assert topics.parse(topics.piece(federation, digest, index)) == Place("b", "", digest[:32], index)
    assert topics.parse(topics.presence(federation, device)) == Place("s", device)
    assert topics.parse(topics.down(federation, device, "ack")) == Place("d", device, "ack")
    assert topics.parse(topics.up(federation, device, "reply")) == Place("u", device, "reply")
    assert topics.parse(topics.up_piece(federation, device, order, index)) == Place("u", device, order, index)
    assert topics.parse(topics.enrolment(federation, order, "csr")) == Place("k", kind="csr", invitation=order)
    assert topics.up_piece(federation, device, order, index).count("/") + 1 <= 7
    assert topics.up(federation, device, "reply").startswith(topics.all_up(federation).removesuffix("#"))


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "e1",
        "e2/f/m",
        "e1/f/m/x",
        "e1/f/b/aa",
        "e1/f/b/aa/-1",
        "e1/f/b/aa/+1",
        "e1/f/b/aa/1.0",
        "e1/f/b/aa/01",
        "e1/f/b/aa/1\n",
        "e1/f/b/aa/\u0661",
        "e1/f/b/aa/10000000",
        "e1/f/s/",
        "e1/f/s/a b",
        "e1/f/d/a b/ack",
        "e1/f/u/0/a b/reply",
        "e1/f/u/0/d/x/y",
        "e1/f/u/0/d/x/1/2",
        "$SYS/broker/uptime",
        "e1/f/k/d/csr",
        "e1/f/k/0123456789ABCDEF/csr",
    ],
)
def test_foreign_topics_are_refused(topic):
    with pytest.raises(Malformed, match="none of ours"):
        topics.parse(topic)


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "\u00e4", "x" * 65, "a\n"])
def test_names_that_cannot_stand_in_a_topic(name):
    with pytest.raises(ConfigError, match="letters, digits"):
        topics.valid_name(name, "device")


def test_good_names():
    assert topics.valid_name("pi-1_A", "device") == "pi-1_A"
