"""What checkpoints can be loaded into, averaged into and evaluated with."""

import re

import pytest
import torch

from support.cli import LM, MASKED_LM, TRANSLATION, assert_equal, build, call, parameters
from support.evaluation import EVALUATION, perplexity
from support.tasks import DATA, TASKS, dense


@pytest.fixture(scope="module")
def lm_checkpoints(trained):
    """Checkpoints of one run after 3, 6 (not spawned), 9, 12 and 14 updates (spawned)."""
    run = trained(LM)
    return {**{update: run.at(update) for update in (3, 6, 9, 12)}, 14: run.last}


def test_torch_loads_them_with_its_defaults(lm_checkpoints):
    for path in lm_checkpoints.values():
        state = torch.load(path)
        assert state["cfg"]["model"]["moe_experts"] == 4
        assert all(torch.is_tensor(tensor) for tensor in state["model"].values())


def test_before_and_after_the_spawn_they_can_be_evaluated(lm_data, lm_checkpoints):
    found = {update: perplexity(lm_data, path) for update, path in lm_checkpoints.items()}
    assert found[14] < found[6] < found[3]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("spawn_update", [6, 0])
def test_a_dense_checkpoint_is_the_base_expert(task, spawn_update, trained, tmp_path, request):
    data = request.getfixturevalue(DATA[task["task"]])
    stock = dense(task)
    stock_run = trained(stock)
    before = stock_run.log("valid")[-1]
    settings = {**task, "moe_spawn_update": spawn_update, "moe_spawn_method": "copy", "max_update": 8}
    result = call(
        "fairseq-train",
        data,
        save_dir=tmp_path / "moe",
        finetune_from_model=stock_run.last,
        **{**settings, "lr": 1e-30},
    )
    plain = build(data, **stock).model.eval()
    plain.load_state_dict(parameters(stock_run.last))
    moe = build(data, **settings).model.eval()
    moe.load_state_dict(parameters(stock_run.last))
    batch = build(data, **settings).batches("valid")[0]
    with torch.no_grad():
        expected, found = (model(**batch["net_input"])[0] for model in (plain, moe))
    if spawn_update > 0:
        assert torch.allclose(found, expected, atol=1e-6)
        first = result.log("train_inner")[0]
        assert first["loss"] == pytest.approx(before["valid_loss"], abs=1.0)
    else:
        assert all(layer.moe.spawned for layer in moe.modules() if hasattr(layer, "moe"))
        name = next(name for name, _ in moe.named_modules() if name.endswith("moe.experts"))
        fc1 = plain.state_dict()[name.replace("moe.experts", "fc1.weight")]
        assert torch.equal(moe.get_submodule(name).w1, fc1.repeat(4, 1))


def test_spawning_from_a_dense_checkpoint_applies_the_method(lm_data, trained):
    setup = build(lm_data, **{**LM, "moe_spawn_update": 0, "moe_spawn_strength": 0.25})
    state = parameters(trained(dense(LM)).last)
    fc1 = state["decoder.layers.1.fc1.weight"]
    setup.model.load_state_dict(state)
    for expert in setup.model.decoder.layers[1].moe.experts.w1.split(48):
        masked = expert == 0
        assert 0.2 < masked.float().mean() < 0.3
        assert torch.equal(expert[~masked], fc1[~masked])


def test_a_grown_checkpoint_trains_on_with_a_new_optimizer(lm_data, lm_checkpoints, tmp_path):
    settings = {**LM, "lr": 1e-30, "moe_spawn_update": 0, "moe_hard_update": 0, "max_update": 4}
    result = call(
        "fairseq-train",
        lm_data,
        save_dir=tmp_path,
        restore_file=lm_checkpoints[14],
        reset_optimizer=True,
        reset_lr_scheduler=True,
        reset_dataloader=True,
        reset_meters=True,
        **settings,
    )
    assert [step["num_updates"] for step in result.log("train_inner")] == [1, 2, 3, 4]
    assert_equal(parameters(tmp_path / "checkpoint_last.pt"), parameters(lm_checkpoints[14]))


