"""Going on from experts that have spawned: in the last stage, unless the flags say otherwise."""

import json
import shutil

import pytest
import torch
from fairseq import checkpoint_utils

from support.cli import LM, Run, assert_equal, call, evomoe, parameters

SCHEDULE = ("moe_spawn_update", "moe_anneal_updates", "moe_hard_update")
QUIET = {"disable_validation": True, "no_save": True}
# as users do it: no flag says when anything happens
TUNED = {**{name: value for name, value in LM.items() if name not in SCHEDULE}, "max_update": 8}


@pytest.fixture(scope="module")
def spawned(lm_data, tmp_path_factory):
    """A checkpoint in the soft stage, and one of an update before, with one expert."""
    folder = tmp_path_factory.mktemp("spawned")
    settings = {**LM, "max_update": 8, "save_interval_updates": 4, "save_dir": folder}
    call("fairseq-train", lm_data, **settings)
    return folder


def stages(result):
    """Phase and temperature of each update."""
    return [(step["moe_phase"], step["moe_temperature"]) for step in result.log("train_inner")]


LAST, FIRST = (2, 0.5), (1, 2.0)


@pytest.mark.parametrize(
    "options",
    [
        {"max_update": 8},
        {"max_update": 0, "max_epoch": 1},
        {"max_update": 8, "moe_spawn_update": "auto"},
        {"max_update": 8, "moe_preset": "evomoe"},
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["finetune_from_model", "restore_file"])
def test_no_schedule_flag_is_needed(how, options, spawned, lm_data, tmp_path):
    reset = {"reset_optimizer": True, "reset_dataloader": True} if how == "restore_file" else {}
    settings = {**TUNED, **QUIET, **reset, **options, how: spawned / "checkpoint_last.pt"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert len(stages(result)) >= 7 and set(stages(result)) == {LAST}
    assert not result.lines("spawned experts before")
    (line,) = result.lines("so that they go on in the last stage")
    assert "--moe-spawn-update 0" in line
    assert not result.lines("WARNING | fairseq_evomoe.training.growth")


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"moe_spawn_update": 0, "moe_anneal_updates": 3}, [2.0, 1.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"moe_spawn_update": 2, "moe_anneal_updates": 3}, [2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.5, 0.5]),
        ({"moe_anneal_updates": 3}, [2.0, 1.5, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ({"moe_anneal_updates": "50%"}, [2.0, 1.625, 1.25, 0.875, 0.5, 0.5, 0.5, 0.5]),
    ],
    ids=str,
)
def test_flags_say_otherwise(flags, expected, spawned, lm_data, tmp_path):
    """From the update that they name, or else from update 0."""
    settings = {**TUNED, **QUIET, **flags, "finetune_from_model": spawned / "checkpoint_last.pt"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert [temperature for _, temperature in stages(result)] == expected
    assert stages(result)[0] == FIRST and not result.lines("so that they go on in the last stage")


@pytest.mark.parametrize("hard_update, soft", [(0, 0), (3, 3), (-1, 8)])
def test_the_hard_update_counts_from_0(hard_update, soft, spawned, lm_data, tmp_path):
    settings = {**TUNED, **QUIET, "moe_hard_update": hard_update}
    settings["finetune_from_model"] = spawned / "checkpoint_last.pt"
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert [phase for phase, _ in stages(result)] == [1] * soft + [2] * (8 - soft)


@pytest.mark.parametrize("options", [{}, {"moe_spawn_update": "auto"}], ids=str)
def test_a_fine_tuned_run_resumes_bit_equal(options, spawned, lm_data, tmp_path):
    """At update 4 too, which is after the spawn update that no flag gave."""
    settings = {**TUNED, **options, "disable_validation": True, "save_interval_updates": 4}
    settings["finetune_from_model"] = spawned / "checkpoint_last.pt"
    call("fairseq-train", lm_data, save_dir=tmp_path / "whole", **settings)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (tmp_path / "whole/checkpoint_1_4.pt").rename(resumed / "checkpoint_last.pt")
    result = call("fairseq-train", lm_data, save_dir=resumed, **settings)
    assert stages(result) == [LAST] * 4
    whole, parts = (parameters(path / "checkpoint_last.pt") for path in (tmp_path / "whole", resumed))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_one_expert_goes_through_all_stages(spawned, lm_data, tmp_path):
    """It has not spawned, so a tenth of the run is before the spawn."""
    settings = {**TUNED, **QUIET, "finetune_from_model": spawned / "checkpoint_1_4.pt"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert [phase for phase, _ in stages(result)] == [0] + [1] * 7
    assert len(result.lines("spawned experts before update 1")) == 1


def test_one_expert_that_is_spawned_when_it_is_loaded_starts_in_the_soft_stage(spawned, lm_data, tmp_path):
    settings = {**TUNED, **QUIET, "moe_preset": "evomoe_table"}
    settings["finetune_from_model"] = spawned / "checkpoint_1_4.pt"
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert stages(result)[0] == FIRST and not result.lines("so that they go on in the last stage")


def test_the_frozen_assignment_of_stable_stays(lm_data, tmp_path):
    stable = {**TUNED, "moe_router": "stable", "disable_validation": True}
    call("fairseq-train", lm_data, save_dir=tmp_path / "a", **stable)
    before = torch.load(tmp_path / "a/checkpoint_last.pt")["model"]["decoder.layers.1.moe.router.table_V"]
    assert (before >= 0).all()
    tuned = {**stable, "max_update": 30, "finetune_from_model": tmp_path / "a/checkpoint_last.pt"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path / "b", **tuned)
    assert {phase for phase, _ in stages(result)} == {2}
    after = torch.load(tmp_path / "b/checkpoint_last.pt")["model"]["decoder.layers.1.moe.router.table_V"]
    assert torch.equal(before, after)
    begun = {**tuned, **QUIET, "moe_stable_update": 3, "max_update": 5}
    result = call("fairseq-train", lm_data, save_dir=tmp_path / "c", **begun)
    assert [phase for phase, _ in stages(result)] == [1] * 3 + [2] * 2


def test_a_run_that_goes_on_counts_as_before(lm_data, spawned, tmp_path):
    """No counter is reset, and the spawn update is the run's own: nothing is said of a last stage."""
    settings = {**LM, **QUIET, "max_update": 12, "restore_file": spawned / "checkpoint_last.pt"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert [phase for phase, _ in stages(result)] == [1] * 2 + [2] * 2
    assert not result.lines("so that they go on in the last stage")


def stage_in_evaluation(folder):
    """Phase and temperature that fairseq's own commands evaluate the last checkpoint of a run in."""
    (model,), _ = checkpoint_utils.load_model_ensemble([str(folder / "checkpoint_last.pt")])
    layer = model.decoder.layers[1]
    return layer.schedule.phase(layer.num_updates, 1), layer.schedule.temperature(layer.num_updates)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, LAST),
        ({"moe_spawn_update": "auto"}, LAST),
        ({"moe_anneal_updates": 6}, (1, 1.5)),
        ({"moe_spawn_update": 0, "moe_anneal_updates": 6}, (1, 1.5)),
    ],
    ids=str,
)
def test_checkpoints_are_evaluated_in_the_stage_of_the_run(
    flags, expected, spawned, lm_data, tmp_path, capsys
):
    settings = {**TUNED, **flags, "max_update": 2, "disable_validation": True}
    settings["finetune_from_model"] = spawned / "checkpoint_last.pt"
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert stages(result)[-1][0] == expected[0]
    assert stage_in_evaluation(tmp_path) == expected
    capsys.readouterr()
    evomoe("info", tmp_path / "checkpoint_last.pt", "--json")
    assert json.loads(capsys.readouterr().out)["temperature"] == expected[1]


