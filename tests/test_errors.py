"""Exceptions: who catches them, and what they say."""

from __future__ import annotations

import copy
import pickle

import anyio
import psycopg
import pytest

from pgstructured import errors

CAUGHT_AS = {
    errors.ConnectionLostError: psycopg.OperationalError,
    errors.SessionRequiredError: psycopg.NotSupportedError,
    errors.NotPrimaryError: psycopg.OperationalError,
    errors.ConninfoError: ValueError,
    errors.UnexpectedRowsError: psycopg.DataError,
    errors.PoolTimeoutError: TimeoutError,
    errors.PoolNestedAcquireError: RuntimeError,
    errors.LockTimeout: TimeoutError,
    errors.LockAlreadyHeldError: RuntimeError,
    errors.LockKeyError: ValueError,
    errors.ChannelNameError: ValueError,
    errors.PayloadTooLargeError: ValueError,
    errors.BusUnavailableError: anyio.BrokenResourceError,
    errors.FilterError: ValueError,
    errors.InvalidIdentifierError: ValueError,
    errors.TableNotFoundError: LookupError,
}
FACTS = {
    errors.PayloadTooLargeError: {"size": 9000, "limit": 7999},
    errors.GapError: {"gap": "a gap"},
    errors.DecodeError: {"notification": "a notification"},
    errors.ListenRejectedError: {"channel": "a", "sqlstate": "42501"},
    errors.UndeliveredError: {"count": 3},
    errors.FilterError: {"position": 7},
    errors.AmbiguousTableError: {"schemas": ("a", "b")},
}
ALL = [value for name in errors.__all__ if isinstance(value := getattr(errors, name), type)]


@pytest.mark.parametrize("error", ALL)
def test_every_error_is_caught_as_one_of_ours(error):
    assert issubclass(error, errors.PgStructuredError)


@pytest.mark.parametrize(("error", "handler"), CAUGHT_AS.items())
def test_generic_handlers_catch_it_too(error, handler):
    assert issubclass(error, handler)


@pytest.mark.parametrize(("error", "facts"), FACTS.items())
def test_facts_are_attributes(error, facts):
    raised = error("what to do about it", **facts)
    assert str(raised) == "what to do about it"
    assert {name: getattr(raised, name) for name in facts} == facts


@pytest.mark.parametrize("error", [errors.FilterError, errors.AmbiguousTableError])
def test_facts_that_are_not_always_known(error):
    assert not (error("no facts").args[1:])


def test_a_lost_connection_has_a_sqlstate():
    assert errors.ConnectionLostError("gone").sqlstate == "08003"


@pytest.mark.parametrize(("reason", "certain"), [("terminated", True), ("unconfirmed", False)])
def test_only_silence_is_uncertain(reason, certain):
    lost = errors.LockLost(
        "lost", reason=reason, sqlstate="57P01", held_for=1.5, last_confirmed=100.0
    )
    assert lost.certain is certain
    assert (lost.sqlstate, lost.held_for, lost.last_confirmed) == ("57P01", 1.5, 100.0)


def test_errors_without_facts_survive_pickling():
    copied = pickle.loads(pickle.dumps(errors.LockTimeout("too late")))
    assert isinstance(copied, errors.LockTimeout)
    assert str(copied) == "too late"


@pytest.mark.parametrize(
    ("error", "facts"),
    [*FACTS.items(), (errors.LockLost, {"reason": "expired", "held_for": 1.5, "certain": True})],
)
def test_errors_with_facts_survive_copying_and_pickling(error, facts):
    given = {name: fact for name, fact in facts.items() if name != "certain"}
    raised = error("what to do about it", **given)
    raised.add_note("seen here")
    for copied in (copy.copy(raised), pickle.loads(pickle.dumps(raised))):
        assert type(copied) is error
        assert str(copied) == "what to do about it"
        assert copied.__notes__ == ["seen here"]
        assert {name: getattr(copied, name) for name in facts} == facts


def test_a_lost_connection_survives_pickling():
    copied = pickle.loads(pickle.dumps(errors.ConnectionLostError("gone")))
    assert isinstance(copied, errors.ConnectionLostError)
    assert (str(copied), copied.sqlstate) == ("gone", "08003")
