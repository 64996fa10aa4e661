"""Seconds per update of all systems, side by side."""

from __future__ import annotations

import json
from pathlib import Path

TIMES = "times.json"


def read(folder: Path) -> dict[str, float]:
    """The seconds per update of each system, if they have been timed."""
    path = folder / TIMES
    return json.loads(path.read_text())["seconds"] if path.exists() else {}
