"""Keys of a fleet at a broker of our own: an authority, invitations, certificates, and who may do what."""

from __future__ import annotations

import importlib.util

from wire.errors import ConfigError


def require_cryptography() -> None:
    """See that certificates can be made on this machine.

    Raises:
        ConfigError: The package that makes them is not installed.
    """
    if importlib.util.find_spec("cryptography") is None:
        raise ConfigError(
            "keys of devices need the package `cryptography`: pip install 'nestling[coordinator]'"
            " (Termux: pkg install python-cryptography)"
        )
