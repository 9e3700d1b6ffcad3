"""Names for what travels between engines and rules."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Arrays = dict[str, Floats]
