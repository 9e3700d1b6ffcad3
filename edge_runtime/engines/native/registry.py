"""The ops of the native engine by name; `wire.native.registry` has what each holds."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.engines.native import norms, pointwise, sequences, shapes, windows
from edge_runtime.engines.native.at import Op

OPS: Mapping[str, Op] = {**pointwise.OPS, **shapes.OPS, **windows.OPS, **norms.OPS, **sequences.OPS}
