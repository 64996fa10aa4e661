"""SMoLA: low-rank experts learn beside a frozen dense model, and can be taken off it and put on again."""

from pathlib import Path

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.models.feed_forward import CheckpointMismatch
from fairseq_evomoe.models.low_rank import low_rank_experts
from support.cli import LM, MASKED_LM, TRANSLATION, Run, assert_equal, build, call, evomoe, parameters, run
from support.parallel import RANKS, TOLERANCE
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks
from support.refusals import refused
from support.resume import check_resume
from support.tasks import PLAIN, dense

QUIET = {"disable_validation": True}


def adapted(settings):
    """Settings of a run that adds low-rank experts to a model, a tiny one of two experts of rank 3."""
    kept = {name: value for name, value in settings.items() if name not in PLAIN}
    return {**kept, **QUIET, "moe_preset": "smola", "moe_rank": 3, "moe_experts": 2, "max_update": 6}


SMOLA = adapted(MASKED_LM)


@pytest.fixture(scope="module")
def backbone(lm_data, tmp_path_factory):
    """A dense model of fairseq's own."""
    folder = tmp_path_factory.mktemp("backbone")
    settings = {**dense(MASKED_LM), **QUIET, "max_update": 3}
    return Run(folder, call("fairseq-train", lm_data, save_dir=folder, **settings))


@pytest.fixture(scope="module")
def adaptation(backbone, lm_data, tmp_path_factory):
    """A run beside it, by the console script."""
    folder = tmp_path_factory.mktemp("adapted")
    settings = {**SMOLA, "save_interval_updates": 3, "finetune_from_model": backbone.last}
    return Run(folder, run("fairseq-train", lm_data, save_dir=folder, **settings))


def outputs(data, path):
    """The logits of a checkpoint's model for some tokens, in evaluation."""
    setup = build(data, **SMOLA)
    setup.model.load_state_dict(torch.load(path)["model"])
    torch.manual_seed(0)
    with torch.no_grad():
        return setup.model.eval()(torch.randint(4, 20, (3, 7)))[0]


def test_the_backbone_stays_what_it_was_bit_for_bit(backbone, adaptation):
    before, after = parameters(backbone.last), parameters(adaptation.last)
    new = set(after) - set(before)
    assert set(before) <= set(after)
    assert_equal({name: after[name] for name in before}, before)
    assert new and all(".low_rank." in name for name in new)
    up = [name for name in new if name.endswith("up_ERO")]
    # four projections and two layers of the feed-forward network, in both layers
    assert len(up) == 2 * 6 and all(after[name].abs().sum() > 0 for name in up)
    losses = [line["loss"] for line in adaptation.log("train_inner")]
    assert len(losses) == 6
    (line,) = adaptation.result.lines("not trained, by --moe-freeze: backbone")
    (line,) = adaptation.result.lines("2 experts of rank 3 beside")
    assert "in 2 of 2 layers" in line


def test_it_starts_as_the_backbone(backbone, lm_data):
    """But for rounding where attention's projections are called instead of being handed to PyTorch."""
    torch.manual_seed(0)
    tokens = torch.randint(4, 20, (3, 7))
    tokens[1, 4:] = 1  # padding
    plain = build(lm_data, **dense(MASKED_LM)).model
    plain.load_state_dict(torch.load(backbone.last)["model"])
    for beside, tolerance in (("ffn", 0), ("attention", 1e-5)):
        model = build(lm_data, **SMOLA, moe_beside=beside).model
        model.load_state_dict(torch.load(backbone.last)["model"])
        with torch.no_grad():
            difference = model.eval()(tokens)[0] - plain.eval()(tokens)[0]
        assert difference.abs().max() <= tolerance


def test_they_learn(backbone, lm_data):
    """One batch again and again, whose masks stay as they are."""
    setup = build(lm_data, **{**SMOLA, "lr": 0.02, "dropout": 0.0, "attention_dropout": 0.0})
    setup.model.load_state_dict(torch.load(backbone.last)["model"])
    trainer, batch = setup.trainer(), setup.batches()[0]
    trainer.begin_epoch(1)
    losses = [float(trainer.train_step([batch])["loss"]) for _ in range(40)]
    assert losses[-1] < 0.95 * losses[0]


