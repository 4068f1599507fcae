"""Keys of other lock libraries, against `lock_keys.json`.

Its vectors come from a reference written from those libraries' sources; pals' and
sqlalchemy-dlock's agree with the packages, and others have literals of their own tests below.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pgstructured.driver import open_connection
from pgstructured.errors import LockKeyError
from pgstructured.locks import LockKey

VECTORS = json.loads(Path(__file__).with_name("lock_keys.json").read_text(encoding="utf-8"))


def test_by_name():
    for scheme in ("sqlx", "django_pglock", "sqlalchemy_dlock"):
        for name, number in VECTORS[scheme].items():
            key = getattr(LockKey, scheme)(name)
            assert (key.as_bigint, key.name, key.scheme) == (number, name, scheme)
    assert LockKey.django_pglock(7) == LockKey.sqlalchemy_dlock(7) == LockKey.bigint(7)
    assert LockKey.sqlalchemy_dlock("漢字".encode()) == LockKey.sqlalchemy_dlock("漢字")


def test_platform_go():
    for case in VECTORS["platform_go"]:
        key = LockKey.platform_go(case["key"], case["namespace"])
        assert key.as_bigint == case["id"]
    assert LockKey.platform_go("a") == LockKey.platform_go("a", 0)
    with pytest.raises(LockKeyError, match="empty"):
        LockKey.platform_go("")
    with pytest.raises(LockKeyError, match="out of range"):
        LockKey.platform_go("a", 2**31)


def test_madelson():
    for name, (space, value) in VECTORS["madelson_allow_hashing"].items():
        key = LockKey.madelson(name, allow_hashing=True)
        if space == "bigint":
            assert key.as_bigint == value
            with pytest.raises(LockKeyError, match="allow_hashing"):
                LockKey.madelson(name)
        else:
            assert key == LockKey.madelson(name)
            assert key.as_pair == tuple(value)
    # the tests of DistributedLock itself
    assert LockKey.madelson("漢" * 18, allow_hashing=True).as_bigint == -5707277204051710361
    assert LockKey.madelson("00000003,ffffffff").as_pair == (3, -1)
    assert LockKey.madelson("\0" * 9).as_pair == (0, 0)
    assert LockKey.madelson("FFFFFFFFFFFFFFFF").as_bigint == -1


def test_madelson_reads_numbers_as_dotnet_does():
    """Its ``int.TryParse`` takes NULs after the digits (asked on Mono)."""
    assert LockKey.madelson("4D7\0\0\0\0\0,5E\0\0\0\0\0\0").as_pair == (1239, 94)
    assert LockKey.madelson("Cc61cC\0\x001bD\0\0\0\0\0").as_bigint == 57528424050196925
    for name in (
        "\0" * 16,
        "4D7\0\0\0\x001,5E\0\0\0\0\0\0",
        "12345678-1234567",
        "1234567\n12345678",
    ):
        with pytest.raises(LockKeyError, match="allow_hashing"):
            LockKey.madelson(name)


def test_pals():
    for case in VECTORS["pals"]:
        assert LockKey.pals(case["name"], case["app"]).as_bigint == case["id"]


def test_with_advisory_lock():
    for case in VECTORS["with_advisory_lock"]:
        key = LockKey.with_advisory_lock(case["name"], case["prefix"])
        assert key.as_pair == tuple(case["keys"])
    assert LockKey.with_advisory_lock(5, "7 dwarfs").as_pair == (5, 7)


@pytest.mark.parametrize(
    ("prefix", "number"),
    [  # asked of Ruby's String#to_i
        (" \t\n\v\f\r7", 7),
        ("1_000", 1000),
        ("1__0", 1),
        ("_1", 0),
        ("0d12", 12),
        ("-0D5", 2147483643),
        ("0d_3", 0),
        ("0d", 0),
        ("0x1f", 0),
        ("\u00a07", 0),
        ("\x1c7", 0),
        ("\u0663", 0),
    ],
)
def test_with_advisory_lock_reads_the_prefix_as_ruby_does(prefix, number):
    assert LockKey.with_advisory_lock(5, prefix).as_pair == (5, number)


def test_river():
    for case in VECTORS["river"]:
        assert LockKey.river(case["content"], case["prefix"]).as_bigint == case["id"]
    with_prefix = LockKey.river("some content for hashing purposes", 123).as_bigint
    assert with_prefix == (123 << 32) | 764501624  # the low word from River's own test
    assert LockKey.river("a", -1).pg_locks_ids[0] == 0xFFFF_FFFF
    with pytest.raises(LockKeyError, match="out of range"):
        LockKey.river("a", 2**31)


def test_what_is_no_text():
    for make in (
        LockKey.sqlx,
        LockKey.platform_go,
        LockKey.madelson,
        LockKey.django_pglock,
        LockKey.sqlalchemy_dlock,
        LockKey.with_advisory_lock,
        LockKey.river,
    ):
        with pytest.raises(LockKeyError, match="UTF-8"):
            make("\ud800")
    with pytest.raises(LockKeyError, match="UTF-8"):
        LockKey.pals("a", "\ud800")
    with pytest.raises(LockKeyError, match="out of range"):
        LockKey.sqlalchemy_dlock(2**63)


async def test_hashtextextended(pg_dsn):
    async with open_connection(pg_dsn) as conn:
        key = await LockKey.hashtextextended(conn, "my-lock")
        assert key.as_bigint == 7574172786964069059
        assert key.name == "my-lock"
        assert await LockKey.hashtextextended(conn, "my-lock", 1) != key
        with pytest.raises(LockKeyError, match="out of range"):
            await LockKey.hashtextextended(conn, "my-lock", 2**63)
        with pytest.raises(LockKeyError, match="UTF-8"):
            await LockKey.hashtextextended(conn, "\ud800")
        with pytest.raises(LockKeyError, match="zero byte"):
            await LockKey.hashtextextended(conn, "a\0")