def test_a_frozen_assignment_is_evaluated_as_such(lm_data, tmp_path):
    stable = {**TUNED, "moe_router": "stable", "disable_validation": True}
    call("fairseq-train", lm_data, save_dir=tmp_path / "a", **stable)
    tuned = {**stable, "max_epoch": 1, "max_update": 400}  # a tenth of which is after the 8 of the epoch
    tuned["finetune_from_model"] = tmp_path / "a/checkpoint_last.pt"
    call("fairseq-train", lm_data, save_dir=tmp_path / "b", **tuned)
    assert stage_in_evaluation(tmp_path / "b")[0] == 2


GROWN = {"moe_spawn_update": "auto:2,auto:4", "moe_spawn_window": 3, "moe_spawn_plateau": 0.9, "lr": 0.02}


@pytest.mark.parametrize("continued", ["restart", "continue"])
def test_stages_after_the_first_resume_bit_equal(continued, lm_data, tmp_path):
    """The experts of a checkpoint spawn again in this run, whose gate anneals from there."""
    one = {
        **TUNED,
        "moe_experts": None,
        "moe_spawn_update": "1:2,4:4",
        "max_update": 5,
        "save_interval_updates": 3,
    }
    call("fairseq-train", lm_data, save_dir=tmp_path / "one", disable_validation=True, **one)
    settings = {**TUNED, **GROWN, "moe_experts": 4, "max_update": 44, "disable_validation": True}
    settings.update(moe_anneal_updates=40, moe_hard_update=-1, moe_stage_temperature=continued)
    settings.update(save_interval_updates=1, keep_interval_updates=-1, store_ema=True)
    settings["finetune_from_model"] = tmp_path / "one/checkpoint_1_3.pt"
    whole = Run(tmp_path / "whole", call("fairseq-train", lm_data, save_dir=tmp_path / "whole", **settings))
    (line,) = whole.result.lines("spawned experts before update")
    update = int(line.split("before update ")[1].split(":")[0])
    for stop in (update - 1, update + 2):
        folder = tmp_path / f"from{stop}"
        folder.mkdir()
        shutil.copy(whole.at(stop), folder / "checkpoint_last.pt")
        result = call("fairseq-train", lm_data, save_dir=folder, **{**settings, "save_interval_updates": 0})
        assert stages(result) == stages(whole.result)[stop:]
        assert_equal(parameters(folder / "checkpoint_last.pt"), parameters(whole.last))


