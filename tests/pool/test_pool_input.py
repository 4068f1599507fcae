"""What makes no sense is refused at the door."""

from __future__ import annotations

import math

import pytest

from pgstructured.errors import ConninfoError
from pgstructured.pool import open_pool

BAD = [
    {"min_size": -1},
    {"max_size": 0},
    {"max_size": -3},
    {"min_size": 3, "max_size": 2},
    {"min_size": 1.5},
    {"max_size": True},
    {"max_waiting": -1},
    {"max_waiting": 2.5},
    {"pooler": "maybe"},
    {"pooler": None},
    *(
        {name: value}
        for name in (
            "acquire_timeout",
            "max_lifetime",
            "reconnect_timeout",
            "connect_timeout",
            "cancel_timeout",
        )
        for value in (0, -1, math.nan, math.inf, "1", True)
    ),
    *(
        {name: value}
        for name in ("max_idle", "check_after_idle", "close_timeout")
        for value in (-1, math.nan, math.inf, "1", False)
    ),
    {"cancel_timeout": None},
    {"close_timeout": None},
]


@pytest.mark.parametrize("options", BAD, ids=str)
async def test_options(options):
    (name,) = options.keys() - ({"max_size"} if len(options) > 1 else set())
    with pytest.raises(ValueError, match=name):
        async with open_pool("", **options):
            raise AssertionError("entered")


@pytest.mark.parametrize(
    "arguments",
    [
        {"conninfo": "host"},
        {"conninfo": "env:PGSTRUCTURED_NOT_SET"},
        {"conninfo": "", "no_such_parameter": "x"},
        {"conninfo": "", "direct_conninfo": "host"},
    ],
    ids=str,
)
async def test_conninfos(arguments):
    with pytest.raises(ConninfoError):
        async with open_pool(**arguments):
            raise AssertionError("entered")
