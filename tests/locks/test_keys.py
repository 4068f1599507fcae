"""Keys: derivation, identity, and how Postgres shows them."""

# ruff: noqa: PLW0108, RUF001

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from pgstructured.errors import LockKeyError
from pgstructured.locks import LockKey
from pgstructured.locks._keys import as_lock_key

LOWEST, HIGHEST = -(2**63), 2**63 - 1


@pytest.mark.parametrize(
    ("name", "namespace", "number"),
    [  # computed with `openssl kdf HKDF`
        ("my-lock", "", -8630472911175274261),
        ("my-lock", "billing", -3883165546538356108),
        ("漢字", "", -1190501671531683015),
        ("x", "näme", -9057717258559414874),
    ],
)
def test_named_is_for_ever(name, namespace, number):
    key = LockKey.named(name, namespace=namespace)
    assert key.as_bigint == number
    assert key.as_pair is None
    assert key.name == name
    assert key.scheme == "named"
    assert str(key) == f"{name!r} ({number})"


def test_identity_is_what_postgres_sees():
    assert LockKey.bigint(-8630472911175274261) == LockKey.named("my-lock")
    assert hash(LockKey.bigint(-8630472911175274261)) == hash(LockKey.named("my-lock"))
    assert LockKey.bigint(1) != LockKey.pair(0, 1)
    assert LockKey.pair(0, 1) != LockKey.pair(1, 0)
    assert str(LockKey.pair(-1, 2)) == "-1,2"
    assert str(LockKey.bigint(0)) == "0"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("123", LockKey.bigint(123)),
        ("-5", LockKey.bigint(-5)),
        ("1,2", LockKey.pair(1, 2)),
        ("-1,-2", LockKey.pair(-1, -2)),
        ("1, 2", LockKey.named("1, 2")),
        ("+1", LockKey.named("+1")),
        ("12:a", LockKey.named("12:a")),
        ("١", LockKey.named("١")),
    ],
)
def test_parse(text, key):
    assert LockKey.parse(text) == key


NOTHING: Any = None

BAD = [
    (lambda: LockKey.bigint(HIGHEST + 1), "out of range: -9223372036854775808 to"),
    (lambda: LockKey.bigint(LOWEST - 1), "out of range"),
    (lambda: LockKey.pair(2**31, 0), "out of range: -2147483648 to 2147483647"),
    (lambda: LockKey.pair(0, -(2**31) - 1), "out of range"),
    (lambda: LockKey.bigint(True), "not True"),
    (lambda: LockKey.pair(0, NOTHING), "not None"),
    (lambda: LockKey.named(""), "empty"),
    (lambda: LockKey.parse(""), "empty"),
    (lambda: LockKey.parse("9" * 20), "out of range"),
    (lambda: LockKey.parse("9" * 9999), "19 digits"),
    (lambda: LockKey.parse("1,9999999999"), "out of range"),
    (lambda: LockKey.named("\ud800"), "UTF-8"),
    (lambda: LockKey(), "one bigint or one pair"),
    (lambda: LockKey(as_bigint=1, as_pair=(1, 2)), "one bigint or one pair"),
    (lambda: as_lock_key(""), "empty"),
]


def test_bad_keys():
    for make, words in BAD:
        with pytest.raises(LockKeyError, match=words):
            make()


def test_what_stands_for_a_key():
    key = LockKey.pair(1, 2)
    assert as_lock_key(key) is key
    assert as_lock_key("a") == LockKey.named("a")
    assert as_lock_key(-7) == LockKey.bigint(-7)
    assert as_lock_key((1, 2)) == key
    others: list[Any] = [(1, 2, 3), None, 1.5]
    for nothing in others:
        with pytest.raises(TypeError, match="a lock key is"):
            as_lock_key(nothing)


@pytest.mark.parametrize(
    "key",
    [
        LockKey.bigint(1),
        LockKey.bigint(-1),
        LockKey.bigint(LOWEST),
        LockKey.bigint(HIGHEST),
        LockKey.bigint(0),
        LockKey.pair(-1, -(2**31)),
        LockKey.pair(2**31 - 1, 0),
        LockKey.named("my-lock"),
    ],
)
def test_pg_locks_ids_are_what_pg_locks_shows(key, pg_cluster, pg_dsn):
    numbers = key.as_pair or (key.as_bigint,)
    types = "%s::int4, %s::int4" if key.as_pair else "%s::int8"
    with psycopg.connect(pg_dsn, autocommit=True) as conn:
        conn.execute(f"SELECT pg_advisory_lock({types})", numbers)
        (lock,) = pg_cluster.advisory_locks(pg_dsn)
        assert (lock.classid, lock.objid, lock.objsubid) == key.pg_locks_ids
