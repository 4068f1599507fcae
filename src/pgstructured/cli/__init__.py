"""The command line: ``pgstructured …``."""

from pgstructured._util import publish

from ._main import main as main

__all__ = ("main",)

publish(__name__, globals())
