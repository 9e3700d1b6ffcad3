"""The house rules over the whole repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.house import walk
from tests.house.duplicates import duplicated
from tests.house.walk import PACKAGES, Module

OURS = walk.modules(*PACKAGES)
ALL = [*OURS, *walk.modules("tests")]
DUPLICATE_MAX = 0.03


@pytest.mark.parametrize(
    "rule",
    [walk.docstring, walk.lines, walk.functions, walk.classes, walk.statements, walk.leftovers],
    ids=lambda r: r.__name__,
)
def test_rule(rule: Callable[[Module], Iterator[str]]) -> None:
    where = OURS if rule is walk.classes else ALL  # a test's stand-in for a whole fleet may be wide
    where = [module for module in where if "tests/house/" not in module.path or rule is not walk.leftovers]
    broken = [sentence for module in where for sentence in rule(module)]
    assert not broken, "\n" + "\n".join(broken)


def test_nothing_inherits_but_protocols_exceptions_and_enums() -> None:
    exceptions = walk.exceptions_of(ALL)
    broken = [sentence for module in ALL for sentence in walk.inheritance(module, exceptions)]
    assert not broken, "\n" + "\n".join(broken)


@pytest.mark.parametrize("folders", [PACKAGES, ("tests",)], ids=["packages", "tests"])
def test_little_stands_twice(folders: tuple[str, ...]) -> None:
    total, twice, named = duplicated(walk.modules(*folders))
    places = "\n".join(f"  {a}:{i} and {b}:{j}" for (a, i), (b, j) in sorted(named.items()))
    assert twice <= DUPLICATE_MAX * total, f"{twice} of {total} lines stand twice:\n{places}"


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for name in (*PACKAGES, "tests") for path in (walk.ROOT / name).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_no_path_of_one_machine_is_written_down() -> None:
    for module in ALL:
        assert str(walk.ROOT.parent) + "/" not in module.text, module.path
