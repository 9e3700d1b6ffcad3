"""How much of the code stands twice: lines in a window of six that occurs elsewhere, comments and docstrings aside."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict

from tests.house.walk import Module

WINDOW = 6


def code_lines(module: Module) -> list[tuple[int, str]]:
    """Give the numbered lines that are code: no blank lines, no comments, no docstrings; indentation does not count."""
    silent = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            silent.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    rows = module.text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            rows[line - 1] = rows[line - 1][:column]
    found = [(i, " ".join(row.split())) for i, row in enumerate(rows, 1) if i not in silent]
    return [(i, row) for i, row in found if row]


def duplicated(modules: list[Module]) -> tuple[int, int, dict[tuple[str, int], tuple[str, int]]]:
    """Count (code lines, lines that stand elsewhere too) and name for each repeated window another place of it."""
    places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    all_lines = [code_lines(module) for module in modules]
    for m, found in enumerate(all_lines):
        texts = [row for _, row in found]
        for i in range(len(texts) - WINDOW + 1):
            places[tuple(texts[i : i + WINDOW])].append((m, i))
    twice: set[tuple[int, int]] = set()
    named = {}
    for window, found in places.items():
        # Six lines of closing brackets say nothing.
        if len(found) > 1 and sum(any(c.isalnum() for c in row) for row in window) >= WINDOW - 2:
            twice.update((m, i + k) for m, i in found for k in range(WINDOW))
            for (m, i), (n, j) in zip(found, [*found[1:], found[0]], strict=True):
                named[modules[m].path, all_lines[m][i][0]] = (modules[n].path, all_lines[n][j][0])
    return sum(map(len, all_lines)), len(twice), named
