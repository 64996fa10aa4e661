"""`evomoe export` and `evomoe import`: models out of fairseq, and back."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble
from fairseq.sequence_generator import SequenceGenerator
from omegaconf import OmegaConf

from fairseq_evomoe.checkpoints.hf import folder as folders
from fairseq_evomoe.checkpoints.hf.architecture import Architecture
from fairseq_evomoe.checkpoints.hf.code import files_of_model
from fairseq_evomoe.checkpoints.hf.tokenizer import told
from fairseq_evomoe.models.layers import moe_layers
from fairseq_evomoe.moe import ROUTERS
from support import elsewhere
from support.cli import LM, MASKED_LM, TRANSLATION, assert_equal, build, evomoe
from support.tasks import DATA, TASKS

safetensors = pytest.importorskip("safetensors.torch")

AUTO = {"language_modeling": "AutoModelForCausalLM", "masked_lm": "AutoModelForMaskedLM"}
AUTO["translation"] = "AutoModelForSeq2SeqLM"
OPTIONS = {
    "stable": {"moe_stable_update": 5},
    "soft": {"moe_slots": 3},
    "stratified": {"moe_strata": "1,1,2", "moe_output_masking": 0.1},
}
PROMPT, MOST = 5, 8
"""Tokens that a language model is given, and tokens that are generated at most."""

SCRIPT = Path(elsewhere.__file__).with_name("exported.py")

MORE = {
    "language_modeling": {
        "learned": {"decoder_learned_pos": True, "share_decoder_input_output_embed": True, "moe_freq": 2},
        "beside": {
            "moe_heads": 2,
            "moe_shared_expert": True,
            "moe_hyper_adapter": True,
            "moe_scaling_factor": 1.5,
            "activation_fn": "gelu",
        },
        "free": {
            "moe_router": "topk",
            "moe_expert_activation": "swiglu",
            "moe_zero_experts": 1,
            "moe_copy_experts": 1,
            "moe_constant_experts": 1,
        },
        "table": {"moe_gate_input": "table"},
        "adaptive": {"moe_gate_input": "both", "moe_eval_routing": "adaptive", "moe_threshold": 0.2},
        "uneven": {"moe_router": "top-p", "moe_expert_sizes": "1,2,3,4", "moe_total_ffn_dim": 120},
    },
    "masked_lm": {"untied": {"untie_weights_roberta": True}},
    "translation": {
        "strata, norm after": {"moe_router": "stratified", "moe_strata": "2,2"},
        "pre": {"encoder_normalize_before": True, "decoder_normalize_before": True},
        "apart": {"share_all_embeddings": False, "moe_router": "switch"},
    },
}
"""Models with more than their router, by task."""


def cases():
    """Settings of a small model for each router, and for the other parts that a model may have."""
    for name, cls in ROUTERS.items():
        if not cls.__module__.startswith("fairseq_evomoe.moe.routers."):
            continue  # of a test's plugin
        base = MASKED_LM if cls.needs_whole_sequence else LM
        yield name, {**base, "moe_router": name, **OPTIONS.get(name, {})}
    for base in (LM, MASKED_LM, TRANSLATION):
        for name, options in MORE[base["task"]].items():
            yield name, {**base, **options}


def checkpoint(data, path, settings):
    """A checkpoint of a model with all its experts, whose parameters are random, and its setup."""
    settings = {"moe_freq": 1, **settings, "moe_spawn_update": 0, "dropout": 0.0}
    if settings.get("moe_router", "dts") != "dts":
        settings = {k: x for k, x in settings.items() if k not in ("moe_anneal_updates", "moe_hard_update")}
    setup, generator = build(data, **settings), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for name, table in setup.model.named_buffers():
            if name.endswith("table_V"):
                table.copy_(torch.randint(4, table.shape, generator=generator))
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(setup.cfg, resolve=True, enum_to_str=True),
        "model": setup.model.state_dict(),
        "optimizer_history": [{"num_updates": 1, "optimizer_name": "", "lr_scheduler_state": {}}],
        "extra_state": {},
    }
    torch.save(state, path)
    return setup


def longest(setup):
    """A batch of real sentences with the most padding."""
    batches = [batch["net_input"] for batch in setup.batches("valid")]
    return max(batches, key=lambda batch: int(batch["src_tokens"].eq(1).sum()))


def loaded(path, **overrides):
    (model,), _ = load_model_ensemble([str(path)], arg_overrides=overrides)
    return model.eval()


def generated(model, setup, tokens):
    """What fairseq generates without a beam, behind the first tokens in a language model."""
    known = 0 if setup.cfg.task._name == "translation" else PROMPT - 1
    options = {"beam_size": 1, "max_len_a": 0, "max_len_b": MOST + known}
    generator = SequenceGenerator([model], setup.task.target_dictionary, **options)
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": tokens.ne(1).sum(1)}}
    # a language model's text begins with the end of the one before
    found = generator.generate([model], sample, prefix_tokens=tokens[:, 1:] if known else None)
    return [hypotheses[0]["tokens"].tolist()[known:][:MOST] for hypotheses in found]


def expected(path, setup, generate=False):
    """What fairseq makes of a checkpoint, for ``support/exported.py``."""
    model, batch, task = loaded(path), longest(setup), setup.cfg.task._name
    with torch.no_grad():
        found = {**batch, "logits": model(**batch)[0], "auto": AUTO[task]}
        if generate:
            tokens = batch["src_tokens"]
            if task == "language_modeling":
                # the beginning of one text, as fairseq's generator has it
                tokens = tokens[(tokens[:, 1:PROMPT] > 2).all(1), :PROMPT].clone()
                tokens[:, 0] = 2
            found.update(prompt=tokens, generated=generated(model, setup, tokens), most=MOST)
    return found


def export(path, out, *options):
    evomoe("export", path, "--to", "hf", "--out", out, *options)
    return out


@pytest.mark.network
@pytest.mark.skipif(not os.environ.get("EVOMOE_NETWORK_TESTS"), reason="needs the network")
def test_a_model_elsewhere_is_the_same(request, trained, tmp_path):
    """Where there is neither fairseq nor this package: every router, and trained models of three tasks."""
    made = []
    data = {
        task: request.getfixturevalue(fixture) for task, fixture in DATA.items() if "sentence" not in task
    }
    jobs = [(f"{settings['task']}-{name}", settings, None) for name, settings in cases()]
    jobs += [
        (settings["task"], settings, trained(settings).last) for settings in (LM, MASKED_LM, TRANSLATION)
    ]
    for name, settings, path in jobs:
        folder, task = tmp_path / name, settings["task"]
        folder.mkdir()
        if path is None:
            path = folder / "model.pt"
            setup = checkpoint(data[task], path, settings)
        else:
            setup = build(data[task], **settings)
        found = expected(path, setup, generate=task != "masked_lm")
        options = ["--data", data[task]]
        if task == "translation":
            options += ["--sentencepiece", data[task] / "spm.model"]
            found["text"] = (data[task] / "valid.de").read_text().splitlines()
            found["tokens"] = [setup.task.dataset("valid")[i]["source"].tolist() for i in range(12)]
        torch.save(found, folder / "expected.pt")
        export(path, folder / "hf", *options)
        made.append((folder, found))
    environment = tmp_path / "environment"
    environment.mkdir()
    path = elsewhere.make(environment)
    printed = elsewhere.run(path, SCRIPT, *[folder for folder, _ in made], cwd=tmp_path)
    rows = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("FOUND ")]
    assert len(rows) == len(made), printed
    for row, (_, found) in zip(rows, made):
        assert row["difference"] < 1e-5 and not row["faults"], row
        assert row.get("cached", 0) < 1e-5, row
        assert row.get("generated") == found.get("generated"), row
        if "text" in found:
            assert row["tokens"] == found["tokens"] and row["text"] == found["text"]


NLLB = {
    **TRANSLATION,
    "moe_router": "topk",
    "moe_freq": 2,
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
}


@pytest.mark.network
@pytest.mark.skipif(not os.environ.get("EVOMOE_NETWORK_TESTS"), reason="needs the network")
def test_an_nllb_moe_elsewhere_is_the_same(translation_data, tmp_path):
    """transformers 4's: the class of 5.24 takes the numbers of chosen experts for those that are asked."""
    setup = checkpoint(translation_data, tmp_path / "model.pt", NLLB)
    found = expected(tmp_path / "model.pt", setup, generate=True)
    torch.save(found, tmp_path / "expected.pt")
    evomoe("export", tmp_path / "model.pt", "--to", "nllb_moe", "--out", tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.py"))
    path = elsewhere.make(tmp_path, "transformers<5")
    printed = elsewhere.run(path, SCRIPT, tmp_path, cwd=tmp_path)
    (row,) = [json.loads(line[6:]) for line in printed.splitlines() if line.startswith("FOUND ")]
    assert row["difference"] < 1e-5 and row["cached"] < 1e-5 and not row["faults"], row
    assert row["generated"] == found["generated"]


def test_an_nllb_moe_has_all_tensors(translation_data, tmp_path):
    checkpoint(translation_data, tmp_path / "model.pt", {**NLLB, "moe_gate_lr_scale": 2.0})
    evomoe("export", tmp_path / "model.pt", "--to", "nllb_moe", "--out", tmp_path / "hf")
    found, before = folders.read_tensors(tmp_path / "hf"), torch.load(tmp_path / "model.pt")["model"]
    layer, moe = "model.decoder.layers.1.ffn.", "decoder.layers.1.moe."
    assert torch.equal(found[layer + "router.classifier.weight"], 2 * before[moe + "router.weight"])
    second = slice(48, 96)
    assert torch.equal(found[layer + "experts.expert_1.fc1.weight"], before[moe + "experts.w1"][second])
    assert torch.equal(found[layer + "experts.expert_1.fc2.weight"], before[moe + "experts.w2"][second].t())
    assert torch.equal(found["lm_head.weight"], before["encoder.embed_tokens.weight"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["num_experts"], config["decoder_sparse_step"], config["encoder_ffn_dim"]) == (4, 2, 48)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"encoder_normalize_before": False}, "layer norms behind the sublayers"),
        ({"moe_router": "switch"}, "the router switch instead of a plain top-2 gate"),
        ({"moe_top_k": 3}, "the router topk instead of"),
        ({"share_all_embeddings": False}, "several embeddings"),
        ({"activation_fn": "gelu"}, "activation gelu"),
        ({"moe_shared_expert": True}, "a shared expert"),
        ({"decoder_learned_pos": True}, "positions"),
    ],
)
def test_what_is_no_nllb_moe(changes, text, translation_data, tmp_path, capsys):
    checkpoint(translation_data, tmp_path / "model.pt", {**NLLB, **changes})
    rest = [tmp_path / "model.pt", "--to", "nllb_moe", "--out", tmp_path / "hf"]
    assert_refused(capsys, [text, "NLLB-MoE", "--to hf"], "export", *rest)


