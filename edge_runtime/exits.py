"""The exit codes of all `edge-runtime` commands, registered here once. Numbers are never used again for something else."""

from __future__ import annotations

OK = 0
UNEXPECTED = 1
CONFIG = 2
BROKER = 3
UNFIT = 4
DISK = 5
DATA = 6
INTERRUPTED = 130

MEANINGS = {
    OK: "all done",
    UNEXPECTED: "an unexpected failure: please report it with the text above",
    CONFIG: "the command line or the configuration is wrong; the text says what to write instead",
    BROKER: "no broker: it is unreachable or refuses this device",
    UNFIT: "`edge-runtime check` found something that must be put right",
    DISK: "this machine's disk: the state folder, or a file that was asked for, cannot be read or written",
    DATA: "the device's data are missing or not what they should be; a restart would end the same way",
    INTERRUPTED: "interrupted",
}
"""What each code means. A service manager should not restart after `CONFIG` and `DATA`."""
