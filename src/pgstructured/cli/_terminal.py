"""Progress on a terminal: coloured and with symbols where it can be, plain where it is piped."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from typing import TextIO

_GREEN: Final = "32"
_RED: Final = "31"
_BOLD: Final = "1"
_DIM: Final = "2"


class Terminal:
    """Prints chapters and what happened in them, each line with the time since the start."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._began = time.monotonic()
        self._in_colour = self._out.isatty() and "NO_COLOR" not in os.environ
        encoding = (self._out.encoding or "ascii").lower().replace("-", "")
        self._done, self._failed = ("✓", "✗") if encoding == "utf8" else ("ok", "FAILED")

    def chapter(self, title: str) -> None:
        """Print a heading."""
        self._print(f"\n{self._paint(title, _BOLD)}")

    def tell(self, text: str) -> None:
        """Print what goes on."""
        self._line(" ", text, _DIM)

    def succeed(self, text: str) -> None:
        """Print something that had to happen, and did."""
        self._line(self._paint(self._done, _GREEN), text)

    def fail(self, text: str) -> None:
        """Print something that had to happen, and didn't."""
        self._line(self._paint(self._failed, _RED), text, _RED)

    def _line(self, mark: str, text: str, style: str = "") -> None:
        elapsed = time.monotonic() - self._began
        stamp = self._paint(f"{elapsed:6.2f}s", _DIM)
        self._print(f"{stamp} {mark} {self._paint(text, style)}")

    def _paint(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._in_colour and style else text

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)
