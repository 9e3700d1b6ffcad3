"""The house rules that a syntax tree can show. Each rule is a function from one module to the sentences that it breaks."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("wire", "edge_runtime", "coordinator")
LINES_MAX = 400
FUNCTION_LINES_MAX = 60
PARAMETERS_MAX = 7
ATTRIBUTES_MAX = 12
_BASES = {
    "Protocol",
    "Generic",
    "NamedTuple",
    "TypedDict",
    "Enum",
    "IntEnum",
    "StrEnum",
    "Flag",
    "IntFlag",
    "Module",
    "Function",  # torch.autograd's
    "Structure",  # ctypes'
    "TorchDispatchMode",  # how torch tells of every operation; tests alone
    "RawIOBase",
}
_EXCEPTIONS = {
    name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
}
_MUTABLE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_VAGUE = re.compile(r"(Manager|Handler|Helper|Utils?)$|^Base[A-Z]|^Abstract")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    path: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, text: str, path: str = "sample.py") -> Module:
        return cls(path, text, ast.parse(text))


def modules(*folders: str) -> list[Module]:
    """Parse all files of some folders of this repository."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [Module.of(path.read_text("utf-8"), str(path.relative_to(ROOT))) for path in paths]


def exceptions_of(all_modules: list[Module]) -> set[str]:
    """Name every class that is an exception, at whatever depth: those may have a tree."""
    bases = {
        node.name: set(map(_last, node.bases)) for m in all_modules for node in ast.walk(m.tree) if _is_class(node)
    }
    known = set(_EXCEPTIONS)
    while more := {name for name, above in bases.items() if above & known} - known:
        known |= more
    return known


def docstring(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.path}: has no docstring that says what the module is for"


def lines(module: Module) -> Iterator[str]:
    count = module.text.count("\n")
    if count > LINES_MAX:
        yield f"{module.path}: {count} lines, at most {LINES_MAX}"


def functions(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, Function):
            where = f"{module.path}:{node.lineno} {node.name}"
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES_MAX:
                yield f"{where}: {count} lines, at most {FUNCTION_LINES_MAX}"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in {"self", "cls"}])
            if count > PARAMETERS_MAX:
                yield f"{where}: {count} parameters, at most {PARAMETERS_MAX}"
            defaults = [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
            if any(isinstance(d, _MUTABLE) or _calls(d, {"list", "dict", "set", "bytearray"}) for d in defaults):
                yield f"{where}: a mutable default is shared by all calls"


def classes(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if _is_class(node):
            count = len(attributes(node))
            if count > ATTRIBUTES_MAX:
                yield f"{module.path}:{node.lineno} {node.name}: {count} attributes, at most {ATTRIBUTES_MAX}"
            if _VAGUE.search(node.name):
                yield f"{module.path}:{node.lineno} {node.name}: say what it does, not that it does something"


def attributes(node: ast.ClassDef) -> set[str]:
    """Name what an object of a class holds: fields of the class body, slots, and what methods set on self."""
    names = {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_class_variable(item)
    }
    for inner in ast.walk(node):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            names |= {inner.attr} if isinstance(inner.value, ast.Name) and inner.value.id == "self" else set()
    return names


def inheritance(module: Module, exceptions: set[str]) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if _is_class(node):
            for base in node.bases:
                name = _last(base)
                if name not in _BASES and name not in exceptions:
                    yield f"{module.path}:{node.lineno} {node.name}: inherits from {name}; compose instead"


def statements(module: Module) -> Iterator[str]:
    """`global`, star imports, and writes into somebody's configuration or around a frozen dataclass."""
    for node in ast.walk(module.tree):
        where = f"{module.path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Global):
            yield f"{where}: global {', '.join(node.names)}: pass it, or put it into an object"
        if isinstance(node, ast.ImportFrom) and (node.level or any(a.name == "*" for a in node.names)):
            yield f"{where}: import names, absolutely"
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _last(node.value) in _CONFIGS:
            yield f"{where}: writes {_last(node.value)}.{node.attr}; dataclasses.replace makes another"
        if isinstance(node, ast.Call) and _last(node.func) == "__setattr__" and not module.path.startswith("tests/"):
            yield f"{where}: writes into a frozen object"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
            yield f"{where}: {node.func.id} runs what it is given"


_CONFIGS = {"config", "cfg", "settings", "options", "args"}
_LEFTOVERS = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|\bNotImplementedError\b")
_BARE = re.compile(r"#\s*(noqa\b(?!: [A-Z0-9, ]+ - \S)|type: ignore(?!\[[\w, -]+\] *(#|- ) *\S))")
_SLEEP = re.compile(r"time\.sleep\((0\.[5-9]|[1-9])")
_SKIP = re.compile(r"pytest\.(skip|importorskip|xfail)\b|mark\.(skip|skipif|xfail)\b")


def leftovers(module: Module) -> Iterator[str]:
    """Things to do later, silenced tools without a reason, sleeping tests and skipped ones."""
    for number, line in enumerate(module.text.splitlines(), 1):
        where = f"{module.path}:{number}"
        if _LEFTOVERS.search(line):
            yield f"{where}: a leftover: {line.strip()[:80]}"
        if _BARE.search(line):
            yield f"{where}: silences a tool without a code and a reason ('# noqa: CODE - why')"
        if module.path.startswith("tests/") and _SLEEP.search(line):
            yield f"{where}: a test that sleeps; wait for the condition with a time limit"
        if _SKIP.search(line):
            yield f"{where}: a test that does not run; the set-up installs what it needs"


def _last(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _calls(node: ast.expr, names: set[str]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def _is_class_variable(item: ast.AnnAssign) -> bool:
    return _last(item.annotation) == "ClassVar"
