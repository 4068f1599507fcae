"""What the reference pages say of events is what the table says."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from pgstructured.observe import EVENTS

PAGES = Path(__file__).parents[2] / "docs" / "reference"
ROW = re.compile(
    r"^\| `(?P<name>\w+\.\w+)` \|(?: (?P<level>debug|info|warning|error) \|)?"
    r" (?P<facts>`\w+`(?:, `\w+`)*) \|",
    re.MULTILINE,
)
ROOMS = {name.partition(".")[0] for name in EVENTS}


def test_tables_of_events_agree() -> None:
    told: set[str] = set()
    for page in PAGES.glob("*.md"):
        for row in ROW.finditer(page.read_text(encoding="utf-8")):
            name, level = row["name"], row["level"]
            if name.partition(".")[0] not in ROOMS:
                continue
            told.add(name)
            assert tuple(re.findall(r"\w+", row["facts"])) == EVENTS[name].facts, (page.name, name)
            if level is not None:
                expected = logging.getLevelName(EVENTS[name].level).lower()
                assert level == expected, (page.name, name)
    rooms = ("driver", "supervise", "pool", "lock", "bus", "store")
    assert told >= {name for name in EVENTS if name.partition(".")[0] in rooms}
