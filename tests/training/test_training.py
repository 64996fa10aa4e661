"""The tasks through all phases, and the phase before the spawn against fairseq's dense models."""

import re

import pytest
import torch

from fairseq_evomoe.training.growth import spawn
from support.cli import CLASSIFICATION, LM, MASKED_LM, assert_equal, build, call, parameters, run
from support.tasks import DATA, TASKS, check_phases, dense


@pytest.mark.parametrize("settings", TASKS)
def test_a_task_goes_through_all_phases(settings, trained, request):
    data, run = request.getfixturevalue(DATA[settings["task"]]), trained(settings)
    check_phases(run.result)
    names = {"task": settings["task"], "criterion": settings["criterion"], "user_dir": settings["user_dir"]}
    checked = call("fairseq-validate", data, path=run.last, batch_size=8, num_workers=0, **names)
    found = re.search(r"\| valid on 'valid' subset \| (.*)", checked.output)
    reported = dict(part.rsplit(" ", 1) for part in found.group(1).split(" | "))
    assert float(reported["loss"]) == run.log("valid")[-1]["valid_loss"]
    assert float(reported["moe_experts"]) == 1


def test_fine_tuning_from_a_masked_lm(lm_data, classification_data, tmp_path):
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**MASKED_LM, "moe_spawn_update": 4})
    spawned = tmp_path / "checkpoint_last.pt"
    result = call(
        "fairseq-train",
        classification_data,
        restore_file=spawned,
        reset_optimizer=True,
        reset_dataloader=True,
        reset_meters=True,
        save_dir=tmp_path / "tuned",
        **{**CLASSIFICATION, "moe_spawn_update": 0, "moe_hard_update": 0},
    )
    assert not result.lines("spawned experts")
    assert {step["moe_phase"] for step in result.log("train_inner")} == {2}
    tuned, before = parameters(tmp_path / "tuned/checkpoint_last.pt"), parameters(spawned)
    name = "encoder.sentence_encoder.layers.1.moe.experts.w1"
    assert tuned[name].shape == before[name].shape and not torch.equal(tuned[name], before[name])
    assert any("classification_heads" in key for key in tuned)


def test_fine_tuning_grows_from_a_masked_lm_that_has_not(classification_data, trained, tmp_path):
    result = call(
        "fairseq-train",
        classification_data,
        finetune_from_model=trained(MASKED_LM).at(6),
        save_dir=tmp_path,
        **CLASSIFICATION,
    )
    check_phases(result)


def test_the_console_script(lm_data, trained, tmp_path):
    """In a process of its own it does what it does in this one."""
    result = run("fairseq-train", lm_data, cwd=tmp_path, save_dir=tmp_path / "checkpoints", **LM)
    check_phases(result)
    here = trained(LM)
    losses = [[step["loss"] for step in each.log("train_inner")] for each in (result, here)]
    assert losses[0] == losses[1]
    assert_equal(parameters(tmp_path / "checkpoints" / "checkpoint_last.pt"), parameters(here.last))


@pytest.mark.parametrize("settings", TASKS)
def test_before_the_spawn_it_is_the_dense_model(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    moe, plain = build(data, **settings).model, build(data, **dense(settings)).model
    assert sum(p.numel() for p in moe.parameters()) == sum(p.numel() for p in plain.parameters())
    other = build(data, **{**settings, "seed": 2}).model
    other.load_state_dict(plain.state_dict())
    assert_equal(moe.state_dict(), other.state_dict())

    results = [
        call("fairseq-train", data, save_dir=tmp_path / name, **{**each, "max_update": 7})
        for name, each in (("moe", settings), ("dense", dense(settings)))
    ]
    for ours, theirs in zip(*(result.log("train_inner")[:6] for result in results)):
        for key in ("loss", "gnorm", "wpb", "lr"):
            assert ours[key] == pytest.approx(theirs[key], abs=2e-3), key


def test_the_spawn_says_what_it_does(lm_data, tmp_path):
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **{**LM, "moe_spawn_method": "noise"})
    counted = [
        int(n.replace(",", "")) for n in re.findall(r"num. shared model params: ([\d,]+)", result.output)
    ]
    (line,) = result.lines("spawned experts")
    update, before, after, p_before, p_after, method = re.search(
        r"before update (\d+): (\d+) -> (\d+) experts, ([\d,]+) -> ([\d,]+) parameters, method (\w+)", line
    ).groups()
    assert (int(update), int(before), int(after), method) == (6, 1, 4, "noise")
    assert [int(p_before.replace(",", ""))] == counted
    saved = parameters(tmp_path / "checkpoint_last.pt")
    # one of the two layers has experts: three more of 32 x 48, and a gate on the hidden state
    more = 3 * (2 * 32 * 48 + 48 + 32) + 4 * 32
    assert int(p_after.replace(",", "")) == counted[0] + more
    assert saved["decoder.layers.1.moe.experts.w1"].shape == (4 * 48, 32)
    # between the warning of the spawn's update and the end, each update was counted once
    assert [step["num_updates"] for step in result.log("train_inner")] == list(range(1, 15))


def test_growing_uses_no_random_number_of_the_run(lm_data):
    trainer = build(lm_data, **LM).trainer()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    spawn(trainer)
    assert torch.equal(torch.get_rng_state(), before)


def test_with_one_expert_it_stays_the_dense_model(lm_data, trained, tmp_path):
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **{**LM, "moe_experts": 1})
    assert not result.lines("spawned experts")
    assert {step["moe_phase"] for step in result.log("train_inner")} <= {1, 2}
    plain = trained(dense(LM))
    assert result.log("valid")[-1]["valid_loss"] == plain.log("valid")[-1]["valid_loss"]


def test_experts_from_the_start_are_all_different(lm_data, tmp_path):
    model = build(lm_data, **{**LM, "moe_spawn_update": 0}).model
    experts = model.decoder.layers[1].moe.experts.w1.view(4, 48, 32)
    assert len({expert.sum().item() for expert in experts}) == 4
    dense_weight = build(lm_data, **dense(LM)).model.decoder.layers[1].fc1.weight
    assert torch.equal(experts[0], dense_weight)
    assert experts.std(dim=(1, 2)).allclose(dense_weight.std(), rtol=0.1)


def test_layerdrop_does_not_decide_which_layers_have_experts(lm_data):
    settings = {**LM, "decoder_layers": 6, "decoder_layerdrop": 0.5}
    layers = build(lm_data, **settings).model.decoder.layers.children()
    assert [hasattr(layer, "moe") for layer in layers] == [False, True] * 3
