"""``examples/benchmark/quality``: the protocol, the statistics, the report, and all of it in small."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import sacrebleu

from fairseq_evomoe.config.resolve import resolve
from support.cli import LM, MASKED_LM, build, call

QUALITY = Path(__file__).resolve().parents[2] / "examples" / "benchmark" / "quality"
sys.path.insert(0, str(QUALITY))

import at_spawn  # noqa: E402
import bootstrap  # noqa: E402
import claims  # noqa: E402
import evaluate  # noqa: E402
import gap  # noqa: E402
import growth_tables  # noqa: E402
import json_lines  # noqa: E402
import plots  # noqa: E402
import protocol  # noqa: E402
import recorded  # noqa: E402
import records  # noqa: E402
import results_page  # noqa: E402
import tables  # noqa: E402

KNOWN = records.read(QUALITY / "results")


def language(seed, bits, tokens=None):
    """A record of a language model with a loss in each chunk."""
    tokens = tokens or [100] * len(bits)
    return {"seed": seed, "test": {"chunks": [[b * n, n] for b, n in zip(bits, tokens)]}}


def test_the_difference_of_perplexities_is_that_of_the_mean_losses():
    ours = [language(1, [5.0, 6.0], [100, 300]), language(2, [5.5, 6.5], [100, 300])]
    theirs = [language(2, [6.0, 6.0], [100, 300]), language(1, [5.5, 6.0], [100, 300])]
    found = bootstrap.difference(ours, theirs)
    losses = [(5.0 + 3 * 6.0) / 4, (5.5 + 3 * 6.5) / 4], [(5.5 + 3 * 6.0) / 4, 6.0]
    assert found.seeds == 2
    assert found.mean == pytest.approx(2 ** (sum(losses[0]) / 2 - sum(losses[1]) / 2) - 1)
    assert found.low <= found.mean <= found.high and not found.excludes_zero


def test_what_is_better_everywhere_excludes_zero():
    generator = numpy.random.default_rng(1)
    noise = generator.normal(size=(3, 40))
    theirs = [language(s, [7 + v for v in noise[s]]) for s in range(3)]
    ours = [language(s, [6.9 + v for v in noise[s]]) for s in range(3)]  # chunks pair up
    found = bootstrap.difference(ours, theirs)
    assert found.excludes_zero and found.low == pytest.approx(found.high) == pytest.approx(2**-0.1 - 1)
    assert found.decides
    one = bootstrap.difference(ours[:1], theirs[:1])  # the interval is of the text alone
    assert one.excludes_zero and not one.decides
    assert claims.verdict(one, False, protocol.TASKS["lm"]) == "one seed"
    assert tables.in_percent(found) == f"**{tables.in_percent(one)}**"
    assert bootstrap.difference(theirs, theirs).mean == 0


def test_the_interval_is_that_of_every_possible_draw():
    """With two seeds and two chunks there are sixteen draws, all as likely."""
    bits = [[5.0, 5.6], [5.3, 6.4]], [[5.2, 5.5], [5.9, 6.0]]
    ours, theirs = ([language(s, row) for s, row in enumerate(rows)] for rows in bits)
    draws = []
    for seeds in itertools.product(range(2), repeat=2):
        for chunks in itertools.product(range(2), repeat=2):
            means = [sum(rows[s][c] for s in seeds for c in chunks) / 4 for rows in bits]
            draws.append(2 ** (means[0] - means[1]) - 1)
    found = bootstrap.difference(ours, theirs)
    assert found.low == pytest.approx(min(draws)) and found.high == pytest.approx(max(draws))


def test_bleu_of_the_chunks_is_that_of_the_corpus(tmp_path):
    generator = numpy.random.default_rng(2)
    words = "the a cat dog sat ran on under mat tree".split()
    lines = [" ".join(generator.choice(words, size=generator.integers(4, 12))) for _ in range(40)]
    outputs = [line.replace("cat", "dog") if i % 3 else line for i, line in enumerate(lines)]
    (tmp_path / "raw").write_text("\n".join(lines) + "\n")
    order = generator.permutation(len(outputs))  # fairseq sorts by length
    (tmp_path / "log").write_text("".join(f"D-{i}\t-0.5\t{outputs[i]}\nH-{i}\t-0.5\tx\n" for i in order))
    found = evaluate.bleu(tmp_path / "log", tmp_path / "raw")
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(outputs, [lines]).score)
    sums = numpy.array([found["bleu_chunks"]], dtype=float)
    whole = bootstrap._bleu(sums, numpy.ones((1, 1)), numpy.ones((1, sums.shape[1])))
    assert whole.item() == pytest.approx(found["bleu"])
    assert "tok:13a" in found["signature"]


def test_other_texts_and_other_seeds_are_refused():
    with pytest.raises(ValueError, match="seed"):
        bootstrap.difference([language(1, [5.0])], [language(2, [5.0])])
    with pytest.raises(ValueError, match="other texts"):
        bootstrap.difference([language(1, [5.0])], [language(1, [5.0, 5.0])])


def test_when_a_loss_is_reached():
    curve = [[0, 0, 0, 8.0], [100, 10, 1e9, 7.0], [200, 30, 3e9, 6.0]]
    found = [{"curve": curve}, {"curve": curve}]
    assert tables.reaches(found, 6.25, 0) == pytest.approx(175)
    assert tables.reaches(found, 6.25, 1) == pytest.approx(25)
    assert tables.reaches(found, 6.25, 2) == pytest.approx(2.5e9)
    assert tables.reaches(found, 5.9, 0) is None
    # at the first validation already, and one after which nothing has changed
    assert tables.reaches(found, 8.5, 0) == 0
    level = [{"curve": [[10, 1, 1e8, 2.0], [20, 2, 2e8, 2.0]]}]
    assert [tables.reaches(level, 2.0, axis) for axis in (0, 1, 2)] == [10, 1, 1e8]
    assert tables.reaches(level, 2.5, 0) == 10 and tables.reaches(level, 1.5, 0) is None


def test_parameters_that_are_looked_up(lm_data):
    def count(settings, **options):
        return evaluate.looked_up_parameters(build(lm_data, **{**settings, **options}).model)

    words = build(lm_data, **LM).model.decoder.embed_tokens.weight.shape[0]
    assert count(LM, share_decoder_input_output_embed=True) == 0
    assert count(LM) == words * 32  # another matrix multiplies
    assert (
        count(MASKED_LM)
        == build(lm_data, **MASKED_LM).model.encoder.sentence_encoder.embed_positions.weight.numel()
    )


def test_main_rows_are_rows():
    for experiment in protocol.EXPERIMENTS.values():
        assert set(experiment.main) <= set(experiment.tasks)
        for task in experiment.tasks:
            rows = [variant.label for variant in experiment.rows(protocol.TASKS[task])]
            assert set(rows) == set(experiment.main.get(task, rows)) and rows
        labels = [variant.label for variant in experiment.variants]
        assert set(experiment.confirmed) <= set(labels) and len(labels) == len(set(labels)), experiment.id
    assert len(protocol.EXPERIMENTS["systems"].rows(protocol.TASKS["help_de"])) == 8


def test_runs_have_names_of_their_own():
    runs = [
        variant.run(protocol.TASKS[task], seed)
        for experiment in protocol.EXPERIMENTS.values()
        for variant in experiment.variants
        for task in experiment.tasks
        for seed in experiment.seeds_of(variant, protocol.TASKS[task])
    ]
    commands = {}
    for run in runs:
        commands.setdefault(run.key, set()).add((run.task.id, run.system.id, *run.arguments))
    assert all(len(same) == 1 for same in commands.values())
    assert not any("/" in argument for run in runs for argument in run.arguments)  # no paths of a machine


@pytest.mark.parametrize("name", recorded.SYSTEMS)
def test_systems_are_the_presets_with_what_they_have_over_them(name):
    """The options by name that the results have mean the preset, for a run of the protocol."""

    def means(options):
        found = resolve({"experts": 8, **options}, ffn_dims=[128], max_update=protocol.UPDATES).flat()
        return {option: value for option, value in found.items() if option != "preset"}

    system = recorded.SYSTEMS[name]
    then = recorded.as_then(system.options)
    named = {option.replace("moe_", "", 1): value for option, value in then.items()}
    assert means(named) == means({"preset": system.preset, **system.over})
    if system.over:
        assert means(named) != means({"preset": system.preset})


def test_results_are_known_by_what_they_were_trained_with():
    """Each row of the main tables has its runs in the results, whatever the defaults are called today."""
    experiment = protocol.EXPERIMENTS["systems"]
    for name in ("lm", "masked_lm", "help_de"):
        for variant in experiment.rows(protocol.TASKS[name]):
            for seed in experiment.seeds_of(variant, protocol.TASKS[name]):
                assert variant.run(protocol.TASKS[name], seed).key in KNOWN, (name, variant.label, seed)


def test_a_command_names_what_was_a_default_when_the_results_were_made():
    def command(label):
        variants = {variant.label: variant for variant in protocol.EXPERIMENTS["systems"].variants}
        run = variants[label].run(protocol.TASKS["lm"], 1)
        return run, " ".join(run.command(Path("data"), Path("out")))

    run, text = command("EvoMoE, confident gate")
    assert "--moe-spawn-update 0 --moe-router dts" in text and "--moe-spawn-update" not in run.arguments
    assert command("EvoMoE, published")[1].count("--moe-spawn-update 400") == 1
    assert "--moe-balance-choices first" in command("equal experts, Top-K")[1]


@pytest.mark.parametrize("path", sorted((QUALITY / "results").glob("*/*.jsonl")), ids=lambda path: path.stem)
def test_results_are_whole(path):
    seen = set()
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert record["key"] not in seen
        seen.add(record["key"])
        assert record["task"] == path.stem and "/" not in "".join(record["arguments"])
        assert record["curve"][-1][0] == record["updates"]
        assert math.isfinite(record["test"]["loss"])
        bits, tokens = (sum(part) for part in zip(*record["test"]["chunks"]))
        assert bits / tokens == pytest.approx(record["test"]["loss"], abs=1e-4)


def test_the_pages_are_what_the_results_say():
    """The page of results and the tables of the README are made again, and are the same."""
    assert (QUALITY / "results.md").read_text(encoding="utf-8") == results_page.page(QUALITY / "results")
    text = (QUALITY / "README.md").read_text(encoding="utf-8")
    steps = records.read_steps(QUALITY / "results" / "2" / "steps")
    shown = {
        marker: re.search(f"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", text, re.DOTALL).group(1)
        for marker in ("claims", "growth")
    }
    assert shown["claims"] == claims.claims_table(KNOWN)
    assert shown["growth"] == growth_tables.verdict(KNOWN, steps)
    assert len(text.splitlines()) <= 120


def test_a_claim_is_linked_to_its_table():
    headings = re.findall(
        r"^#+ (.*)$", (QUALITY / "results.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    anchors = {claims.anchor(heading) for heading in headings}
    links = re.findall(r"results\.md#([^)]*)\)", claims.claims_table(KNOWN))
    assert links and set(links) <= anchors


NARROW, WIDE = "4 narrow ones of 32", "1 of 8"
OURS = {NARROW: "EvoMoE", WIDE: "EvoMoE, 8 wide experts"}
LABELS = {
    (NARROW, "Hash"): "Hash, 4 of 32 narrow experts",
    (NARROW, "Top-4"): "Top-4 of 32 narrow experts",
    (WIDE, "EvoMoE, as published"): "EvoMoE, published",
    ("2 of 8", "GShard"): "GShard, top-2",
}


@pytest.mark.parametrize("page, systems, compared", [("README.md", 7, 0), ("examples/results.md", 11, 6)])
def test_the_first_pages_say_the_same(page, systems, compared):
    """The tables of the main README and of the results, whose numbers are copied."""
    text = (QUALITY.parents[2] / page).read_text(encoding="utf-8")
    start = text.index("| experts of a token | system | test perplexity |")
    lines = text[start:].split("\n\n")[0].splitlines()[2:]
    experiment, task = protocol.EXPERIMENTS["systems"], protocol.TASKS["lm"]
    of = {v.label: tables.of_variant(v, task, KNOWN) for v in experiment.variants}
    group = ""
    for line in lines:
        experts, name, perplexity, *difference = (cell.strip() for cell in line.strip("|").split("|"))
        group = experts or group
        name = re.sub(r" \(.*\)", "", re.sub(r"\[(.*)\]\(.*\)", r"\1", name))
        label = OURS[group] if name == "EvoMoE, our options" else LABELS.get((group, name), name)
        assert f"{tables.mean(tables.score, of[label]):.2f}" == perplexity, name
        if difference and difference[0]:
            d = bootstrap.difference(of[OURS[group]], of[label])
            words = f"{abs(100 * d.mean):.1f}% {'more' if d.mean > 0 else 'less'}"
            assert difference[0] == words + ("" if d.excludes_zero else " (level)"), name
            assert d.seeds == 3
            compared -= 1
    assert (len(lines), compared) == (systems, 0)


def test_seconds_are_compared_within_a_round():
    """Hash is where Switch ends after 150 of 200 updates, each of which takes half of Switch's time."""
    seconds = {"Switch": {0: 0.1, 1: 0.2, 2: 0.1}, "Hash": {0: 0.05, 1: 0.1, 2: 0.08}, "dense": {0: 0.05}}
    ends = {"Switch": 6.0, "Hash": 5.0, "dense": 7.0}
    experiment, task, known = protocol.EXPERIMENTS["systems"], protocol.TASKS["lm"], {}
    for variant in experiment.variants:
        if variant.label in ends:
            curve = [[0, 0, 0, 8.0], [100, 10, 1e9, 7.0], [200, 30, 3e9, ends[variant.label]]]
            known[variant.run(task, 2).key] = {"seed": 2, "curve": curve}
    assert tables.speed_table({"lm": seconds}, experiment, known).splitlines()[4:] == [
        "| dense | 0.0500 | 0.50 (0.50-0.50) | never | 1 |",
        "| Hash | 0.0800 | 0.50 (0.50-0.80) | 0.38 | 3 |",
        "| Switch | 0.1000 | 1.00 (1.00-1.00) | 1.00 | 3 |",
    ]


