"""Importing the agent without OpenSSL, where the broker is spoken to in the clear: 4.4 MiB of resident memory less.

Two modules load libcrypto although a plain connection needs nothing of it: `ssl`, which paho imports if it can, and
`_hashlib`, which `hashlib` prefers to Python's own SHA-256. Only while the agent is imported, a stand-in takes the place
of the first and the second is not there; a later ``import ssl`` gets the real one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class _NeverRaised(Exception):
    """What paho waits for in an ``except``, and what only a real TLS socket raises."""


@contextmanager
def without_openssl() -> Iterator[None]:
    """Import what is imported inside without libcrypto; does nothing where it is loaded already or is the only SHA-256."""
    own_sha256 = any(importlib.util.find_spec(name) is not None for name in ("_sha256", "_sha2"))
    if not own_sha256 or {"ssl", "_hashlib", "hashlib"} & sys.modules.keys():
        yield
        return
    stand_in = ModuleType("ssl")
    stand_in.__dict__.update(SSLWantReadError=_NeverRaised, SSLWantWriteError=_NeverRaised)
    absent: dict[str, ModuleType | None] = {"ssl": stand_in, "_hashlib": None}  # None makes an import fail
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]  # None is allowed in there
    modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
