"""The worker's process: `edge_runtime.worker` behind stand-ins for what it never uses (`edge_runtime.frugal`).

A sixth of the time that a worker took to start went into what nobody there reads: documentation and signatures of numpy's
functions, types for annotations, help texts; as much into methods of dataclasses that nobody calls, and a tenth into searches
for garbage among what had just been loaded. An engine that is large itself loads the real modules first.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import GenericAlias
from typing import Any

from edge_runtime import frugal


class _Annotation:
    """As much of ``NDArray`` as annotations need."""

    def __class_getitem__(cls, item: Any) -> GenericAlias:
        return GenericAlias(cls, item)


def _asked(module: str, name: str) -> Any:
    """Give a function that loads the real one when it is called, once for all who hold the stand-in."""

    def call(*words: Any, **more: Any) -> Any:
        frugal.load(module)
        return getattr(importlib.import_module(module), name)(*words, **more)

    return call


def _signature(of: Any, **more: Any) -> Any:
    """Give none of a class, where it is for a text, nor to numpy while it starts; `numpy.ma` does need those of functions."""
    numpy = sys.modules.get("numpy")
    if isinstance(of, type) or numpy is None or getattr(numpy.__spec__, "_initializing", False):
        return None
    return _asked("inspect", "signature")(of, **more)


ASIDE = (
    *(*frugal.ASIDE, "gettext", "pickle", "secrets", "subprocess", "urllib.parse"),
    *("numpy._core._add_newdocs", "numpy._core._add_newdocs_scalars", "numpy._typing", "numpy.typing"),
)
"""What a worker does not use unless something goes wrong."""
ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "gettext": {"gettext": lambda text: text, "ngettext": lambda one, many, n: one if n == 1 else many},
    "inspect": {"cleandoc": lambda text: text, "signature": _signature, "get_annotations": frugal.hints},
    "numpy._typing": {"NDArray": _Annotation},
    "numpy.typing": {"NDArray": _Annotation},
    "platform": {"system": lambda: os.uname().sysname, "python_implementation": lambda: "CPython"},
    "secrets": {"randbits": lambda bits: int.from_bytes(os.urandom(bits // 8))},
    "shutil": {"get_terminal_size": lambda: os.terminal_size((80, 24))},
    "textwrap": {"dedent": lambda text: text},
    "urllib.parse": {"quote_from_bytes": _asked("urllib.parse", "quote_from_bytes")},
}
"""What everybody asks them at the start."""


def bind() -> None:
    """Let packages know the stand-ins of their modules, as an import would have: numpy seeks its own without end."""
    for name in ASIDE:
        package, _, last = name.rpartition(".")
        if package in sys.modules and name in sys.modules:
            vars(sys.modules[package]).setdefault(last, sys.modules[name])


@contextmanager
def starting() -> Iterator[None]:
    """Import what is imported inside as a worker does."""
    if sys.implementation.name == "cpython":
        frugal.put_aside(ASIDE, ANSWERS)
        frugal.put_off()
    with frugal.loading():
        yield
    bind()


def main() -> int:
    """Run the process; see `edge_runtime.worker.main`."""
    with starting():
        from edge_runtime import worker
    return worker.main()


if __name__ == "__main__":
    sys.exit(main())
