"""``examples/migrating.md``: its commands are accepted, and the flags that it names exist."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from fairseq import options

from fairseq_evomoe.config.errors import PREFIX, flag
from fairseq_evomoe.config.options import MoEOptions
from fairseq_evomoe.config.resolve import resolve
from support.cli import USER_DIR

PAGE = (Path(__file__).resolve().parents[2] / "examples" / "migrating.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
TRAININGS = [text for text in BLOCKS if "fairseq-train" in text and "--user-dir" in text]
FLAGS = {flag(field.name) for field in dataclasses.fields(MoEOptions) if field.name.startswith(PREFIX)}


@pytest.mark.parametrize("text", TRAININGS, ids=range(len(TRAININGS)))
def test_commands_are_accepted(text):
    """By fairseq's parser, and by the check of contradictions."""
    words = shlex.split(text.replace("\\\n", " ").replace("$(evomoe user-dir)", str(USER_DIR)))
    words = words[words.index("DATA") :]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    given = {name[len(PREFIX) :]: value for name, value in vars(args).items() if name.startswith(PREFIX)}
    config = resolve(given, max_update=args.max_update)
    assert config.flat()["experts"] == args.moe_experts
    assert args.criterion.startswith("evomoe_") and args.arch.startswith("evomoe_")


def test_there_is_a_command_for_each_origin():
    assert len(TRAININGS) == PAGE.count("\n## ") == 5


def test_what_stands_for_their_flags_exists():
    """All ``--moe`` flags but those in their commands and in the left column of a table."""
    text = PAGE
    for block in BLOCKS:
        if block not in TRAININGS:
            text = text.replace(block, "")
    text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
    text = re.sub(r"^- What has no counterpart.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^(?:- Its scripts|\*\*Its checkpoints\.).*$", "", text, flags=re.MULTILINE)
    named = set(re.findall(r"--moe-[a-z0-9-]+", text))
    assert len(named) > 25
    assert named <= FLAGS, named - FLAGS
