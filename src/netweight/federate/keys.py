"""Certificates and keys for a start: a certificate authority, the server's certificate, and a key pair for each client.

A server proves itself by its certificate (TLS), a client by signing with its private key; the server holds the public
keys of those that it lets in. Whoever has certificates already uses those.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netweight.errors import MissingExtra, OptionError

_DAYS = 365
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class ServerKeys:
    """What a server needs, in PEM: the authority's certificate, its own and its key; public keys of clients by name."""

    authority: bytes
    certificate: bytes
    key: bytes
    clients: dict[str, bytes]

    @staticmethod
    def load(folder: Path) -> ServerKeys:
        """From a folder as `make_keys` writes. Raises OptionError where a file is missing, no client is known, or two
        have one key."""
        clients = {path.stem: path.read_bytes() for path in sorted((folder / "clients").glob("*.pub"))}
        if not clients:
            raise OptionError(
                f"{folder}/clients has no public key (NAME.pub); a server lets in nobody it does not know."
            )
        names = {key: name for name, key in clients.items()}
        if twins := [name for name, key in clients.items() if names[key] != name]:
            raise OptionError(
                f"{twins[0]}.pub and {names[clients[twins[0]]]}.pub in {folder}/clients hold one key, and a key stands "
                "for one client; delete one of them, or make other keys with `netweight federate keys`."
            )
        authority, certificate, key = (_read(folder / name) for name in ("ca.crt", "server.crt", "server.key"))
        return ServerKeys(authority, certificate, key, clients)


@dataclass(frozen=True)
class ClientKeys:
    """What a client needs, in PEM: the authority's certificate and its own private key."""

    authority: bytes
    key: bytes

    @staticmethod
    def load(authority: Path, key: Path) -> ClientKeys:
        """Raises OptionError where a file is missing, or is no such thing."""
        found = ClientKeys(_read(authority), _read(key))
        x509 = _crypto()
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            text = found.authority.isascii() and bool(x509.load_pem_x509_certificates(found.authority))
        except ValueError:
            text = False
        if not text:
            raise OptionError(f"{authority} holds no certificate in PEM (ASCII); use the ca.crt of the server's keys.")
        try:
            fine = isinstance(load_pem_private_key(found.key, None), ec.EllipticCurvePrivateKey)
        except (ValueError, TypeError):
            fine = False
        if not fine:
            raise OptionError(f"{key} holds no private key on an elliptic curve in PEM, without a password.")
        return found


def make_keys(
    folder: Path, clients: tuple[str, ...], hosts: tuple[str, ...] = ("localhost", "127.0.0.1")
) -> list[Path]:
    """Write keys for a server and its clients; the files that each client needs lie in a folder of its name. Where the
    server has keys already, clients are added.

    Raises OptionError for names that cannot be files, and where a client has a key already.
    """
    for name in clients:
        if not _NAME.fullmatch(name):
            raise OptionError(f"{name!r} is no name of a client; use letters, digits, - _ . and at most 64 of them.")
    if not clients or len(set(clients)) < len(clients):
        raise OptionError(f"clients are {list(clients)}; name at least one, each once.")
    server = folder / "server"
    if server.exists():
        known, files, secret = _read(server / "ca.crt"), dict[Path, bytes](), dict[Path, bytes]()
        there = [n for n in clients if (folder / n).exists() or (server / "clients" / f"{n}.pub").exists()]
        if there:
            raise OptionError(
                f"{folder} has keys of {', '.join(there)} already; name other clients, or delete theirs (NAME/ and "
                "server/clients/NAME.pub) to make new ones."
            )
    else:
        authority, authority_key = _certificate("netweight federation", None, ())
        certificate, key = _certificate(hosts[0], (authority, authority_key), hosts)
        known = _public(authority)
        files = {server / "ca.crt": known, server / "server.crt": _public(certificate)}
        secret = {folder / "ca.key": _private(authority_key), server / "server.key": _private(key)}
    for name in clients:
        private = _new_key()
        secret[folder / name / "client.key"] = _private(private)
        files[folder / name / "ca.crt"] = known
        files[server / "clients" / f"{name}.pub"] = _public_key(private)
    for path, data in (files | secret).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600 if path in secret else 0o644)
        path.write_bytes(data)
    return sorted(files | secret)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as problem:
        raise OptionError(
            f"{path} cannot be read ({problem.strerror}); `netweight federate keys` makes such files."
        ) from None


def _crypto() -> Any:
    try:
        from cryptography import x509
    except ImportError:
        raise MissingExtra("making keys", "federated") from None
    return x509


def _new_key() -> Any:
    _crypto()
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _certificate(name: str, issuer: tuple[Any, Any] | None, hosts: tuple[str, ...]) -> tuple[Any, Any]:
    """A certificate and its key; signed by itself, and allowed to sign others, where no issuer is given."""
    x509 = _crypto()
    from cryptography.hazmat.primitives import hashes

    key = _new_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signer = key if issuer is None else issuer[1]
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer[0].subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=_DAYS))
        .add_extension(
            x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if issuer is None:
        # From Python 3.13 on, ssl takes no authority that does not say what its key is for.
        usage = x509.KeyUsage(*[False] * 5, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False)
        made = made.add_extension(usage, critical=True)
    if hosts:
        made = made.add_extension(x509.SubjectAlternativeName([_host(x509, host) for host in hosts]), critical=False)
    return made.sign(signer, hashes.SHA384()), key


def _host(x509: Any, host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _public(certificate: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    made: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return made


def _public_key(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    made: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return made


def _private(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    made: bytes = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return made
