"""The certificates of a link over TLS; only such a link loads OpenSSL."""

from __future__ import annotations

from typing import Any

from wire.errors import ConfigError
from wire.link import Address


def context(address: Address) -> Any:
    """Give an `ssl.SSLContext` that trusts the address's authority, or the system's, and shows its certificate.

    Raises:
        ConfigError: A file cannot be used.
    """
    import ssl

    try:
        made = ssl.create_default_context(cafile=address.ca or None)
        if address.cert:
            made.load_cert_chain(address.cert, address.key or None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"certificates for {address} (ca, cert, key): {error}") from None
    return made
