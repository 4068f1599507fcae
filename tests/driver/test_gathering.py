"""What many tasks send at once goes as one command, and each is told its own answer."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import anyio
import psycopg
import pytest

from pgstructured.driver import ConnectionState, Gatherable, Prepared, open_session
from pgstructured.errors import ConnectionLostError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from pgstructured.driver import Command, Session

TASKS = 20
BIG = "x" * 16_000_000  # more than sockets take


def gatherable(name: str, expression: str, order: int = 1) -> Gatherable:
    """Return a statement that gives an expression of ``{v}``, and says in which form it ran."""
    alone = f"SELECT ({expression})::text, 'alone'".replace("{v}", "$1::int4")
    together = f"SELECT ({expression})::text, 'together' FROM unnest($1::int4[]) AS v"
    return Gatherable(
        order,
        Prepared(f"{name}_alone".encode(), alone.encode()),
        Prepared(f"{name}_together".encode(), together.replace("{v}", "v").encode()),
    )


ECHO = gatherable("echo", "{v}")
DIVIDE = gatherable("divide", "1 / {v}")


def row_of(command: Command) -> tuple[int, str]:
    """Return a command's own value, and the form in which it ran."""
    form = command.answers[0].get_value(command.row, 1)
    return int(command.scalar() or 0), (form or b"").decode()


@asynccontextmanager
async def many_at_once(
    session: Session, work: Callable[[Session, int], Awaitable[None]]
) -> AsyncGenerator[anyio.abc.TaskGroup]:
    """Run ``work`` in many tasks, after a command each whose answers likely come in one read."""

    async def ask_first(number: int) -> None:
        with suppress(anyio.ClosedResourceError, ConnectionLostError):  # ended by another
            await session.execute("SELECT 1")
        await work(session, number)

    async with anyio.create_task_group() as tasks:
        for number in range(1, TASKS + 1):
            tasks.start_soon(ask_first, number)
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        time.sleep(0.02)  # the answers come, and nobody reads
        yield tasks


async def test_each_is_told_its_own_answer(pg_dsn) -> None:
    forms: set[str] = set()

    async def ask(session: Session, number: int) -> None:
        command = session.gather(ECHO, [b"%d" % number])
        await command.signal
        value, form = row_of(command)
        assert value == number
        forms.add(form)

    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            while "together" not in forms:
                async with many_at_once(session, ask):
                    pass


async def test_one_by_itself_waits_for_nobody(pg_dsn) -> None:
    async with open_session(pg_dsn) as session:
        for number in range(3):
            command = session.gather(ECHO, [b"%d" % number])
            await command.signal
            assert row_of(command) == (number, "alone")


