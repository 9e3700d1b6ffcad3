"""`tests.bench._engines` in a process that starts as a worker does (`edge_runtime.worker_process`)."""

from __future__ import annotations

import sys

from edge_runtime.worker_process import starting

if __name__ == "__main__":
    with starting():
        from tests.bench import _engines
    _engines.main(sys.argv[1:])