def test_rows_without_a_seed_in_common_are_not_compared(tmp_path):
    """The cell is empty, and the others are as they were."""
    experiment, task = protocol.EXPERIMENTS["systems"], protocol.TASKS["lm"]
    of = {v.label: tables.of_variant(v, task, KNOWN) for v in experiment.variants}
    rows = {"EvoMoE": of["EvoMoE"][1:], "Hash": of["Hash"], "Switch": of["Switch"][:1]}
    known = {record["key"]: record for records in rows.values() for record in records}
    assert tables.compared(rows["EvoMoE"], rows["Switch"]) == tables.compared(rows["EvoMoE"], []) == ""
    table = tables.systems_table(experiment, task, known).splitlines()[2:]
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[2] for row in table}
    assert cells["Switch"] == "" and cells["Hash"] == tables.compared(rows["EvoMoE"], of["Hash"])
    times = {"EvoMoE": {0: 0.1}, "Switch": {0: 0.1}}
    (row,) = re.findall(".*EvoMoE.*", tables.speed_table({"lm": times}, experiment, known))
    assert row == "| EvoMoE | 0.1000 | 1.00 (1.00-1.00) |  | 1 |"
    plots.plot(experiment, known, tmp_path)
    assert (tmp_path / "systems-lm.svg").exists()
    assert re.search("our options beats Switch.*causal LM.*not run yet", claims.claims_table(known))


