"""What is frozen stays so through a spawn, and what is new learns."""

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.moe import MoELayer
from fairseq_evomoe.training import growth
from support.cli import LM, Run, assert_equal, build, call, evomoe, parameters
from support.parallel import RANKS, SENTENCES, SHARED, TOLERANCE
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks
from support.refusals import refused
from support.resume import check_resume
from support.tasks import PLAIN, dense

QUIET = {"disable_validation": True}
FREEZING = {**LM, **QUIET, "moe_shared_expert": True, "moe_hyper_adapter": True}


def frozen(module):
    return {name for name, parameter in module.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("router", ["switch", "recurrent"])
@pytest.mark.parametrize("names", [["w1"], ["w1", "b1", "w2", "b2"]])
def test_what_a_spawn_makes_is_trained_unless_it_comes_from_what_is_not(names, router):
    layer = MoELayer(8, 16, 4, router, shared_expert=True, hyper_adapter=True)
    for name in names:
        getattr(layer.experts, name).requires_grad_(False)
    layer.spawn()
    assert frozen(layer) == {f"{module}.{name}" for module in ("experts", "shared") for name in names}


def test_a_shared_expert_is_in_the_parameter_group_of_the_base():
    layer = MoELayer(8, 16, 4, shared_expert=True)
    layer.experts.w1.param_group = "slow"
    layer.spawn()
    assert layer.experts.w1.param_group == layer.shared.w1.param_group == "slow"


def test_a_module_that_is_yet_to_come_can_be_frozen():
    layer = MoELayer(8, 16, 4)
    layer.freeze("router")
    assert not frozen(layer)
    layer.spawn()
    assert frozen(layer) == {"router.weight"}


@pytest.mark.parametrize("ema_fp32", [False, True])
def test_an_average_of_the_model_is_not_trained(ema_fp32, lm_data, tmp_path):
    settings = {**FREEZING, "store_ema": True, "ema_decay": 0.9, "ema_fp32": ema_fp32}
    trainer = build(lm_data, **settings).train(2)
    growth.spawn(trainer)
    assert not any(p.requires_grad for p in trainer.ema.get_model().parameters())
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(tmp_path / "ema.pt"), {"train_iterator": {"epoch": 1}})
    loading = build(lm_data, **settings).trainer()
    loading.load_checkpoint(str(tmp_path / "ema.pt"))
    ema = loading.ema.get_model()
    assert ema.decoder.layers[1].moe.spawned
    assert not any(p.requires_grad for p in ema.parameters())


def in_part(name, part):
    """Whether a parameter belongs to what ``--moe-freeze`` calls so."""
    experts = ".moe." in name and ".moe.router." not in name
    return {"router": ".moe.router." in name, "experts": experts, "backbone": ".moe." not in name}[part]


FROZEN = {"router": ["router"], "experts": ["experts", "shared", "hyper_adapter"]}


@pytest.mark.parametrize("parts, stops", [(["router", "backbone"], [9]), (["experts"], [3])], ids=str)
def test_a_part_is_frozen_before_and_after_the_spawn(parts, stops, lm_data, tmp_path):
    """The flag holds in a run that is resumed before the spawn, and after it."""
    settings = {**FREEZING, "moe_freeze": ",".join(parts), "max_update": 12}
    whole = check_resume(lm_data, tmp_path, settings, stops)
    before, spawned, last = map(parameters, (whole.at(3), whole.at(9), whole.last))
    start = dict(build(lm_data, **settings).model.named_parameters())
    for early, late in ((start, before), (spawned, last)):
        for name, tensor in early.items():
            if name == "decoder.version":
                continue
            held = any(in_part(name, part) for part in parts)
            assert torch.equal(tensor, late[name]) == held or "hyper_adapter" in name, name
    (line,) = whole.result.lines("spawned experts before")
    assert line.endswith(f", frozen: {', '.join(FROZEN[parts[0]])}")
    assert len(whole.result.lines("a router that a spawn makes stays as it is drawn")) == ("router" in parts)
    (line,) = whole.result.lines("not trained, by --moe-freeze: ")
    assert all(part in line for part in parts)