def test_padding_and_the_batch_change_nothing(adaptation, lm_data):
    setup = build(lm_data, **SMOLA)
    setup.model.load_state_dict(torch.load(adaptation.last)["model"])
    model = setup.model.eval()
    torch.manual_seed(0)
    tokens = torch.randint(4, 20, (2, 7))
    tokens[1, 4:] = 1
    with torch.no_grad():
        both, alone = model(tokens)[0], model(tokens[1:, :4])[0]
        other = tokens.clone()
        other[1, 3] = 23
        changed = model(other)[0]
    assert torch.allclose(both[1, :4], alone[0], atol=1e-6)
    assert torch.equal(changed[0], both[0]) and not torch.equal(changed[1, 0], both[1, 0])


def test_recomputed_activations_change_nothing(lm_data):
    batch = build(lm_data, **SMOLA).batches()[0]
    gradients = []
    for recompute in (False, True):
        setup = build(lm_data, **SMOLA, checkpoint_activations=recompute, dropout=0.0, attention_dropout=0.0)
        for _, experts in low_rank_experts(setup.model):
            experts.up_ERO.data.fill_(0.1)
        torch.manual_seed(1)
        setup.criterion(setup.model.train(), batch)[0].backward()
        gradients.append({n: p.grad for n, p in setup.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and all(".low_rank." in name for name in gradients[0])
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_a_resumed_run_is_the_same(adaptation, lm_data, tmp_path):
    check_resume(lm_data, tmp_path, SMOLA, [3], adaptation)


def test_experts_are_taken_off_and_put_on_again(backbone, adaptation, lm_data, tmp_path, capsys):
    adapter, again = tmp_path / "adapter.pt", tmp_path / "again.pt"
    evomoe("detach", adaptation.last, "--out", adapter)
    evomoe("attach", adapter, backbone.last, "--out", again)
    assert_equal(parameters(again), parameters(adaptation.last))
    assert torch.equal(outputs(lm_data, again), outputs(lm_data, adaptation.last))
    assert all(".low_rank." in name for name in torch.load(adapter)["model"])
    assert capsys.readouterr().out.count("parameters ") == 2
    whole, own = (run_validation(lm_data, path) for path in (again, adaptation.last))
    assert whole == own and "valid on" in whole
    go_on = {**SMOLA, "max_update": 1, "restore_file": again, "reset_optimizer": True}
    call("fairseq-train", lm_data, save_dir=tmp_path / "on", **go_on)


def run_validation(data, path):
    """The line that `fairseq-validate` prints, without the time."""
    user_dir = {"user_dir": MASKED_LM["user_dir"], "task": "masked_lm", "tokens_per_sample": 48}
    result = call("fairseq-validate", data, path=path, batch_size=8, num_workers=0, **user_dir)
    return result.lines("valid on")[-1].split(" | ", 3)[-1].split(" | wps")[0]


def test_what_detach_and_attach_refuse(backbone, adaptation, lm_data, tmp_path, capsys):
    def said(*arguments):
        with pytest.raises(SystemExit):
            evomoe(*arguments, "--out", tmp_path / "out.pt")
        assert not (tmp_path / "out.pt").exists()
        return capsys.readouterr().err

    adapter = tmp_path / "adapter.pt"
    evomoe("detach", adaptation.last, "--out", adapter)
    capsys.readouterr()
    assert "no low-rank experts" in said("detach", backbone.last)
    assert "evomoe detach" in said("attach", backbone.last, backbone.last)
    assert "stand beside" in said("attach", adapter, adapter)
    other = torch.load(backbone.last)
    next(x for name, x in other["model"].items() if name.endswith("fc1.weight"))[0, 0] += 1
    torch.save(other, tmp_path / "other.pt")
    assert "another model" in said("attach", adapter, tmp_path / "other.pt")
    trained = torch.load(adaptation.last)
    trained["cfg"]["model"]["moe_freeze"] = None
    torch.save(trained, tmp_path / "trained.pt")
    assert "--moe-freeze" in said("detach", tmp_path / "trained.pt")


@pytest.mark.ranks
def test_two_ranks_are_one_process(backbone, lm_data, tmp_path):
    exact = {"dropout": 0.0, "attention_dropout": 0.0, "adam_eps": 1e-4, "batch_size": 5, "clip_norm": 0.5}
    settings = {**SMOLA, **exact, "finetune_from_model": backbone.last, "seed": 2}
    settings["required_batch_size_multiple"] = 1
    train_on_ranks(RANKS, [[[lm_data], {**settings, "save_dir": tmp_path / "two"}]], tmp_path / "jobs")
    train_on_all_batches(RANKS, lm_data, save_dir=tmp_path / "one", **settings)
    one, two = (state_of(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert largest_difference(one, two) < TOLERANCE


def test_the_encoder_of_a_translation_model(translation_data, tmp_path):
    settings = {**dense(TRANSLATION), **QUIET, "max_update": 1}
    call("fairseq-train", translation_data, save_dir=tmp_path / "dense", **settings)
    last = tmp_path / "dense" / "checkpoint_last.pt"
    settings = {**adapted(TRANSLATION), "max_update": 2, "finetune_from_model": last}
    result = call("fairseq-train", translation_data, save_dir=tmp_path / "adapted", **settings)
    assert result.lines("the decoder has none")
    before, after = parameters(last), parameters(tmp_path / "adapted" / "checkpoint_last.pt")
    assert_equal({name: after[name] for name in before}, before)
    assert all(name.startswith("encoder.") for name in set(after) - set(before))


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"moe_rank": 33}, ["--moe-rank", "32", "33"]),
        ({"moe_router": "switch", "moe_slots": None}, ["--moe-rank", "soft", "switch"]),
        ({"moe_spawn_update": 2}, ["--moe-spawn-update", "--moe-rank"]),
        ({"moe_spawn_method": "copy"}, ["--moe-spawn-method", "--moe-rank"]),
        ({"moe_expert_activation": "swiglu"}, ["--moe-expert-activation", "--moe-rank"]),
        ({"moe_shared_expert": True}, ["--moe-shared-expert", "--moe-rank"]),
        ({"moe_spawn_strength": 0.3}, ["--moe-spawn-strength", "--moe-rank"]),
        ({"moe_freq": 3}, ["--moe-freq", "2"]),
    ],
    ids=str,
)
def test_refused(options, parts, lm_data):
    with pytest.raises(ConfigError) as error:
        build(lm_data, **{**SMOLA, **options})
    refused(error, *parts)


