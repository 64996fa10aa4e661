"""Experts that come and go inside a running Trainer."""

import re

import pytest
import torch

from fairseq_evomoe.checkpoints import optimizer_state
from fairseq_evomoe.moe.routers.dynmoe import DynMoERouter
from fairseq_evomoe.training.growth import resize
from support.cli import LM, assert_equal, build, call, parameters
from support.evaluation import perplexity
from support.optimizers import MIXED, OPTIMIZERS, assert_same_state, copy_state
from support.rank_jobs import state_of, train_on_ranks
from support.resume import check_resume

DYNMOE = {**LM, "moe_router": "dynmoe", "moe_dynmoe_window": 3, "moe_max_experts": 6, "moe_spawn_update": 0}
TENSORS = ("w1", "b1", "w2", "b2")


def trained(data, **settings):
    """A trainer whose next update begins by removing expert 1 of 4 and adding a copy of expert 3."""
    trainer = build(data, **{**DYNMOE, "moe_max_experts": 0, **settings}).train(updates=2)
    router = trainer.get_model().decoder.layers[1].moe.router
    router.used_E.copy_(torch.tensor([3.0, 0, 2, 9]))
    router.rejected_D.copy_(torch.arange(32.0))
    router.updates.fill_(3)
    return trainer


def rows(tensor, widths):
    """The rows of each expert."""
    return tensor.split(widths) if len(tensor) == sum(widths) else tensor.split(1)


def check_state(before, after, old, new):
    """Each expert has the state of the expert that it was, and a new one nothing but weights."""
    assert before.statistics.keys() == after.statistics.keys()
    widths = [48] * 4 if len(old) == 4 * 48 else [1] * 4
    for key, value in before.statistics.items():
        other = after.statistics[key]
        if not torch.is_tensor(value) or value.dim() == 0 or key == "exp_avg_sq_col":
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other))
            continue
        value, other = rows(value, widths), rows(other, widths)
        assert [torch.equal(value[o], other[n]) for o, n in ((0, 0), (2, 1), (3, 2))] == [True] * 3
        assert not other[3].any()
    if before.master is not None:
        value, other = rows(before.master, widths), rows(after.master, widths)
        assert [torch.equal(value[o], other[n]) for o, n in ((0, 0), (2, 1), (3, 2))] == [True] * 3
        assert torch.equal(after.master.to(new.dtype), new)


