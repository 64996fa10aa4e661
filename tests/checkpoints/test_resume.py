"""A run that is interrupted and resumed is, bit for bit, the run that is not."""

import os
import shutil
import zipfile

import pytest
import torch

from fairseq_evomoe.checkpoints import storage
from fairseq_evomoe.checkpoints.index import DamagedCheckpoint, UnreadableCheckpoint
from support.cli import CLASSIFICATION, LM, Run, assert_equal, call, parameters
from support.optimizers import OPTIMIZERS
from support.refusals import refused
from support.resume import check_resume
from support.tasks import DATA, TASKS

BEFORE, AT, SOFT, HARD = 3, 6, 9, 12


@pytest.mark.parametrize("settings", [*TASKS, pytest.param(CLASSIFICATION, id=CLASSIFICATION["task"])])
def test_every_phase(settings, tmp_path, request, trained):
    data = request.getfixturevalue(DATA[settings["task"]])
    stops = (BEFORE, AT, SOFT, HARD) if settings is LM else (AT, SOFT)
    check_resume(data, tmp_path, settings, stops, trained(settings))


@pytest.mark.parametrize(
    "options",
    [
        {"update_freq": 2, "store_ema": True, "ema_decay": 0.9},
        {"batch_size": None, "max_tokens": 64, "store_ema": True, "ema_decay": 0.9, "ema_fp32": True},
        {"decoder_layerdrop": 0.3, "moe_freq": 1, "decoder_layers": 4},
        {"checkpoint_activations": True, "moe_balance_weight": 0.1},
        {"moe_gate_weight": "gumbel", "moe_spawn_method": "reinit", "clip_norm": 0.5},
        {"memory_efficient_fp16": True, "fp16_init_scale": 1},  # for --fp16 see test_growth.py
    ],
    ids=lambda options: "-".join(options),
)
def test_with_options(options, lm_data, tmp_path):
    check_resume(lm_data, tmp_path, {**LM, **options}, (AT, SOFT))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_optimizers(optimizer, lm_data, tmp_path):
    settings = {**LM, **OPTIMIZERS[optimizer], "optimizer": optimizer}
    check_resume(lm_data, tmp_path, settings, (SOFT,))


SCHEDULES = {
    "fixed": {"warmup_updates": 4, "lr_shrink": 0.5, "force_anneal": 2},
    "inverse_sqrt": {"warmup_updates": 4, "warmup_init_lr": 1e-7},
    "polynomial_decay": {"warmup_updates": 2, "total_num_update": 14},
    "cosine": {"warmup_updates": 2, "lr_period_updates": 6},
    "reduce_lr_on_plateau": {"lr_shrink": 0.5, "lr_threshold": 0.5, "lr_patience": 0},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_schedules(schedule, lm_data, tmp_path):
    settings = {**LM, **SCHEDULES[schedule], "lr_scheduler": schedule}
    whole = check_resume(lm_data, tmp_path, settings, (SOFT,))
    if schedule == "reduce_lr_on_plateau":
        return  # it depends on the validation losses

    # the spawn leaves no trace in the schedule
    settings.update(moe_experts=1, save_interval_updates=3)
    plain = Run(tmp_path / "plain", call("fairseq-train", lm_data, save_dir=tmp_path / "plain", **settings))
    for update in (BEFORE, AT, SOFT, HARD):
        spawned, other = (torch.load(run.at(update)) for run in (whole, plain))
        ours, theirs = (each["optimizer_history"][-1]["lr_scheduler_state"] for each in (spawned, other))
        ours.pop("best", None), theirs.pop("best", None)
        assert ours == theirs
        ours, theirs = (each["last_optimizer_state"]["param_groups"][0]["lr"] for each in (spawned, other))
        assert ours == theirs


@pytest.fixture
def again(trained, tmp_path):
    """A copy of a run that has ended, and its settings, to start it again."""
    run = trained(LM)
    folder = shutil.copytree(run.folder, tmp_path / "again")
    for update in (BEFORE, AT, SOFT, HARD):  # whatever the clock did while it was trained
        os.utime(folder / run.at(update).name, (update, update))
    return Run(folder, run.result), {"save_interval_updates": 3, **LM, "save_dir": folder}


def flip_in_largest_tensor(path):
    """Change one bit of a checkpoint: in a tensor, since between two of them nobody would notice."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        data = archive.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 1
    path.write_bytes(content)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(again, trained, lm_data):
    run, settings = again
    os.truncate(run.last, run.last.stat().st_size // 2)
    best = run.folder / "checkpoint_best.pt"
    flip_in_largest_tensor(best)  # which torch does not notice
    result = call("fairseq-train", lm_data, **settings)
    (line,) = result.lines("WARNING")
    assert f"{run.last} is not whole: the run goes on from {run.at(HARD)}" in line
    assert result.log("train_inner")[0]["num_updates"] == HARD + 1
    assert_equal(parameters(run.last), parameters(trained(LM).last))


def test_a_finished_run_does_nothing_more(again, lm_data):
    run, settings = again
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    result = call("fairseq-train", lm_data, **settings)
    assert result.lines("the run has made its 14 updates") and not result.log("train_inner")
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before


@pytest.mark.parametrize("option", ["restore_file", "finetune_from_model"])
@pytest.mark.parametrize("name, text", [("none.pt", "does not exist"), ("", "is a folder")])
def test_a_checkpoint_that_is_not_there_is_refused(option, name, text, lm_data, tmp_path):
    path = str(tmp_path / name)
    with pytest.raises(ValueError) as error:
        call("fairseq-train", lm_data, **{**LM, option: path, "save_dir": tmp_path / "run"})
    flag = "--" + option.replace("_", "-")
    assert f"{flag} {path} {text}" in str(error.value)
    assert not list(tmp_path.glob("run/*"))


def test_a_checkpoint_that_must_not_be_read_is_not_replaced_by_another(again, lm_data, monkeypatch):
    run, settings = again

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(storage, "skim", refuse)
    with pytest.raises(UnreadableCheckpoint) as error:
        call("fairseq-train", lm_data, **settings)
    refused(error, f"{run.last} cannot be read: its permissions do not let you")


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(again, lm_data):
    run, settings = again
    for path in run.folder.iterdir():
        os.truncate(path, 100)
    with pytest.raises(DamagedCheckpoint) as error:
        call("fairseq-train", lm_data, **settings)
    refused(error, f"{run.last} cannot be read", "no whole one in its folder: move it away to begin anew")
