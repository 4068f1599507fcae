"""`mask_conninfo` with passwords that nobody thought of: no piece of one is ever shown."""

from __future__ import annotations

import random
from urllib.parse import quote

from pgstructured.store import mask_conninfo

ODD = "@:/?#%&=' \\\"[],;+$!~*()<>{}|^`é東\t"
LETTERS = "bcdfghjkmnpqrstvwxz"


def keyword(value):
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


FORMS = {
    "url": lambda p: f"postgresql://user:{quote(p, safe='')}@host/db",
    "url, two hosts": lambda p: f"postgres://user:{quote(p, safe='')}@one:1,two:2/db?port=1",
    "url, not escaped": lambda p: f"postgresql://user:{p}@host:5432/db",
    "url, half escaped": lambda p: (
        f"postgres://user:{quote(p, safe='@:/')}@host/db?sslmode=require"
    ),
    "url without a user": lambda p: f"postgresql://:{p}@host/db",
    "url, parameter": lambda p: f"postgresql://user@host/db?password={quote(p, safe='')}",
    "url, parameter not escaped": lambda p: f"postgres://user@host/db?a=b&password={p}",
    "url, sslpassword": lambda p: f"postgres://host/db?sslpassword={quote(p, safe='')}&user=u",
    "pairs": lambda p: f"host=h user=u password={keyword(p)} dbname=d",
    "pairs, not quoted": lambda p: f"host=h password={p} user=u",
    "pairs, a quote too few": lambda p: f"host=h password='{p} user=u",
    "pairs, spaces": lambda p: f" password = {keyword(p)}   host=h ",
    "options": lambda p: f"host=h options={keyword('-c x.password=' + p)}",
    "a conninfo as the database": lambda p: f"dbname={keyword('host=h password=' + keyword(p))}",
    "env": lambda p: f"env:{p}!",
}


def make_password(chance):
    """Return a password and its pieces, which are found nowhere else."""
    pieces = [
        "zq" + "".join(chance.choices(LETTERS, k=chance.randint(4, 8)))
        for _ in range(chance.randint(1, 4))
    ]
    odd = ["".join(chance.choices(ODD, k=chance.randint(1, 3))) for _ in pieces]
    ends = chance.choice(("", odd[0]))
    return ends + "".join(a + b for a, b in zip(pieces, [*odd[1:], ""], strict=True)) + ends, pieces


def test_no_piece_of_a_password_is_shown():
    chance = random.Random(20260131)
    for _ in range(3_000):
        password, pieces = make_password(chance)
        for form, write in FORMS.items():
            masked = mask_conninfo(write(password))
            shown = [piece for piece in pieces if piece in masked]
            assert not shown, (form, write(password), masked)


def test_what_is_no_secret_is_shown():
    for form in ("url", "url, two hosts", "url, parameter", "pairs"):
        masked = mask_conninfo(FORMS[form]("secret"))
        assert "user=" in masked
        assert "password=***" in masked
