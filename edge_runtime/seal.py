"""Whether an order is the coordinator's: ``python -m edge_runtime.seal AUTHORITY < MESSAGE`` ends with 0 if so.

A short process of its own, because it loads `cryptography`. What it is given is read no further than the signature goes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_runtime import exits
from edge_runtime.csr import ADVICE
from wire import codec
from wire.errors import NestlingError, PeerError, WrongAuthority
from wire.messages import MESSAGE_BYTES, ORDER, Signed


def verify(signed: Signed, authority: bytes) -> None:
    """Check a signature, and that its key is one that the authority (PEM) has made for orders.

    Raises:
        WrongAuthority: It is not.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.x509.oid import ExtendedKeyUsageOID

    no_certificate = (x509.ExtensionNotFound, x509.InvalidVersion, x509.DuplicateExtension)  # no ValueErrors
    try:
        signer = x509.load_der_x509_certificate(signed.signer)
        signer.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
        uses = signer.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        key = signer.public_key()
        if not isinstance(key, ed25519.Ed25519PublicKey) or ExtendedKeyUsageOID.CODE_SIGNING not in uses:
            raise WrongAuthority("a key that is not for orders has signed it")
        key.verify(signed.signature, ORDER + signed.body)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, *no_certificate) as error:
        raise WrongAuthority(f"not signed by this device's coordinator ({type(error).__name__})") from None


def main(words: list[str]) -> int:
    """Give the exit code."""
    try:
        data = sys.stdin.buffer.read(MESSAGE_BYTES + 1)
        verify(codec.decode(data, Signed), Path(words[0]).read_bytes())
    except (PeerError, WrongAuthority) as error:
        print(f"edge-runtime: an order is refused: {error}", file=sys.stderr)
        return exits.ENROLMENT
    except ImportError as error:
        print(f"edge-runtime: an order cannot be checked ({error}): {ADVICE}", file=sys.stderr)
        return exits.CONFIG
    except (NestlingError, OSError) as error:
        print(f"edge-runtime: an order cannot be checked: {error}", file=sys.stderr)
        return exits.CONFIG
    return exits.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
