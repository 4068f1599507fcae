"""How names become numbers: this library's way, and those of others.

Nothing here may ever change: two versions that disagree do not exclude each other.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import zlib
from typing import Final, Literal

_MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
_FNV32_OFFSET: Final = 0x811C_9DC5
_FNV32_PRIME: Final = 0x0100_0193
_FNV64_OFFSET: Final = 0xCBF2_9CE4_8422_2325
_FNV64_PRIME: Final = 0x100_0000_01B3
_NAMED_INFO: Final = b"pgstructured lock v1\0"
_SEMAPHORE_INFO: Final = b"pgstructured semaphore v1\0"
_SQLX_INFO: Final = b"SQLx (Rust) Postgres advisory lock"
_MADELSON_CHARS: Final = 9
_MADELSON_NUMBERS: Final = re.compile(r"([^,]{8})(,?)([^,]{8})", re.DOTALL)
_DOTNET_HEX: Final = re.compile(r"([0-9A-Fa-f]+)\0*")  # int.TryParse allows the NULs
_RUBY_INTEGER: Final = re.compile(r"[ \t-\r]*([+-]?)(?:0[Dd])?([0-9]+(?:_[0-9]+)*)")
_RUBY_MASK: Final = 0x7FFF_FFFF


def named(name: bytes, namespace: bytes) -> int:
    """HKDF-SHA256 without salt, 8 bytes, little-endian."""
    return _little(_hkdf_sha256(name, _NAMED_INFO + namespace))


def semaphore(numbers: str, part: str) -> int:
    """As `named`, of a semaphore's numbers (``123`` or ``1,2``), with what it is a key for."""
    return _little(_hkdf_sha256(numbers.encode(), _SEMAPHORE_INFO + part.encode()))


def sqlx(name: bytes) -> int:
    """As `named`, with sqlx's own information."""
    return _little(_hkdf_sha256(name, _SQLX_INFO))


def platform_go(name: bytes, namespace: int) -> int:
    """FNV-1a of 64 bits over the namespace, as four bytes big-endian, and the name."""
    value = _FNV64_OFFSET
    for byte in namespace.to_bytes(4, "big", signed=True) + name:
        value = ((value ^ byte) * _FNV64_PRIME) & _MASK64
    return signed(value, 64)


def madelson(name: str, *, allow_hashing: bool) -> int | tuple[int, int] | None:
    """Short ASCII is packed into a pair, hexadecimal digits are meant, all else is hashed.

    Returns:
        None where that would take a hash and none is allowed.
    """
    if len(name) <= _MADELSON_CHARS and name.isascii():
        packed = 0
        for char in name:
            packed = packed << 7 | ord(char)
        fill = 64 - 7 * len(name)  # a zero bit, then ones
        packed = packed << fill | (1 << (fill - 1)) - 1
        return signed(packed >> 32, 32), signed(packed & 0xFFFF_FFFF, 32)
    if match := _MADELSON_NUMBERS.fullmatch(name):
        upper, lower = _DOTNET_HEX.fullmatch(match[1]), _DOTNET_HEX.fullmatch(match[3])
        if upper and lower:
            first, second = int(upper[1], 16), int(lower[1], 16)
            if match[2]:
                return signed(first, 32), signed(second, 32)
            return signed(first << 32 | second, 64)
    return _little(_sha1(name.encode())) if allow_hashing else None


def pals(name: str, app_name: str | None) -> int:
    """SHA-1 of both, joined by a dot."""
    return _little(_sha1((name if app_name is None else f"{app_name}.{name}").encode()))


def django_pglock(name: bytes) -> int:
    """SHA-256."""
    return _little(hashlib.sha256(name).digest())


def sqlalchemy_dlock(name: bytes) -> int:
    """BLAKE2b of 8 bytes, in the byte order of the machine: that of x86 and ARM."""
    return _little(hashlib.blake2b(name, digest_size=8).digest())


def with_advisory_lock(name: str | int, prefix: str | None) -> tuple[int, int]:
    """CRC-32 cut to 31 bits, and what Ruby's ``to_i`` makes of the prefix."""
    number = name if isinstance(name, int) else zlib.crc32(name.encode())
    leading = _RUBY_INTEGER.match(prefix or "")
    return number & _RUBY_MASK, (int(leading[1] + leading[2]) if leading else 0) & _RUBY_MASK


def river(key: bytes, prefix: int) -> int:
    """FNV-1 of 64 bits; with a prefix that in the upper half, and FNV-1 of 32 bits below."""
    if prefix == 0:
        return signed(_fnv1(key, _FNV64_OFFSET, _FNV64_PRIME, 64), 64)
    return signed(prefix << 32 | _fnv1(key, _FNV32_OFFSET, _FNV32_PRIME, 32), 64)


def signed(value: int, bits: Literal[32, 64]) -> int:
    """Return the low ``bits`` of ``value`` as a signed number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _little(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little", signed=True)


def _sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def _fnv1(data: bytes, value: int, prime: int, bits: int) -> int:
    mask = (1 << bits) - 1
    for byte in data:
        value = (value * prime & mask) ^ byte
    return value


def _hkdf_sha256(secret: bytes, info: bytes) -> bytes:
    """Return HKDF without salt (RFC 5869): of its output, the first block is enough."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")
