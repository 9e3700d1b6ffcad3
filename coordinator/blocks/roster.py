"""Of which devices a coordinator remembers anything: of those that it heard of last.

Names are the devices' own, and a fleet may have ever new ones. What is remembered by name is saved with every round, so that
it must not grow for ever; a device that was forgotten is one that was never seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

DEVICES_MAX = 4096
"""Devices that are remembered. With names as long as they may be, what is said of each in a state's header must be short."""


def latest(known: Mapping[str, T], news: Mapping[str, T]) -> dict[str, T]:
    """Lay news over what is known, and forget who was heard of longest ago beyond `DEVICES_MAX`.

    Args:
        known: By device name, who was heard of last being the last.
        news: Likewise; nobody in it is forgotten.

    Returns:
        Both, the news last. Cost: one pass.
    """
    both = {name: value for name, value in known.items() if name not in news} | dict(news)
    return dict(list(both.items())[-max(DEVICES_MAX, len(news), 1) :])
