"""The exit codes of all `edge-runtime` commands and of the worker, registered here once; `docs/exits.md` explains them.

Numbers are never used again for something else.
"""

from __future__ import annotations

OK = 0
UNEXPECTED = 1
CONFIG = 2
BROKER = 3
UNFIT = 4
DISK = 5
DATA = 6
ENROLMENT = 7
INTERRUPTED = 130

MEANINGS = {
    OK: "all done",
    UNEXPECTED: "an unexpected failure: please report it with the text above",
    CONFIG: "the command line or the configuration is wrong; the text says what to write instead",
    BROKER: "no broker: it is unreachable or refuses this device",
    UNFIT: "`edge-runtime check` found something that must be put right",
    DISK: "this machine's disk: the state folder, or a file that was asked for, cannot be read or written",
    DATA: "the device's data are missing or not what they should be; a restart would end the same way",
    ENROLMENT: "this device gets no certificate: the invitation, the authority or the clock; the text says which",
    INTERRUPTED: "interrupted",
}
"""What each code means. A service manager should not restart after `CONFIG` and `DATA`."""

WORKER_OK = 0
WORKER_CRASHED = 1
WORKER_UNFIT = 2
WORKER_MEMORY = 3

WORKER_MEANINGS = {
    WORKER_OK: "its input ended, or the agent hung up",
    WORKER_CRASHED: "an order broke it in a way that nobody expected; the order is refused as `crash`",
    WORKER_UNFIT: "it cannot begin: the data, the engine or the configuration; the agent says which",
    WORKER_MEMORY: "an order ran out of memory; it is refused as `oom`, and the next one gets a fresh worker",
}
"""What the worker's codes mean. Only the agent sees them; below 0 it was a signal."""
