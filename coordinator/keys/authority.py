"""A small certificate authority in a folder of the run: P-256 throughout, one for the run, made when it is first needed.

It signs four things: the broker's certificate, with the names by which this machine is reached; a device's, with its name
and nothing else of what was asked; the list of those that were taken back; and the key that signs orders. Only this module
loads `cryptography`.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coordinator.keys.files import read
from wire import private
from wire.errors import Malformed, StoreError
from wire.messages import ORDER, Signed

CA, CRL, SERVER, SIGNER = "ca.pem", "revoked.pem", "server.pem", "signer.pem"
_CA_KEY = "ca.key"
_DAYS_CA = 3650
_DAYS_SERVER = 365
_SKEW = timedelta(minutes=5)
_EARLIER = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was just signed.

    Attributes:
        pem: The certificate.
        serial: Its number, hex.
        key: SHA-256 of the public key that it is for, hex.
        ends: When it ends, seconds since 1970.
    """

    pem: bytes
    serial: str
    key: str
    ends: float


class Authority:
    """The keys in one folder."""

    def __init__(self, folder: Path) -> None:
        """Load them, or make them.

        Raises:
            StoreError: The folder cannot be read or written, or holds something else.
        """
        self._folder = folder
        if not (folder / CA).exists():
            _found(folder)
        try:
            key = serialization.load_pem_private_key(read(folder / _CA_KEY), None)
            self._ca = x509.load_pem_x509_certificate(read(folder / CA))
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise StoreError(f"{folder}: no usable authority: {error}") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self._ca.public_key():
            raise StoreError(f"{folder}: {_CA_KEY} does not belong to {CA}")
        self._key = key
        self._signer: tuple[ed25519.Ed25519PrivateKey, bytes] | None = None

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the authority's certificate; what an invitation pins."""
        return hashlib.sha256(self._ca.public_bytes(serialization.Encoding.DER)).digest()

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self._ca.public_bytes(serialization.Encoding.PEM)

    def serve(self, names: Sequence[str], now: datetime | None = None) -> bool:
        """See to a server certificate for all of `names` with a third of its life left; True when it is a new one.

        One file holds key, certificate and authority, so that it changes as a whole.
        """
        now = now or datetime.now(UTC)
        path = self._folder / SERVER
        if path.exists() and _good(
            path, self._ca, {str(_general(name).value) for name in names}, now + timedelta(days=_DAYS_SERVER / 3)
        ):
            return False
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = x509.SubjectAlternativeName([_general(name) for name in names])
        builder = _builder("coordinator", self._ca.subject, key.public_key())
        builder = builder.not_valid_before(now - _EARLIER).not_valid_after(now + timedelta(days=_DAYS_SERVER))
        builder = builder.add_extension(alternatives, critical=False)
        builder = _leaf(builder, self._key.public_key(), ExtendedKeyUsageOID.SERVER_AUTH)
        certificate = builder.sign(self._key, hashes.SHA256())
        private.replace(path, _private(key) + certificate.public_bytes(serialization.Encoding.PEM) + self.pem)
        return True

    def seal(self, body: bytes) -> Signed:
        """Sign an order with a key of its own, which is made when it is first needed.

        Raises:
            StoreError: The folder cannot be read or written.
        """
        if self._signer is None:
            self._signer = self._load_signer()
        key, certificate = self._signer
        return Signed(body, certificate, key.sign(ORDER + body))

    def _load_signer(self) -> tuple[ed25519.Ed25519PrivateKey, bytes]:
        path = self._folder / SIGNER
        if not path.exists():
            fresh = ed25519.Ed25519PrivateKey.generate()
            now = datetime.now(UTC)
            builder = _builder("orders", self._ca.subject, fresh.public_key()).not_valid_before(now - _EARLIER)
            builder = builder.not_valid_after(self._ca.not_valid_after_utc)
            builder = _leaf(builder, self._key.public_key(), ExtendedKeyUsageOID.CODE_SIGNING)
            signed = builder.sign(self._key, hashes.SHA256())
            private.replace(path, _private(fresh) + signed.public_bytes(serialization.Encoding.PEM))
        data = read(path)
        try:
            key = serialization.load_pem_private_key(data, None)
            certificate = x509.load_pem_x509_certificate(data)
            certificate.verify_directly_issued_by(self._ca)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise StoreError(f"{path}: no usable key for orders: {error}; delete it, and another is made") from None
        if not isinstance(key, ed25519.Ed25519PrivateKey):
            raise StoreError(f"{path}: not an Ed25519 key; delete it, and another is made")
        return key, certificate.public_bytes(serialization.Encoding.DER)

    def issue(self, name: str, public: ec.EllipticCurvePublicKey, seconds: float) -> Issued:
        """Sign a device's certificate for `seconds` from now. It begins five minutes ago: clocks differ."""
        now = datetime.now(UTC)
        ends = (now + timedelta(seconds=seconds)).replace(microsecond=0)
        builder = _builder(name, self._ca.subject, public).not_valid_before(now - _SKEW).not_valid_after(ends)
        certificate = _leaf(builder, self._key.public_key(), ExtendedKeyUsageOID.CLIENT_AUTH).sign(
            self._key, hashes.SHA256()
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        return Issued(pem, f"{certificate.serial_number:x}", fingerprint(public), ends.timestamp())

    def revoke(self, serials: Sequence[str], number: int) -> None:
        """Write the list of certificates that were taken back.

        A TLS library that is told a second list takes the one that began later, to the second. So the list's begin is not
        the clock's but counts up with `number` from the authority's own begin; and it does not end before the authority.
        """
        begin = self._ca.not_valid_before_utc + timedelta(seconds=number)
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._ca.subject)
        builder = builder.last_update(begin).next_update(self._ca.not_valid_after_utc)
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(identifier, critical=False)
        for serial in serials:
            gone = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(begin)
            builder = builder.add_revoked_certificate(gone.build())
        signed = builder.sign(self._key, hashes.SHA256())
        private.replace(self._folder / CRL, signed.public_bytes(serialization.Encoding.PEM))