def test_a_checkpoint_is_evaluated_as_in_training_and_as_in_evaluation(lm_data, tmp_path):
    """At update 7 of 14 the gate is soft: while training a token has several experts, in evaluation one."""
    settings = {**LM, "moe_spawn_update": 2, "moe_hard_update": 12, "save_interval_updates": 7}
    settings["required_batch_size_multiple"] = 1  # or else fairseq leaves out what is left over
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    (checkpoint,) = tmp_path.glob("checkpoint_*_7.pt")
    (logged,) = (line for line in result.log("valid") if line["valid_num_updates"] == 7)
    found = {way: gap.loss(checkpoint, lm_data, 7, way) for way in ("training", "adaptive", "top1")}
    assert found["top1"] == (pytest.approx(logged["valid_loss"], abs=2e-3), 1)
    assert found["training"][1] > 1.5 and found["adaptive"][1] > 1.5
    assert len({bits for bits, _ in found.values()}) == 3
    assert gap.loss(checkpoint, lm_data, 14, "training")[1] == 1


def test_other_numbers_are_noticed():
    key, record = next(iter(KNOWN.items()))
    changed = json.loads(json.dumps(record))
    assert records.differences(KNOWN, {key: changed}) == []
    changed["seconds"] += 1  # of the machine, not of the run
    assert records.differences(KNOWN, {key: changed}) == []
    changed["test"]["chunks"][3][0] += 0.001
    assert records.differences(KNOWN, {key: changed}) == [f"{key}: other numbers"]
    assert records.differences(KNOWN, {"another": record}) == ["no run is in both"]