@pytest.mark.parametrize("settings", TASKS)
def test_back_again_to_the_last_bit(settings, trained, request, tmp_path):
    path, data = trained(settings).last, request.getfixturevalue(DATA[settings["task"]])
    export(path, tmp_path / "hf")
    evomoe("import", tmp_path / "hf", "--out", tmp_path / "back.pt")
    before, after = torch.load(path), torch.load(tmp_path / "back.pt")
    assert_equal(dict(sorted(before["model"].items())), dict(sorted(after["model"].items())))
    assert before["cfg"]["model"] == after["cfg"]["model"]
    batch = longest(build(data, **settings))
    with torch.no_grad():
        back = loaded(tmp_path / "back.pt", data=str(data))
        assert torch.equal(loaded(path)(**batch)[0], back(**batch)[0])


def test_languages_that_fairseq_inferred_from_the_data(trained, translation_data, tmp_path):
    """Without -s and -t a checkpoint does not name them."""
    state = torch.load(trained(TRANSLATION).last)
    for side in ("source_lang", "target_lang"):
        state["cfg"]["task"][side] = None
    torch.save(state, tmp_path / "model.pt")
    folder = export(tmp_path / "model.pt", tmp_path / "hf", "--data", translation_data)
    named = export(trained(TRANSLATION).last, tmp_path / "named", "--data", translation_data)
    assert (folder / "vocabulary.json").read_bytes() == (named / "vocabulary.json").read_bytes()


