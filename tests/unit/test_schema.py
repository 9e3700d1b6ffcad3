"""The strict reader: every kind of field, every way to be wrong, and the path in the error."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.errors import Malformed, TooLarge
from wire.schema import Limit, Name, Natural, from_plain, to_plain, unpack


@dataclass(frozen=True, slots=True)
class Inner:
    size: Natural
    on: bool = True


@dataclass(frozen=True, slots=True)
class Outer:
    name: Name
    rate: float
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None
    many: Annotated[tuple[Inner, ...], Limit(0, 2)] = ()
    knobs: Mapping[Name, float] = field(default_factory=dict)
    raw: bytes = b""
    either: int | str = 0


GOOD = {
    "name": "x.y-1",
    "rate": 1,
    "kind": "b",
    "inner": {"size": 3},
    "many": [{"size": 1, "on": False}, {"size": 2}],
    "knobs": {"k": 0.5},
    "raw": b"\0",
    "either": "text",
}


def test_every_kind_of_field_is_read():
    outer = from_plain(Outer, GOOD)
    assert outer == Outer("x.y-1", 1.0, "b", Inner(3), (Inner(1, on=False), Inner(2)), {"k": 0.5}, b"\0", "text")
    assert type(outer.rate) is float


def test_there_and_back():
    outer = from_plain(Outer, GOOD)
    assert from_plain(Outer, to_plain(outer)) == outer
    assert from_plain(Outer, msgpack.unpackb(msgpack.packb(to_plain(outer)))) == outer


@pytest.mark.parametrize(
    ("change", "path", "problem"),
    [
        ({"name": 5}, "$.name", "expected str, got int"),
        ({"name": ""}, "$.name", "length 0 is below 1"),
        ({"name": "n" * 65}, "$.name", "length 65 is above 64"),
        ({"name": "a b"}, "$.name", "does not match"),
        ({"name": "a\n"}, "$.name", "does not match"),
        ({"name": None}, "$.name", "expected str, got nothing"),
        ({"rate": "1"}, "$.rate", "expected float, got str"),
        ({"rate": True}, "$.rate", "expected float, got bool"),
        ({"rate": float("nan")}, "$.rate", "finite"),
        ({"rate": float("-inf")}, "$.rate", "finite"),
        ({"kind": "c"}, "$.kind", "one of a, b"),
        ({"kind": ["a"]}, "$.kind", "one of a, b"),
        ({"inner": 7}, "$.inner", "expected a map, got int"),
        ({"inner": {}}, "$.inner.size", "missing"),
        ({"inner": {"size": -1}}, "$.inner.size", "value -1 is below 0"),
        ({"inner": {"size": 2**54}}, "$.inner.size", "is above"),
        ({"inner": {"size": 1.0}}, "$.inner.size", "expected int, got float"),
        ({"inner": {"size": True}}, "$.inner.size", "expected int, got bool"),
        ({"many": {}}, "$.many", "expected a list"),
        ({"many": [{"size": 1}, {"size": "2"}]}, "$.many[1].size", "expected int"),
        ({"many": [{"size": 1}] * 3}, "$.many", "length 3 is above 2"),
        ({"knobs": [1]}, "$.knobs", "expected a map"),
        ({"knobs": {"k": "x"}}, "$.knobs.k", "expected float"),
        ({"knobs": {"k k": 1.0}}, "$.knobs.k k", "does not match"),
        ({"knobs": {1: 1.0}}, "$.knobs.1", "expected str"),
        ({"raw": "text"}, "$.raw", "expected bytes"),
        ({"either": 1.5}, "$.either", "expected int, got float or expected str, got float"),
        ({"either": None}, "$.either", "got nothing"),
    ],
)
def test_what_is_wrong_is_named_with_its_path(change, path, problem):
    with pytest.raises(Malformed) as caught:
        from_plain(Outer, GOOD | change)
    assert caught.value.path == path
    assert problem in caught.value.problem


def test_a_missing_key_and_a_root_that_is_no_map():
    with pytest.raises(Malformed, match=r"missing.*\$\.name"):
        from_plain(Outer, {"rate": 1.0})
    with pytest.raises(Malformed, match=r"expected a map, got list.*order\.toml"):
        from_plain(Outer, [], path="order.toml")


def test_unknown_keys_are_ignored_unless_strict_at_every_depth():
    assert from_plain(Outer, GOOD | {"later": 1}).name == "x.y-1"
    with pytest.raises(Malformed, match=r"known here: .*name"):
        from_plain(Outer, GOOD | {"later": 1}, strict=True)
    with pytest.raises(Malformed) as caught:
        from_plain(Outer, GOOD | {"inner": {"size": 1, "sice": 2}}, strict=True)
    assert caught.value.path == "$.inner.sice"


def test_error_texts_do_not_carry_the_attack_along():
    for change in ({"name": "\n" * 50_000}, {"kind": "x" * 50_000}, {"knobs": {"k" * 50_000: "v"}}):
        with pytest.raises(Malformed) as caught:
            from_plain(Outer, GOOD | change)
        assert len(str(caught.value)) < 500
    with pytest.raises(Malformed) as caught:
        from_plain(Outer, GOOD | {"k" * 50_000: 1}, strict=True)
    assert len(str(caught.value)) < 500


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(GOOD)), inner),
        max_leaves=20,
    )
)
def test_anything_at_all_is_read_or_malformed(value):
    with contextlib.suppress(Malformed):
        assert isinstance(from_plain(Outer, value), Outer)


def test_unpack_bounds_everything_before_it_reads():
    assert unpack(b"\x93\x01\x02\x03", 4) == [1, 2, 3]
    with pytest.raises(TooLarge):
        unpack(b"\x93\x01\x02\x03", 3)
    for data in (b"", b"\x01\x01", b"\x93\x01", b"\x82\xa1a\x01\xa1a\x02", b"\xc1", b"\xd4\x00\x00", b"\x91" * 5000):
        with pytest.raises(Malformed):
            unpack(data, 10_000)
    with pytest.raises(Malformed):
        unpack(msgpack.packb(list(range(1025))), 10_000)
    assert len(unpack(msgpack.packb(list(range(1025))), 10_000, 2000)) == 1025
