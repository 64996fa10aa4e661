"""`evomoe merge`: checkpoints that load everywhere, their optimizer's state too."""

import copy
import re
import subprocess
import sys
from argparse import Namespace
from unittest import mock

import pytest
import torch

from fairseq_evomoe.checkpoints.guessed_layout import guessed_keys
from fairseq_evomoe.checkpoints.merge import (
    Layer,
    LayerMerge,
    merge_checkpoint,
    moe_layers_of,
    new_options,
    plan_checkpoint,
)
from fairseq_evomoe.checkpoints.observe import observe
from fairseq_evomoe.checkpoints.saved_optimizer import (
    LAYOUT,
    Layout,
    UnknownLayout,
    need_layout,
    parameter_keys,
)
from fairseq_evomoe.checkpoints.saved_options import SavedOptions
from fairseq_evomoe.config.config import declarations
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.evolution.merge import MergeError, plan_merge, weight_similarity
from fairseq_evomoe.moe import ROUTERS
from support.cli import LM, TRANSLATION, USER_DIR, build, call, evomoe
from support.experts import experts_of, tensors_of

EVALUATION = {"user_dir": USER_DIR, "batch_size": 8, "num_workers": 0}


def copies_in(path, target, groups, permuted=False):
    """A checkpoint whose experts are copies of each other in these groups, and the optimizer's state too."""
    state = torch.load(path)
    names = parameter_keys(state)
    for name in [n for n in state["model"] if ".moe." in n]:
        tensor, number = state["model"][name], names.index(name)
        experts = sum(map(len, groups))
        width = tensor.shape[0] // experts
        for group in groups:
            for e in group[1:]:
                order = torch.arange(width).flip(0) if permuted else torch.arange(width)
                for x in [
                    tensor,
                    *map(state["last_optimizer_state"]["state"][number].get, ("exp_avg", "exp_avg_sq")),
                ]:
                    x[e * width : (e + 1) * width] = x[group[0] * width + order]
    torch.save(state, target)
    return target


GROWN = {"moe_spawn_update": 0, "max_update": 4, "moe_eval_routing": "adaptive", "moe_threshold": 0.0}


def command(*arguments):
    evomoe("merge", *arguments)


@pytest.fixture(scope="module")
def lm(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    call("fairseq-train", lm_data, save_dir=folder, **{**LM, **GROWN})
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def small_lm(lm, tmp_path_factory):
    """A checkpoint of permuted copies, and what was made of it."""
    folder = tmp_path_factory.mktemp("small")
    copies = copies_in(lm, folder / "copies.pt", [[0, 2], [1, 3]], permuted=True)
    command(copies, "--experts", 2, "--align", "--out", folder / "small.pt")
    return copies, folder / "small.pt"


def perplexity(data, path):
    result = call("fairseq-eval-lm", data, path=path, gen_subset="valid", tokens_per_sample=16, **EVALUATION)
    return float(re.search(r"Perplexity: ([\d.]+)", result.output).group(1))


def test_merged_copies_are_the_same_model(lm_data, small_lm):
    state = torch.load(small_lm[1])
    assert state["cfg"]["model"]["moe_experts"] == 2
    assert state["model"]["decoder.layers.1.moe.experts.w1"].shape == (96, 32)
    models = [build(lm_data, **{**LM, **GROWN, "moe_experts": n}).model.eval() for n in (4, 2)]
    for model, path in zip(models, small_lm):
        model.load_state_dict(torch.load(path)["model"])
    batch = build(lm_data, **{**LM, **GROWN}).batches("valid")[0]["net_input"]
    with torch.no_grad():
        before, after = (model(**batch)[0] for model in models)
    assert torch.allclose(before, after, atol=1e-5) and not torch.equal(before[0], before[1])
    assert perplexity(lm_data, small_lm[0]) == perplexity(lm_data, small_lm[1])


def test_training_goes_on_with_the_optimizer_s_state(lm_data, small_lm, tmp_path):
    settings = {**LM, **GROWN, "moe_experts": 2, "max_update": 7}
    setup = build(lm_data, **settings)
    trainer = setup.trainer()
    trainer.load_checkpoint(str(small_lm[1]))
    before = torch.load(small_lm[0])
    names, old = parameter_keys(before), before["last_optimizer_state"]["state"]
    assert trainer.get_num_updates() == 4
    for name, parameter in setup.model.named_parameters():
        found = trainer.optimizer.optimizer.state[parameter]
        expected = old[names.index(name)]
        for key in ("exp_avg", "exp_avg_sq"):
            rows = expected[key][: found[key].shape[0]]  # experts 0 and 1, whose copies the others are
            assert torch.allclose(found[key], rows, atol=1e-12), name
    result = call("fairseq-train", lm_data, save_dir=tmp_path, restore_file=small_lm[1], **settings)
    assert [step["num_updates"] for step in result.log("train_inner")] == [5, 6, 7]


def test_it_can_be_fine_tuned(lm_data, small_lm, tmp_path):
    settings = {**LM, **GROWN, "moe_experts": 2, "max_update": 2}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, finetune_from_model=small_lm[1], **settings)
    assert [step["num_updates"] for step in result.log("train_inner")] == [1, 2]


