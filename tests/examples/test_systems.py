"""``examples/systems``: each system trains, resumes bit for bit and evaluates; growth; the runner."""

import copy
import csv
import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fairseq.dataclass import utils as fairseq_dataclasses

from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import ROUTERS
from support.cli import LM, MASKED_LM, assert_equal, build, call, parameters
from support.models import with_router
from support.tasks import dense

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "systems"
sys.path.insert(0, str(EXAMPLES))

import densified  # noqa: E402
import finished  # noqa: E402
import inference  # noqa: E402
import jobs  # noqa: E402
import logs  # noqa: E402
import page  # noqa: E402
import run  # noqa: E402
import step_times  # noqa: E402
import systems  # noqa: E402

UPDATES, MIDDLE, BEFORE = 100, 81, 9  # an epoch has seven or eight, at the end of which nothing is saved
SYSTEMS = {system.id: system for system in systems.read_all(["all"])}
SMALL = {
    "save_dir": "checkpoints",
    "moe_freq": 1,
    "max_update": UPDATES,
    "moe_spawn_update": None,
    "moe_anneal_updates": None,
    "moe_hard_update": None,
    "save_interval": UPDATES,
    "validate_interval": UPDATES,
    "required_batch_size_multiple": 1,  # or else fairseq validates with whole batches only
    # else a thread that loads ahead masks tokens while the validation does, with one random number generator
    "data_buffer_size": 0,
}
LAYERS = {"language_modeling": {"decoder_layers": 1}, "masked_lm": {"encoder_layers": 1}}
_composed = {}


@pytest.fixture(autouse=True)
def compose_once(monkeypatch):
    """The same command takes fairseq a second or two to understand: let it do so once."""
    compose = fairseq_dataclasses.compose

    def composed(name, overrides, **options):
        key = (name, tuple(overrides))
        if key not in _composed:
            _composed[key] = compose(name, overrides=overrides, **options)
        return copy.deepcopy(_composed[key])

    monkeypatch.setattr(fairseq_dataclasses, "compose", composed)


def settings_of(system):
    """Settings of a small run that are not the system's own."""
    if system.dense:
        return without_experts(LM)
    grows = resolve({"preset": system.preset}, max_update=UPDATES).latest_spawn > 0
    small = {**SMALL, "save_interval_updates": BEFORE if grows else MIDDLE}
    if "moe_experts" not in system.common:  # the preset says how many
        small["moe_experts"] = None
    if "lm" in system.not_for:
        return {**MASKED_LM, **small, **LAYERS["masked_lm"]}
    return {**LM, **small, **LAYERS["language_modeling"]}


def without_experts(settings):
    """Settings of a small run of fairseq's own model."""
    saving = {"save_interval_updates": MIDDLE, "user_dir": LM["user_dir"]}
    return {**dense({**settings, **SMALL}), **LAYERS[settings["task"]], **saving}


@pytest.fixture(scope="session")
def dense_checkpoint(lm_data, tmp_path_factory):
    """``dense_checkpoint(settings)``: a dense model after a few updates, for the systems made of one."""
    made = {}

    def train(settings):
        task = settings["task"]
        if task not in made:
            made[task] = tmp_path_factory.mktemp("dense") / "checkpoint_last.pt"
            few = {"save_dir": made[task].parent, "max_update": 20}
            call("fairseq-train", lm_data, **{**without_experts(settings), **few})
        return made[task]

    return train


def perplexity(checkpoint, data, system):
    """By fairseq's script for the task."""
    common = {"path": checkpoint, "user_dir": LM["user_dir"], "batch_size": 8, "num_workers": 0}
    common["required_batch_size_multiple"] = 1
    if "lm" in system.not_for:
        names = {"task": "masked_lm", "criterion": MASKED_LM["criterion"]}
        output = call("fairseq-validate", data, **common, **names).output
        return float(re.search(r"\| ppl ([\d.]+)", output).group(1))
    output = call("fairseq-eval-lm", data, gen_subset="valid", tokens_per_sample=16, **common).output
    return float(re.search(r"Perplexity: ([\d.]+)", output).group(1))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if SYSTEMS[name].width == 1])
