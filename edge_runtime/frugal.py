"""Keeping processes small: modules that they never use are not loaded, and what only the start needed is given back.

``put_aside``
    Much of what the standard library and paho import is for cases that an agent never has: `dataclasses` imports `inspect`
    for classes without a docstring, `urllib` imports `ipaddress` for addresses in brackets. A stand-in takes the place of
    each such module, and loads the real one when anything of it is asked for: 3 MiB of the agent's own memory, and a sixth
    of the time that a worker needs to start: numpy writes documentation and signatures that no worker reads.
``put_off``
    Most methods that `dataclasses` writes are never called.
``without_openssl``
    Where the broker is spoken to in the clear, nothing needs OpenSSL: 4.4 MiB of resident memory.
``give_back``
    The code of libraries stays resident after it ran once. A start runs through most of OpenSSL and of Python's parser, and an
    idle agent through little of either: 5 MiB of resident memory, which the kernel would have to search for elsewhere.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pathlib import Path  # it loads half of urllib, for which there may be a stand-in

    from _typeshed import ReadableBuffer as Buffer

ASIDE = (
    *("ast", "base64", "bz2", "dis", "encodings.idna", "inspect", "ipaddress", "linecache", "locale", "lzma"),
    *("platform", "random", "shutil", "tempfile", "textwrap", "tokenize", "traceback", "uuid", "zipfile"),
)
"""What an agent does not use unless something goes wrong."""


def _idna() -> codecs.CodecInfo:
    """Give a codec of names of hosts that needs the tables of Unicode, 0.2 MiB, for those alone that are not ASCII."""

    def encode(name: str, errors: str = "strict") -> tuple[bytes, int]:
        if name.isascii() and all(0 < len(label) < 64 for label in name.split(".")):
            return name.encode("ascii"), len(name)
        return real().encode(name, errors)

    def decode(data: Buffer, errors: str = "strict") -> tuple[str, int]:
        return real().decode(data, errors)

    def real() -> codecs.CodecInfo:
        load("encodings.idna")
        found: codecs.CodecInfo = importlib.import_module("encodings.idna").getregentry()
        return found

    return codecs.CodecInfo(encode, decode, name="idna")


def hints(of: Any, **how: Any) -> dict[str, Any]:
    """Give what `dataclasses` of Python 3.13 asks of every class; `inspect` is half a mebibyte."""
    if isinstance(of, type) and not how:
        return dict(vars(of).get("__annotations__", {}))
    load("inspect")
    found: dict[str, Any] = importlib.import_module("inspect").get_annotations(of, **how)
    return found


_ANSWERS: dict[str, dict[str, Any]] = {
    "inspect": {"get_annotations": hints},
    "encodings.idna": {"getregentry": _idna, "getaliases": tuple},  # every connection's
    "platform": {"system": lambda: os.uname().sysname},  # paho's question
}
"""What stand-ins know themselves, because everybody asks it."""
_STANDS_IN = "__stands_in__"
_PUT_OFF = ("__delattr__", "__eq__", "__hash__", "__repr__", "__setattr__")
_MADV_DONTNEED = 4
_MAPS = "/proc/self/smaps"


def put_aside(names: tuple[str, ...] = ASIDE, answers: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Let stand-ins take the place of modules that are not loaded yet. To be called before anything that imports them.

    Args:
        names: Of the modules.
        answers: What they know themselves, by name; `take_back` replaces it.
    """
    modules: dict[str, ModuleType] = sys.modules
    known = _ANSWERS if answers is None else answers
    for name in names:
        if name not in modules:
            modules[name] = _stand_in(name, known.get(name, {}))
    with contextlib.suppress(ImportError):  # what the other half is about, this one replaces
        modules.setdefault("datetime", importlib.import_module("_datetime"))


def put_off() -> None:
    """Let dataclasses write what compares, hashes, prints and guards them at the first call: of most classes there is none.

    Python before 3.13 compiles each such method by itself: a fifth of the time in which a worker starts. To be called before
    anything that has dataclasses.
    """
    import dataclasses

    create = getattr(dataclasses, "_create_fn", None)  # 3.13 compiles all of a class at once
    if create is not None:
        dataclasses.__dict__["_create_fn"] = functools.partial(_method, create)


