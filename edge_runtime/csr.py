"""A new key and a request for its certificate; the only module on a device that loads `cryptography`.

``python -m edge_runtime.csr DEVICE FOLDER`` is the short process that the agent starts for a renewal: it leaves ``next.key``
and ``next.csr`` in the folder and ends, and its memory is given back.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_runtime import exits
from wire import private
from wire.errors import ConfigError, NestlingError

KEY, CSR = "next.key", "next.csr"
ADVICE = "pip install 'nestling[enroll]' (Termux: pkg install python-cryptography)"


def make(device: str) -> tuple[bytes, bytes]:
    """Make a P-256 key, as PEM, and a request for a certificate in a device's name, as DER.

    Raises:
        ConfigError: The package that makes keys is not installed.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ConfigError(f"keys need the package `cryptography` ({error}): {ADVICE}") from None
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, device)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    form, encoding = serialization.PrivateFormat.PKCS8, serialization.Encoding
    pem = key.private_bytes(encoding.PEM, form, serialization.NoEncryption())
    return pem, csr.public_bytes(encoding.DER)


def main(argv: list[str]) -> int:
    """Leave a key and its request in a folder; give the exit code."""
    device, folder = argv
    try:
        key, csr = make(device)
        (Path(folder) / CSR).unlink(missing_ok=True)  # a request that is there is always of the key beside it
        private.replace(Path(folder) / KEY, key)
        private.replace(Path(folder) / CSR, csr)
    except (NestlingError, OSError) as error:
        print(f"edge-runtime: no new key: {error}", file=sys.stderr)
        return exits.CONFIG if isinstance(error, ConfigError) else exits.DISK
    return exits.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
