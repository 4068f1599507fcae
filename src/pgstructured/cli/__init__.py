"""The command line: ``pgstructured …``."""

from ._main import main as main

__all__ = ("main",)
