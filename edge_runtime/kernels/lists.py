"""Lists of the compiled core's calls: prepared once for a batch size, run at every step with one crossing into it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from edge_runtime.engines import Update
from edge_runtime.engines.arrays import Floats
from edge_runtime.kernels.library import Call, Image, Step, must
from edge_runtime.kernels.panels import address

(PACK, UNPACK, LINEAR_FORWARD, LINEAR_BACKWARD, POOL_FORWARD, POOL_BACKWARD, CONV_FORWARD) = range(1, 8)
(CONV_BACKWARD_INPUT, CONV_BACKWARD_WEIGHT, CROSS_ENTROPY, SETTLE) = range(8, 12)
(CONV_POOL_FORWARD, CONV_POOL_BACKWARD) = range(12, 14)
"""As in `native/kernels.h`."""

_LETTERS = "abcdefg"


@dataclass(slots=True)
class Prepared:
    """A list of calls, and what in it changes from step to step.

    Attributes:
        calls: The list.
        marks: Place in it by name.
        spans: First call of each stage's way back, and the one behind its last; the last stage first.
        goals: Call, letter and tensor name of every gradient that is added to.
        whats: What each call is about.
        keeps: What must live as long as the list.
    """

    calls: Any
    marks: dict[str, int]
    spans: list[tuple[int, int]]
    goals: list[tuple[int, str, str]]
    whats: list[str]
    keeps: list[object]
    given: list[Floats] = field(default_factory=list)

    def run(self, library: ctypes.CDLL, first: int = 0, end: int = -1) -> None:
        """Run the calls from one to before another.

        Raises:
            DeviceError: One failed; the text names what it was about.
        """
        count = (len(self.calls) if end < 0 else end) - first
        code = library.nk_run(ctypes.byref(self.calls[first]), count) if count else 0
        if code:
            must(code & 255, self.whats[first + (code >> 8)])

    def point(self, mark: str, letter: str, array: NDArray[Any]) -> None:
        """Let an argument of a call be this array, which the caller keeps until it has run."""
        setattr(self.calls[self.marks[mark]], letter, array.ctypes.data)

    def aim(self, grads: Mapping[str, Floats]) -> None:
        """Let gradients be added to these arrays."""
        now = [grads[name] for _, _, name in self.goals]
        if len(now) == len(self.given) and all(a is b for a, b in zip(now, self.given, strict=True)):
            return
        for (place, letter, _), array in zip(self.goals, now, strict=True):
            setattr(self.calls[place], letter, array.ctypes.data)
        self.given = now


class Writer:
    """Takes down a list."""

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._calls: list[dict[str, Any]] = []
        self._whats: list[str] = []
        self._keeps: list[object] = []
        self._marks: dict[str, int] = {}
        self._goals: list[tuple[int, str, str]] = []
        self._spans: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(
        self,
        what: int,
        about: str,
        images: Sequence[Image],
        arrays: Sequence[NDArray[Any] | None],
        *,
        mark: str = "",
        **others: Any,
    ) -> None:
        """Append a call.

        Args:
            what: Which function.
            about: For errors.
            images: Its images, in its order.
            arrays: Its arrays; None is null, or is set later.
            mark: To find it again by.
            others: Fields of `Call`; structures by themselves.
        """
        if mark:
            self._marks[mark] = len(self._calls)
        structures: dict[str, ctypes.Structure] = dict(zip(("first", "second", "third"), images, strict=False))
        structures |= {name: value for name, value in others.items() if isinstance(value, ctypes.Structure)}
        fields: dict[str, Any] = {"what": what, "batch": self._batch} | others
        fields |= {name: ctypes.addressof(value) for name, value in structures.items()}
        fields |= {letter: address(array) for letter, array in zip(_LETTERS, arrays, strict=False) if array is not None}
        self._keeps += [*structures.values(), *arrays]
        self._calls.append(fields)
        self._whats.append(about)

    def goal(self, letter: str, name: str) -> None:
        """Say that an argument of the latest call is the gradient of this tensor."""
        self._goals.append((len(self._calls) - 1, letter, name))

    def span(self, first: int) -> None:
        """Say that the calls from `first` on are one stage's way back."""
        self._spans.append((first, len(self._calls)))

    def done(self) -> Prepared:
        """Give the list."""
        calls = (Call * len(self._calls))(*(Call(**fields) for fields in self._calls))
        return Prepared(calls, self._marks, self._spans, self._goals, self._whats, self._keeps)


class Steps:
    """What moves each tensor along its gradient, refilled when another update comes.

    The arrays of an update are not held: momentum ends with the order that it was made for.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.of = {name: Step() for name in names}
        self._numbers: tuple[float, ...] = ()
        self._arrays: list[weakref.ref[Floats]] = []

    def known(self, update: Update) -> bool:
        """Tell whether this moves as the update that was taken last, with the same arrays."""
        if _numbers(update) != self._numbers:
            return False
        now = self._used(update)  # what is missing is no array that has gone
        return len(now) == len(self._arrays) and all(
            a is not None and a is b() for a, b in zip(now, self._arrays, strict=True)
        )

    def fill(self, update: Update) -> None:
        """Take the numbers and arrays of an update that was looked at (`edge_runtime.kernels.check_goal`)."""
        if self.known(update):
            return
        for name, step in self.of.items():
            step.rate, step.momentum, step.decay, step.pull = update.rate, update.momentum, update.decay, update.pull
            step.velocity = address(update.velocity[name]) if update.momentum and update.velocity is not None else None
            step.anchor = address(update.anchor[name]) if update.pull and update.anchor is not None else None
        self._numbers = _numbers(update)
        self._arrays = [weakref.ref(array) for array in self._used(update) if array is not None]

    def _used(self, update: Update) -> list[Floats | None]:
        used = [mapping for on, mapping in ((update.momentum, update.velocity), (update.pull, update.anchor)) if on]
        return [mapping.get(name) for mapping in used if mapping is not None for name in self.of]


def _numbers(update: Update) -> tuple[float, ...]:
    return update.rate, update.momentum, update.decay, update.pull
