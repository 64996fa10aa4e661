"""`evomoe densify`: dense checkpoints that fairseq loads without the plugin."""

import re
from argparse import Namespace

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel

from fairseq_evomoe.checkpoints.densify import densify_checkpoint
from fairseq_evomoe.checkpoints.merge import moe_layers_of
from fairseq_evomoe.evolution.densify import gather_experts
from support.cli import CLASSIFICATION, LM, MASKED_LM, TRANSLATION, build, call, evomoe
from support.evaluation import perplexity
from support.stock import stock
from support.tasks import DATA, TASKS, dense

CLASSES = {"language_modeling": TransformerLanguageModel, "masked_lm": RobertaModel}
CLASSES["translation"] = TransformerModel
CRITERIONS = {"language_modeling": ("cross_entropy", "CrossEntropyCriterion")}
CRITERIONS["masked_lm"] = ("masked_lm", "MaskedLmLoss")
CRITERIONS["translation"] = ("label_smoothed_cross_entropy", "LabelSmoothedCrossEntropyCriterion")
# all experts are there from the start; in evaluation each token gets all of them, by weights that sum to 1
SPAWNED = {"moe_spawn_update": 0, "max_update": 3, "moe_eval_routing": "adaptive", "moe_threshold": 0.0}


def densify(path, out, method="topk", *options):
    evomoe("densify", path, "--method", method, "--out", out, *options)
    return torch.load(out)


def loaded(path):
    (model,), _ = load_model_ensemble([str(path)])
    return model.eval()


def outputs(settings, data, *paths):
    """What models of checkpoints make of the same sentences, without padding."""
    batch = build(data, **settings).batches("valid")[0]["net_input"]
    keep = batch.get("prev_output_tokens", batch["src_tokens"]) != 1
    with torch.no_grad():
        return [loaded(path)(**batch)[0][keep] for path in paths]


@pytest.mark.parametrize("settings", TASKS)
def test_one_expert_is_the_dense_model(settings, trained, request, tmp_path, capsys):
    """As before the spawn, whatever the method, and with all that belongs to a model of fairseq's own."""
    path, out, task = trained(settings).at(3), tmp_path / "dense.pt", settings["task"]
    moe, state = torch.load(path)["model"], densify(path, out, "average")
    printed = capsys.readouterr().out
    assert re.search(r"^MoE layers \d, experts 1 -> 1, parameters ([\d,]+) -> \1: ", printed, re.MULTILINE)
    name = next(key for key in moe if key.endswith(".moe.experts.w2"))
    assert torch.equal(state["model"][name.replace("moe.experts.w2", "fc2.weight")], moe[name].t())
    before, after = outputs(settings, request.getfixturevalue(DATA[task]), path, out)
    assert type(loaded(out)) is CLASSES[task]
    assert torch.allclose(before, after, atol=1e-6) and not torch.equal(before[0], before[1])


@pytest.mark.parametrize("settings", TASKS)
def test_nothing_of_ours_is_left_in_it(settings, trained, tmp_path):
    state, task = densify(trained(settings).last, tmp_path / "dense.pt"), settings["task"]
    cfg, (name, cls) = state["cfg"], CRITERIONS[task]
    assert cfg["model"]["_name"] == dense(settings)["arch"] and cfg["criterion"]["_name"] == name
    assert state["optimizer_history"][-1]["criterion_name"] == cls
    assert cfg["common"]["user_dir"] is None
    assert not [key for key in (*cfg["model"], *state, *state["model"]) if "moe" in key]
    assert "last_optimizer_state" not in state and state["extra_state"].keys() == {"train_iterator"}


def test_a_stock_language_model(trained, lm_data, tmp_path):
    out = tmp_path / "dense.pt"
    densify(trained(LM).last, out)
    options = ["--path", out, "--gen-subset", "valid", "--tokens-per-sample", "16"]
    found = re.search(r"Perplexity: ([\d.]+)", stock("eval_lm", lm_data, *options, cwd=tmp_path))
    assert float(found[1]) == perplexity(lm_data, out, user_dir=None)