def test_what_is_in_a_folder(trained, lm_data, tmp_path, capsys):
    """Without the network: all that transformers needs, and nothing of this machine."""
    folder = export(trained(LM).last, tmp_path / "hf", "--data", lm_data)
    assert "AutoModelForCausalLM" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    code = {path.name for path in folder.glob("*.py")}
    assert {"modeling_evomoe.py", "tokenization_evomoe.py", "moe_routers_dts.py"} < code
    assert not code & {"moe_routers_switch.py", "moe_layer.py", "moe_spawning.py"}
    for name in code:  # each file finds the others beside it
        text = (folder / name).read_text()
        ast.parse(text)
        assert not re.search(r"^\s*(from|import) (\.\.|\. |fairseq)", text, re.MULTILINE)
        found = re.findall(r"^\s*from \.(\S+) import", text, re.MULTILINE)
        assert {f"{module}.py" for module in found} <= code
    assert str(lm_data) not in (folder / "config.json").read_text()
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    assert vocabulary[:4] == ["<s>", "<pad>", "</s>", "<unk>"] and len(vocabulary) == config["vocab_size"]
    assert config["bos_token_id"] == 2  # what fairseq's language models see first


@pytest.mark.parametrize("router", [name for name, _ in cases() if name in ROUTERS])
def test_every_router_can_be_taken_along(router):
    """transformers finds files of one folder, by `from .x import y` alone; see `hf/code.py`."""
    texts = files_of_model(router)
    for text in texts.values():
        found = re.findall(r"^\s*from \.(\S+) import", text, re.MULTILINE)
        assert {f"{module}.py" for module in found} <= texts.keys()
        assert not re.search(r"^\s*(from|import) (\.\.|\. |fairseq)", text, re.MULTILINE)
    assert not {"moe_layer.py", "moe_spawning.py", "moe_dispatch_local.py"} & texts.keys()


