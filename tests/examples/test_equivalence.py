"""``examples/systems/equivalence.py``, against scipy's tests and numbers worked out by hand; the tables."""

import math
import sys
from pathlib import Path

import pytest
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "systems"))

import equivalence
import finished
import report
import run
import systems


def perplexities(*values):
    return dict(enumerate(values, 1))


def test_by_hand():
    """Ratios of e^0.01, e^0.02, e^0.03: mean 0.02, deviation 0.01, t(2) = 4.3027 for 95%."""
    ours = perplexities(*(100 * math.exp(x) for x in (0.01, 0.02, 0.03)))
    found = equivalence.compare(ours, perplexities(100, 100, 100))
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert found.mean == pytest.approx(math.expm1(0.02))
    assert found.low == pytest.approx(math.expm1(0.02 - half)) and found.low < 0
    assert found.high == pytest.approx(math.expm1(0.02 + half))
    assert found.verdict == "undecided" and found.seeds == 3
    assert str(found) == "+2.0% [-0.5, +4.6]"


@pytest.mark.parametrize(
    "logarithms, verdict",
    [
        ((0.020, 0.021, 0.019), "worse"),
        ((-0.020, -0.021, -0.019), "better"),
        ((0.004, 0.005, 0.0045), "level"),  # though the interval excludes 0
        ((0.0005, -0.0005, 0.0001), "level"),
        ((0.009, 0.0095, 0.0105), "worse"),  # 90% of it reaches beyond the margin
        ((0.03, -0.03, 0.0), "undecided"),
        ((0.0, 0.0, 0.0), "level"),
        ((0.1,), ""),
    ],
)
def test_verdicts_are_those_of_two_one_sided_tests(logarithms, verdict):
    ours = perplexities(*(80 * math.exp(x) for x in logarithms))
    found = equivalence.compare(ours, perplexities(*[80] * len(logarithms)))
    assert found.verdict == verdict
    if len(set(logarithms)) < 2:
        return
    margin = math.log1p(equivalence.MARGIN)
    sides = stats.ttest_1samp(logarithms, -margin, alternative="greater").pvalue
    other = stats.ttest_1samp(logarithms, margin, alternative="less").pvalue
    assert found.level == (max(sides, other) < 0.05)
    assert (found.low > 0 or found.high < 0) == (stats.ttest_1samp(logarithms, 0).pvalue < 0.05)


def test_seeds_pair_up():
    """What seeds have in common takes no part, in whatever order they are, and others are left out."""
    found = equivalence.compare({3: 303, 1: 101, 2: 202}, {1: 100, 2: 200, 3: 300, 4: 5})
    assert found.mean == pytest.approx(0.01) == found.low == found.high and found.seeds == 3
    assert equivalence.compare({1: 5.0}, {2: 5.0}) is None


def record(perplexity, seed=1, **changes):
    """A record of a system."""
    values = {"seed": seed, "perplexity": perplexity, "experts": 1.0, "active_parameters": 100}
    values.update(parameters=100, flops=1e12, drift={}, options={}, commit="abc", processor="P", peak_mib=9)
    values.update(versions={"torch": "2"}, curve=[[10, 1e12, 6.0]], **changes)
    return values


MOE = {"expert_activation": "model", "total_ffn_dim": None}


def row(name, *values, **changes):
    system = systems.read(name)
    options = {} if system.dense else {**MOE, **changes.pop("options", {})}
    records = [record(v, seed, options=options, **changes) for seed, v in enumerate(values, 1)]
    return report.Row(system, records)


def test_a_winner_is_bold_only_where_the_interval_says_so():
    ahead = [row("switch", 100, 101, 102), row("hash", 97, 98, 99)]
    table = report.markdown(ahead, "switch", {})
    assert "| **Hash Layer, random (`hash`)** | 98.00 ± 1.00 | 3 | -3.0% [-3.0, -2.9] | better |" in table
    assert table.count("**") == 4
    level = [row("switch", 100, 101, 102), row("hash", 99.9, 100.9, 101.8)]
    table = report.markdown(level, "switch", {})
    assert "| level |" in table and table.count("**") == 2


def test_rows_are_beside_those_of_their_kind_and_dense_models_of_their_sizes():
    wide = {"active_parameters": 100, "parameters": 400}
    rows = [
        row("switch", 100, **wide),
        row(
            "mixtral",
            99,
            active_parameters=200,
            parameters=600,
            experts=2.0,
            options={"expert_activation": "swiglu"},
        ),
        row("narrow_hash", 98, experts=4.0, options={"total_ffn_dim": 1024}, **wide),
        row("upcycling", 97, experts=2.0, **wide),
        row("gshard", 96, experts=2.0, **wide),
        row("dense", 101),
        row("dense_2x", 95, active_parameters=200, parameters=200),
        row("dense_4.5x", 94, active_parameters=400, parameters=400),
    ]
    parts = report.markdown(rows, "switch", {"switch": 0.05}).split("**")
    found = dict(zip(parts[1::2], parts[2::2]))
    assert list(found) == list(report.GROUPS)
    assert "`switch`" in found["One expert a token"] and "| 0.0500 |" in found["One expert a token"]
    assert "(`dense`), nearest in active parameters |" in found["One expert a token"]
    assert "(`dense_4.5x`), nearest in parameters in all |" in found["One expert a token"]
    assert "(`dense_2x`), nearest in active parameters |" in found["Gated experts"]
    assert "`narrow_hash`" in found["Narrow experts"] and "`gshard`" in found["Several experts a token"]
    assert "`upcycling`" in found["Experts made of a dense model"]


