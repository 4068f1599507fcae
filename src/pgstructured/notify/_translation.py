"""Notifications from a database whose encoding is another than UTF-8.

The server would convert each payload to the session's encoding, and end the session
over one that has no equivalent there (a byte that is no character; in an SQL_ASCII
database all that is no UTF-8): whoever publishes could keep a bus from being live. So
the bus's session takes bytes as they are, and they are decoded here, where what can't
be decoded does no harm.

What the bus sends, names of channels, is UTF-8 all the same, so around it the session
speaks UTF-8. The server sends notifications between transactions only: none comes in
there.

Python's codecs lack some of what the server's have (№ and ① in EUC_JP, all of EUC_TW). In a
payload that is a few surrogates; a channel's name that can't be told from others would be a
subscriber who hears nothing. So the server is asked how it spells names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, final

import psycopg

from ._channels import NAME_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pgstructured.driver import Session, SessionParam

    from ._events import RawNotification

    Statement = tuple[str, Sequence[SessionParam]]

_SPEAK_UTF8: Final = ("SET client_encoding TO 'UTF8'", ())
_TAKE_BYTES: Final = ("SET client_encoding TO 'SQL_ASCII'", ())
_SPELL: Final = (
    "SELECT pg_catalog.encode(pg_catalog.convert_to($1, pg_catalog.getdatabaseencoding()), 'hex')"
)


@final
class Translation:
    """What there is to do about the encoding of one session's database.

    Args:
        codec: Python's codec for that encoding; None where there is nothing to do.
    """

    def __init__(self, codec: str | None = None) -> None:
        self._codec = codec
        self.is_needed: bool = codec not in {None, "utf-8"}
        """Whether what comes is to be translated."""
        self._names: dict[bytes, bytes] = {}
        """Names in UTF-8 by how the server spells them, where that is not the same."""

    async def begin(self, session: Session) -> None:
        """Let the server send notifications as they are.

        Raises:
            psycopg.Error: if the session fails.
        """
        if self._codec is not None:
            await session.execute(*_TAKE_BYTES)

    async def learn(self, session: Session, names: Iterable[str]) -> None:
        """Find out how the server spells names, before it listens to them.

        Raises:
            psycopg.Error: if the database's encoding lacks a character, or makes a name longer
                than a channel's may be, or if the session fails.
        """
        strange = [name for name in names if not name.isascii()] if self.is_needed else []
        if not strange:
            return
        questions = [(_SPELL, (name,)) for name in strange]
        _, *answers, _ = await session.execute_batch(self.around(questions))
        for name, answer in zip(strange, answers, strict=True):
            spelled = bytes.fromhex(answer.rows[0][0] or "")
            if len(spelled) > NAME_BYTES:
                raise psycopg.errors.NameTooLong(
                    f"{name!r} has {len(spelled)} bytes in the database's encoding; at most"
                    f" {NAME_BYTES} are possible"
                )
            self._names[spelled] = name.encode()

    def around(self, statements: Sequence[Statement]) -> Sequence[Statement]:
        """Return what to run for ``statements`` that are in UTF-8."""
        if self._codec is None:
            return statements
        return [_SPEAK_UTF8, *statements, _TAKE_BYTES]

    def translate(self, batch: Sequence[RawNotification]) -> Sequence[RawNotification]:
        """Return notifications in UTF-8; what can't be decoded stays as it is.

        Only where `is_needed`.
        """
        codec, names = self._codec or "utf-8", self._names
        return [
            (names.get(name) or _to_utf8(name, codec), pid, _to_utf8(text, codec))
            for name, pid, text in batch
        ]


def _to_utf8(text: bytes, codec: str) -> bytes:
    return text.decode(codec, "surrogateescape").encode("utf-8", "surrogateescape")