def test_temperature_and_stage_come_along(trained, tmp_path):
    """Those of a model that fairseq loads, so that a gate that is still soft is one elsewhere."""
    for update, temperature, hard in ((9, 0.5, False), (12, 0.5, True)):
        state = torch.load(trained(LM).at(update))
        moe = Architecture(state).as_config()["decoder_stack"]["layers"][1]["moe"]
        context = next(x for _, x in moe_layers(loaded(trained(LM).at(update)))).context
        assert (moe["router"]["temperature"], moe["router"]["hard"]) == (context.temperature, context.hard)
        assert (context.temperature, context.hard) == (temperature, hard)


def test_growth_in_stages(trained):
    """The widths, the temperature and the stage of the experts that there are after each spawn."""
    run = trained(LM, moe_spawn_update="2:2,5:4", moe_hard_update=2)
    for update, experts in ((3, 2), (6, 4), (9, 4)):
        path = run.at(update)
        moe = Architecture(torch.load(path)).as_config()["decoder_stack"]["layers"][1]["moe"]
        layer = next(x for _, x in moe_layers(loaded(path)))
        assert moe["widths"] == layer.moe.experts.widths == [48] * experts
        told = moe["router"]["temperature"], moe["router"]["hard"]
        assert told == (layer.context.temperature, layer.context.hard)


def test_one_expert_needs_no_router(trained, tmp_path):
    stack = Architecture(torch.load(trained(LM).at(3))).as_config()["decoder_stack"]
    assert stack["layers"][1]["moe"]["router"] is None and stack["layers"][0] == {"ffn_dim": 48}


