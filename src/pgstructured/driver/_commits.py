"""What is to be done once a transaction has committed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("pgstructured.driver")


@final
class AfterCommit:
    """The callbacks of one connection, in the order in which they were given."""

    __slots__ = ("callbacks", "given_before")

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], object]] = []
        """Those given in the transaction that is open."""
        self.given_before: list[Callable[[], object]] = []
        """Those given before it was."""

    def add(self, callback: Callable[[], object], *, has_begun: bool) -> None:
        """Keep ``callback`` for the end of the transaction.

        Args:
            callback: What to run.
            has_begun: Whether the transaction is open. Without autocommit that is up to the
                next statement.
        """
        (self.callbacks if has_begun else self.given_before).append(callback)

    def begin(self) -> None:
        """Take note that a transaction begins.

        What was given in another one, which is not over as far as is known here, is forgotten:
        SQL's own COMMIT or ROLLBACK has ended that.
        """
        self.callbacks, self.given_before = self.given_before, []

    def mark(self) -> int:
        """Return a mark to drop back to if what begins now is rolled back."""
        return len(self.callbacks) + len(self.given_before)

    def drop(self, mark: int = 0) -> None:
        """Forget the callbacks given since ``mark``."""
        self.callbacks += self.given_before
        self.given_before = []
        del self.callbacks[mark:]

    def run(self) -> None:
        """Run every callback, once.

        Raises:
            Exception: what a callback raised, after all have run; several in a group.
        """
        callbacks = self.callbacks + self.given_before
        self.callbacks, self.given_before = [], []
        failures: list[Exception] = []
        for callback in callbacks:
            try:
                callback()
            except Exception as exc:  # noqa: BLE001 - raised below, once all have run
                failures.append(exc)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup("after_commit callbacks failed", failures)

    def run_while_raising(self, *, is_outermost: bool) -> None:
        """Run every callback of an outermost transaction while something else is being raised.

        What a callback raises is only logged.
        """
        if not is_outermost:
            return
        try:
            self.run()
        except Exception:
            logger.exception("error ignored in an after_commit callback")