def test_an_optimizer_s_state_that_does_not_fit_is_left_out(lm, lm_data, tmp_path, capsys):
    state = torch.load(lm)
    state["last_optimizer_state"]["param_groups"][0]["params"].pop()
    torch.save(state, tmp_path / "odd.pt")
    command(tmp_path / "odd.pt", "--experts", 3, "--out", tmp_path / "small.pt")
    assert "was left out" in capsys.readouterr().out
    assert "last_optimizer_state" not in torch.load(tmp_path / "small.pt")
    settings = {**LM, **GROWN, "moe_experts": 3, "max_update": 2, "reset_optimizer": True}
    result = call(
        "fairseq-train",
        lm_data,
        save_dir=tmp_path / "on",
        restore_file=tmp_path / "small.pt",
        reset_lr_scheduler=True,
        reset_dataloader=True,
        reset_meters=True,
        **settings,
    )
    assert len(result.log("train_inner")) == 2


def test_shared_parameters_are_numbered_once_and_buffers_not_at_all():
    embedding, zeros = torch.randn(4, 3), torch.zeros(3)
    model = {"embed.weight": embedding, "a.bias": zeros, "b.bias": zeros.clone(), "x.version": torch.ones(1)}
    model.update({"router.table_V": torch.arange(4), "output.weight": embedding.clone()})
    assert guessed_keys(model) == ["embed.weight", "a.bias", "b.bias"]


def test_old_checkpoints_with_a_namespace(lm):
    state = torch.load(lm)
    state.update(args=Namespace(**state["cfg"]["model"]), cfg=None)
    layers = moe_layers_of(state)
    assert merge_checkpoint(state, plan_checkpoint(layers, SavedOptions(state), 3))
    assert state["args"].moe_experts == 3
    assert state["model"]["decoder.layers.1.moe.router.weight"].shape[0] == 3


@pytest.mark.parametrize(
    "changes, experts, expected",
    [
        ({}, 2, {}),
        ({"moe_total_ffn_dim": "192"}, 2, {"moe_total_ffn_dim": "96"}),
        (
            {"moe_spawn_method": "split", "moe_spawn_strength": None},
            2,
            {"moe_spawn_method": "slice", "moe_spawn_strength": None, "moe_total_ffn_dim": "96"},
        ),
        ({"moe_expert_sizes": "1,1,2,2"}, 2, {"moe_expert_sizes": "32,64", "moe_total_ffn_dim": "96"}),
    ],
)
def test_options_describe_what_was_merged(lm, changes, experts, expected):
    state = torch.load(lm)
    state["cfg"]["model"].update(changes)
    layers = moe_layers_of(state)
    plans = plan_checkpoint(layers, SavedOptions(state), experts)
    merge_checkpoint(state, plans)
    options = state["cfg"]["model"]
    assert {name: options[name] for name in {**changes, **expected}} == {**changes, **expected}
    assert options["moe_experts"] == experts
    given = {name[4:]: value for name, value in options.items() if name.startswith("moe_")}
    assert resolve(given).widths(48) == plans[0].merge.widths


