"""The engines of this machine in tests: all of them in turn, one alone, or one in double precision."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_runtime import engines
from edge_runtime.engines import Engine, Make, open_engine
from edge_runtime.warm import warm
from wire import prices
from wire.memory import Prediction

NAMES = tuple(engines.ENGINES)
IN_DOUBLE = tuple(name for name in NAMES if name == "native")
"""Those that can be made to calculate in double precision, for tests."""


def make() -> Engine:
    """Make an empty engine of the kind that is the best there is: in tests that use `every_engine`, the one in turn."""
    return _opened(engines.available()[0])()


def predicted(*model: Any, **more: Any) -> Prediction:
    """Predict training on that engine; arguments as `wire.memory.predict` has them."""
    return prices.training(engines.available()[0])(*model, **more)


@functools.cache
def _opened(name: str) -> Make:
    return open_engine(name)


def in_double(name: str) -> Make:
    """Give a maker of engines that calculate in double precision."""
    assert name in IN_DOUBLE
    from edge_runtime.engines.native.engine import NativeEngine

    return functools.partial(NativeEngine, dtype=np.float64)


@contextlib.contextmanager
def alone(name: str) -> Iterator[None]:
    """Let there be no engine but one."""
    with pytest.MonkeyPatch.context() as patch:
        for other in NAMES:
            if other != name:
                patch.delitem(engines.ENGINES, other)
        warm.cache_clear()
        yield
    warm.cache_clear()
