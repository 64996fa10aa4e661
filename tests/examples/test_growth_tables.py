"""``examples/benchmark/quality``: the tables of whether growth pays, on records that are made up."""

import math
import sys
from pathlib import Path

import pytest

from fairseq_evomoe.config.resolve import resolve

QUALITY = Path(__file__).resolve().parents[2] / "examples" / "benchmark" / "quality"
sys.path.insert(0, str(QUALITY))

import choosing  # noqa: E402
import costs  # noqa: E402
import growth_tables  # noqa: E402
import stage_times  # noqa: E402
from growth import GROWTH  # noqa: E402
from protocol import SEEDS, TASKS  # noqa: E402

DOMAINS = TASKS["domains"]
SWITCH = GROWTH["growth_switch"]
START, GROWN = "from the start", "stages (5, 10, 20%): 4, 16, 64"
STEPS = {
    experts: {"seconds": 0.1 * seconds, "parameters": 1000 * experts, "sent_mb": 0.5 * (experts > 1)}
    for experts, seconds in ((1, 1), (4, 2), (16, 3), (64, 4))
}


def variant_of(experiment, label):
    return next(variant for variant in experiment.variants if variant.label == label)


def records_of(experiment, rows, seeds=(1,), **more):
    """Records of some rows with a loss of so many bits; each seed has its own."""
    found = {}
    for label, bits in rows.items():
        variant = variant_of(experiment, label)
        for seed in seeds:
            run, loss = variant.run(DOMAINS, seed), bits + 0.01 * seed
            found[run.key] = {
                "key": run.key,
                "seed": seed,
                "updates": run.updates,
                "parameters": 2000,
                "looked_up_parameters": 100,
                "flops": 3e12,
                "valid_loss": loss,
                "curve": [[0, 0, 0, 9.0], [2000, 10, 1e12, loss + 1], [4000, 20, 3e12, loss]],
                "test": {"loss": loss, "chunks": [[loss * n, n] for n in (100, 90, 80)]},
                **more,
            }
    return found