def test_a_stock_masked_language_model(trained, lm_data, tmp_path):
    out = tmp_path / "dense.pt"
    densify(trained(MASKED_LM).last, out, "svd")
    options = ["--path", out, "--task", "masked_lm", "--valid-subset", "valid"]
    printed = stock("validate", lm_data, *options, cwd=tmp_path)
    assert float(re.search(r"\| loss ([\d.]+)", printed)[1]) > 0


def test_a_stock_translator(trained, translation_data, tmp_path):
    out = tmp_path / "dense.pt"
    densify(trained(TRANSLATION).last, out, "average")
    printed = stock("generate", translation_data, "--path", out, "--max-len-b", "20", cwd=tmp_path)
    assert len(re.findall(r"^H-\d+", printed, flags=re.MULTILINE)) == 40


def test_a_classifier_keeps_its_head(trained, classification_data, tmp_path):
    path, out = trained(CLASSIFICATION).at(3), tmp_path / "dense.pt"
    densify(path, out)
    options = {"task": "sentence_prediction", "batch_size": 8, "num_workers": 0, "valid_subset": "valid"}
    ours = {"criterion": "evomoe_sentence_prediction", "user_dir": CLASSIFICATION["user_dir"]}
    losses = []
    for name, more in ((path, ours), (out, {"criterion": "sentence_prediction"})):
        printed = call("fairseq-validate", classification_data, path=name, **options, **more).output
        losses.append(re.search(r"\| loss ([\d.]+)", printed)[1])
    assert losses[0] == losses[1]


