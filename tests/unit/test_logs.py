"""What the agent says: forms that programs read, and floods that cost one line a minute."""

from __future__ import annotations

import io
import json
import logging
import re

import pytest

from edge_runtime import logs
from edge_runtime.logs import BURST, SECONDS_BETWEEN, Flood, Lines


@pytest.fixture
def root():
    """Give the root logger back as it was."""
    found = logging.getLogger()
    handlers, level = found.handlers[:], found.level
    yield found
    found.handlers[:], found.level = handlers, level


def record(text="no broker: %s", *args, level=logging.WARNING, **fields):
    made = logging.LogRecord("edge_runtime", level, "x.py", 1, text, args, None)
    made.created = 0.0
    if fields:
        made.fields = fields
    return made


def test_logfmt():
    line = Lines("logfmt", "kitchen-pi").format(record("no broker: %s", 'a "b"\n=c', order="0f", move=None))
    assert line == (
        r'ts=1970-01-01T00:00:00Z level=warning msg="no broker: a \"b\"\n=c" device=kitchen-pi order=0f move=None'
    )


def test_json():
    said = json.loads(
        Lines("json", "kitchen-pi").format(record("refusing %s", "x\0\n", level=logging.INFO, reason="busy"))
    )
    assert said == {
        "ts": "1970-01-01T00:00:00Z", "level": "info", "msg": "refusing x\0\n", "device": "kitchen-pi", "reason": "busy"
    }  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "logfmt", "json"])
def test_a_strangers_text_is_one_line_and_bounded(form):
    line = Lines(form, "d").format(record("%s", "x\nlevel=error\r\x1b[2J\u2028" + "y" * 9000))
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert len(line) < 2200


def test_an_exception_is_named():
    made = logging.LogRecord("a", logging.ERROR, "x.py", 1, "broke", (), (ValueError, ValueError("no"), None))
    assert json.loads(Lines("json", "d").format(made))["error"] == "ValueError"


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_flood_of_one_warning_costs_one_line_a_minute():
    clock = Clock()
    flood = Flood(clock)
    passed = []
    for i in range(600):  # ten a second for a minute, and then one more
        clock.now = 1000.0 + i / 10
        one = record("no broker: %s", "refused")
        passed += [one] if flood.filter(one) else []
    clock.now += SECONDS_BETWEEN
    last = record("no broker: %s", "refused")
    assert flood.filter(last)
    assert len(passed) == 1
    assert last.held_back == 599
    assert "held_back=599" in Lines("logfmt", "d").format(last)
    assert "(and 599 more" in Lines("plain", "d").format(last)


def test_a_flood_of_ever_new_texts_costs_ten_lines_a_minute_and_bounded_memory():
    clock = Clock()
    flood = Flood(clock)
    passed = [flood.filter(record("dropped a message on %s", str(i))) for i in range(5000)]
    assert sum(passed) == BURST
    kinds = [flood.filter(record(f"kind {i}")) for i in range(5000)]
    assert all(kinds)
    assert max(len(flood._kinds), len(flood._lines)) <= 256


def test_what_is_no_warning_always_passes():
    flood = Flood(Clock())
    assert all(flood.filter(record("round %d", 1, level=logging.INFO)) for _ in range(100))


@pytest.mark.parametrize(
    ("form", "tty", "wanted"), [("auto", False, "ts="), ("auto", True, r"\d\d:"), ("json", True, r"\{")]
)
def test_the_form_is_chosen_by_where_it_goes(root, form, tty, wanted):
    stream = io.StringIO()
    stream.isatty = lambda: tty
    logs.begin(form, "d", stream=stream)
    logging.getLogger("edge_runtime").info("hello")
    for _ in range(9):
        logging.getLogger("edge_runtime").warning("no broker")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(re.match(wanted, line) for line in lines)


def test_quiet_says_what_goes_wrong_alone(root):
    stream = io.StringIO()
    logs.begin("logfmt", "d", quiet=True, stream=stream)
    logging.getLogger("edge_runtime").info("hello")
    logging.getLogger("edge_runtime").warning("help")
    assert "hello" not in stream.getvalue()
    assert "msg=help" in stream.getvalue()
