"""``evomoe plan``: what schedules of spawns cost, with updates that are timed here."""

import argparse
import time
from pathlib import Path

import pytest

from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.evolution.budget import Stage, Step, cost
from fairseq_evomoe.training import calibration, in_process, planning
from fairseq_evomoe.training.calibration import Measured
from fairseq_evomoe.training.planning import Case
from support.cli import LM, USER_DIR, evomoe, flags

TINY = "--layers 2 --dim 16 --ffn-dim 16 --vocabulary 50 --tokens 32 --sequence 8 --seconds 0.1".split()


def tables(text):
    """The rows of each Markdown table, each a list of cells, without headings."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in block[2:]] for block in blocks]


def plan(capsys, *words):
    """What is printed."""
    capsys.readouterr()
    evomoe("plan", *words)
    return capsys.readouterr().out


def test_a_model_of_these_sizes(capsys):
    """Costs in the second table are those of the first, added up over each schedule."""
    spawns = ["--spawn-update", "10%", "--spawn-update", "5%:4,10%:16"]
    words = ["--experts", 16, "--max-update", 100, "--preset", "switch"]
    steps, schedules = tables(plan(capsys, *words, *TINY, *spawns))
    assert [row[0] for row in steps] == ["1 expert", "4 experts", "16 experts"]
    seconds = {int(row[0].split()[0]): float(row[1]) for row in steps}
    memory = {int(row[0].split()[0]): int(row[3].replace(",", "")) for row in steps}
    assert memory[1] < memory[4] < memory[16]
    assert [row[0] for row in schedules] == ["from the start", "10%", "5%:4,10%:16"]
    stages = [{16: 100}, {1: 10, 16: 90}, {1: 5, 4: 5, 16: 90}]
    times = [sum(n * seconds[e] for e, n in run.items()) for run in stages]
    used = [sum(n * seconds[e] * memory[e] for e, n in run.items()) for run in stages]
    for row, spent, bytes_ in zip(schedules, times, used):
        assert float(row[2]) == pytest.approx(spent / times[0], abs=0.06)  # steps are printed in milliseconds
        assert float(row[3]) == pytest.approx(bytes_ / used[0], abs=0.06)
        assert float(row[5]) == 0


def test_a_command_of_ones_own_on_several_gpus(lm_data, capsys):
    """The gate is soft for a while after a spawn; ranks send tokens to each other from then on."""
    own = {k: v for k, v in LM.items() if k not in ("max_update", "moe_experts", "moe_spawn_update")}
    words = ["--experts", "4", "--max-update", "40", "--gpus", "4", "--parallel", "2", "--seconds", "0.1"]
    command = ["fairseq-train", *flags(lm_data, **own, no_save=True)]
    printed = plan(capsys, *words, "--spawn-update", "50%", "--", *command)
    steps, (_, once) = tables(printed)
    here = "4 experts, 2 on a rank"
    assert [row[0] for row in steps] == ["1 expert", here, f"{here}, soft gate"]
    one, hard, soft = (float(row[5]) for row in steps)
    assert one == 0 and 0 < hard < soft
    assert float(once[6]) == pytest.approx((4 * soft + 16 * hard) / (4 * soft + 36 * hard), abs=0.02)
    assert "estimated" in printed


def parameters(rows):
    return [int(row[3].replace(",", "")) for row in rows]


def test_narrow_experts_are_as_narrow_in_each_stage(capsys):
    """8x the ffn-embed-dim is divided among 32, whatever number of them there is."""
    words = [
        "--experts",
        32,
        "--max-update",
        100,
        "--preset",
        "narrow_hash",
        "--spawn-update",
        "10%:4,20%:32",
    ]
    steps, _ = tables(plan(capsys, *words, *TINY))
    _, few, all_ = parameters(steps)
    width = 8 * 16 // 32
    assert all_ - few == 28 * (2 * 16 * width + width + 16)


def test_experts_of_a_rank_are_as_narrow_as_all_of_them(capsys):
    """The base's hidden units are divided among 16."""
    words = ["--experts", 16, "--max-update", 100, "--preset", "emoe", "--spawn-update", "10%"]
    steps, _ = tables(plan(capsys, *words, *TINY, "--gpus", 4))
    assert [row[0] for row in steps] == ["1 expert", "16 experts, 4 on a rank"]
    one, shared = parameters(steps)
    base, expert = (2 * 16 * width + width + 16 for width in (16, 16 // 16))
    assert shared - one == 4 * expert - base + 4 * 16  # and a row of the gate for each


def test_a_rank_with_fewer_experts_than_a_token_has(capsys):
    """The best two of all are on any rank."""
    words = ["--experts", 8, "--max-update", 100, "--preset", "mixtral", "--spawn-update", "10%"]
    steps, _ = tables(plan(capsys, *words, *TINY, "--gpus", 8))
    assert [row[0] for row in steps] == ["1 expert", "8 experts, 1 on a rank"]
    one, shared = parameters(steps)
    assert shared - one == 2 * 16  # two rows of the gate, with which it is timed


def test_stages_that_nobody_asked_for_are_no_mistake(capsys):
    """A gate that is made of the base expert has one stage."""
    words = ["--experts", 16, "--max-update", 100, "--preset", "emoe", *TINY]
    _, schedules = tables(plan(capsys, *words))
    assert [row[0] for row in schedules] == ["from the start", "10%"]
    with pytest.raises(SystemExit):
        plan(capsys, *words, "--spawn-update", "5%:2,10%:4,20%:16")
    assert "give one stage" in capsys.readouterr().err


def test_experts_of_sizes_of_their_own_on_ranks(lm_data, capsys):
    """Which are timed all together, since no rank's are known."""
    own = {k: v for k, v in LM.items() if k not in ("max_update", "moe_experts", "moe_spawn_update")}
    words = ["--experts", 4, "--max-update", 40, "--gpus", 2, "--seconds", 0.1, "--spawn-update", "50%"]
    command = ["fairseq-train", *flags(lm_data, **own, no_save=True, moe_expert_sizes="1,2,2,1")]
    steps, _ = tables(plan(capsys, *words, "--", *command))
    assert [row[0] for row in steps][1] == "4 experts, 2 on a rank"


@pytest.mark.parametrize("dim, heads", [(16, 1), (64, 1), (400, 5), (500, 5), (512, 8), (1000, 10), (401, 1)])
def test_heads_divide_the_width(dim, heads):
    assert calibration.Sizes(dim=dim).heads == heads


def test_only_the_program_is_taken_off_a_command(capsys):
    def first(*words):
        args = argparse.Namespace(train=list(words), preset=None, max_update=10, experts=4)
        return planning._flags(args, [])[0]

    assert first("/usr/bin/fairseq-train", "data") == first("data") == "data"
    assert first("fairseq-data", "--arch", "x") == first("fairseq-train", "fairseq-data") == "fairseq-data"


@pytest.mark.parametrize(
    "words, text",
    [
        (["--experts", "1"], "--experts must be at least 2, but is 1"),
        (["--experts", "6", "--gpus", "8", "--parallel", "4"], "--parallel 4 must divide --gpus (8) and"),
        (["--experts", "8", "--spawn-update", "auto"], "auto waits for a plateau, whose update nobody knows"),
        (["--experts", "8", "--gpus", "8", "--spawn-update", "5%:4,10%:8"], "fewer than the --parallel 8"),
        (["--experts", "8", "--spawn-update", "5%:3,10%:8"], "makes 8 experts of 3, which cannot all have"),
        (["--experts", "8", "--layers", "0"], "--layers must be greater than 0"),
        (["--experts", "8", "--vocabulary", "4"], "--vocabulary must be at least 5, but is 4"),
        (["--experts", "8", "--gpus", "2", "--bandwidth", "0"], "--bandwidth must be greater than 0"),
        (["--experts", "8", "--gpus", "2", "--inside", "0"], "--inside must be greater than 0"),
        (["--experts", "8", "--gpus", "2", "--ranks-per-node", "0"], "--ranks-per-node must be greater than"),
        (["--experts", "8", "--gpus", "2", "--bytes", "0"], "--bytes must be greater than 0"),
        (["--experts", "8", "--gpus", "2", "--latency", "-1"], "--latency must be at least 0"),
        (
            ["--experts", "8", "--", "fairseq-train", "nodata", "--task", "language_modeling"]
            + ["--arch", "evomoe_lm_tiny"],
            "nodata/dict.txt'): give files and folders",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(words, text, capsys):
    with pytest.raises(SystemExit) as end:
        evomoe("plan", "--max-update", "100", *TINY, *words)
    printed = capsys.readouterr()
    assert end.value.code == 2 and text in printed.err
    assert len(printed.err.strip().splitlines()) == 1 and printed.out == ""


@pytest.mark.parametrize("joined", [False, True])
def test_another_copy_of_the_package_is_refused_and_a_link_to_this_one_is_not(joined, tmp_path, capsys):
    def words(folder):
        user_dir = [f"--user-dir={folder}"] if joined else ["--user-dir", folder]
        return ["--experts", 4, "--max-update", 100, "--", "fairseq-train", "data", *user_dir, "--arch", "x"]

    (tmp_path / "copy" / USER_DIR.name).mkdir(parents=True)
    with pytest.raises(SystemExit):
        plan(capsys, *words(tmp_path / "copy" / USER_DIR.name))
    assert (
        f"is another copy of {USER_DIR.name} than that of this command: give --user-dir"
        in capsys.readouterr().err
    )

    (tmp_path / USER_DIR.name).symlink_to(USER_DIR)
    given = [str(word) for word in words(tmp_path / USER_DIR.name)[6:]]
    planning._load_this_copy(given)
    assert given == ["data", "--user-dir", str(USER_DIR.resolve()), "--arch", "x"]


def test_shares_are_of_the_first_schedule():
    runs = [[Stage(10, 4)], [Stage(5, 1), Stage(5, 4)]]
    steps = {1: Step(1.0, 10.0), 4: Step(2.0, 40.0, 3.0)}
    schedules = [planning.Schedule(name, run) for name, run in zip(("from the start", "50%"), runs)]
    _, row = tables(planning.schedules_table(schedules, lambda stage: steps[stage.experts]))[0]
    assert cost(runs[1], lambda stage: steps[stage.experts]).seconds == 15
    assert row[2:4] == ["0.75", f"{(5 * 10 + 10 * 40) / (20 * 40):.2f}"] and row[6] == "0.50"


def test_a_plan_is_what_whole_runs_take(capsys, monkeypatch):
    """In time of the processor, so that it does not matter what else the machine does; bounds are wide."""
    monkeypatch.setattr(in_process, "now", time.process_time)
    sizes = calibration.Sizes(layers=2, dim=64, ffn_dim=128, vocabulary=50, tokens=256, sequence=16)
    words = "--layers 2 --dim 64 --ffn-dim 128 --vocabulary 50 --tokens 256 --sequence 16 --seconds 1".split()
    words += ["--experts", 64, "--max-update", 40, "--preset", "switch"]
    _, schedules = tables(plan(capsys, *words, "--spawn-update", "50%"))
    planned = [3600 * float(row[1]) for row in schedules]
    taken = []
    with calibration.temporary_data(sizes, updates=50) as folder:
        common = [*sizes.flags(Path(folder)), "--user-dir", str(USER_DIR), "--cpu", "--moe-preset", "switch"]
        for spawn in ("0", "20"):
            more = ["--moe-experts", "64", "--max-update", "40", "--moe-spawn-update", spawn]
            taken.append(in_process.Training([*common, *more], load=False).update(40).seconds)
    for expected, found in zip(planned, taken):
        assert 0.5 < found / expected < 2
    assert planned[1] < 0.9 * planned[0]
    assert taken[1] / taken[0] == pytest.approx(planned[1] / planned[0], rel=0.3)


@pytest.mark.parametrize(
    "case, experts", [(Case(8, 1), 2), (Case(8, 2), 2), (Case(8, 4, soft=True), 8), (Case(8, 8), 8)], ids=str
)
def test_what_is_timed_for_a_rank(case, experts, monkeypatch):
    """At least two experts, which have a gate; all of them where each token may go to all."""
    timed = []
    monkeypatch.setattr(planning, "measure", lambda flags, seconds: timed.append(flags) or measured)
    measured = Measured([1.0], experts=80, others=10, layers=[], tokens=100, active=1)
    whole = planning.Configured(resolve({"experts": 8}, max_update=100, ffn_dims=[64]), 64)
    found = planning._measure_case(case, [], whole, 0.1)
    assert timed == [["--moe-experts", str(experts)]] and found.experts == 80 * case.here // experts
