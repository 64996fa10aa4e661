"""``evomoe presets``: lists, resolves for given sizes, and refuses in a sentence."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fairseq_evomoe.config import commands, presets, rules
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import ROUTERS

EVOMOE = Path(commands.__file__).resolve().parent.parent / "bin" / "evomoe"


@pytest.fixture
def printed(capsys):
    """What the command prints."""

    def call(*arguments):
        commands.presets([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return call


def section(text, heading):
    """The rows under a heading, split into columns."""
    lines = text.split(heading, 1)[1].splitlines()[1:]
    lines = lines[: lines.index("")] if "" in lines else lines
    return [line.split() for line in lines]


def test_all_presets_are_listed(printed):
    text = printed()
    for name in presets.names():
        preset = presets.load(name)
        assert f"{name} " in text and preset.name in text and preset.paper.split(",")[0] in text


@pytest.mark.parametrize("name", presets.names())
def test_what_is_printed_is_what_it_resolves_to(name, printed):
    text = printed(name, "--ffn-dim", 256, "--max-update", 1000)
    config = resolve({"preset": name}, ffn_dims=[256], max_update=1000)
    flat = config.flat()
    shown = {row[0]: row[1] for row in section(text, "All options")}
    assert shown["--moe-router"] == config.router
    for option, value in shown.items():
        value = None if value == "(none)" else value
        assert str(flat[option[len("--moe-") :].replace("-", "_")]).lower() == str(value).lower()
    without_effect = {
        option for _, idle in rules.idle(replace(config, given=frozenset(flat))) for option in idle
    }
    for option in ROUTERS[config.router].Options.declared():
        assert ("--moe-" + option.replace("_", "-") in shown) == (option not in without_effect)
    default = resolve({"router": config.router}, ffn_dims=[256], max_update=1000).flat()
    differing = {row[0] for row in section(text, "Options that are not defaults")} - {
        "(none)",
        "--moe-router",
    }
    expected = {
        option
        for option in shown
        if flat[option[6:].replace("-", "_")] != default[option[6:].replace("-", "_")]
    }
    assert differing == expected
    for words in presets.load(name).differs.split()[:3]:
        assert words in text


def test_stages_are_those_of_the_schedule(printed, tmp_path):
    text = printed("evomoe", "--max-update", 40000, "--experts", 8, "--ffn-dim", 512)
    assert "experts    8, each of 512 hidden units" in text
    assert "before update 4000, by mask" in text
    assert "from update 4000; temperature 2 to 0.5, linear, until update 9000\n" in text
    assert "top-1      from update 10000\n" in text
    short = printed("evomoe", "--max-update", 4000)
    assert "top-1      from update 6400 (after the end of the run)" in short
    assert "at a plateau of the training loss, by mask" in printed("evomoe", "--max-update", 0)
    assert "frozen   from update 400\n" in printed("stable", "--max-update", 4000)
    assert "top-2      in evaluation only\n" in printed("ds_moe", "--max-update", 4000)
    config = tmp_path / "stages.yaml"
    config.write_text("name: stages\noptions: {spawn_update: '5%:4,20%:16'}\n")
    staged = printed(config, "--max-update", 40000, "--experts", 16)
    assert "4 before update 2000, 16 before update 8000, by mask" in staged
    assert "from 0 updates after each spawn; temperature 2 to 0.5" in staged
    assert "9 hidden" not in text and "1152, 1272" in printed("hmoe_topk")


def test_a_file_by_its_path_works_like_a_name(printed, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: Mine\npaper: none\noptions: {router: topk, top_k: 3}\n")
    text = printed(mine)
    assert "system  Mine" in text
    assert ["--moe-top-k", "3", "default", "2"] in section(text, "Options that are not defaults")


@pytest.mark.parametrize(
    "options, sizes, row",
    [
        (
            "router: stable, stable_update: 500",
            ["--max-update", 0],
            ["--moe-stable-update", "500", "default", "(none)"],
        ),
        ("router: topk, top_k: 1", ["--experts", 1], ["--moe-top-k", "1", "default", "2"]),
    ],
)
def test_defaults_that_cannot_be_had_are_compared_all_the_same(options, sizes, row, printed, tmp_path):
    """What is not given in their place is no mistake of a preset that gives it."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"name: Mine\noptions: {{{options}}}\n")
    assert row in section(printed(mine, *sizes), "Options that are not defaults")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nosuch"], "--moe-preset nosuch is no file and none of the presets base, "),
        (["hmoe_topk", "--ffn-dim", "0"], "--ffn-dim must be at least 1, but is 0."),
        (["switch", "--max-update", "-1"], "--max-update must be at least 0, but is -1."),
        (["dynmoe", "--max-update", "0"], "--moe-dynmoe-window 5% is a percentage of --max-update"),
        (["emoe", "--experts", "2"], "--moe-top-k must be from 1 to the 2 experts, but is 4."),
    ],
)
def test_refusals_are_a_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as refused:
        commands.presets(arguments)
    assert refused.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("evomoe presets: " + sentence) and error.count("\n") == 1


def test_the_command_imports_no_fairseq():
    program = (
        "import runpy, sys\n"
        f"sys.argv = ['evomoe', 'presets', 'switch']; runpy.run_path({str(EVOMOE)!r}, run_name='__main__')\n"
        "assert 'torch' in sys.modules and 'fairseq' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "Switch Transformer" in done.stdout, done.stderr


def test_help_imports_no_torch():
    program = (
        "import runpy, sys\n"
        "sys.argv = ['evomoe', 'presets', '--help']\n"
        f"try: runpy.run_path({str(EVOMOE)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0 and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "--ffn-dim" in done.stdout, done.stderr
