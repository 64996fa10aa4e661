"""Experts that spawn several times in one run: --moe-spawn-update 3:2,6:4,9:8."""

import math

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_evomoe.checkpoints import optimizer_state
from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.moe import ROUTERS, record
from fairseq_evomoe.training import growth, rescaling
from fairseq_evomoe.training.state import RunState
from support.cli import LM, MASKED_LM, build, call, evomoe
from support.optimizers import MIXED, copy_state
from support.parallel import SENTENCES, SHARED
from support.rank_jobs import largest_difference, train_on_all_batches, train_on_ranks
from support.refusals import refused
from support.resume import check_resume
from support.stages import check_that_it_goes_on, layer_of

STAGES = {"moe_spawn_update": "3:2,6:4,9:8", "moe_experts": None}
SETTINGS = {**LM, **STAGES, "disable_validation": True}


def test_a_run_grows_and_resumes_in_every_stage(lm_data, tmp_path):
    settings = {**SETTINGS, "moe_spawn_update": "20%:25%,6:4,9:100%", "moe_experts": 8}
    settings.update(store_ema=True, ema_decay=0.9)
    whole = check_resume(lm_data, tmp_path, settings, (3, 6, 9, 12))
    log = whole.result.log("train_inner")
    assert [step["moe_phase"] for step in log] == [0] * 3 + [1] * 10 + [2]
    assert [step["moe_temperature"] for step in log] == [2.0] * 4 + [1.5, 1.0] + [2.0, 1.5, 1.0] * 2 + [
        0.5,
        0.5,
    ]
    assert [math.ceil(step["moe_experts"]) for step in log][:10:3] == [1, 2, 4, 8]
    lines = whole.result.lines("spawned experts before")
    assert [line.split(":")[-1].split(" exp")[0] for line in lines] == [" 1 -> 2", " 2 -> 4", " 4 -> 8"]
    assert [f"before update {n}" in line for n, line in zip((3, 6, 9), lines)] == [True] * 3
    assert whole.result.lines("layers with 2, then 4, then 8 experts of 48 hidden units")
    model = torch.load(whole.last)["cfg"]["model"]
    assert model["moe_spawn_update"] == "3:2,6:4,9:8" and model["moe_experts"] == 8


def test_the_temperature_may_go_on(lm_data, tmp_path):
    settings = {**SETTINGS, "moe_stage_temperature": "continue", "max_update": 10}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, no_save=True, **settings)
    log = result.log("train_inner")
    assert [step["moe_temperature"] for step in log] == [2.0] * 4 + [1.5, 1.0] + [0.5] * 4
    assert [step["moe_phase"] for step in log] == [0] * 3 + [1] * 4 + [2] * 3


def of_router(router):
    encoder = ROUTERS[router].needs_whole_sequence
    base = MASKED_LM if encoder else LM
    settings = {**base, "moe_spawn_update": "1:2,3:4", "moe_experts": None, "moe_router": router}
    if not ROUTERS[router].anneals:
        settings.update(moe_anneal_updates=None, moe_hard_update=None)
    if router == "stable":
        settings["moe_stable_update"] = 4
    if router == "stratified":  # of whose two experts in the first stage each is a stratum
        settings["moe_top_k"] = 1
    return settings


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_grows_and_resumes(router, lm_data, tmp_path):
    setup = build(lm_data, **of_router(router))
    trainer = setup.train(updates=2)
    check_that_it_goes_on(setup, trainer, tmp_path, setup.batches()[2:6])
    moe = layer_of(trainer)
    assert moe.stage == 2 and (moe.resizes or moe.num_experts == 4)


