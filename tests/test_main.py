"""``python -m pgstructured``."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["dmeo"], 2)])
def test_it_is_the_command_line(arguments, code):
    done = subprocess.run(
        [sys.executable, "-m", "pgstructured", *arguments],
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )
    assert done.returncode == code
    assert (done.stdout + done.stderr).startswith("usage: pgstructured ")
