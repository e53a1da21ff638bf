# SPDX-License-Identifier: Apache-2.0
"""The file of accepted API keys, and whether a request carries one of them."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence
from pathlib import Path

from phalanx.parallel.errors import ConfigError

__all__ = ["has_key", "read_api_keys"]


def read_api_keys(path: str | Path | None, flag: str = "--api-key-file") -> tuple[bytes, ...]:
    """One key per line; empty lines and ``#`` comments do not count.

    Raises:
        ConfigError: the file cannot be read, holds no key, or one that no header can carry.
    """
    if path is None:
        return ()
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{flag} {path} is not UTF-8 (byte {error.start}); write keys as text, one per line"
        ) from None
    stripped = [line.strip() for line in lines]
    for number, line in enumerate(stripped, 1):
        if not line.startswith("#") and not line.isprintable():
            raise ConfigError(
                f"{flag} {path} line {number} holds a character that cannot be printed; write keys as text, one per line"
            )
    keys = tuple(line.encode() for line in stripped if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"{flag} {path} holds no key; write one per line")
    return keys


def has_key(authorization: str, keys: Sequence[bytes]) -> bool:
    """Whether an ``Authorization`` value holds one of ``keys``: as a Bearer token, or as the password of Basic; no keys = any does."""
    if not keys:
        return True
    scheme, _, given = authorization.partition(" ")
    sent = given.strip().encode("latin-1", errors="replace")
    if scheme.lower() == "basic":
        sent = _password(sent)
    elif scheme.lower() != "bearer":
        return False
    matches = [hmac.compare_digest(_utf8(sent), key) for key in keys]
    return any(matches)


def _password(encoded: bytes) -> bytes:
    """The password of Basic credentials (RFC 7617); empty, which no key is, if they cannot be read."""
    try:
        return base64.b64decode(encoded, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


def _utf8(sent: bytes) -> bytes:
    """A key as the key file has it: most clients send the bytes of UTF-8, some those of Latin-1."""
    try:
        sent.decode()
    except UnicodeDecodeError:
        return sent.decode("latin-1").encode()
    return sent