def test_layers_in_which_dynmoe_has_fewer_experts_stay(lm_data, tmp_path, capsys):
    settings = {**LM, "moe_router": "dynmoe", "moe_freq": 1, "moe_spawn_update": 0, "max_update": 2}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    state = torch.load(tmp_path / "checkpoint_last.pt")
    prefix = "decoder.layers.0.moe."
    for key in [key for key in state["model"] if key.startswith(prefix)]:  # drop the first of four experts
        old = state["model"][key]
        if old.dim() and old.shape[0] in (4, 4 * 48):
            state["model"][key] = old[old.shape[0] // 4 :]
    before = state["model"][prefix + "experts.w1"]
    torch.save(state, tmp_path / "fewer.pt")
    command(tmp_path / "fewer.pt", "--experts", 3, "--out", tmp_path / "small.pt")
    output = capsys.readouterr().out
    assert "3 as before" in output and "4 -> 3" in output and "was left out" in output
    model = torch.load(tmp_path / "small.pt")["model"]
    assert torch.equal(model[prefix + "experts.w1"], before)
    assert torch.equal(model[prefix + "router.origin_E"], torch.arange(3.0))
    assert perplexity(lm_data, tmp_path / "small.pt") > 1


@pytest.mark.parametrize("layout", [True, False], ids=["with its layout", "of an old checkpoint"])
def test_flat_optimizer_states_are_merged(layout):
    tensors = tensors_of(experts_of([3] * 4))
    model = {"a.weight": torch.randn(2, 3), **{"l.moe.experts." + name: x for name, x in tensors.items()}}
    model["l.moe.router.weight"] = torch.randn(4, 5)
    rules = ROUTERS["dts"].merge_rules
    plan = plan_merge(tensors, [3] * 4, weight_similarity(tensors, [3] * 4), 2, router_rules=rules)
    plans = [LayerMerge(Layer("l", {}, [3] * 4), torch.eye(4), plan)]
    values = {name: torch.randn_like(x) for name, x in model.items()}
    flat = torch.cat([x.flatten().double() for x in values.values()])
    state = {"model": dict(model), "cfg": {"model": {"moe_experts": 4}}}
    state["last_optimizer_state"] = {
        "state": {0: {"step": 7, "exp_avg": flat}},
        "param_groups": [{"params": [0]}],
        "loss_scale": 4,
    }
    broken = copy.deepcopy(state)
    if layout:
        state[LAYOUT] = Layout(list(model), [x.numel() for x in model.values()], True).as_dict()
        broken[LAYOUT] = state[LAYOUT]
    assert merge_checkpoint(state, plans)
    expected = [
        plan.tensor(name[6:], x.double()) if ".moe." in name else x.double() for name, x in values.items()
    ]
    found = state["last_optimizer_state"]
    assert found["loss_scale"] == 4 and found["state"][0]["step"] == 7
    assert torch.allclose(
        found["state"][0]["exp_avg"], torch.cat([x.flatten() for x in expected]), atol=1e-10
    )
    assert state[LAYOUT] == {"keys": list(model), "sizes": [x.numel() for x in expected], "flat": True}
    broken["last_optimizer_state"]["state"][0]["exp_avg"] = flat[:-1]
    assert not merge_checkpoint(broken, plans)
    assert "last_optimizer_state" not in broken and LAYOUT not in broken


@pytest.fixture(scope="module")
def translator(translation_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("translator")
    changes = {**GROWN, "moe_expert_sizes": "2,1,1,2", "moe_total_ffn_dim": 192, "share_all_embeddings": True}
    call("fairseq-train", translation_data, save_dir=folder, store_ema=True, **{**TRANSLATION, **changes})
    return folder / "checkpoint_last.pt"


def test_a_translator_with_experts_of_different_widths(translation_data, translator, tmp_path, capsys):
    """With data, EMA, shared embeddings, and in a process of its own by the script."""
    small = tmp_path / "small.pt"
    done = subprocess.run(
        [sys.executable, USER_DIR / "bin/evomoe", "merge", translator, "--experts", "3", "--out", small]
        + ["--data", translation_data, "--tokens", "100"],
        env={"PYTHONPATH": str(USER_DIR.parent), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "outputs of all experts compared on 100 tokens of each layer"
    assert [line.split()[:4] for line in lines[2:4]] == [
        [side + ".layers.1", "4", "->", "3"] for side in ("encoder", "decoder")
    ]
    for line in lines[2:4]:
        pairs = re.findall(r"\b\d \d\b", line.split("->")[1].split(maxsplit=3)[3])
        assert len(pairs) == 1 and pairs[0] in ("0 3", "1 2")  # of equal widths
    assert re.match(r"MoE layers 2, experts 4 -> 3, parameters [\d,]+ -> [\d,]+", lines[4])
    options = torch.load(small)["cfg"]["model"]
    assert lines[
        5
    ] == "to train on, give --moe-experts 3 --moe-expert-sizes {} --moe-total-ffn-dim {}".format(
        options["moe_expert_sizes"], options["moe_total_ffn_dim"]
    )
    result = call("fairseq-generate", translation_data, path=small, beam=2, max_len_b=20, **EVALUATION)
    assert len(re.findall(r"^H-\d+", result.output, flags=re.MULTILINE)) == 40
    restored = call(
        "fairseq-train",
        translation_data,
        save_dir=tmp_path,
        restore_file=small,
        store_ema=True,
        **{
            **TRANSLATION,
            **GROWN,
            "max_update": 6,
            "moe_experts": 3,
            "moe_expert_sizes": options["moe_expert_sizes"],
            "moe_total_ffn_dim": options["moe_total_ffn_dim"],
        },
    )
    assert [step["num_updates"] for step in restored.log("train_inner")] == [5, 6]
    assert restored.lines("Loading EMA from checkpoint")


def test_shares_follow_the_load(lm, lm_data, tmp_path, capsys):
    """The busier an expert, the nearer the mean of its group is to it."""
    seen = observe(str(lm), str(lm_data), "valid", 64)["decoder.layers.1"]
    assert seen.tokens == 64 and seen.load_E.sum() >= 64
    assert torch.allclose(seen.similarity_EE.diagonal(), torch.ones(4, dtype=torch.float64))
    command(lm, "--experts", 1, "--out", tmp_path / "one.pt", "--data", lm_data, "--tokens", 64)
    before, after = (torch.load(path)["model"] for path in (lm, tmp_path / "one.pt"))
    share = seen.load_E / seen.load_E.sum()
    w1 = before["decoder.layers.1.moe.experts.w1"].double().view(4, 48, 32)
    expected = sum(share[e] * w1[e] for e in range(4))
    assert torch.allclose(after["decoder.layers.1.moe.experts.w1"].double(), expected, atol=1e-7)
    assert not any(".router." in name for name in after)  # a single expert needs none
    assert perplexity(lm_data, tmp_path / "one.pt") > 1


def test_a_dry_run_writes_nothing(lm, lm_data, tmp_path, capsys):
    before = sorted(lm.parent.iterdir())
    command(lm, "--experts", 3, "--dry-run", "--data", lm_data)
    output = capsys.readouterr().out
    assert re.search(r"decoder\.layers\.1 +4 -> 3 +-?0\.\d{3} +-?0\.\d{3} +\d[\d |]+$", output, re.M)
    assert sorted(lm.parent.iterdir()) == before


@pytest.fixture(scope="module")
def not_grown(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("early")
    call(
        "fairseq-train",
        lm_data,
        save_dir=folder,
        **{**LM, "moe_spawn_update": 6, "max_update": 7, "save_interval_updates": 2},
    )
    return folder / "checkpoint_1_2.pt"


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["{lm}", "--experts", 4, "--out", "x.pt"], ["--experts", "less than", "4 experts", "is 4"]),
        (["{lm}", "--experts", 9, "--out", "x.pt"], ["--experts", "is 9"]),
        (["{lm}", "--experts", 0, "--out", "x.pt"], ["--experts must be at least 1, but is 0"]),
        (["{lm}", "--experts", 2], ["--out", "--dry-run"]),
        (["{lm}", "--experts", 2, "--out", "{lm}"], ["--out", "another name"]),
        (["{lm}", "--experts", 2, "--out", "no/such/x.pt"], ["--out no/such/x.pt", "create it"]),
        (["{lm}", "--experts", 2, "--out", "x.pt", "--subset", "test"], ["--subset", "--data"]),
        (["{lm}", "--experts", 2, "--out", "x.pt", "--data", "nowhere"], ["--data nowhere"]),
        (["{lm}", "--experts", 2, "--out", "x.pt", "--data", "{folder}"], ["--data", "dict.txt"]),
        (["{lm}", "--experts", 2, "--dry-run", "--data", "{data}", "--tokens", 0], ["--tokens", "is 0"]),
        (["nothing.pt", "--experts", 2, "--out", "x.pt"], ["no checkpoint nothing.pt"]),
        (["{text}", "--experts", 2, "--out", "x.pt"], ["dict.txt", "or no checkpoint"]),
        (["{early}", "--experts", 2, "--out", "x.pt"], ["one expert", "--moe-spawn-update"]),
        (["{translator}", "--experts", 1, "--dry-run"], ["--moe-expert-sizes", "at least 2"]),
    ],
)
def test_errors_are_one_sentence(
    arguments, parts, lm, lm_data, not_grown, translator, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    names = {"lm": lm, "data": lm_data, "text": lm_data / "dict.txt", "early": not_grown, "folder": tmp_path}
    names["translator"] = translator
    with pytest.raises(SystemExit) as stopped:
        command(*[str(a).format(**names) for a in arguments])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("evomoe merge: ") and message.endswith(".\n") and message.count("\n") == 1
    for part in parts:
        assert part in message
    assert not list(tmp_path.glob("*.pt"))


def test_other_checkpoints_are_refused(lm, tmp_path, capsys):
    for name, state in {"dense": {"model": {"a": torch.ones(1)}, "cfg": {"model": {}}}, "list": [1]}.items():
        torch.save(state, tmp_path / name)
        with pytest.raises(SystemExit):
            command(tmp_path / name, "--experts", 2, "--dry-run")
        assert "checkpoint" in capsys.readouterr().err
    for changes, part in (
        ({"moe_router": "topk", "moe_top_k": 3}, "--moe-top-k"),
        ({"moe_hard_experts": 2}, "--moe-hard-experts"),
        ({"moe_router": "hash", "moe_hashes": 2}, "--moe-hashes"),
        ({"moe_router": "base"}, "--moe-router base"),
        ({"moe_shared_expert": True}, "--moe-shared-expert"),
        ({"moe_output_masking": 0.1}, "--moe-output-masking"),
    ):
        state = torch.load(lm)
        state["cfg"]["model"].update(changes)
        torch.save(state, tmp_path / "changed")
        with pytest.raises(SystemExit):
            command(tmp_path / "changed", "--experts", 1, "--dry-run")
        assert part in capsys.readouterr().err


def test_the_router_says_what_merging_must_know(lm, tmp_path, capsys):
    for changes, parts in (
        ({"moe_router": "comet"}, ["--moe-router comet", "cannot be merged"]),
        ({"moe_router": "stratified"}, ["--moe-router stratified", "cannot be merged"]),
        ({"moe_router": "of-somebody"}, ["--moe-router of-somebody", "--user-dir"]),
    ):
        state = torch.load(lm)
        state["cfg"]["model"].update(changes)
        torch.save(state, tmp_path / "changed")
        with pytest.raises(SystemExit):
            command(tmp_path / "changed", "--experts", 2, "--dry-run")
        error = capsys.readouterr().err
        assert all(part in error for part in parts), error
    with pytest.raises(SystemExit):
        command(lm, "--experts", 2, "--dry-run", "--user-dir", tmp_path / "nowhere")
    assert "--user-dir" in capsys.readouterr().err


@pytest.mark.parametrize("old", [True, False], ids=["of version 0.1", "of today"])
def test_options_are_read_from_checkpoints_of_any_version(old, lm):
    state = torch.load(lm)
    options = state["cfg"]["model"]
    if old:  # all options are there, and some are not decided
        options.update(
            {f"moe_{name}": declared[0].default for name, declared in declarations().items()},
            moe_gate_input="auto",
            moe_renormalize="auto",
            moe_top_k=4,
        )
        options.update(moe_experts=4, moe_spawn_method="split")
    found = SavedOptions(state)
    assert found.router == "dts" and found["hard_experts"] == 1 and found["experts"] == 4
    assert found["gate_input"] == "hidden"
    assert found["renormalize"] == ("straight-through" if old else "never")
    assert found["spawn_method"] == ("split" if old else "mask")
    assert found.of_model("decoder_ffn_embed_dim", 0) == 48
    if old:
        for missing in ("moe_router", "moe_hard_experts"):
            del options[missing]
        assert SavedOptions(state).router == "dts" and SavedOptions(state)["hard_experts"] == 1
        options["moe_router"] = "topk"
        assert SavedOptions(state)["top_k"] == 4
        options["moe_top_k"] = None
        assert SavedOptions(state)["top_k"] == 2


def merged_with(lm, experts=2, align=False, **changes):
    """What becomes of a checkpoint whose options are others than those it was trained with."""
    state = torch.load(lm)
    state["cfg"]["model"].update(changes)
    merge_checkpoint(state, plan_checkpoint(moe_layers_of(state), SavedOptions(state), experts, align=align))


@pytest.mark.parametrize(
    "options, text",
    [
        ({"moe_expert_sizes": "1,1,2"}, "do not tell the widths of its 4 experts"),
        ({"experts": 1, "decoder_ffn_embed_dim": 96}, "have 48 hidden units: `experts` must be at least 2"),
    ],
)
def test_options_that_do_not_go_with_merging_are_refused(options, text, lm):
    with pytest.raises(MergeError, match=text):
        merged_with(lm, **options)


def test_units_that_a_norm_tells_apart_are_not_reordered(lm):
    state = torch.load(lm)
    state["model"]["decoder.layers.1.moe.experts.hidden.norm.weight"] = torch.ones(48)
    with pytest.raises(MergeError, match="`align` would reorder hidden units"):
        plan_checkpoint(moe_layers_of(state), SavedOptions(state), 2, align=True)


def test_widths_that_differ_from_layer_to_layer_are_refused(lm):
    state = torch.load(lm)
    state["cfg"]["model"]["moe_expert_sizes"] = "1,1,2,2"
    plans = [Namespace(merge=Namespace(widths=widths)) for widths in ([32, 64], [48, 48])]
    with pytest.raises(MergeError, match=r"would be \[32, 64\] and \[48, 48\] in different layers"):
        new_options(SavedOptions(state), plans, 2)


def test_aligning_asks_for_scipy(lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MergeError, match="pip install scipy"):
        merged_with(lm, align=True)


def test_data_without_tokens_for_a_layer_are_refused(lm, lm_data, tmp_path, capsys):
    nothing = {"decoder.layers.1": Namespace(tokens=0)}
    with mock.patch("fairseq_evomoe.checkpoints.observe.observe", return_value=nothing):
        with pytest.raises(SystemExit):
            command(lm, "--experts", 2, "--data", lm_data, "--out", tmp_path / "x.pt")
    assert "gave a layer no tokens: choose another --subset" in capsys.readouterr().err


def test_an_optimizer_s_state_that_cannot_be_matched_is_refused(lm):
    state = torch.load(lm)
    del state[LAYOUT]
    state["last_optimizer_state"]["state"] = {0: {"exp_avg": torch.zeros(1)}}
    with pytest.raises(UnknownLayout, match="could not be matched"):
        need_layout(state)


@pytest.mark.parametrize(
    "options, experts, text",
    [
        ({"moe_router": "dtop-p"}, 1, "`mean_experts` must be more than 0 to the 1 experts"),
        ({"moe_router": "expert-choice"}, 1, "`mean_experts`"),
        ({"moe_router": "remoe", "moe_mean_experts": 4.0}, 2, "to the 2 experts, but is 4.0"),
        ({"moe_router": "switch", "moe_copy_experts": 1}, 1, "which there is not with `experts` 1"),
        ({"moe_scaling_factor": 2.0}, 1, "`scaling_factor` is another one with a single expert"),
    ],
)
def test_models_that_would_be_refused_are_not_made(options, experts, text, lm):
    with pytest.raises(MergeError, match=text):
        merged_with(lm, experts, **options)


def test_experts_that_compute_nothing_are_no_obstacle_to_data(lm_data, tmp_path, capsys):
    options = {**LM, **GROWN, "moe_preset": "moe_plus_plus", "moe_eval_routing": None, "moe_threshold": None}
    options.update(moe_anneal_updates=None, moe_hard_update=None)
    call("fairseq-train", lm_data, save_dir=tmp_path, **options)
    command(tmp_path / "checkpoint_last.pt", "--experts", 2, "--data", lm_data, "--tokens", 64, "--dry-run")
    assert "outputs of all experts compared on 64 tokens" in capsys.readouterr().out


def test_it_is_refused_before_the_data_are_read(lm, tmp_path, capsys):
    state = torch.load(lm)
    state["cfg"]["model"]["moe_router"] = "stratified"
    torch.save(state, tmp_path / "changed.pt")
    with mock.patch("fairseq_evomoe.checkpoints.observe.observe", side_effect=AssertionError):
        with pytest.raises(SystemExit):
            command(tmp_path / "changed.pt", "--experts", 2, "--data", tmp_path, "--dry-run")
    assert "cannot be merged" in capsys.readouterr().err