@pytest.mark.parametrize("direct", ["plain", "prepared"])
async def test_they_go_in_their_order_and_before_what_is_sent_meanwhile(pg_dsn, direct) -> None:
    prepared = Prepared(b"next", b"SELECT nextval('seen')::text")
    late = gatherable("late", "nextval('seen') * 1000 + {v}", order=2)
    early = gatherable("early", "nextval('seen') * 1000 + {v}", order=1)
    seen: list[tuple[int, list[int]]] = []

    async def ask(session: Session, number: int) -> None:
        gathered = [session.gather(statement, [b"%d" % number]) for statement in (late, early)]
        value = 0
        if number == TASKS // 2:
            if direct == "plain":
                sent = session.send([(prepared.text.decode(), ())])
            else:
                sent = session.send_prepared(prepared, [])
            await sent.signal
            value = int(sent.scalar() or 0)
        for command in gathered:
            await command.signal
        values = [row_of(command) for command in gathered]
        if all(form == "together" for _, form in values):
            seen.append((value, [value // 1000 for value, _ in values]))
        assert all(value % 1000 == number for value, _ in values)

    async with open_session(pg_dsn) as session:
        await session.execute("CREATE TEMPORARY SEQUENCE seen")
        with anyio.fail_after(30):
            while not any(between for between, _ in seen):
                async with many_at_once(session, ask):
                    pass
    for between, (late_at, early_at) in seen:
        assert early_at < late_at
        if between:
            assert late_at < between


async def test_they_fail_together(pg_dsn) -> None:
    outcomes: list[str] = []

    async def ask(session: Session, number: int) -> None:
        command = session.gather(DIVIDE, [b"0" if number == 1 else b"1"])
        await command.signal
        try:
            assert not command.says_true
            outcomes.append("alone" if command.scalar() == b"1" else "?")
        except psycopg.errors.DivisionByZero:
            outcomes.append("failed")

    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            while outcomes.count("failed") < 2:
                outcomes.clear()
                async with many_at_once(session, ask):
                    pass
        assert (await session.execute("SELECT 1")).scalar() == "1"
    assert set(outcomes) <= {"failed", "alone"}


async def test_the_end_of_the_session_is_told_to_each(pg_cluster, pg_dsn) -> None:
    wait = gatherable("wait", "(SELECT {v} FROM pg_sleep(60) LIMIT 1)")
    errors: list[BaseException | None] = []
    asked: list[Command] = []

    async def ask(session: Session, number: int) -> None:
        command = session.gather(wait, [b"%d" % number])
        asked.append(command)
        await command.signal
        errors.append(command.error)

    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            async with many_at_once(session, ask):
                while len(asked) < TASKS:  # noqa: ASYNC110 - tasks that answers have to reach
                    await anyio.sleep(0.005)
                pg_cluster.terminate_backend(session.backend_pid)
    assert len(errors) == TASKS
    # What was running is told the server's own words, by its answer.
    assert {type(error) for error in errors} <= {ConnectionLostError, type(None)}
    told = [error for error in errors if error is not None]
    assert len({id(error) for error in told}) == len(told) > 0, "each raises its own"


@pytest.mark.parametrize("how", ["killed", "closed"])
async def test_what_is_gathered_when_the_session_ends(pg_cluster, pg_dsn, how) -> None:
    """The task that is answered first ends the session, while the others gather."""
    outcomes: list[str] = []

    async def ask(session: Session, number: int) -> None:
        try:
            command = session.gather(ECHO, [b"%d" % number])
        except (anyio.ClosedResourceError, ConnectionLostError):
            outcomes.append("refused")
            return
        if number == TASKS // 2:
            if how == "closed":
                await session.aclose()
            else:
                pg_cluster.terminate_backend(session.backend_pid)
                time.sleep(0.05)  # its end is there, and nobody has read it
        await command.signal
        outcomes.append("answered" if command.error is None else "told")
        if command.error is None and not command.has_failed:  # closing cancels what runs
            assert row_of(command)[0] == number

    with anyio.fail_after(30):
        for _ in range(5):
            async with open_session(pg_dsn) as session:
                async with many_at_once(session, ask):
                    pass
                if how == "killed":
                    await session.wait_closed()
                    assert session.state is ConnectionState.FAILED
    assert len(outcomes) == 5 * TASKS


async def test_cancelled_while_they_are_gathered(pg_dsn) -> None:
    """What is sent after it, to undo it, is done after it."""
    undone: list[int] = []

    async def ask(session: Session, number: int) -> None:
        with anyio.CancelScope() as scope:
            command = session.gather(ECHO, [b"%d" % number])
            if number % 2:
                scope.cancel()
            try:
                await command.signal
                assert row_of(command)[0] == number
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await session.execute("SELECT 1")
                    assert row_of(command)[0] == number  # answered before that
                    undone.append(number)
                raise

    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            for _ in range(10):
                async with many_at_once(session, ask):
                    pass
        assert (await session.execute("SELECT 1")).scalar() == "1"
    assert undone


async def test_answered_in_the_middle_of_being_sent(pg_dsn) -> None:
    """The socket takes no more, so whoever is answered then runs, and uses the session.

    What was being sent is answered before that task rests: for whom has to be known by then.
    """
    done: list[int] = []

    async def ask(number: int) -> None:
        await session.execute("SELECT 1")
        if number == TASKS:
            session.send([("SELECT length($1)", [BIG])])  # while the server reads nothing
            time.sleep(0.2)  # one of its naps is over, and nobody has heard of it
        gathered = [session.gather(ECHO, [b"%d" % number]) for _ in range(2)]
        for command in gathered:
            await command.signal
            assert row_of(command)[0] == number
        done.append(number)

    async def meddle() -> None:
        nap = session.send([("SELECT pg_sleep(0.1)", ())])
        session.send([("SELECT pg_sleep(0.4)", ())])
        await nap.signal
        for _ in range(9):  # until all of it is sent, and answered
            time.sleep(0.1)
            session.send([("SELECT 1", ())])
        session.send([("SELECT length($1)", [BIG])])

    async with open_session(pg_dsn) as session:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for number in range(1, TASKS + 1):
                    tasks.start_soon(ask, number)
                tasks.start_soon(meddle)
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                time.sleep(0.02)  # the first answers come, and nobody reads
    assert sorted(done) == list(range(1, TASKS + 1))


async def test_found_lost_by_closing(pg_dsn, fault_proxy) -> None:
    """What was gathered can't be sent any more, so it was not we who ended the session."""
    outcomes: list[str] = []

    async def ask(session: Session, number: int) -> None:
        try:
            command = session.gather(ECHO, [b"%d" % number])
            if number == TASKS // 2:
                fault_proxy.freeze("up")
                session.send([("SELECT length($1)", [BIG])])
                command = session.gather(ECHO, [b"%d" % number])
                fault_proxy.half_close("down")
                time.sleep(0.1)  # the end is there, and nobody has read it
                await session.aclose()
        except (anyio.ClosedResourceError, ConnectionLostError):
            outcomes.append("refused")
            return
        await command.signal
        outcomes.append("told" if command.error is not None else "answered")

    with anyio.fail_after(30):
        async with open_session(fault_proxy.dsn(pg_dsn)) as session:
            async with many_at_once(session, ask):
                pass
            assert session.state is ConnectionState.FAILED
            assert session.failure is not None
    assert len(outcomes) == TASKS


@pytest.mark.parametrize("direction", ["up", "down", "both"])
async def test_a_silence_is_told_to_each(pg_dsn, fault_proxy, direction) -> None:
    gathered, is_frozen = 0, False
    outcomes: list[Exception | None] = []

    async def ask(session: Session, number: int) -> None:
        nonlocal is_frozen
        if not is_frozen:  # by the first that is answered, so before what is gathered goes out
            is_frozen = True
            fault_proxy.freeze(direction)
        try:
            command = session.gather(ECHO, [b"%d" % number])
        except ConnectionLostError as exc:  # its own answer was not read with those of the others
            outcomes.append(exc)
        else:
            await command.signal
            outcomes.append(command.error)

    with anyio.fail_after(30):
        while not gathered:
            outcomes.clear()
            is_frozen = False
            async with open_session(
                fault_proxy.dsn(pg_dsn), heartbeat=0.1, heartbeat_timeout=0.4
            ) as session:
                async with many_at_once(session, ask):
                    while not any(command.parts for command in session._wire.commands):
                        if session.state is not ConnectionState.OPEN:
                            break
                        await anyio.sleep(0.01)
                    parts = [command.parts or [] for command in session._wire.commands]
                    gathered = sum(len(together) for together in parts if len(together) > 1)
                assert session.state is ConnectionState.FAILED
            fault_proxy.thaw()
            assert len(outcomes) == TASKS
            assert {type(error) for error in outcomes} == {ConnectionLostError}
            assert len({id(error) for error in outcomes}) == TASKS, "each raises its own"