@pytest.mark.parametrize("select", ["load", "gradient"])
def test_which_expert_becomes_how_many(select, lm_data, tmp_path):
    settings = {**of_router("switch"), "moe_spawn_update": "1:2,5:5", "moe_spawn_select": select}
    setup = build(lm_data, **settings)
    trainer, batches = setup.train(updates=1), setup.batches()
    share, moe = torch.zeros(2), layer_of(trainer)
    for batch in batches[1:3]:
        with record() as routings:
            trainer.train_step([batch])
        measure = routings[moe].load_E()
        if select == "gradient":
            rows = [
                [p.grad.split(1 if name == "b2" else 48)[e] for name, p in parameters_of(moe)] for e in (0, 1)
            ]
            measure = torch.tensor([sum(x.square().sum() for x in each).sqrt() for each in rows])
        share += 0.01 * (measure / measure.sum() - share)
        assert torch.allclose(moe.demand.share_E, share)
    check_that_it_goes_on(setup, trainer, tmp_path, batches[3:5])
    expected = moe.spawner.children(2, 5, moe.demand.share_E)
    assert list(moe.plan_spawn().offspring.parent_E) == [0] * expected[0] + [1] * expected[1]
    trainer.train_step([batches[5]])
    assert moe.num_experts == 5 and moe.demand is None


def parameters_of(moe):
    return list(moe.experts.named_parameters(recurse=False))


@pytest.mark.parametrize("precision", [None, *MIXED])
def test_what_the_optimizer_knows_follows(precision, lm_data, flat_fp16_on_cpu):
    options = {
        **SETTINGS,
        **MIXED.get(precision, {}),
        "moe_router": "xmoe",
        "store_ema": True,
        "ema_fp32": True,
    }
    options.update(moe_anneal_updates=None, moe_hard_update=None)
    trainer = build(lm_data, **options).train(updates=5)
    moe = trainer.get_model().decoder.layers[1].moe
    states = optimizer_state.read(trainer.optimizer)
    before = {name: copy_state(vars(states[p])) for name, p in moe.named_parameters()}
    averages = {k: x.clone() for k, x in trainer.ema.fp32_params.items()}
    assert moe.num_experts == 2
    plan = moe.plan_spawn()
    growth.spawn(trainer)
    after = optimizer_state.read(trainer.optimizer)
    parents = list(plan.offspring.parent_E)
    for name, parameter in moe.named_parameters():
        found, moments = vars(after[parameter]), before[name]["statistics"]["exp_avg"]
        key = "decoder.layers.1.moe." + name
        if name.startswith("experts."):
            short = name.split(".")[1]
            expected = plan.statistics(short, moments, moments)
            average = plan.weights(short, averages[key])
        else:
            rows = parents if parameter.shape[0] == 4 and name == "router.weight" else slice(None)
            expected, average = moments[rows], averages[key][rows]
        assert moments.any() and torch.equal(found["statistics"]["exp_avg"], expected), name
        distance = (trainer.ema.fp32_params[key] - average).abs().max()
        assert 0 < distance < 0.1 if name == "router.weight" else distance == 0
        if precision and "memory" not in precision:
            assert torch.equal(found["master"].to(parameter.dtype), parameter.detach())
    trainer.train_step([build(lm_data, **options).batches()[5]])


RANKS = {
    "dts": {**SHARED, "moe_balance_weight": 0.1},
    "switch, rescaled": {**SHARED, "moe_router": "switch", "moe_spawn_rescale": True},
    "stable, P=1": {"moe_router": "stable", "moe_stable_update": 12, "moe_spawn_select": "load"},
    "topk": {
        **SHARED,
        "moe_router": "topk",
        "moe_spawn_update": "3:2,8:5",
        "moe_spawn_statistics": "unchanged",
        "moe_spawn_select": "gradient",
        "moe_hyper_adapter": True,
        "moe_shared_expert": True,
        "moe_sharded_checkpoint": True,
    },
}


def state_of_all_files(folder):
    state = checkpoint_utils.load_checkpoint_to_cpu(str(folder / "checkpoint_last.pt"))["model"]
    return {name: value for name, value in state.items() if not name.endswith("_float_tensor")}


@pytest.mark.ranks
def test_two_ranks_are_one_process(lm_data, tmp_path):
    jobs, common = [], {**SENTENCES, "moe_spawn_update": "3:2,8:4", "moe_experts": None, "max_update": 16}
    for name, options in RANKS.items():
        jobs.append([[lm_data], {**common, **options, "save_dir": tmp_path / name, "ranks": 2}])
    train_on_ranks(2, jobs, tmp_path)
    for name, options in RANKS.items():
        alone = {**common, **options, "moe_expert_parallel": None}
        train_on_all_batches(2, lm_data, **alone, save_dir=tmp_path / "one" / name)
        folders = tmp_path / name, tmp_path / "one" / name
        assert largest_difference(*map(state_of_all_files, folders)) < 1e-5, name


