"""A run that is interrupted and resumed is, bit for bit, the run that is not."""

import pytest
import torch
from cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION, assert_equal, call, parameters

BEFORE, AT, SOFT, HARD = 3, 6, 9, 12
DATA = {
    "language_modeling": "lm_data",
    "masked_lm": "lm_data",
    "translation": "translation_data",
    "sentence_prediction": "classification_data",
}
TASKS = [
    pytest.param(settings, id=settings["task"]) for settings in (LM, MASKED_LM, TRANSLATION, CLASSIFICATION)
]


def check_resume(data, folder, settings, stops):
    """Resuming from each of some updates ends where the uninterrupted run ends."""
    settings = {"save_interval_updates": 3, **settings}
    call("fairseq-train", data, save_dir=folder / "whole", **settings)
    saved = {int(path.stem.split("_")[2]): path for path in (folder / "whole").glob("checkpoint_?_*.pt")}
    whole = torch.load(folder / "whole/checkpoint_last.pt")
    for stop in stops:
        restarted = folder / f"from{stop}"
        result = call("fairseq-train", data, save_dir=restarted, restore_file=saved[stop], **settings)
        assert [step["num_updates"] for step in result.log("train_inner")][0] == stop + 1
        assert_equal(*(parameters(path / "checkpoint_last.pt") for path in (restarted, folder / "whole")))
        resumed = torch.load(restarted / "checkpoint_last.pt")
        assert_equal(resumed["last_optimizer_state"], whole["last_optimizer_state"])
        ours, theirs = (each["optimizer_history"][-1] for each in (resumed, whole))
        assert ours["num_updates"] == theirs["num_updates"] == settings["max_update"]
        assert_equal(ours["lr_scheduler_state"], theirs["lr_scheduler_state"])
        for key in ("ema", "ema_fp32_params"):
            assert_equal(resumed["extra_state"].get(key), whole["extra_state"].get(key))
    return saved


@pytest.mark.parametrize("settings", TASKS)
def test_every_phase(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    stops = (BEFORE, AT, SOFT, HARD) if settings is LM else (AT, SOFT)
    check_resume(data, tmp_path, settings, stops)


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


OPTIMIZERS = {
    "adam": {"weight_decay": 0.1},
    "adamax": {},
    "sgd": {"momentum": 0.9},
    "nag": {"momentum": 0.9},
    "adagrad": {},
    "adadelta": {},
    "adafactor": {"relative_step": False, "scale_parameter": False, "beta1": 0.9},
}


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
    saved = check_resume(lm_data, tmp_path, settings, (SOFT,))

    # the spawn leaves no trace in the schedule
    plain = {**settings, "moe_experts": 1, "save_dir": tmp_path / "plain", "save_interval_updates": 3}
    call("fairseq-train", lm_data, **plain)
    for path in saved.values():
        spawned, other = (torch.load(tmp_path / folder / path.name) for folder in ("whole", "plain"))
        if schedule != "reduce_lr_on_plateau":  # that one depends on the validation losses
            ours, theirs = (each["optimizer_history"][-1]["lr_scheduler_state"] for each in (spawned, other))
            ours.pop("best", None), theirs.pop("best", None)
            assert ours == theirs
            ours, theirs = (
                each["last_optimizer_state"]["param_groups"][0]["lr"] for each in (spawned, other)
            )
            assert ours == theirs
