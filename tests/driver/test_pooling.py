"""Which statements leave something in their session, by their text."""

from __future__ import annotations

import pytest

from pgstructured.driver._traces import _REMEMBERED, Trace, _traces_of, find_traces

LEAVING = {
    "SET search_path = x": Trace.SETTINGS,
    "  set session characteristics as transaction read only": Trace.SETTINGS,
    "-- a comment\nSET x = 1": Trace.SETTINGS,
    "/* another */ RESET ALL": Trace.SETTINGS,
    "select set_config('x', 'y', false)": Trace.SETTINGS,
    "SELECT 1;\n  LISTEN x": Trace.SESSION,
    'listen "x"': Trace.SESSION,
    "SELECT pg_try_advisory_lock_shared(1)": Trace.SESSION,
    "DECLARE c CURSOR WITH  HOLD FOR SELECT 1": Trace.SESSION,
    "CREATE TEMPORARY SEQUENCE s": Trace.TEMPORARY,
    "create local temp table t ()": Trace.TEMPORARY,
    "CREATE TABLE pg_temp.t ()": Trace.TEMPORARY,
    "CREATE OR REPLACE TEMP VIEW v AS SELECT 1": Trace.TEMPORARY,
    "CREATE /* why */ TEMPORARY TABLE t ()": Trace.TEMPORARY,
    "SELECT 1 INTO TEMP t": Trace.TEMPORARY,
    'SELECT 1 INTO LOCAL TEMPORARY TABLE "t"': Trace.TEMPORARY,
    "PREPARE p AS SELECT 1": Trace.PREPARED,
    'PREPARE"p"AS SELECT 1': Trace.PREPARED,
    'listen"x"': Trace.SESSION,
    "SET/**/x = 1": Trace.SETTINGS,
    "RESET/**/ALL": Trace.SETTINGS,
    "select set_config('x', 'y', true), set_config('z', 'y', $1)": Trace.SETTINGS,
    "DO'BEGIN END'": Trace.SESSION | Trace.SETTINGS | Trace.TEMPORARY,
    "call f()": Trace.SESSION | Trace.SETTINGS | Trace.TEMPORARY,
}
LEAVING_NOTHING = [
    "SELECT 1",
    "UPDATE t SET x = 1",
    "UPDATE t\n SET x = 1",
    "INSERT INTO t VALUES (1) ON CONFLICT (x) DO UPDATE SET x = 2",
    "INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING",
    "SET LOCAL x = 1",
    "SET TRANSACTION READ ONLY",
    "SET CONSTRAINTS ALL DEFERRED",
    "PREPARE TRANSACTION 'x'",
    "SELECT pg_advisory_xact_lock(1)",
    "SELECT temperature, preset FROM dolistings",
    "DROP TABLE template",
    "INSERT INTO templates VALUES (1)",
    "INSERT INTO temp VALUES (1)",
    "INSERT INTO temp (a) VALUES (1)",
    "SELECT set_config('x', $1, true)",
    "SELECT settings, resets FROM doers",
    "BEGIN",
    "NOTIFY x",
]


@pytest.mark.parametrize("text", LEAVING)
def test_traces(text):
    assert find_traces(text.encode()) == LEAVING[text]


@pytest.mark.parametrize("text", LEAVING_NOTHING)
def test_no_traces(text):
    assert find_traces(text.encode()) == Trace.NONE


def test_only_so_many_are_remembered():
    for number in range(2 * _REMEMBERED):
        find_traces(b"SELECT %d" % number)
        assert len(_traces_of) <= _REMEMBERED


def test_long_ones_are_not_remembered():
    filler = b"x" * 20_000
    assert find_traces(b"SET x = '" + filler + b"'") == Trace.SETTINGS
    assert find_traces(b"SELECT '" + filler + b"'; SET x = 1") == Trace.NONE  # it carries data
    assert max(map(len, _traces_of)) < 20_000