def test_several_files_of_either_kind(trained, tmp_path, monkeypatch):
    """A checkpoint in parts, written as parts of at most so many bytes, is the checkpoint in one file."""
    path, parts = trained(LM).last, tmp_path / "parts.pt"
    evomoe("reshard", path, "--parts", 2, "--out", parts)
    monkeypatch.setattr(folders, "MOST_BYTES", 30_000)
    folder = export(parts, tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2 and set(index["weight_map"].values()) == set(names)
    evomoe("import", folder, "--out", tmp_path / "back.pt")
    tensors, expected = torch.load(tmp_path / "back.pt")["model"], torch.load(path)["model"]
    assert_equal(dict(sorted(tensors.items())), dict(sorted(expected.items())))


def test_plain_weights(trained, tmp_path):
    evomoe("export", trained(LM).last, "--to", "safetensors", "--out", tmp_path / "plain")
    assert [path.name for path in (tmp_path / "plain").iterdir()] == ["model.safetensors"]
    expected = torch.load(trained(LM).last)["model"]
    assert_equal(folders.read_tensors(tmp_path / "plain"), dict(sorted(expected.items())))


def option(name, value):
    """A change of a checkpoint."""
    return lambda state: state["cfg"]["model"].update({name: value})


@pytest.mark.parametrize(
    "change, arguments, parts",
    [
        (option("_name", "transformer_lm"), [], ["transformer_lm", "evomoe_lm"]),
        (option("moe_router", "of_somebody"), [], ["--moe-router of_somebody", "plugin"]),
        (option("adaptive_softmax_cutoff", "10,20"), [], ["--adaptive-softmax-cutoff"]),
        (option("moe_threshold", 3), [], ["--moe-threshold"]),
        (option("decoder_ffn_embed_dim", 64), [], ["decoder.layers.1.moe", "192", "256"]),
        (lambda state: state.update(model=None), [], ["no checkpoint of"]),
        (lambda state: state.update(model={}), ["--to", "safetensors"], ["no checkpoint of a model"]),
        (lambda state: state.clear(), [], ["no checkpoint of"]),
        (lambda state: None, ["--to", "safetensors", "--data", "."], ["--data has no effect"]),
        (lambda state: None, ["--data", "."], ["--data . has no dict.txt"]),
        (lambda state: None, ["--sentencepiece", "nothing.model"], ["nothing.model"]),
    ],
)
def test_errors_are_one_sentence(change, arguments, parts, trained, tmp_path, capsys):
    state = torch.load(trained(LM).last)
    change(state)
    torch.save(state, tmp_path / "model.pt")
    rest = [tmp_path / "model.pt", "--to", "hf", "--out", tmp_path / "hf", *arguments]
    assert_refused(capsys, parts, "export", *rest)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def assert_refused(capsys, parts, command, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        evomoe(command, *arguments)
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith(f"evomoe {command}: ") and message.endswith(".\n") and message.count("\n") == 1
    assert all(part in message for part in parts), message


def test_capacities_in_evaluation_are_refused(lm_data, tmp_path, capsys):
    """They depend on the batch; other routers with a plugin's code, see above."""
    settings = {**MASKED_LM, "moe_router": "switch", "moe_eval_capacity_factor": 1.0}
    checkpoint(lm_data, tmp_path / "model.pt", settings)
    parts = ["--moe-eval-capacity-factor", "other sentences"]
    assert_refused(capsys, parts, "export", tmp_path / "model.pt", "--to", "hf", "--out", tmp_path / "hf")


def test_folders_that_are_there(trained, tmp_path, capsys):
    path, folder = trained(LM).last, tmp_path / "hf"
    rest = ["export", path, "--to", "hf", "--out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "text").touch()
    assert_refused(capsys, ["no folder that an export has written"], *rest, tmp_path / "mine", "--force")
    assert_refused(capsys, ["does not exist"], *rest, tmp_path / "nowhere" / "hf")
    export(path, folder)
    assert_refused(capsys, ["is there already", "--force"], *rest, folder)
    (folder / "optimizer.pt").touch()
    assert_refused(capsys, ["has optimizer.pt, which no export has written"], *rest, folder, "--force")
    (folder / "optimizer.pt").unlink()
    theirs = tmp_path / "mine" / "model.safetensors"
    safetensors.save_file({"weight": torch.ones(1)}, theirs, metadata={"format": "pt"})
    (tmp_path / "mine" / "text").unlink()
    assert_refused(capsys, ["no folder that an export has written"], *rest, tmp_path / "mine", "--force")
    assert theirs.exists()
    (folder / "config.json").unlink()
    export(path, folder, "--force")
    assert (folder / "config.json").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "mine"]


def test_what_breaks_off_leaves_nothing(trained, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr("fairseq_evomoe.checkpoints.hf.export.write_tensors", full)
    rest = ["export", trained(LM).last, "--to", "hf", "--out", tmp_path / "hf"]
    assert_refused(capsys, ["cannot be written", "No space left"], *rest)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_models(trained, tmp_path, capsys):
    out = ["--out", tmp_path / "back.pt"]
    assert_refused(capsys, ["config.json is missing"], "import", tmp_path, *out)
    folder = export(trained(LM).last, tmp_path / "hf")
    (folder / "model.safetensors").write_bytes(b"nothing of that kind")
    assert_refused(capsys, ["cannot be read"], "import", folder, *out)
    (folder / "model.safetensors").unlink()
    assert_refused(capsys, ["no whole model"], "import", folder, *out)
    assert not (tmp_path / "back.pt").exists()


def test_without_safetensors(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    rest = ["export", trained(LM).last, "--to", "hf", "--out", tmp_path / "hf"]
    assert_refused(capsys, ["safetensors is not installed", "pip install"], *rest)
    assert not list(tmp_path.iterdir())


def test_a_dictionary_of_pieces_without_their_model_is_told():
    pieces = [["<s>", "\u2581the", "s"]]
    assert "give --sentencepiece" in told(["dict.txt"], pieces, None)
    assert "--sentencepiece" not in told(["dict.txt"], pieces, "spm.model")
    assert told(["dict.txt"], [["<s>", "the"]], None) == "tokenizer of dict.txt"
