# SPDX-License-Identifier: Apache-2.0
"""The certificate with which HTTPS and secure gRPC are served."""

from __future__ import annotations

import ssl
from pathlib import Path

from phalanx.parallel.errors import ConfigError

__all__ = ["read_pem", "server_context"]


def server_context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """Return what a TLS connection of the server begins with; None without a certificate. Both files are PEM.

    Raises:
        ConfigError: a file cannot be read, holds no certificate or key, or the two do not belong together.
    """
    if certificate is None or key is None:
        return None
    for flag, path in (("--ssl-certfile", certificate), ("--ssl-keyfile", key)):
        _read(flag, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    asked: list[None] = []

    def no_password() -> str:
        """OpenSSL would ask for one on the terminal, which no job has."""
        asked.append(None)
        return ""

    try:
        context.load_cert_chain(certificate, key, password=no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = (
            "the key has a password" if asked else getattr(error, "reason", None) or "a certificate or a key is missing"
        )
        raise ConfigError(
            f"--ssl-certfile {certificate} and --ssl-keyfile {key} cannot be used together ({reason}); "
            "give a certificate chain and its key without a password, both PEM"
        ) from None
    return context


def read_pem(certificate: str, key: str) -> tuple[bytes, bytes]:
    """Return the key and the certificate chain, in the order in which gRPC takes them.

    Raises:
        ConfigError: a file cannot be read.
    """
    return _read("--ssl-keyfile", key), _read("--ssl-certfile", certificate)


def _read(flag: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}; check the path") from None
