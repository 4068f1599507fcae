"""``python -m pgstructured`` is ``pgstructured``."""

from __future__ import annotations

import sys

from pgstructured.cli import main

if __name__ == "__main__":
    sys.exit(main())
