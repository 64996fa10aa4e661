"""Stages that are either finished or absent: never half done, never done twice.

A stage is one folder. It is built under a temporary name and renamed when complete; the settings it
was built with lie inside it, in ``settings.json``. A later run with the same settings finds it
finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"

Settings = dict[str, Any]


class PrepareError(Exception):
    """Something the user can put right. The message is one sentence that says how."""


def say(message: str) -> None:
    """Print one line of progress, at once."""
    print(message, flush=True)


def recorded_settings(folder: Path) -> Settings | None:
    """Settings a finished stage was built with; None where there is no finished stage."""
    try:
        return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def is_finished(folder: Path, settings: Settings) -> bool:
    """Whether ``folder`` was built, completely, with exactly these settings."""
    return recorded_settings(folder) == settings


@contextmanager
def building(folder: Path, settings: Settings) -> Iterator[Path]:
    """Yield an empty folder to fill; it is named ``folder`` once the block ends without an error.

    Args:
        folder: the name of the finished stage. An earlier result of ours is replaced.
        settings: everything the result depends on; must survive a round trip through JSON.

    Raises: PrepareError: ``folder`` exists and is not ours, so that replacing it would lose
        someone's files.
    """
    refuse_foreign(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (partial / SETTINGS_FILE).write_text(text, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


def refuse_foreign(folder: Path) -> None:
    """Raise PrepareError where ``folder`` exists without having been made by a stage."""
    if folder.exists() and recorded_settings(folder) is None:
        raise PrepareError(f"{folder} exists and was not made by this command; choose another output folder.")