def request(csr: bytes) -> tuple[str, ec.EllipticCurvePublicKey]:
    """Read a certificate request: the name that it asks for, and the key that it proves to have.

    Raises:
        Malformed: It is no request (PKCS #10, DER) for one name and a P-256 key that has signed it.
    """
    try:
        asked = x509.load_der_x509_csr(csr)
        names = [str(part.value) for part in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        public = asked.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
            raise Malformed("a certificate request for a key that is not P-256", "$.csr")
        if len(names) != 1 or not asked.is_signature_valid:
            raise Malformed("a certificate request without one name, or not signed by its key", "$.csr")
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise Malformed(f"no certificate request: {error}", "$.csr") from None
    return names[0], public


def fingerprint(public: ec.EllipticCurvePublicKey) -> str:
    """Name a public key: SHA-256, hex."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def _found(folder: Path) -> None:
    """Make the authority: the certificate is written last, so that half of it is none."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    # The key's digest in the name keeps two authorities of one machine apart.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"nestling {fingerprint(key.public_key())[:16]}")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _EARLIER).not_valid_after(now + timedelta(days=_DAYS_CA))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    private.replace(folder / _CA_KEY, _private(key))
    private.replace(folder / CA, certificate.public_bytes(serialization.Encoding.PEM))


def _builder(
    name: str, issuer: x509.Name, public: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
) -> x509.CertificateBuilder:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
    return builder.serial_number(x509.random_serial_number())


def _leaf(
    builder: x509.CertificateBuilder, issuer: ec.EllipticCurvePublicKey, purpose: x509.ObjectIdentifier
) -> x509.CertificateBuilder:
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer)
    return builder.add_extension(identifier, critical=False)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _good(path: Path, ca: x509.Certificate, names: set[str], until: datetime) -> bool:
    try:
        known = x509.load_pem_x509_certificate(read(path))
        known.verify_directly_issued_by(ca)
        found = known.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return False
    held = {str(general.value) for general in found}
    return names <= held and known.not_valid_after_utc > until


def _private(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