def test_a_system_trains_resumes_and_evaluates(name, lm_data, tmp_path, request, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoints")
    system, flags, settings = SYSTEMS[name], SYSTEMS[name].flags(), settings_of(SYSTEMS[name])
    if system.dense_updates:
        made_of = request.getfixturevalue("dense_checkpoint")(settings)
        flags += systems.as_arguments({system.dense_as: made_of})
    result = call("fairseq-train", lm_data, *flags, **settings)
    losses = [step["loss"] for step in result.log("train_inner")]
    assert len(losses) == UPDATES and all(map(math.isfinite, losses))
    frozen = (
        not system.dense and "backbone" in resolve({"preset": system.preset}, max_update=UPDATES).frozen_parts
    )
    assert frozen or sum(losses[-10:]) < 0.9 * sum(losses[:10])

    whole = (folder / "checkpoint_last.pt").rename("whole.pt")
    next(folder.glob(f"checkpoint_*_{MIDDLE}.pt")).rename(folder / "checkpoint_last.pt")
    again = call("fairseq-train", lm_data, *flags, **settings).log("train_inner")
    assert [step["loss"] for step in again] == losses[MIDDLE:]
    assert_equal(parameters(folder / "checkpoint_last.pt"), parameters(whole))

    validated = {step["valid_num_updates"]: step["valid_ppl"] for step in result.log("valid")}
    assert perplexity("whole.pt", lm_data, system) == pytest.approx(validated[UPDATES], abs=0.011)
    if len(validated) > 2:  # one expert at first
        before = next(folder.glob(f"checkpoint_*_{BEFORE}.pt")).rename("before.pt")
        assert parameters(before)["decoder.layers.0.moe.experts.b2"].shape == (1, 32)
        assert perplexity("before.pt", lm_data, system) == pytest.approx(validated[BEFORE], abs=0.011)


@pytest.mark.parametrize("router", ROUTERS)
def test_one_expert_grows_into_many_with_any_router(router, lm_data):
    settings = with_router(router)
    setup, loaded = build(lm_data, **settings), build(lm_data, **settings).model
    layers = [module for module in setup.model.modules() if hasattr(module, "moe")]
    trainer = setup.trainer()
    trainer.begin_epoch(1)
    losses, fresh = [], {}
    for batch in setup.batches()[:7]:
        assert all(layer.moe.spawned == (len(losses) >= 4) for layer in layers)
        losses.append(float(trainer.train_step([batch])["loss"]))
        if len(losses) == 4:
            fresh = {n: p.detach().clone() for n, p in setup.model.named_parameters() if ".router." in n}
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert all(len(layer.moe.experts.widths) == 4 for layer in layers)
    learned = [n for n, p in setup.model.named_parameters() if n in fresh and not torch.equal(p, fresh[n])]
    assert bool(learned) == bool(fresh)

    loaded.load_state_dict(setup.model.state_dict())
    loaded.set_num_updates(7), setup.model.set_num_updates(7)
    with torch.no_grad():
        ours, theirs = (m.eval()(**batch["net_input"])[0] for m in (setup.model, loaded))
    assert torch.equal(ours, theirs) and bool(torch.isfinite(ours).all())


SIZES = "--decoder-layers 1 --moe-freq 1 --moe-experts 4 --decoder-embed-dim 32 --decoder-input-dim 32"
SIZES += " --decoder-output-dim 32 --decoder-ffn-embed-dim 48 --tokens-per-sample 16 --batch-size 8"


def runner(data, out, *systems, updates=300, more=(), wait=True):
    """Start the runner, and wait for its end."""
    command = [
        sys.executable,
        str(EXAMPLES / "run.py"),
        str(data),
        "--out",
        str(out),
        "--updates",
        str(updates),
    ]
    command += ["--systems", *map(str, systems), "--", *SIZES.split(), *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return process if not wait else (process.communicate()[0], process.returncode)


def test_the_runner(lm_data, tmp_path):
    pytest.importorskip("matplotlib")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: Broken\npaper: none\noptions: {router: switch, top_k: 3}\n")
    out = tmp_path / "out"

    def log():
        return next(out.glob("runs/switch-1-*/train.log"), out / "none")

    first = runner(lm_data, out, "switch", broken, "soft", wait=False)
    while first.poll() is None and not (
        log().exists() and re.search(r"Saved checkpoint.*_30\.pt", log().read_text())
    ):
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    assert first.returncode == 143
    assert not (out / "table.md").exists() and not (out / "records.jsonl").exists()

    output, status = runner(lm_data, out, "switch", broken, "soft")
    text = log().read_text()
    assert status == 1
    assert re.search(r"Loaded checkpoint .*checkpoint_last.pt \(epoch \d+ @ \d+ updates\)", text)
    run = logs.read(log(), "valid_loss")
    assert [point.update for point in run.curve] == list(range(30, 301, 30))
    table = (out / "table.md").read_text()
    assert table in output
    assert "Broken (`broken`): failed: " in table
    assert "--moe-top-k 3 has no effect with --moe-router switch" in table
    assert "Soft MoE (`soft`): not applicable: a token's output depends on later tokens" in table

    shutil.rmtree(out / "runs")  # what has a record is not trained again
    output, status = runner(lm_data, out, "switch", "dense_2x")
    assert status == 0 and log() == out / "none"
    with open(out / "table.csv") as file:
        rows = {row["system"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"switch", "dense_2x"}
    assert float(rows["switch"]["validation perplexity"]) == run.last["valid_ppl"]
    # one layer of width 32, from 48 hidden units to 96
    assert float(rows["dense_2x"]["parameters"]) == run.active_parameters - 4 * 32 + 48 * (2 * 32 + 1)
    assert all(float(row["peak memory, MiB"]) > 50 and row["error"] == "" for row in rows.values())
    assert (out / "curves.svg").stat().st_size < 100_000

    record = finished.of(finished.read(out), "switch", 1)[0]
    assert record["curve"] == [[p.update, p.flops, p.loss] for p in run.curve]
    assert record["options"]["capacity_factor"] == 1.25 and len(record["code"]) == 12
    assert record["versions"]["torch"] == torch.__version__ and record["processor"]

    for settings in ({"updates": 40}, {"more": ["--lr", "1"]}):
        output, status = runner(lm_data, out, "switch", **settings)
        assert status == 1 and "use another --out" in output

    command = [
        sys.executable,
        str(EXAMPLES / "run.py"),
        "--report",
        "--systems",
        "switch",
        "dense_2x",
        "hash",
    ]
    command += ["--out", str(out), "--seeds", "1", "2"]
    assert subprocess.run(command, stdout=subprocess.PIPE).returncode == 0
    again = (out / "table.md").read_text()
    assert "| seeds 1, 2 | `hash` |" in again and "| seed 2 | `switch`, `dense_2x` |" in again


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere", "--systems", "switch"], "nowhere has no dict*.txt: DATA must be a folder like"),
        (["DATA", "--systems", "all", "--inference"], "--systems must be of ds_moe and evomoe"),
        (["--report", "--densified"], "--densified: not allowed with argument --report"),
        (["DATA", "--systems", "switch", "--densified"], "has the table of other updates (settings.json"),
        (["DATA", "--systems", "switch", "--times", "--", "--lr", "1"], "has the table of other flags ("),
        (
            ["DATA", "--systems", "broken.yaml", "--densified", "--updates", "40"],
            "--moe-top-k 3 has no effect",
        ),
    ],
)
def test_the_runner_refuses(arguments, says, lm_data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text("name: Broken\npaper: none\noptions: {router: switch, top_k: 3}\n")
    settings = systems.Settings(lm_data, "lm", 40, ())
    finished.keep_settings(Path("results"), finished.settings_of(settings))
    arguments = [str(lm_data) if word == "DATA" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as refused:
        run.main()
    assert says in capsys.readouterr().err + str(refused.value)
    assert not Path("results/runs").exists()


def test_rises_of_the_loss():
    """Of neighbours the highest; 2% over the mean of the five before is the least that counts."""
    losses = [8.0] * 6 + [8.1, 8.2, 9.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.165]
    records = [{"tag": "train_inner", "num_updates": 10.0 * (i + 1), "loss": x} for i, x in enumerate(losses)]
    records.insert(3, {"tag": "valid", "num_updates": 30.0, "loss": 20.0})
    mean = (8.0 * 3 + 8.1 + 8.2) / 5
    assert logs._rises(records) == [[90, round(9.0 / mean - 1, 4)], [160, round(8.165 / 8 - 1, 4)]]
    assert logs._rises(records[:5]) == []


def test_a_training_that_was_asked_to_end_has_not_come_to_its_end(tmp_path):
    """It saves and ends without an error."""
    ended = jobs.Job("a", ["echo", '{"num_updates": "3"}'], tmp_path / "a.log", updates=5)
    whole = jobs.Job("b", ["echo", '{"valid_num_updates": "5"}'], tmp_path / "b.log", updates=5)
    after = jobs.Job("c", ["true"], tmp_path / "c.log", needs=[ended])
    seen = []
    jobs.run([ended, whole, after], 2, 1, seen.append)
    assert seen == [whole] and not after.state
    assert ended.failure() == "ended after 3 of 5 updates" and after.failure() == "a: " + ended.failure()


def test_the_readme_has_the_generated_tables():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in SYSTEMS)
    assert page.filled(text) == text, "run python examples/systems/page.py"
    for path in EXAMPLES.glob("results/*/*.md"):
        assert path.read_text(encoding="utf-8") in text


def test_the_records_are_of_one_kind_and_name_no_path():
    for folder in (EXAMPLES / "results").iterdir():
        records = finished.read(folder)
        assert records and "/" not in "".join(word for r in records for word in r["arguments"])
        assert len({(r["system"], r["seed"], r["commit"]) for r in records}) == len(records)
        assert not any(r["commit"].endswith("+") for r in records), "made with code that is in no commit"


SMALL_LM = systems.Settings(Path("data"), "lm", 12, tuple(SIZES.split()))


def test_times_are_taken_side_by_side(lm_data):
    settings = dataclasses.replace(SMALL_LM, data=lm_data)
    names = ["switch", "upcycling", "soft"]
    found = step_times.measure([SYSTEMS[name] for name in names], settings, rounds=1)
    seconds = found["seconds"]
    assert seconds.keys() == {"dense", "switch", "upcycling"} == found["rounds"][0].keys()
    assert all(0 < value < 10 for value in seconds.values()) and found["processor"]


def test_the_median_is_of_the_same_updates():
    assert step_times._medians([[(5, 1.0), (4, 9.0)], [(5, 2.0), (4, 1.0)], [(5, 9.0), (4, 2.0)]]) == [
        (5, 2),
        (4, 2),
    ]
    assert step_times._per_update([(5, 2.0), (3, 2.0)]) == 0.5
    seconds = {"dense": 1.0, "upcycling": 3.0}
    step_times._add_dense_part(seconds, SYSTEMS["upcycling"], 40)
    assert seconds == {"dense": 1.0, "upcycling": 2.0}


@pytest.mark.slow
def test_what_becomes_of_checkpoints(lm_data, tmp_path, monkeypatch):
    """The share of the gain that is kept when they become dense, and other experts at inference."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(densified, "METHODS", ("average",))
    ways = {"k = 2": {"moe_hard_experts": 2}, "k = 1": {"moe_hard_experts": 1}}
    monkeypatch.setattr(inference, "WAYS", {"ds_moe": ways})
    common = [str(lm_data), "--updates", "40", "--out", str(tmp_path), "--jobs", "2"]

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *common, *arguments, "--", *SIZES.split()])
        assert run.main() == 0

    main("--densified", "--refine", "10", "--systems", "ds_moe")
    main("--inference", "--systems", "ds_moe")
    main("--systems", "ds_moe", "dense")  # which are trained by now
    whole = {name: finished.of(finished.read(tmp_path), name, 1)[0] for name in ("ds_moe", "dense")}

    row, taught = json.loads((tmp_path / "densified.json").read_text())["rows"]
    losses = {name: record["curve"][-1][2] for name, record in whole.items()}
    assert row["gain"] == losses["dense"] - losses["ds_moe"]
    assert row["kept"]["at_once"] == pytest.approx((losses["dense"] - row["losses"]["at_once"]) / row["gain"])
    assert row["kept"]["refined"] == pytest.approx(
        (row["dense_refined"] - row["losses"]["refined"]) / row["gain"]
    )
    assert row["losses"]["refined"] < row["losses"]["at_once"]
    assert "| `ds_moe` | average |" in (tmp_path / "densified.md").read_text()
    # the dense model with the same teacher, and nothing else
    assert taught["method"] == densified.NOTHING and taught["kept"]["at_once"] == 0
    assert taught["losses"]["refined"] not in (row["losses"]["refined"], row["dense_refined"])
    logs_of = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/*/train.log")}
    assert '"train_distillation"' in logs_of["densified-average-10-by-ds_moe"]
    assert '"train_distillation"' in logs_of["checkpoint_last-10-by-ds_moe"]
    assert '"train_distillation"' not in logs_of["checkpoint_last-10-more"]

    as_trained, one = json.loads((tmp_path / "inference.json").read_text())["rows"]
    assert as_trained["perplexity"] == pytest.approx(whole["ds_moe"]["perplexity"], abs=0.011)
    assert (as_trained["experts"], one["experts"]) == (2, 1) and one["perplexity"] != as_trained["perplexity"]
    assert "| `ds_moe` | k = 1 | 1.00 |" in (tmp_path / "inference.md").read_text()
