"""The house rules on small samples: each must see what it is for, and nothing else."""

from __future__ import annotations

import pytest

from tests.house import walk
from tests.house.duplicates import code_lines, duplicated
from tests.house.walk import Module


def says(rule, text: str, path: str = "wire/sample.py") -> list[str]:
    return list(rule(Module.of(text, path)))


def test_size_of_files_and_functions():
    assert not says(walk.lines, "x = 1\n" * 400)
    assert says(walk.lines, "x = 1\n" * 401)
    assert not says(walk.functions, "def f():\n" + "    x = 1\n" * 59)
    assert says(walk.functions, "def f():\n" + "    x = 1\n" * 60)
    assert says(walk.docstring, "x = 1\n")


def test_parameters_and_defaults():
    assert not says(walk.functions, "class A:\n def f(self, a, b, c, d, *, e, f, g): ...\n")
    assert says(walk.functions, "def f(a, b, c, d, *, e, f, g, h): ...\n")
    assert says(walk.functions, "def f(a=[]): ...\n")
    assert says(walk.functions, "def f(*, a=dict()): ...\n")
    assert not says(walk.functions, "def f(a=(), b=None): ...\n")


def test_attributes_are_fields_and_what_self_gets():
    body = "class A:\n x: int\n k: ClassVar[int] = 1\n def f(self):\n  self.a = self.b = 1\n  self.c.d = 2\n  other.e = 1\n"
    node = Module.of(body).tree.body[0]
    assert walk.attributes(node) == {"x", "a", "b"}
    wide = "class A:\n" + "".join(f" x{i}: int\n" for i in range(13))
    assert says(walk.classes, wide)
    assert says(walk.classes, "class RoundManager: ...\n")
    assert not says(walk.classes, "class Round: ...\n")


@pytest.mark.parametrize(
    ("bases", "allowed"),
    [
        ("", True),
        ("Protocol[T]", True),
        ("enum.Enum", True),
        ("Odd", True),
        ("ValueError", True),
        ("A", False),
        ("x.B", False),
    ],
)
def test_inheritance(bases, allowed):
    module = Module.of(f"class Odd(Strange): ...\nclass Strange(Exception): ...\nclass A: ...\nclass B({bases}): ...\n")
    assert bool(list(walk.inheritance(module, walk.exceptions_of([module])))) != allowed


@pytest.mark.parametrize(
    "text",
    ["def f():\n global x\n", "from a import *\n", "from . import a\n", "config.x = 1\n", "self.config.x = 1\n", "eval('1')\n",
     "object.__setattr__(a, 'b', 1)\n"],
)  # fmt: skip
def test_statements(text):
    assert says(walk.statements, text)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("x = 1  # noqa: E501\n", True),
        ("x = 1  # noqa\n", True),
        ("x = 1  # noqa: E501, S101 - the table is read as a whole\n", False),
        ("x = 1  # type: ignore\n", True),
        ("x = 1  # type: ignore[arg-type]\n", True),
        ("x = 1  # type: ignore[arg-type]  # numpy's stubs say otherwise\n", False),
        ("# TODO: later\n", True),
        ("time.sleep(1)\n", True),
        ("time.sleep(0.05)\n", False),
        ("pytest.skip('no broker')\n", True),
    ],
)
def test_leftovers(text, broken):
    assert bool(says(walk.leftovers, text, "tests/sample.py")) == broken


def test_duplicates_are_windows_of_six_lines_of_code():
    block = "".join(f"a{i} = {i}\n" for i in range(6))
    docs = 'def f():\n    """Says.\n\n    More.\n    """\n    return 1  # why\n\n'
    assert [row for _, row in code_lines(Module.of(docs))] == ["def f():", "return 1"]
    one, two = Module.of(block + "b = 1\n", "one"), Module.of("c = 1\n" + block.replace("=", " ="), "two")
    total, twice, named = duplicated([one, two])
    assert (total, twice, named) == (14, 12, {("one", 1): ("two", 2), ("two", 2): ("one", 1)})
    assert duplicated([one])[1] == 0
