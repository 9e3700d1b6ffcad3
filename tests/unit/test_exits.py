"""Exit codes: registered, used by name, and explained on the page for them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from coordinator.cli import EXITS
from edge_runtime import exits
from wire.messages import Reason

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "exits.md").read_text("utf-8")
ADVICE = "docs/exits.md: every code has one row, with the registered meaning word for word"


def table(heading: str) -> dict[str, str]:
    """Give the first two columns of the table below a heading."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")][2:]
    assert len({row[0] for row in rows}) == len(rows)
    assert all(cell.strip() for row in rows for cell in row)
    return {row[0].strip(): row[1].strip() for row in rows}


@pytest.mark.parametrize(
    ("heading", "codes"),
    [("edge-runtime", exits.MEANINGS), ("coordinator", EXITS), ("the worker", exits.WORKER_MEANINGS)],
)
def test_the_page_has_every_code(heading: str, codes: dict[int, str]) -> None:
    assert table(heading) == {str(code): meaning for code, meaning in codes.items()}, ADVICE


def test_the_page_has_every_refusal() -> None:
    assert set(table("Refusals")) == {f"`{reason}`" for reason in get_args(Reason)}


def test_every_constant_is_registered() -> None:
    named = {name: value for name, value in vars(exits).items() if isinstance(value, int) and name.isupper()}
    ours = {value for name, value in named.items() if not name.startswith("WORKER_")}
    assert (ours, {v for n, v in named.items() if n.startswith("WORKER_")}) == (
        set(exits.MEANINGS),
        set(exits.WORKER_MEANINGS),
    )


def test_the_agent_and_its_commands_name_their_codes() -> None:
    """A number in the code would be one that nobody registered."""
    for name in ("cli", "worker", "trainer", "agent"):
        text = (ROOT / "edge_runtime" / f"{name}.py").read_text("utf-8")
        assert not re.findall(r"sys\.exit\(\d|os\._exit\(\d|^ +return [1-9]\d*\b", text, re.MULTILINE), name
