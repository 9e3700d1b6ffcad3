"""The ops that the native engine has: by name, what each holds."""

from __future__ import annotations

from collections.abc import Mapping

from wire.native import norms, pointwise, sequences, shapes, windows
from wire.native.needs import Say

NEEDS: Mapping[str, Say] = {**pointwise.NEEDS, **shapes.NEEDS, **windows.NEEDS, **norms.NEEDS, **sequences.NEEDS}