@pytest.mark.ranks
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_resume_in_every_stage(sharded, lm_data, tmp_path):
    """Bit for bit, and as one process; what resumes has saved nothing on the way."""
    common = {**SENTENCES, **SHARED, **STAGES, "max_update": 12, "moe_sharded_checkpoint": sharded}
    common.update(moe_balance_weight=0.1, store_ema=True, ema_decay=0.9)
    saving = {"save_interval_updates": 1, "keep_interval_updates": -1, "save_dir": tmp_path / "whole"}
    train_on_ranks(2, [[[lm_data], {**common, **saving}]], tmp_path)
    names = {stop: f"checkpoint_*_{stop}.pt" for stop in (2, 5, 6, 8, 10)}
    jobs = []
    for stop, name in names.items():
        (saved,) = (tmp_path / "whole").glob(name)
        resumed = {"save_dir": tmp_path / str(stop), "restore_file": saved, "save_interval_updates": 0}
        jobs.append([[lm_data], {**common, **resumed}])
    results = train_on_ranks(2, jobs, tmp_path / "resumed")
    whole = state_of_all_files(tmp_path / "whole")
    for stop, result in zip(names, results):
        assert result.log("train_inner")[0]["num_updates"] == stop + 1
        assert largest_difference(state_of_all_files(tmp_path / str(stop)), whole) == 0, stop
    train_on_all_batches(2, lm_data, **common, save_dir=tmp_path / "one")
    assert largest_difference(state_of_all_files(tmp_path / "one"), whole) < 1e-5


AUTO = {"moe_spawn_update": "auto:2,auto:4", "moe_spawn_window": 3, "moe_spawn_plateau": 0.9, "lr": 0.02}


def test_plateaus_decide_on_each_stage(lm_data, tmp_path):
    settings = {**SETTINGS, **AUTO, "max_update": 44, "moe_experts": 4, "save_interval_updates": 1}
    settings.update(keep_interval_updates=-1, store_ema=True, ema_fp32=True)
    whole = check_resume(lm_data, tmp_path, settings, ())
    lines = whole.result.lines("spawned experts before")
    updates = [int(line.split("before update ")[1].split(":")[0]) for line in lines]
    assert len(updates) == 2 and updates[0] <= 11 and updates[0] < updates[1] <= 22
    reasons = whole.result.lines("spawning before update")
    assert len(reasons) == 2
    check_resume(lm_data, tmp_path, settings, (updates[0], updates[0] + 2, updates[1]), whole)
    (model,), _ = checkpoint_utils.load_model_ensemble([str(whole.last)])
    assert model.plateau.spawned == updates and model.decoder.layers[1].moe.stage == 2


def test_fine_tuning_goes_on_from_any_stage(lm_data, tmp_path, trained):
    run = trained({**SETTINGS, "max_update": 12})
    for update, options, spawns in (
        (9, {"moe_spawn_update": "1:2,2:4,4:8"}, ["before update 4: 4 -> 8"]),
        (12, {"moe_spawn_update": "1:2,2:4,4:8"}, []),
        (9, {"moe_spawn_update": None, "moe_experts": 4}, []),
    ):
        settings = {**SETTINGS, **options, "max_update": 6, "finetune_from_model": run.at(update)}
        result = call("fairseq-train", lm_data, save_dir=tmp_path / "tuned", no_save=True, **settings)
        lines = result.lines("spawned experts before")
        assert len(lines) == len(spawns) and all(text in line for text, line in zip(spawns, lines))
        assert result.log("train_inner")[-1]["moe_experts"] <= 8
    wrong = {**SETTINGS, "moe_spawn_update": None, "moe_experts": 8, "finetune_from_model": run.at(9)}
    with pytest.raises(ValueError, match="4 experts .* --moe-experts is 8"):
        call("fairseq-train", lm_data, save_dir=tmp_path / "wrong", **wrong)


