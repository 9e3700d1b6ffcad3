"""Every way to fail, by who is to blame.

NestlingError
├── ConfigError       the operator: a key, a file or a flag is wrong; the text says what to write instead
├── DataError         the data set: missing, unreadable or not what its name promises
├── SpecError         the model: a graph that cannot be run, or not as asked
├── PeerError         the other side: its bytes or messages break the contract
│   ├── Malformed       not of the agreed form; carries the path inside the document
│   ├── TooLarge        beyond a limit that SPEC.md states
│   ├── Unsupported     a version, encoding or op that this side does not know
│   ├── DigestMismatch  the bytes are not the ones that were named
│   ├── MaskUnknown     values arrived for a mask that this side does not hold
│   └── NonFinite       a NaN or an infinity where a number is needed
├── LinkError         the broker or the way to it
│   ├── BrokerUnreachable
│   ├── BrokerRefused
│   └── BrokerMissing   no broker program is installed on this machine
├── DeviceError       this device
│   ├── BudgetExceeded  the work does not fit the memory that was granted
│   └── WorkerLost      the training process ended without an answer
├── EnrolmentError    a device does not get a certificate; the operator can do something about it
│   ├── InvitationExpired
│   ├── InvitationUsed
│   ├── InvitationUnknown
│   ├── WrongName       the invitation or the certificate is for another device
│   ├── WrongAuthority  who answers is not who invited: somebody may stand in between
│   └── ClockWrong      certificates are not valid at what this machine takes for now
└── StoreError        this machine's disk: spool, journal or Keep cannot be read or written
"""

from __future__ import annotations

import errno
from typing import ClassVar

_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG})


def one_line(text: object) -> str:
    """Give a text as one line of printable letters: what others have written in it must not pass for lines of our own."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


class NestlingError(Exception):
    """Root of all expected failures. `blame` says in one word who has to act."""

    blame: ClassVar[str] = "nobody"


class ConfigError(NestlingError):
    """The operator wrote something that cannot work; the text names the key, the file and what to write."""

    blame = "operator"


class DataError(NestlingError):
    """A data set is missing, unreadable or not what its name promises."""

    blame = "data"


class SpecError(NestlingError):
    """A model graph cannot be run, or not in the way that was asked."""

    blame = "model"


class PeerError(NestlingError):
    """The other side broke the contract."""

    blame = "peer"


class Malformed(PeerError):
    """Bytes or fields are not of the agreed form.

    Attributes:
        path: Where in the document, for example ``$.recipe.lr``.
        problem: What was wanted and what was found.
    """

    def __init__(self, problem: str, path: str = "$") -> None:
        """Keep both parts, so that a caller can name its own file instead of the path."""
        super().__init__(f"{problem} - at {path}")
        self.problem = problem
        self.path = path


class TooLarge(PeerError):
    """Something is beyond a limit that SPEC.md states."""


class Unsupported(PeerError):
    """A version, encoding or op that this side does not know."""


class DigestMismatch(PeerError):
    """The bytes are not the ones that were named."""


class MaskUnknown(PeerError):
    """Values arrived without their mask, and this side does not hold that mask."""


class NonFinite(PeerError):
    """A NaN or an infinity stands where a number is needed."""


class LinkError(NestlingError):
    """The broker, or the way to it, failed."""

    blame = "broker"


class BrokerUnreachable(LinkError):
    """No broker answers at the address."""


class BrokerRefused(LinkError):
    """The broker answered and said no: credentials, protocol version or access rules."""


class BrokerMissing(LinkError):
    """No broker program is installed on this machine; the text says how to get one."""


class DeviceError(NestlingError):
    """This device cannot do what was asked."""

    blame = "device"


class BudgetExceeded(DeviceError):
    """The work does not fit the memory that was granted."""


class WorkerLost(DeviceError):
    """The training process ended without an answer."""


class EnrolmentError(NestlingError):
    """A device does not get a certificate; the text says what the operator can do."""

    blame = "operator"


class InvitationExpired(EnrolmentError):
    """The invitation's time is over."""


class InvitationUsed(EnrolmentError):
    """The invitation has been used, by a key that is not this one."""


class InvitationUnknown(EnrolmentError):
    """The coordinator knows no such invitation, or not any more."""


class WrongName(EnrolmentError):
    """The invitation or the certificate is for a device of another name."""


class WrongAuthority(EnrolmentError):
    """Who answers cannot show the authority that the invitation names."""


class ClockWrong(EnrolmentError):
    """By this machine's clock a certificate is not valid yet, or no longer."""


class StoreError(NestlingError):
    """This machine's disk: the spool, the journal or the Keep cannot be read or written."""

    blame = "disk"


def of_disk(error: OSError) -> bool:
    """Tell whether the system's error is about a file (a program's too) or the disk, and not about a socket."""
    return error.filename is not None or error.errno in _DISK