def check_change(trainer):
    """Change the experts and compare all that there is with what there was."""
    moe = trainer.get_model().decoder.layers[1].moe
    named = dict(moe.named_parameters())
    before = optimizer_state.read(trainer.optimizer)
    before = {p: optimizer_state.ParameterState(**copy_state(vars(state))) for p, state in before.items()}
    tensors = {key: p.detach().clone() for key, p in named.items()}
    resize(trainer)
    after = optimizer_state.read(trainer.optimizer)
    changed = dict(moe.named_parameters())
    assert changed.keys() == named.keys() and moe.experts.widths == [48] * 4
    for key, old in named.items():
        assert changed[key] is not old
        check_state(before[old], after[changed[key]], old, changed[key])
        values, others = (
            rows(x, [48] * 4 if len(old) == 192 else [1] * 4) for x in (tensors[key], changed[key])
        )
        assert [torch.equal(values[o], others[n]) for o, n in ((0, 0), (2, 1), (3, 2))] == [True] * 3
        if key.startswith("experts."):
            assert torch.equal(others[3], values[3])
    direction = torch.arange(32.0) / torch.arange(32.0).norm()
    assert torch.equal(moe.router.weight[3], direction.to(moe.router.weight.dtype))
    assert moe.router.threshold_E[3] == 0 and moe.router.origin_E.tolist() == [0, 2, 3, 3]
    for parameter, state in before.items():
        if not any(parameter is p for p in named.values()):
            assert_same_state(vars(state), vars(after[parameter]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_unused_expert_goes_and_a_new_one_comes(optimizer, lm_data):
    check_change(trained(lm_data, **{**OPTIMIZERS[optimizer], "optimizer": optimizer}))


@pytest.mark.parametrize("precision", MIXED)
def test_in_mixed_precision(precision, lm_data, flat_fp16_on_cpu):
    check_change(trained(lm_data, **MIXED[precision]))


@pytest.mark.parametrize("ema_fp32", [False, True])
def test_the_ema_changes_with_the_model(ema_fp32, lm_data):
    trainer = trained(lm_data, store_ema=True, ema_decay=0.5, ema_fp32=ema_fp32)
    ema = trainer.ema.get_model().decoder.layers[1].moe
    base = ema.experts.w1.detach().split(48)
    gate = ema.router.weight.detach()
    resize(trainer)
    moe = trainer.get_model().decoder.layers[1].moe
    assert torch.equal(ema.experts.w1, torch.cat([base[e] for e in (0, 2, 3, 3)]))
    assert torch.equal(ema.router.weight, torch.cat([gate[[0, 2, 3]], moe.router.weight[3:]]))
    setup = build(lm_data, **DYNMOE)
    before = ema.experts.w1.clone()
    trainer.train_step([setup.batches()[3]])
    assert torch.allclose(ema.experts.w1, 0.5 * before + 0.5 * moe.experts.w1, atol=1e-6)
    assert all(torch.isfinite(p).all() for p in ema.parameters())


def test_nothing_happens_before_the_window_ends_or_without_a_reason(lm_data):
    trainer = trained(lm_data)
    moe = trainer.get_model().decoder.layers[1].moe
    before, optimizer = list(moe.parameters()), trainer.optimizer
    moe.router.updates.fill_(2)
    resize(trainer)
    moe.router.updates.fill_(3)
    moe.router.used_E.fill_(1)  # and no room for more
    resize(trainer)
    assert all(a is b for a, b in zip(before, moe.parameters())) and trainer.optimizer is optimizer
    assert moe.router.updates == 0 and not moe.router.used_E.any()


@pytest.fixture
def never_used(monkeypatch):
    """Let no token activate expert 1, and few the others."""
    initialize = DynMoERouter.initialize

    def changed(self, generator):
        initialize(self, generator)
        self.threshold_E.data.fill_(0.3)
        self.threshold_E.data[1] = 3

    monkeypatch.setattr(DynMoERouter, "initialize", changed)


@pytest.mark.parametrize(
    "options, stops",
    [
        # where a window ends, and within the windows from 2 to 5, 8 and 11
        ({}, (3, 6)),
        ({"moe_spawn_update": 2, "moe_spawn_method": "slice", "moe_expert_sizes": "1,2,4,1"}, (3, 9)),
        ({"store_ema": True, "ema_decay": 0.9, "ema_fp32": True, "update_freq": 2}, (6,)),
    ],
    ids=["plain", "slice", "ema"],
)
def test_a_run_resumes_bit_equal(options, stops, lm_data, tmp_path, never_used):
    check_resume(lm_data, tmp_path, {**DYNMOE, **options}, stops)
    state = parameters(tmp_path / "whole/checkpoint_last.pt")
    origin = state["decoder.layers.1.moe.router.origin_E"].tolist()
    assert 1 not in origin and origin != [0, 2, 3]  # one has gone, and at least one has come
    assert state["decoder.layers.1.moe.experts.b2"].shape[0] == len(origin)


def test_a_run_says_what_it_changes_and_its_checkpoints_can_be_evaluated(lm_data, tmp_path, never_used):
    result = call("fairseq-train", lm_data, save_dir=tmp_path, save_interval_updates=3, **DYNMOE)
    lines = result.lines("changed experts before update")
    pattern = (
        r"update (\d+): decoder.layers.1: (\d) -> (\d) experts \((.*)\); ([\d,]+) -> ([\d,]+) parameters$"
    )
    found = [re.search(pattern, line) for line in lines]
    assert found[0].group(1, 2, 3) == ("3", "4", "4")
    assert re.match(r"removed \[1\], added a copy of \d", found[0].group(4))
    sizes = [int(match.group(3)) for match in found]
    assert [4] + sizes[:-1] == [int(match.group(2)) for match in found] and len(set(sizes)) > 1
    path = tmp_path / "checkpoint_last.pt"
    assert parameters(path)["decoder.layers.1.moe.experts.b2"].shape[0] == sizes[-1]
    # an expert, its row of the gate and its threshold
    expert = 2 * 32 * 48 + 48 + 32 + 32 + 1
    for match, size in zip(found, sizes):
        before, after = (int(match.group(i).replace(",", "")) for i in (5, 6))
        assert after - before == (size - int(match.group(2))) * expert
    # spawn_update 8 makes a model with one expert, which the checkpoint's experts replace
    ppl = [perplexity(lm_data, path, model_overrides=repr({"moe_spawn_update": update})) for update in (0, 8)]
    assert ppl[0] == ppl[1] < perplexity(lm_data, tmp_path / "checkpoint_1_3.pt")
    assert ppl[0] == pytest.approx(2 ** result.log("valid")[-1]["valid_loss"], rel=0.05)


def test_it_can_be_switched_off(lm_data, tmp_path, never_used):
    settings = {**DYNMOE, "moe_dynmoe_window": 0}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert not result.lines("changed experts")
    state = parameters(tmp_path / "checkpoint_last.pt")
    assert state["decoder.layers.1.moe.experts.b2"].shape[0] == 4


@pytest.mark.ranks
def test_two_processes_decide_together(lm_data, tmp_path):
    settings = {**DYNMOE, "max_update": 8, "save_interval_updates": 5}
    # from the middle of a window: the checkpoint has the counts of both
    middle = tmp_path / "two" / "checkpoint_2_5.pt"
    jobs = [{"save_dir": tmp_path / "two"}, {"save_dir": tmp_path / "resumed", "restore_file": middle}]
    result, resumed = train_on_ranks(2, [[[lm_data], {**settings, **job}] for job in jobs], tmp_path)
    assert len(result.lines("changed experts before update 3")) == 1  # only one of them logs
    two = state_of(tmp_path / "two" / "checkpoint_last.pt")
    assert two["decoder.layers.1.moe.experts.b2"].shape[0] > 4
    assert [step["num_updates"] for step in resumed.log("train_inner")] == [6, 7, 8]
    assert_equal(state_of(tmp_path / "resumed" / "checkpoint_last.pt"), two)