def test_a_checkpoint_of_any_stage_is_merged_and_made_dense(lm_data, tmp_path, trained):
    from support.evaluation import perplexity

    run = trained({**SETTINGS, "max_update": 12})
    for update, experts in ((9, 4), (12, 8)):
        merged = tmp_path / f"{update}.pt"
        evomoe("merge", run.at(update), "--experts", experts // 2, "--out", merged)
        state = torch.load(merged)
        assert state["model"]["decoder.layers.1.moe.experts.b2"].shape[0] == experts // 2
        assert "decoder.layers.1.moe.stage" not in state["model"]
        assert perplexity(lm_data, merged) < 200
        dense = tmp_path / f"dense{update}.pt"
        evomoe("densify", run.at(update), "--method", "average", "--out", dense)
        assert not [key for key in torch.load(dense)["model"] if "moe" in key]
    settings = {**SETTINGS, "moe_spawn_update": 6, "moe_experts": 4, "restore_file": merged, "max_update": 14}
    result = call("fairseq-train", lm_data, save_dir=tmp_path / "on", no_save=True, **settings)
    assert not result.lines("spawned experts") and len(result.log("train_inner")) == 2


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"moe_spawn_update": "3:2,20:8"}, ["--moe-spawn-update 20 is not before --max-update 14"]),
        ({"moe_spawn_update": "3:4,6:2"}, ["3:4, 6:2", "more experts in each stage"]),
    ],
)
def test_stages_that_cannot_come_are_refused(options, parts, lm_data, tmp_path):
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path, **{**SETTINGS, **options})
    refused(error, *parts)


RESCALED = {**SETTINGS, "moe_router": "switch", "moe_spawn_rescale": True, "moe_spawn_method": "copy"}
RESCALED.update(moe_anneal_updates=None, moe_hard_update=None, moe_spawn_gate_noise=0)


@pytest.mark.parametrize("precision", [None, *MIXED])
def test_scaled_experts_give_what_they_gave(precision, lm_data, flat_fp16_on_cpu):
    """Those of the model, its master copies and its EMA."""
    options = {**RESCALED, **MIXED.get(precision, {}), "store_ema": True, "ema_fp32": True}
    setup = build(lm_data, **options)
    trainer, batches = setup.train(updates=5), setup.batches()
    RunState.of(trainer).drift.see_batch(batches[0])  # as fairseq-train does at the start
    model, moe = trainer.get_model(), layer_of(trainer)
    inputs = batches[0]["net_input"]

    def outputs():
        seen = []
        handle = moe.register_forward_hook(lambda module, given, y: seen.append(y.float()))
        model.eval()
        with torch.no_grad():
            model(**inputs)
        model.train()
        handle.remove()
        return seen[0]

    before, average = outputs(), trainer.ema.fp32_params["decoder.layers.1.moe.experts.w2"].clone()
    growth.spawn(trainer)
    assert moe.num_experts == 4
    tolerance = 1e-5 if precision is None else 0.02
    assert (outputs() - before).norm() < tolerance * before.norm()
    after = trainer.ema.fp32_params["decoder.layers.1.moe.experts.w2"]
    assert torch.allclose(after[:48], 2 * average[:48], rtol=1e-3)
    states = vars(optimizer_state.read(trainer.optimizer)[moe.experts.w2])
    if precision and "memory" not in precision:
        assert torch.equal(states["master"].to(moe.experts.w2.dtype), moe.experts.w2.detach())


def test_a_run_with_scaled_experts_resumes_before_each_spawn(lm_data, tmp_path):
    whole = check_resume(lm_data, tmp_path, {**RESCALED, "save_interval_updates": 1}, (2, 5, 9))
    lines = whole.result.lines("the experts' output is scaled by")
    factors = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(factors) == 3 and 1.2 < factors[0] < 2 and factors[1:] == [2.0, 2.0]


def test_a_soft_gate_needs_no_scaling(lm_data):
    setup = build(lm_data, **{**SETTINGS, "moe_spawn_rescale": True})
    trainer = setup.train(updates=3)
    RunState.of(trainer).drift.see_batch(setup.batches()[0])
    plans = {"decoder.layers.1": layer_of(trainer).plan_spawn()}
    assert rescaling.output_scales(trainer, plans) == {"decoder.layers.1": 1.0}