def average(paths, target):
    """fairseq's scripts/average_checkpoints.py, which is in no package: means of the tensors by name."""
    states = [torch.load(path) for path in paths]
    models = [state["model"] for state in states]
    assert all(model.keys() == models[0].keys() for model in models)
    result = states[0]
    for name in models[0]:
        result["model"][name] = sum(model[name] for model in models) / len(models)
    torch.save(result, target)
    return target


def test_averages_can_be_evaluated(lm_data, lm_checkpoints, tmp_path):
    one = perplexity(lm_data, average([lm_checkpoints[14]], tmp_path / "one.pt"))
    assert one == perplexity(lm_data, lm_checkpoints[14])
    several = perplexity(lm_data, average([lm_checkpoints[k] for k in (9, 12, 14)], tmp_path / "three.pt"))
    assert several < perplexity(lm_data, lm_checkpoints[9])


@pytest.mark.parametrize("freq", [1, 2])
def test_layers_can_be_left_out(freq, lm_data, tmp_path):
    settings = {**LM, "decoder_layers": 4, "decoder_layerdrop": 0.2, "moe_freq": freq}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    path = tmp_path / "checkpoint_last.pt"
    for keep in ("0,1", "1,3", "0,3"):
        pruned = perplexity(lm_data, path, model_overrides=repr({"decoder_layers_to_keep": keep}))

        # by hand
        whole = build(lm_data, **{**settings, "moe_spawn_update": 0})
        whole.model.load_state_dict(parameters(path))
        layers = whole.model.decoder.layers
        whole.model.decoder.layers = torch.nn.ModuleList(layers[int(i)] for i in keep.split(","))
        total = words = 0
        whole.model.eval()
        with torch.no_grad():
            for batch in whole.batches("valid"):
                loss, _, log = whole.criterion(whole.model, batch)
                total, words = total + log["loss"], words + log["ntokens"]
        assert pruned == pytest.approx((total / words).exp().item(), rel=0.02)


def test_a_pruned_dense_checkpoint_is_the_base_expert(lm_data, tmp_path):
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**dense(LM), "decoder_layers": 4})
    state = parameters(tmp_path / "checkpoint_last.pt")
    setup = build(lm_data, **{**LM, "decoder_layers": 4, "decoder_layers_to_keep": "1,3"})
    fc1 = [state[f"decoder.layers.{i}.fc1.weight"] for i in (1, 3)]
    setup.model.load_state_dict(state, model_cfg=setup.cfg.model)
    assert [torch.equal(layer.moe.experts.w1, w) for layer, w in zip(setup.model.decoder.layers, fc1)] == [
        True
    ] * 2


def test_translation_averages_and_ensembles(translation_data, trained, tmp_path):
    run = trained(TRANSLATION)
    spawned, dense_one = run.last, run.at(6)
    mean = average([spawned, run.at(12)], tmp_path / "mean.pt")
    for path in (mean, f"{spawned}:{dense_one}", f"{spawned}:{mean}"):
        result = call(
            "fairseq-generate", translation_data, path=path, beam=1, max_len_b=20, batch_size=8, **EVALUATION
        )
        assert len(re.findall(r"^H-\d+", result.output, flags=re.MULTILINE)) == 40
        assert "BLEU4" in result.output


def test_masked_lm_averages_validate(lm_data, trained, tmp_path):
    last = trained(MASKED_LM).last
    mean = average([last] * 2, tmp_path / "mean.pt")
    names = {"task": "masked_lm", "criterion": "evomoe_masked_lm"}
    outputs = [
        call("fairseq-validate", lm_data, path=path, **names, batch_size=8, **EVALUATION).output
        for path in (mean, last)
    ]
    losses = [re.search(r"subset \| (loss [\d.]+)", output).group(1) for output in outputs]
    assert losses[0] == losses[1]
