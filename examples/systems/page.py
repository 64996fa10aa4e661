#!/usr/bin/env python3
"""Put the generated tables between their markers in README.md: `results/` and the list of systems."""

from __future__ import annotations

import re
from pathlib import Path

from run import list_of
from systems import read_all

HERE = Path(__file__).resolve().parent
MISSING = "Not made yet.\n"
PAPER, POST = r"(?<![\w/.])\d{4}\.\d{5}\b", r"kexue\.fm/\S+\d"


def filled(text: str) -> str:
    """A page with what belongs between its markers: `<!-- results/lm/table.md -->` to `<!-- /... -->`."""

    def content(match: re.Match) -> str:
        name = match.group(1)
        path = HERE / name
        new = path.read_text(encoding="utf-8") if path.is_file() else MISSING
        return f"<!-- {name} -->\n{new}<!-- /{name} -->"

    text = re.sub(r"<!-- (results/\S+) -->.*?<!-- /\1 -->", content, text, flags=re.DOTALL)
    listed = re.sub(PAPER, r"[\g<0>](https://arxiv.org/abs/\g<0>)", list_of(read_all(["all"])))
    listed = re.sub(POST, r"[\g<0>](https://\g<0>)", listed)
    start = "<!-- systems: python examples/systems/run.py --list -->"
    end = "<!-- /systems -->"
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}\n{listed}{end}", text, flags=re.DOTALL)


def main() -> None:
    """Write the page."""
    path = HERE / "README.md"
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
