"""SHA-256 (FIPS 180-4) without OpenSSL, which hashlib would bring into every device process."""

from __future__ import annotations

try:  # as the standard library's random does
    from _sha256 import sha256 as _sha256  # type: ignore[import-not-found]
except ImportError:  # Python 3.12 and later
    from hashlib import sha256 as _sha256


def sha256(data: bytes) -> bytes:
    """The digest of `data`."""
    digest: bytes = _sha256(data).digest()
    return digest