@pytest.fixture(scope="module")
def dense_run(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    return Run(
        folder, call("fairseq-train", lm_data, save_dir=folder, **{**dense(LM), **QUIET, "max_update": 2})
    )


def test_upcycling_with_a_frozen_backbone(dense_run, lm_data, tmp_path):
    settings = {**LM, **QUIET, **PLAIN, "moe_freeze": "backbone", "finetune_from_model": dense_run.last}
    settings.update(max_update=4, save_interval_updates=2)
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    before, after = parameters(dense_run.last), parameters(tmp_path / "checkpoint_last.pt")
    assert_equal({n: t for n, t in before.items() if n in after}, {n: after[n] for n in before if n in after})
    middle = parameters(tmp_path / "checkpoint_1_2.pt")
    moved = {name for name, tensor in middle.items() if not torch.equal(tensor, after[name])}
    assert moved and all(".moe." in name for name in moved)
    (line,) = result.lines("spawned experts of the checkpoint's one expert")
    assert "1 -> 4 experts" in line and "frozen" not in line


def test_fine_tuning_with_a_frozen_router(trained, lm_data, tmp_path):
    run = trained(LM)
    settings = {**LM, **QUIET, "moe_freeze": "router", "finetune_from_model": run.last}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    before, after = parameters(run.last), parameters(tmp_path / "checkpoint_last.pt")
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if ".router." in name} <= same and len(same) < len(before)


def test_another_part_is_frozen_than_in_the_checkpoint(trained, lm_data, tmp_path):
    settings = {**LM, **QUIET, "max_update": 16, "restore_file": trained(LM).last, "moe_freeze": "backbone"}
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    refused(error, "--moe-freeze", "--reset-optimizer")
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings, reset_optimizer=True)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"moe_freeze": "gate"}, ["--moe-freeze", "router", "experts", "backbone", "gate"]),
        ({"moe_freeze": "router,experts,backbone"}, ["--moe-freeze", "nothing"]),
        ({"moe_freeze": "experts,backbone"}, ["--moe-freeze", "--moe-spawn-update", "nothing"]),
    ],
    ids=str,
)
def test_refused(options, parts, lm_data):
    with pytest.raises(ConfigError) as error:
        build(lm_data, **{**LM, **options})
    refused(error, *parts)


def test_only_a_router_learns(lm_data):
    setup = build(lm_data, **{**LM, **PLAIN, "moe_freeze": "experts,backbone"})
    assert all(".router." in n for n, p in setup.model.named_parameters() if p.requires_grad)


@pytest.mark.ranks
def test_a_part_is_frozen_on_ranks_that_share_the_experts(lm_data, tmp_path):
    """Each with a part of them, and of the checkpoint, from which the run goes on."""
    jobs = {}
    for part in ("experts", "backbone"):
        settings = {**SENTENCES, "max_update": 10, "moe_freeze": part, "save_interval_updates": 8}
        shared = {**settings, **SHARED, "moe_sharded_checkpoint": True, "save_dir": tmp_path / part}
        resumed = {**shared, "save_dir": tmp_path / f"{part} resumed", "save_interval_updates": 0}
        resumed["restore_file"] = tmp_path / part / "checkpoint_2_8.pt"
        jobs[part] = settings, shared, resumed
    runs = [[[lm_data], job] for _, shared, resumed in jobs.values() for job in (shared, resumed)]
    train_on_ranks(RANKS, runs, tmp_path / "jobs")
    for part, (settings, shared, resumed) in jobs.items():
        one = tmp_path / f"{part} alone"
        train_on_all_batches(RANKS, lm_data, save_dir=one, **settings)
        whole, again = (tmp_path / f"{name}.pt" for name in (part, f"{part} again"))
        evomoe("consolidate", shared["save_dir"] / "checkpoint_last.pt", "--out", whole)
        evomoe("consolidate", resumed["save_dir"] / "checkpoint_last.pt", "--out", again)
        assert largest_difference(state_of(whole), state_of(one / "checkpoint_last.pt")) < TOLERANCE
        assert_equal(parameters(whole), parameters(again))