def test_refused_in_a_decoder(lm_data):
    with pytest.raises(ConfigError) as error:
        build(lm_data, **adapted(LM))
    refused(error, "--moe-rank", "decoder", "evomoe_roberta")


def test_refused_before_training(backbone, adaptation, lm_data, tmp_path):
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path, **SMOLA)
    refused(error, "--moe-rank", "--moe-freeze", "--finetune-from-model")
    settings = {**SMOLA, "finetune_from_model": backbone.last, "moe_expert_parallel": 2}
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert "--moe-expert-parallel 2 shares feed-forward experts out" in str(error.value)
    assert not list(Path(tmp_path).glob("*.pt"))


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"moe_rank": 2}, ["--moe-rank", "--moe-experts"]),
        ({"moe_beside": "ffn"}, ["--moe-beside", "--moe-freq"]),
    ],
    ids=str,
)
def test_other_experts_than_the_checkpoint_s(options, parts, adaptation, lm_data):
    model = build(lm_data, **{**SMOLA, **options}).model
    with pytest.raises(CheckpointMismatch) as error:
        model.load_state_dict(torch.load(adaptation.last)["model"])
    refused(error, *parts)


def test_options_without_a_rank_are_told(lm_data, tmp_path):
    settings = {**MASKED_LM, **QUIET, "moe_beside": "ffn", "max_update": 7}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    (line,) = result.lines("no effect without --moe-rank")
    assert line.endswith("--moe-beside")


def refusal(capsys, *words):
    """The sentence with which a command ends."""
    with pytest.raises(SystemExit) as end:
        evomoe(*words)
    assert end.value.code == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    return sentence


def test_info_tells_of_low_rank_experts(adaptation, capsys):
    evomoe("info", adaptation.last)
    lines = capsys.readouterr().out.splitlines()
    found = {line.split(" ")[0]: line for line in lines if line}
    assert found["stage"].endswith("low-rank experts beside a dense model")
    assert "smola" in found["preset"] and "%" in found["experts"]
    assert found["--moe-rank"].endswith(" 3")


def test_what_is_made_for_whole_experts_refuses_them(adaptation, lm_data, tmp_path, capsys):
    sentence = "low-rank experts beside the linear layers of a dense model, and no MoE layers"
    densify = ["densify", adaptation.last, "--method", "sum", "--out", tmp_path / "x.pt"]
    assert sentence in refusal(capsys, *densify)
    assert sentence in refusal(capsys, "merge", adaptation.last, "--experts", "2", "--out", tmp_path / "y.pt")
    report = ["report", adaptation.last, "--data", lm_data, "--out", tmp_path / "report"]
    assert "perhaps with low-rank experts" in refusal(capsys, *report)
    pytest.importorskip("safetensors")
    export = ["export", adaptation.last, "--to", "hf", "--out", tmp_path / "hf"]
    assert "low-rank experts (--moe-rank)" in refusal(capsys, *export)
    assert not list(tmp_path.iterdir())
