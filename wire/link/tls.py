"""The certificates of a link over TLS; only such a link loads OpenSSL."""

from __future__ import annotations

import contextlib
from typing import Any

from wire.errors import ConfigError
from wire.link import Address

_NO_CHECK_TIME = 0x200000
"""OpenSSL's flag for signatures without times, which `ssl` passes on and does not name."""


def context(address: Address) -> Any:
    """Give an `ssl.SSLContext` that trusts the address's authority, or the system's, and shows its certificate.

    Raises:
        ConfigError: A file cannot be used.
    """
    import ssl

    try:
        made = ssl.create_default_context(cafile=address.ca or None)
        show(made, address)
    except (OSError, ValueError) as error:
        raise ConfigError(f"certificates for {address} (ca, cert, key): {error}") from None
    return made


def show(made: Any, address: Address) -> None:
    """Let new connections of a context show the certificate that is in the address's files now."""
    if address.cert:
        made.load_cert_chain(address.cert, address.key or None)


class Peer:
    """Who is dialled, and what is shown to it over TLS.

    Attributes:
        address: Where it is.
        context: An `ssl.SSLContext`; None for a link in the clear.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self.context = context(address) if address.tls else None

    def __str__(self) -> str:
        return str(self.address)

    def renew(self) -> None:
        """Show the certificate that is in the files now, from the next connection on."""
        if self.context is not None:
            show(self.context, self.address)

    def doubt(self) -> str:
        """Say what it may have against us when it hangs up during the greeting."""
        doubt = "is this a broker for MQTT 5, and does it want mqtts://?"
        if self.address.tls:
            doubt = "is this a broker for MQTT 5, and does it want a certificate (`edge-runtime enroll`)?"
        if self.address.cert:
            doubt = "is this device's certificate taken back, or past its end?"
        return f"{self} hung up during the greeting; {doubt}"


def trouble(error: Exception) -> str:
    """Say why there is no connection: nobody is there, or the broker's certificate is no good."""
    why = str(getattr(error, "verify_message", ""))
    if not why:
        return f"nobody answers: {getattr(error, 'strerror', None) or error}"
    if "not yet valid" in why or "expired" in why:
        return f"a certificate that is not valid by this machine's clock ({why}): set the time"
    return f"no certificate to trust ({why})"


def vouched(address: Address) -> tuple[float, float]:
    """See that our certificate is one that the address's authority has made; give when it begins and ends, in s since 1970.

    Nothing here reads certificates but TLS itself: we greet ourselves, in memory. That it is not valid now is no objection:
    our clock may be wrong.

    Raises:
        ConfigError: It is not, or has no key.
    """
    import ssl

    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode, server.verify_mode = False, ssl.CERT_NONE, ssl.CERT_REQUIRED
    forth, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        server.verify_flags |= _NO_CHECK_TIME
        server.load_verify_locations(address.ca)
        show(server, address)
        show(client, address)
        ends = client.wrap_bio(back, forth), server.wrap_bio(forth, back, server_side=True)
        for end in ends * 3:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
        seen = ends[1].getpeercert() or {}
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"{address.cert}: not of this device's authority ({error.verify_message})") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{address.cert}: {error}") from None
    if not seen:
        raise ConfigError(f"{address.cert}: no certificate that TLS can show")
    return float(ssl.cert_time_to_seconds(str(seen["notBefore"]))), float(
        ssl.cert_time_to_seconds(str(seen["notAfter"]))
    )