def test_what_is_not_trained_yet_is_named():
    rows = [row("switch", 100), row("hash", 99), row("base", 98)]
    rows[0].missing, rows[1].missing = [2, 3], [3]
    table = report.markdown(rows, "switch", {})
    assert "| seeds 2, 3 | `switch` |\n| seed 3 | `hash` |" in table
    for each in rows:
        each.missing = [2, 3]
    assert "| seeds 2, 3 | all |" in report.markdown(rows, "switch", {})
    assert "not trained" not in report.markdown([row("switch", 100)], "switch", {})


def test_a_row_made_with_other_code_is_marked():
    older = row("switch", 100)
    older.older = True
    table = report.markdown([older, row("hash", 99)], "switch", {})
    assert (
        "(`switch`) † |" in table
        and "(`hash`) |" in table
        and "† The code of its router has changed" in table
    )


def test_drift_is_shown_where_the_log_has_it():
    rows = [row("switch", 100, drift={"moe_drift": 0.25}), row("hash", 99, drift={"moe_drift": 0.0})]
    table = report.markdown(rows, "switch", {})
    assert "| moe_drift |" in table and "| 0.250 |" in table and "| 0.000 |" in table
    assert "moe_drift" not in report.markdown([row("switch", 100)], "switch", {})


def test_a_record_of_other_options_is_not_that_which_is_asked(tmp_path, capsys):
    settings = systems.Settings(tmp_path, "lm", 100)
    asked = finished.described(systems.read("switch"), settings)
    assert not finished.differences(asked, asked)
    other = {**asked, "seed": 1, "options": {**asked["options"], "jitter": 0.5}}
    assert finished.differences(other, asked) == ["jitter 0.5, now 0.01"]
    older = {**asked, "seed": 1, "code": "0"}
    assert run.usable([other], asked, fresh=False) is None
    assert (
        "switch, seed 1: its record is not of what is asked (jitter 0.5, now 0.01)" in capsys.readouterr().out
    )
    assert run.usable([other, older], asked, fresh=False) is older  # and its row is marked
    assert run.usable([older], asked, fresh=True) is None
    assert "the code of its router has changed" in capsys.readouterr().out
    shorter = finished.described(systems.read("switch"), systems.Settings(tmp_path, "lm", 50))
    assert "other flags" in finished.differences(shorter, asked)
    older = dict(asked["options"])
    older.pop("shared_expert")  # an option that there was not then, and is at its default
    assert not finished.differences({**asked, "options": older}, asked)
    shared = {**asked, "options": {**asked["options"], "shared_expert": True}}
    assert finished.differences({**asked, "options": older}, shared) == ["shared_expert False, now True"]


def test_records_outlive_a_line_that_was_cut_off(tmp_path):
    finished.append(tmp_path, {"system": "a", "seed": 1, "x": 1})
    with open(tmp_path / finished.RECORDS, "a") as file:
        file.write('{"system": "b", "se')
    finished.append(tmp_path, {"system": "a", "seed": 1, "x": 2})
    found = finished.read(tmp_path)
    assert [each["x"] for each in found] == [1, 2] and finished.of(found, "a", 1)[0]["x"] == 2
    assert not finished.of(found, "b", 1)


def test_a_folder_has_one_table(tmp_path):
    finished.keep_settings(tmp_path, {"task": "lm", "updates": 10, "flags": [], "data": "x"})
    finished.keep_settings(tmp_path, {"task": "lm", "updates": 10, "flags": [], "data": "x"})
    with pytest.raises(finished.OtherSettings, match="other updates and data"):
        finished.keep_settings(tmp_path, {"task": "lm", "updates": 20, "flags": [], "data": "y"})


def test_wider_dense_models_have_as_many_parameters_as_experts():
    """Every second of four layers has eight experts: ungated with two matrices, gated ones with three."""
    for experts, matrices, width in ((1, 2, 1), (2, 2, 1.5), (2, 3, 2), (8, 2, 4.5), (8, 3, 6.5)):
        assert width in systems.DENSE_WIDTHS
        assert 2 * 2 + 2 * experts * matrices == 4 * 2 * width
    command = systems.Settings(Path("data"), "translation", 10).train(
        systems.read("dense_1.5x"), 1, Path("x")
    )
    assert command[-4:] == ["--encoder-ffn-embed-dim", "384", "--decoder-ffn-embed-dim", "384"]