def _method(create: Callable[..., Any], name: str, *words: Any, **more: Any) -> Callable[..., Any]:
    if name not in _PUT_OFF:
        return cast("Callable[..., Any]", create(name, *words, **more))
    made: list[Callable[..., Any]] = []

    def method(*values: Any) -> Any:
        if not made:
            made.append(create(name, *words, **more))
        return made[0](*values)

    method.__name__ = name
    return method


@contextmanager
def loading() -> Iterator[None]:
    """Search nothing of what is loaded inside for garbage, now or ever: it stays, and looking takes a tenth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def take_back() -> None:
    """Load what stand-ins know a part of, for all who hold one: a large library may ask them for more than that."""
    for name, module in list(sys.modules.items()):
        if getattr(module, "__dict__", {}).get(_STANDS_IN):
            load(name)


def load(name: str) -> None:
    """Load what a stand-in stands for, if there still is one, for all who hold it."""
    said = getattr(sys.modules.get(name), "__dict__", {})
    if _STANDS_IN in said:
        said["__getattr__"]("__name__")


def _stand_in(name: str, answers: Mapping[str, Any]) -> ModuleType:
    """Make a module that becomes the real one when anything of it is asked for."""
    module = ModuleType(name)

    def real(wanted: str) -> Any:
        if wanted == "__path__":  # the import system asks: is it a package?
            raise AttributeError(wanted)
        if sys.modules.get(name) is module:
            del sys.modules[name]
        loaded = importlib.import_module(name)
        module.__dict__.pop(_STANDS_IN, None)
        module.__dict__.update(loaded.__dict__)
        return getattr(loaded, wanted)

    module.__dict__.update({**answers, "__getattr__": real, _STANDS_IN: bool(answers)})
    return module


class _NeverRaised(Exception):
    """What paho waits for in an ``except``, and what only a real TLS socket raises."""


@contextmanager
def without_openssl() -> Iterator[None]:
    """Import what is imported inside without libcrypto; does nothing where it is loaded already or is the only SHA-256.

    Two modules load it although a plain connection needs nothing of it: `ssl`, which paho imports if it can, and `_hashlib`,
    which `hashlib` prefers to Python's own SHA-256. A later ``import ssl`` gets the real one.
    """
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


def give_back(part: str = "", maps: Path | str = _MAPS) -> int:
    """Give unused heap back, and the resident pages of code, which come back from the page cache when they are run again.

    Only mappings of files that may be executed and that nothing has ever been written into. Cost: about 5 ms.

    Args:
        part: Of the names of the files; empty for the code of all.
        maps: Where the kernel tells of this process's memory.

    Returns:
        Bytes of code that were resident.
    """
    import ctypes  # 0.2 MiB, where it is not loaded yet
    from pathlib import Path

    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):  # Android's has none
        libc.malloc_trim(0)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    freed = 0
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        Path(maps).open(encoding="utf-8", errors="replace") as lines,
    ):
        for start, end, resident in code(lines, part):
            if libc.madvise(start, end - start, _MADV_DONTNEED) == 0:
                freed += resident
    return freed


def code(lines: Iterable[str], part: str = "") -> Iterator[tuple[int, int, int]]:
    """Find (start, end, resident bytes) of pure code in the lines of /proc/PID/smaps; the last mapping, the kernel's, is none.

    Of files alone with `part` in their names.

    Raises:
        ValueError, IndexError: It is something else.
    """
    place: tuple[int, int] | None = None
    facts: dict[str, int] = {}
    for line in lines:
        words = line.split(maxsplit=5)
        if words[0].endswith(":"):
            if place is not None and words[-1] == "kB":
                facts[words[0]] = int(words[1])
            continue
        if place is not None and not facts.get("Anonymous:", 1) and not facts.get("Private_Dirty:", 1):
            yield (*place, facts.get("Rss:", 0) * 1024)
        first, _, last = words[0].partition("-")
        is_code = words[1] == "r-xp" and words[-1].startswith("/") and part in words[-1]
        place, facts = ((int(first, 16), int(last, 16)) if is_code else None), {}