@pytest.mark.parametrize("saved", [{}, {"store_ema": True}, {"store_ema": True, "ema_fp32": True}], ids=str)
@pytest.mark.parametrize("fp32", [False, True])
def test_an_ema_begins_with_the_experts_that_are_spawned(saved, fp32, lm_data, tmp_path):
    """Of one expert, with an EMA or without."""
    one = {**TUNED, "moe_spawn_update": 7, "max_update": 8, "disable_validation": True, **saved}
    call("fairseq-train", lm_data, save_dir=tmp_path / "one", save_interval_updates=3, **one)
    settings = {**TUNED, **QUIET, "moe_spawn_update": 0, "max_update": 2, "no_save": False}
    settings.update(store_ema=True, ema_fp32=fp32, reset_optimizer=True, reset_dataloader=True, lr=1e-9)
    settings["restore_file"] = tmp_path / "one/checkpoint_1_3.pt"
    result = call("fairseq-train", lm_data, save_dir=tmp_path / "many", **settings)
    assert result.lines("has no EMA: --store-ema begins with") != [] or saved
    state = torch.load(tmp_path / "many/checkpoint_last.pt")
    ema = state["extra_state"]["ema"]
    if not saved:
        model = state["model"]
        assert ema.keys() == model.keys()
        assert [k for k, x in ema.items() if not torch.allclose(x.float(), model[k].float(), atol=1e-5)] == []
    if fp32:
        averages = state["extra_state"]["ema_fp32_params"]
        assert all(torch.equal(averages[key], x) for key, x in ema.items())