def rows_of(text):
    """Cells by the first one."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if "|" in line]
    lines = [[cell.strip() for cell in cells] for cells in lines]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_updates_of_each_stage():
    runs = {label: variant_of(SWITCH, label).run(DOMAINS, 1) for label in (START, GROWN, "one spawn at 10%")}
    assert costs.spawns(runs[START]) == [(0, 64)]
    assert costs.spawns(runs["one spawn at 10%"]) == [(400, 64)]
    assert costs.spawns(runs[GROWN]) == [(200, 4), (400, 16), (800, 64)]
    found = costs.cost(runs[GROWN], STEPS)
    assert found.seconds == pytest.approx(200 * 0.1 + 200 * 0.2 + 400 * 0.3 + 3200 * 0.4)
    assert found.sent == pytest.approx(0.5e6 * 3800) and found.peak_memory == 64000 * 16
    assert costs.cost(runs[GROWN], {1: STEPS[1]}) is None


def means(options, updates):
    """What options by name, or with a preset, mean for a run."""
    given = {name.replace("moe_", "", 1): value for name, value in options.items()}
    found = resolve(given, ffn_dims=[128], max_update=updates).flat()
    without = {"preset", "anneal_updates"}  # which does nothing where routing is sparse at once
    return {name: value for name, value in found.items() if name not in without}


def test_all_options_of_all_rows_go_together():
    runs = [(e, v.run(TASKS[e.tasks[0]], 1)) for e in GROWTH.values() for v in e.variants]
    for _, run in runs:
        if not run.system.dense:
            means(run.system.options, run.updates)
    (run, *_) = (run for e, run in runs if e.id == "growth_table" and "moe_gate_warmup" in run.system.options)
    assert means(run.system.options, 4000) == means({"moe_preset": "evomoe_stages", "moe_experts": 64}, 4000)


def test_every_row_is_there_before_it_has_run():
    text = growth_tables.sections({}, {})
    for experiment in GROWTH.values():
        assert f"`run.py --experiments {experiment.id}`" in text
    rows = rows_of(growth_tables.pays_table(SWITCH, {}, {}))
    assert rows.keys() == {variant.label for variant in SWITCH.variants}
    assert all("not run yet" in cells and "not timed yet" in cells for cells in rows.values())
    assert "- 64 experts of Switch: not run yet." in text and "not run yet (0 of at least 6" in text


def test_quality_and_cost_against_experts_from_the_start():
    known = records_of(SWITCH, {START: 6.0, GROWN: 6.004}, SEEDS)
    rows = rows_of(growth_tables.pays_table(SWITCH, known, STEPS))
    start, grown = rows[START], rows[GROWN]
    assert start[0].startswith(f"{sum(2 ** (6 + 0.01 * s) for s in SEEDS) / 3:.2f} ±") and start[1] == "3"
    assert grown[2].startswith(f"**{100 * (2**0.004 - 1):+.2f}%")
    seconds = 200 * 0.1 + 200 * 0.2 + 400 * 0.3 + 3200 * 0.4
    used = 200 * 0.1 * 1 + 200 * 0.2 * 4 + 400 * 0.3 * 16 + 3200 * 0.4 * 64
    assert start[3] == "1600 (1.00)" and grown[3] == f"{seconds:.0f} ({seconds / 1600:.2f})"
    assert grown[4] == f"{used / (1600 * 64):.2f}" and grown[6] == "1900 (0.95)"
    assert start[7] == grown[7] == ""  # there is no shorter run yet


@pytest.mark.parametrize(
    "grown, short, better", [(6.02, 6.1, True), (6.04, 6.1, False), (6.09, 6.1, False)], ids=str
)
def test_at_equal_seconds_against_a_run_of_that_length(grown, short, better):
    rows = {START: 6.0, growth_tables.SHORTER: short, GROWN: grown}
    known = records_of(SWITCH, rows, SEEDS)
    seconds = (200 * 0.1 + 200 * 0.2 + 400 * 0.3 + 3200 * 0.4) / (4000 * 0.4)
    between = short + (6.0 - short) * (math.log(seconds) - math.log(0.75)) / -math.log(0.75)
    found = growth_tables.at_equal_seconds(SWITCH, variant_of(SWITCH, GROWN), known, STEPS)
    assert found.mean == pytest.approx(2 ** (grown - between) - 1) and found.seeds == 3
    cells = rows_of(growth_tables.pays_table(SWITCH, known, STEPS))
    assert (
        cells[GROWN][7] == f"**{100 * found.mean:+.2f}% [{100 * found.low:+.2f}, {100 * found.high:+.2f}]**"
    )
    assert cells[START][7] == cells[growth_tables.SHORTER][7] == ""
    assert cells[growth_tables.SHORTER][3] == "1200 (0.75)"
    (line,) = (
        line
        for line in growth_tables.verdict(known, {"growth_switch": STEPS}).splitlines()
        if line.startswith("- 64 experts of Switch")
    )
    of_1 = f"1 of 1, most of all {GROWN} ({cells[GROWN][7]})" if better else "none of 1"
    assert line.endswith(f"missed by all 1 ways to grow. Better at equal seconds: {of_1}. Up to 3 seeds.")


def test_nothing_is_said_of_seconds_that_no_run_had():
    late = "one spawn at 40%"
    known = records_of(SWITCH, {START: 6.0, growth_tables.SHORTER: 6.1, late: 6.0})
    cheap = {**STEPS, 64: {**STEPS[64], "seconds": 40.0}}  # 0.6 of the seconds of the whole run
    for steps, there in ((STEPS, False), (cheap, False), ({**STEPS, 1: {**STEPS[1], "seconds": 0.2}}, True)):
        found = growth_tables.at_equal_seconds(SWITCH, variant_of(SWITCH, late), known, steps)
        assert (found is not None) == there


@pytest.mark.parametrize(
    "bits, dear, text", [(6.004, 0.25, "missed"), (6.004, 40, "reached"), (6.1, 40, "missed")]
)
def test_the_target_is_quality_and_cost(bits, dear, text, monkeypatch):
    """It is reached where a step of 64 experts is so dear that nothing counts but how many there are."""
    monkeypatch.setattr(growth_tables, "MEMORY", 0.61)  # 60% of the updates need a little more than 0.6
    late = "one spawn at 40%"
    known = records_of(SWITCH, {START: 6.0, late: bits}, SEEDS)
    times = {**STEPS, 64: {**STEPS[64], "seconds": 0.4 * dear}}
    found = growth_tables.verdict(known, {"growth_switch": times})
    line = next(line for line in found.splitlines() if line.startswith("- 64 experts of Switch"))
    assert text in line and (late in line) == (text == "reached")


def test_the_latest_spawn_that_loses_nothing():
    limit = math.log2(1 + growth_tables.TOLERANCE)
    losses = {"from the start": 6.0, "5%": 6.0, "10%": 6.0 + 2 * limit, "20%": 6.5}
    assert growth_tables.latest_share(losses) == pytest.approx(0.075)
    assert growth_tables.latest_share({**losses, "10%": 5.9, "20%": 5.9}) == pytest.approx(0.2)
    assert growth_tables.latest_share({**losses, "5%": 6.0 + 10 * limit}) == pytest.approx(0.005)
    assert growth_tables.latest_share({**losses, "20%": None}) is None


def test_a_rule_is_a_power_law_that_explains_something():
    cases = [(e, r, u) for e in (16.0, 64.0) for r in (0.002, 0.004) for u in (2000.0, 8000.0)]
    exact = [((e, r, u), 0.3 * e**-0.5 * u**0.25) for e, r, u in cases]
    text = growth_tables.rule(exact)
    assert "0.3 x (experts)^-0.50 x (learning rate)^" in text and "(updates)^0.25" in text and "100%" in text
    noise = [(case, 0.1 if i in (0, 3, 5, 6) else 0.2) for i, case in enumerate(cases)]
    assert "no rule" in growth_tables.rule(noise)
    assert "5 of at least 6" in growth_tables.rule(exact[:5])


def test_when_has_a_row_for_each_case():
    experiment = GROWTH["growth_when"]
    case = "64 experts, lr 0.002, 4000 updates"
    whens = {"from the start": 6.0, "spawn at 5%": 6.0, "spawn at 10%": 6.0, "spawn at 20%": 6.1}
    known = records_of(experiment, {f"{case}, {when}": bits for when, bits in whens.items()})
    rows = rows_of(growth_tables.when_table(experiment, known))
    assert len(rows) * 4 == len(experiment.variants)
    share = 0.1 + 0.1 * math.log2(1 + growth_tables.TOLERANCE) / 0.1
    assert rows[case][0] == f"{2**6.01:.2f}" and rows[case][-1] == f"{share:.1%}"


def test_drift_and_rises():
    experiment = GROWTH["growth_steadiness"]
    rises = [[100, 0.5], [1000, 0.031], [2000, 0.042]]  # the first one is of the beginning
    more = {"drift": {"moe_drift": 0.7, "moe_drift_recent": 0.125}, "rises": rises}
    known = records_of(experiment, {"Switch, lr 0.004": 6.0}, **more)
    rows = rows_of(growth_tables.steadiness_table(experiment, known))
    assert rows["Switch, lr 0.004"][1:] == ["1", "0.700", "0.125", "2.0", "4.2%"]
    assert rows["StableMoE, lr 0.004"][0] == "not run yet"


def test_further_seeds_are_those_of_the_best_rate():
    experiment = GROWTH["growth_table"]
    rates = {f"Switch, lr {rate}": bits for rate, bits in (("0.002", 6.1), ("0.004", 6.0), ("0.008", 6.2))}
    best = variant_of(experiment, "Switch, lr 0.004")
    known = records_of(experiment, dict(list(rates.items())[:2]))
    assert choosing.best(experiment, known) == {}
    assert choosing.seeds(experiment, best, DOMAINS, known) == (1,)
    known = records_of(experiment, rates)
    assert choosing.best(experiment, known) == {"Switch": best}
    assert choosing.seeds(experiment, best, DOMAINS, known) == SEEDS
    other, masked = variant_of(experiment, "Switch, lr 0.008"), TASKS["masked_lm"]
    assert choosing.seeds(experiment, other, DOMAINS, known) == (1,)
    assert choosing.seeds(experiment, other, masked, known) == ()
    assert choosing.seeds(experiment, best, masked, known) == SEEDS
    whole = variant_of(experiment, "dense, all parameters, lr 0.002").run(masked, 1)
    assert whole.arguments[-2:] == ["--encoder-ffn-embed-dim", "4160"]
    rows = rows_of(growth_tables.best_table(experiment, masked, known))
    assert rows["Switch"] == ["0.004", "not run yet", "", ""]
    rows = rows_of(growth_tables.best_table(experiment, DOMAINS, known))
    tried = " / ".join(f"{2 ** (bits + 0.01):.2f}" for bits in rates.values())
    assert rows["Switch"][0] == "0.004" and rows["Switch"][-1] == tried
    assert rows["BASE"][-1] == "not run yet / not run yet / not run yet"


def test_each_number_of_experts_is_timed_as_it_is_trained():
    for name, experts in (("growth_switch", [1, 4, 16, 64]), ("growth_narrow", [1, 8, 32, 128])):
        runs = stage_times.stages_of(GROWTH[name], DOMAINS)
        assert list(runs) == experts
        for number, run in runs.items():
            options = run.system.options
            if number > 1:
                assert (options["moe_experts"], options["moe_spawn_update"]) == (number, 0)
            if name == "growth_narrow" and number > 1:
                assert options["moe_total_ffn_dim"] // number == 32