def test_a_line_that_was_cut_off_is_made_again(tmp_path):
    file = tmp_path / "1" / "lm.jsonl"
    file.parent.mkdir()
    file.write_text('{"key": "a"}\n{"key": "b", "te')
    assert records.read(tmp_path).keys() == {"a"}
    json_lines.append(file, {"key": "b"})
    json_lines.append(file, {"key": "c"})
    assert records.read(tmp_path).keys() == {"a", "b", "c"}

    file.write_text('{"label": "x", "upd')
    for read in (records.read_speed, records.read_gap, records.read_steps):
        assert not any(read(file.parent).values())


def test_a_spawn_that_was_not_measured_is(tmp_path, monkeypatch):
    """What was cut off is the second of a system's two lines."""
    asked = []

    def measured(name, data):
        asked.append(name)
        sides = {when: {"bits": 6.0, "norm": 1.0, "weight": 1.0} for when in ("before", "after")}
        later = {f"after {updates}": sides["after"] for updates in at_spawn.AFTER}
        return [{"system": name, "experts": e, **sides, **later} for _, e in at_spawn.SPAWNS]

    monkeypatch.setattr(at_spawn, "measured", measured)
    monkeypatch.setattr(at_spawn, "prepared_small", lambda corpora, work: {("english",): tmp_path})
    monkeypatch.setattr(at_spawn.logging, "disable", lambda level: None)
    out = tmp_path / "spawns.jsonl"
    monkeypatch.setattr(sys, "argv", ["at_spawn.py", "--systems", "hash", "base", "--out", str(out)])
    at_spawn.main()
    whole = out.read_text()
    out.write_text(whole[:-9])
    at_spawn.main()
    assert asked == ["hash", "base", "base"]
    assert {(line["system"], line["experts"]) for line in json_lines.read(out)} == {
        (name, experts) for name in ("hash", "base") for _, experts in at_spawn.SPAWNS
    }


def test_all_of_it_in_small(tmp_path):
    command = [sys.executable, str(QUALITY / "run.py"), "--smoke", "--tasks", "lm", "help_de"]
    command += ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    subprocess.run(command, check=True)
    found = records.read(tmp_path / "results")
    assert sorted((r["task"], r["system"]) for r in found.values()) == [
        (task, system) for task in ("help_de", "lm") for system in ("evomoe_fine", "switch")
    ]
    for record in found.values():
        assert record["curve"][-1][0] == 20 and record["flops"] > 0 and record["peak_mib"] > 100
        assert ("bleu" in record["test"]) == (record["task"] == "help_de")
        assert ("adaptive" in record) == (record["system"] == "evomoe_fine")
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "have all of it already" in done.stdout
    assert not list(tmp_path.glob("work/runs/*/*.pt"))
