"""What a program may have a pool do for its connections, in the program's own task."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio

if TYPE_CHECKING:
    from ._lender import Lender
    from ._members import Member


async def wait_ready(lender: Lender) -> None:
    """See `Pool.wait_ready`."""
    await anyio.lowlevel.checkpoint()
    await _connect_up_to(lender, max(lender.ledger.min_size, 1))


async def check(lender: Lender) -> None:
    """See `Pool.check`."""
    await anyio.lowlevel.checkpoint()
    ledger = lender.ledger
    wanted = len(ledger.idle) + len(ledger.borrowed)
    asked, ledger.idle = ledger.idle, []
    unasked = set(asked)

    async def ask(member: Member) -> None:
        unasked.discard(member)
        if await lender.answers(member):
            lender.put_back(member)

    try:
        async with anyio.create_task_group() as tasks:
            for member in asked:
                tasks.start_soon(ask, member)
    finally:
        for member in unasked:  # pragma: no cover - if a task were ended before it has begun
            lender.put_back(member)
    await _connect_up_to(lender, wanted)


async def _connect_up_to(lender: Lender, wanted: int) -> None:
    """Make connections until there are so many, or wait for those who are making them."""
    ledger = lender.ledger
    deadline = lender.deadline()
    made = 0
    while len(ledger.idle) + len(ledger.borrowed) < min(wanted, ledger.max_size):
        if made >= wanted:
            return  # they were open, and had no leave to rest
        if ledger.size < wanted and ledger.take_slot():
            await lender.make(deadline)
            made += 1
            continue
        is_in_time = False
        with anyio.CancelScope(deadline=deadline):
            await lender.wait_change()
            is_in_time = True
        if not is_in_time:
            raise lender.late(lender.opener.last_error)
