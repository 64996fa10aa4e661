"""`evomoe import --from fairseq-moe`: checkpoints of the branches moe and nllb, and of EvoMoE's authors."""

from argparse import Namespace

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble
from omegaconf import OmegaConf

from fairseq_evomoe.moe.experts import to_dense
from support.cli import LM, TRANSLATION, build, evomoe

THEIRS = {
    "topk": {"moe_second_expert_policy": "all"},
    "switch": {"moe_top1_expert": True, "moe_gate_loss_wt": 0.02},
    "dts": {"moe_topk_expert": True},
}
"""Options of theirs, by our router that they amount to."""


def model_of_ours(data, settings, router="topk"):
    settings = {**settings, "moe_router": router, "moe_freq": 2, "moe_spawn_update": 0, "dropout": 0.0}
    settings = {k: x for k, x in settings.items() if k not in ("moe_anneal_updates", "moe_hard_update")}
    setup, generator = build(data, **settings), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in setup.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return setup


def write_theirs(setup, folder, options, ranks, old=False):
    """A checkpoint as those branches write it: paths of the shared file and of each rank's."""
    shared, of_ranks = {}, [{} for _ in range(ranks)]
    moe = {name: layer for name, layer in setup.model.named_modules() if name.endswith(".moe")}
    for key, tensor in setup.model.state_dict().items():
        if ".moe." not in key:
            shared[key] = tensor
    for name, layer in moe.items():
        theirs = name + "_layer"
        shared[theirs + ".gate.wg.weight"] = layer.router.weight.detach()
        for e in range(4):
            rows, local = layer.experts.rows_of(e), of_ranks[e // (4 // ranks)]
            for part, tensor in layer.experts.tensors().items():
                own = tensor[e : e + 1] if part == "b2" else tensor[rows]
                dense, value = to_dense(part, own)
                local[f"{theirs}.experts.{e % (4 // ranks)}.{dense}"] = value
    cfg = OmegaConf.to_container(setup.cfg, resolve=True, enum_to_str=True)
    model = {k: x for k, x in cfg["model"].items() if not k.startswith("moe_")}
    model.update(
        options, moe_freq=2, moe_expert_count=4, use_moe_pad_mask=True, _name="transformer_of_theirs"
    )
    told = {"cfg": {"model": model, "task": cfg["task"], "criterion": {"_name": "moe_cross_entropy"}}}
    if old:
        told = {"args": Namespace(**{**cfg["task"], **model, "task": cfg["task"]["_name"]}), "cfg": None}
    rest = {"extra_state": {}, "optimizer_history": [{"num_updates": 1000}], **told}
    states = {f"checkpoint_1_100-rank-{i}.pt": {**rest, "model": x} for i, x in enumerate(of_ranks)}
    states = {"checkpoint_1_100-shared.pt": {**rest, "model": shared}, **states}
    for name, state in states.items():
        torch.save(state, folder / name)
    return [folder / name for name in states]


def loaded(path, data):
    (model,), _ = load_model_ensemble([str(path)], arg_overrides={"data": str(data)})
    return model.eval()


def reference(layer, x, router):
    """Their layer in evaluation, where experts have room: slowly, and in float64."""
    x, gate = x.double(), layer.router.weight.double()
    result = torch.zeros_like(x)
    for t, token in enumerate(x):
        probability = (gate @ token).softmax(0)
        best = probability.argsort(descending=True)[: 2 if router == "topk" else 1].tolist()
        total = sum(probability[e] for e in best) if router == "topk" else 1.0
        for e in best:
            rows = layer.experts.rows_of(e)
            w1, b1, w2 = (getattr(layer.experts, name)[rows].double() for name in ("w1", "b1", "w2"))
            hidden = (w1 @ token + b1).relu()
            result[t] += probability[e] / total * (w2.t() @ hidden + layer.experts.b2[e].double())
    return result


@pytest.mark.parametrize("router, ranks, old", [("topk", 2, False), ("switch", 4, True), ("dts", 1, False)])
def test_outputs_are_theirs(router, ranks, old, lm_data, tmp_path, capsys):
    setup = model_of_ours(lm_data, LM, router)
    paths = write_theirs(setup, tmp_path, THEIRS[router], ranks, old)
    evomoe("import", "--from", "fairseq-moe", *paths, "--out", tmp_path / "ours.pt")
    model, original = loaded(tmp_path / "ours.pt", lm_data), setup.model.eval()
    tokens = torch.randint(4, 40, (3, 9))
    with torch.no_grad():
        found, before = model(tokens)[0], original(tokens)[0]
        layer, x = model.decoder.layers[1].moe, torch.randn(20, 32)
        assert (layer(x).double() - reference(layer, x, router)).abs().max() < 1e-5
    assert torch.allclose(found, before, atol=1e-5)
    assert model.moe_config.router == router and model.moe_config.layer.freq == 2
    if router == "switch":
        assert layer.loss_weights["balance"] == 0.02 and layer.router.options.capacity_factor == 1
    assert torch.load(tmp_path / "ours.pt")["optimizer_history"][-1]["num_updates"] == 1000


def test_an_encoder_and_a_decoder(translation_data, tmp_path):
    setup = model_of_ours(translation_data, TRANSLATION)
    paths = write_theirs(setup, tmp_path, THEIRS["topk"], 2)
    evomoe("import", "--from", "fairseq-moe", *paths, "--out", tmp_path / "ours.pt")
    model, original = loaded(tmp_path / "ours.pt", translation_data), setup.model.eval()
    batch = setup.batches("valid")[0]["net_input"]
    with torch.no_grad():
        assert torch.allclose(model(**batch)[0], original(**batch)[0], atol=1e-5)


def test_all_experts_weighed_as_the_authors_do_at_first(lm_data, tmp_path):
    """In one file, with the gate in the layer itself."""
    setup = model_of_ours(lm_data, LM, "dts")
    shared, *ranks = write_theirs(setup, tmp_path, {}, 1)
    state = torch.load(shared)
    state["model"].update(torch.load(ranks[0])["model"])
    gate = "decoder.layers.1.moe_layer.gate.wg.weight"
    state["model"][gate.replace("gate.", "")] = state["model"].pop(gate)
    torch.save(state, tmp_path / "one.pt")
    evomoe("import", "--from", "fairseq-moe", tmp_path / "one.pt", "--out", tmp_path / "ours.pt")
    layer, x = loaded(tmp_path / "ours.pt", lm_data).decoder.layers[1].moe, torch.randn(7, 32)
    with torch.no_grad():
        weight = (x @ layer.router.weight.t()).softmax(1)
        each = [layer.experts(x.repeat(4, 1), [7] * 4).view(4, 7, 32)[e] for e in range(4)]
        expected = sum(weight[:, e : e + 1] * each[e] for e in range(4))
        assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "pick, text",
    [
        (lambda shared, ranks: [*ranks], "no gate"),
        (lambda shared, ranks: [shared], "no experts"),
        (lambda shared, ranks: [shared, ranks[0]], "a gate for 4 experts, and the files have 2"),
        (lambda shared, ranks: [shared, ranks[1], ranks[0]], "not in order"),
        (lambda shared, ranks: [shared, "nothing.pt"], "There is no nothing.pt"),
    ],
)
def test_files_that_are_missing(pick, text, lm_data, tmp_path, capsys):
    shared, *ranks = write_theirs(model_of_ours(lm_data, LM), tmp_path, {}, 2)
    with pytest.raises(SystemExit):
        evomoe("import", "--from", "fairseq-moe", *pick(shared, ranks), "--out", tmp_path / "ours.pt")
    message = capsys.readouterr().err
    assert text in message and message.count("\n") == 1 and message.endswith(".\n"), message
    assert not (tmp_path / "ours.pt").exists()


def test_a_folder_may_be_called_as_a_rank_s_file(lm_data, tmp_path):
    folder = tmp_path / "run-rank-2"
    folder.mkdir()
    files = write_theirs(model_of_ours(lm_data, LM), folder, {}, 2)
    evomoe("import", "--from", "fairseq-moe", *files, "--out", tmp_path / "ours.pt")
    assert (tmp_path / "ours.pt").exists()