def with_copies(path, target):
    """A checkpoint whose experts are all the first, as a spawn by copies makes them."""
    state = torch.load(path)
    for key, tensor in state["model"].items():
        if ".moe.experts." in key and ".norm." not in key:
            first = tensor[: len(tensor) // 4].clone()
            tensor.copy_(torch.cat([first] * 4))
    torch.save(state, target)
    return target


def test_the_average_of_equal_experts_is_the_same_model(trained, lm_data, tmp_path):
    path = with_copies(trained(LM, **SPAWNED).last, tmp_path / "copies.pt")
    densify(path, tmp_path / "dense.pt", "average")
    before, after = outputs({**LM, **SPAWNED}, lm_data, path, tmp_path / "dense.pt")
    assert torch.allclose(before, after, atol=1e-5) and not torch.equal(before[0], before[1])


def test_each_layer_has_what_its_experts_become(trained, tmp_path):
    path = trained(TRANSLATION, **SPAWNED).last
    before, after = torch.load(path), densify(path, tmp_path / "dense.pt", "svd", "--rank", 3)["model"]
    for side in ("encoder", "decoder"):
        prefix = f"{side}.layers.1."
        tensors = {n: before["model"][f"{prefix}moe.experts.{n}"] for n in ("w1", "b1", "w2", "b2")}
        expected = gather_experts(tensors, [48] * 4, 48, "svd", 3)
        assert torch.equal(after[prefix + "fc1.weight"], expected["w1"])
        assert torch.equal(after[prefix + "fc1.bias"], expected["b1"])
        assert torch.equal(after[prefix + "fc2.weight"], expected["w2"].t())
        assert torch.equal(after[prefix + "fc2.bias"], expected["b2"][0])


def test_several_files_and_one_become_the_same(trained, tmp_path):
    whole = trained(LM, **SPAWNED).last
    evomoe("reshard", whole, "--parts", 2, "--out", tmp_path / "parts.pt")
    one, other = (
        densify(path, tmp_path / f"dense{i}.pt")["model"]
        for i, path in enumerate((whole, tmp_path / "parts.pt"))
    )
    assert one.keys() == other.keys() and "decoder.layers.1.fc1.weight" in one
    assert all(torch.equal(one[key], other[key]) for key in one if not key.endswith("_float_tensor"))


def test_the_norm_of_hidden_units_comes_along(trained, tmp_path, capsys):
    """That of scale_fc, with a fairseq that makes one (0.12.3 does not)."""
    state, norm = torch.load(trained(LM, **SPAWNED).last), torch.linspace(0.5, 1, 48)
    state["model"]["decoder.layers.1.moe.experts.hidden.norm.weight"] = norm
    torch.save(state, tmp_path / "moe.pt")
    made = densify(tmp_path / "moe.pt", tmp_path / "dense.pt", "average")
    assert torch.equal(made["model"]["decoder.layers.1.ffn_layernorm.weight"], norm)
    with pytest.raises(SystemExit):
        densify(tmp_path / "moe.pt", tmp_path / "other.pt", "topk")
    assert "scale_fc" in capsys.readouterr().err


def test_it_can_be_fine_tuned_without_the_plugin(trained, lm_data, tmp_path):
    densify(trained(LM).last, tmp_path / "dense.pt")
    settings = {**dense(LM), "max_update": 2, "finetune_from_model": tmp_path / "dense.pt"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path / "on", **settings)
    assert [step["num_updates"] for step in result.log("train_inner")] == [1, 2]


def test_old_checkpoints_with_a_namespace(trained):
    state = torch.load(trained(LM).last)
    options = {**state["cfg"]["model"], "arch": "evomoe_lm_tiny", "criterion": "evomoe_cross_entropy"}
    state.update(args=Namespace(**options, user_dir="somewhere"), cfg=None)
    args = densify_checkpoint(state, moe_layers_of(state, one_expert=True), "topk")["args"]
    assert (args.arch, args.criterion, args.user_dir) == ("transformer_lm", "cross_entropy", None)
    assert not [name for name in vars(args) if name.startswith("moe_")] and args.seed == options["seed"]


def moe(name, shape=(192, 32)):
    """A change of a checkpoint: a tensor of the MoE layer that was not there."""
    return lambda state: state["model"].update({f"decoder.layers.1.moe.{name}": torch.zeros(shape)})


def option(name, value):
    return lambda state: state["cfg"]["model"].update({name: value})


@pytest.mark.parametrize(
    "change, arguments, parts",
    [
        (moe("experts.w3"), ["topk"], ["gated", "--moe-expert-activation"]),
        (moe("heads.head.weight"), ["topk"], ["--moe-heads"]),
        (moe("shared.w1"), ["topk"], ["--moe-shared-expert"]),
        (moe("hyper_adapter.expert_embedding"), ["topk"], ["--moe-hyper-adapter"]),
        (moe("router.norms.0.weight"), ["average"], ["LayerNorms of --moe-strata"]),
        (moe("router.free.weight"), ["topk"], ["--moe-zero-experts", "--moe-constant-experts"]),
        (option("moe_expert_activation", "gelu"), ["topk"], ["--moe-expert-activation gelu", "relu"]),
        (option("moe_expert_sizes", "1,1,2,2"), ["average"], ["--method average", "have 32, 64", "use topk"]),
        (option("decoder_ffn_embed_dim", 64), ["sum"], ["--method sum", "64 hidden", "have 48"]),
        (option("_name", "of_somebody"), ["topk"], ["of_somebody", "evomoe_lm"]),
        (lambda state: None, ["topk", "--rank", 2], ["--rank", "--method topk"]),
        (lambda state: None, ["svd", "--rank", 33], ["--rank must be from 1 to 32", "is 33"]),
        (lambda state: state.update(model={}), ["topk"], ["no MoE layers"]),
    ],
)
def test_errors_are_one_sentence(change, arguments, parts, trained, tmp_path, capsys):
    state = torch.load(trained(LM, **SPAWNED).last)
    change(state)
    torch.save(state, tmp_path / "moe.pt")
    method, *options = arguments
    with pytest.raises(SystemExit) as stopped:
        densify(tmp_path / "moe.pt", tmp_path / "dense.pt", method, *options)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("evomoe densify: ") and message.endswith(".\n") and message.count("\n") == 1
    assert all(part in message for part in parts), message
    assert not (tmp_path / "dense.pt").exists()
