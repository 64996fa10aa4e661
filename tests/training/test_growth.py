"""What a spawn inside a running Trainer carries over."""

from unittest import mock

import pytest
import torch

from fairseq_evomoe.checkpoints import optimizer_state
from fairseq_evomoe.training import growth
from support.cli import LM, assert_equal, build, call, parameters
from support.optimizers import MIXED, OPTIMIZERS, assert_same_state, copy_state

METHODS = {
    "mask": {},
    "slice": {"moe_spawn_method": "slice", "moe_expert_sizes": "1,2,4,1"},
    "split": {"moe_spawn_method": "split"},
}


def grow(data, **settings):
    """A trainer just after its spawn, the states of the parameters before and after, and base tensors."""
    trainer = build(data, **{**LM, **settings}).train(updates=3)
    moe = trainer.get_model().decoder.layers[1].moe
    names = ("w1", "b1", "w2", "b2")
    base = {name: getattr(moe.experts, name) for name in names}
    plan = moe.plan_spawn()
    others = [p for p in trainer.get_model().parameters() if not any(p is b for b in base.values())]
    before = {p: copy_state(vars(state)) for p, state in optimizer_state.read(trainer.optimizer).items()}
    growth.spawn(trainer)
    after = {p: vars(state) for p, state in optimizer_state.read(trainer.optimizer).items()}
    for name in names:
        check_inherited(plan, name, before[base[name]], after[getattr(moe.experts, name)])
    for parameter in others:
        assert_same_state(before[parameter], after[parameter])
    return trainer


def check_inherited(plan, name, before, after):
    """Each expert has the statistics of the base expert, and the master weights that a spawn makes."""
    assert before["statistics"].keys() == after["statistics"].keys()
    for key, value in before["statistics"].items():
        other = after["statistics"][key]
        if not torch.is_tensor(value) or value.dim() == 0 or key == "exp_avg_sq_col":
            assert value == other if not torch.is_tensor(value) else torch.equal(value, other)
        else:
            assert torch.equal(other, plan.statistics(name, value, value)), (name, key)
    if before["master"] is not None:
        assert torch.equal(after["master"], plan.weights(name, before["master"]))


@pytest.mark.parametrize("method", ["mask", "slice", "split"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_expert_inherits_the_statistics(optimizer, method, lm_data):
    trainer = grow(lm_data, **{**OPTIMIZERS[optimizer], **METHODS[method], "optimizer": optimizer})
    (router,) = trainer.get_model().decoder.layers[1].moe.router.parameters()
    state = trainer.optimizer.optimizer.state.get(router, {})
    assert not any(torch.as_tensor(value).any() for value in state.values())  # Adagrad makes zeros at once
    assert any(p is router for group in trainer.optimizer.optimizer.param_groups for p in group["params"])


STATISTICS = {
    "mask": {"moe_spawn_strength": 0.4},
    "noise": {},
    "reinit": {},
    "copy": {},
    "slice": {"moe_expert_sizes": "1,2,4,1"},
    "split": {},
}


@pytest.mark.parametrize("method", STATISTICS)
@pytest.mark.parametrize("optimizer", ["adam", "adafactor"])
def test_changed_weights_start_without_statistics(optimizer, method, lm_data):
    """Each number of the new experts beside that of the base expert which it comes from."""
    options = {**LM, **OPTIMIZERS[optimizer], **STATISTICS[method], "optimizer": optimizer}
    options.update(moe_spawn_method=method, moe_spawn_statistics="unchanged")
    trainer = build(lm_data, **options).train(updates=3)
    moe = trainer.get_model().decoder.layers[1].moe
    base = dict(moe.experts.named_parameters())
    state = trainer.optimizer.optimizer.state
    before = {name: (p.detach().clone(), copy_state(state[p]["exp_avg"])) for name, p in base.items()}
    steps = {name: state[p]["step"] for name, p in base.items()}
    origins = moe.plan_spawn().origins
    growth.spawn(trainer)
    state = trainer.optimizer.optimizer.state
    zeros = total = 0
    for name, (weights, moments) in before.items():
        new, found = getattr(moe.experts, name).detach(), state[getattr(moe.experts, name)]
        assert found["step"] == steps[name]
        widths = [1 if name == "b2" else len(o.unit_K) + o.new_units for o in origins]
        for origin, rows, got in zip(origins, new.split(widths), found["exp_avg"].split(widths)):
            unit_K = torch.tensor([0]) if name == "b2" else origin.unit_K
            expected = torch.where(rows[: len(unit_K)] == weights[unit_K], moments[unit_K], torch.zeros(()))
            assert torch.equal(got[: len(unit_K)], expected) and not got[len(unit_K) :].any()
            if name in ("w1", "w2"):
                zeros, total = zeros + int((expected == 0).sum()), total + expected.numel()
    share = {"mask": 0.4, "noise": 1, "reinit": 0.5}.get(method, 0)
    assert zeros / total == pytest.approx(share, abs=0.03)


def test_statistics_of_a_spawn_that_never_is(lm_data, caplog):
    build(lm_data, **{**LM, "moe_spawn_update": 0, "moe_spawn_statistics": "none"}).trainer()
    assert "no effect with --moe-spawn-update 0: --moe-spawn-statistics" in caplog.text


@pytest.mark.parametrize("precision", [None, *MIXED])
def test_the_optimizer_begins_anew(precision, lm_data, flat_fp16_on_cpu):
    options = {**LM, **MIXED.get(precision, {}), "moe_spawn_statistics": "none"}
    trainer = build(lm_data, **options).train(updates=3)
    moe = trainer.get_model().decoder.layers[1].moe
    plan, old = moe.plan_spawn(), optimizer_state.read(trainer.optimizer)
    masters = {name: copy_state(old[p].master) for name, p in moe.experts.named_parameters()}
    other = trainer.get_model().decoder.layers[0].fc1.weight
    moment = copy_state(old[other].statistics["exp_avg"])
    growth.spawn(trainer)
    new = optimizer_state.read(trainer.optimizer)
    assert torch.equal(new[other].statistics["exp_avg"], moment) and moment.any()
    for name, parameter in moe.experts.named_parameters():
        values = [v for v in new[parameter].statistics.values() if torch.is_tensor(v) and v.dim()]
        assert bool(values) == (precision == "flat_fp16") and not any(value.any() for value in values)
        if masters[name] is not None:
            assert torch.equal(new[parameter].master, plan.weights(name, masters[name]))
    before = moe.experts.w1.detach().clone()
    assert trainer.train_step([build(lm_data, **options).batches()[3]]) is not None
    assert not torch.equal(before, moe.experts.w1)


def test_the_shared_expert_inherits_too(lm_data):
    setup = build(lm_data, **{**LM, **METHODS["slice"], "moe_shared_expert": True})
    trainer = setup.train(updates=3)
    moe = trainer.get_model().decoder.layers[1].moe
    base = {name: (p, p.detach().clone()) for name, p in moe.experts.named_parameters()}
    before = {name: copy_state(trainer.optimizer.optimizer.state[p]) for name, (p, _) in base.items()}
    growth.spawn(trainer)
    for name, (_, value) in base.items():
        shared = getattr(moe.shared, name)
        moment = trainer.optimizer.optimizer.state[shared]["exp_avg"]
        assert torch.equal(shared, value) and torch.equal(moment, before[name]["exp_avg"]) and moment.any()
    trainer.train_step([setup.batches()[3]])
    assert not torch.equal(moe.shared.w1, base["w1"][1])


@pytest.mark.parametrize("precision", MIXED)
def test_in_mixed_precision(precision, lm_data, flat_fp16_on_cpu):
    trainer = grow(lm_data, **MIXED[precision])
    moe = trainer.get_model().decoder.layers[1].moe
    half = torch.bfloat16 if "bf16" in precision else torch.float16
    assert {p.dtype for p in trainer.get_model().parameters()} == {half}
    assert len({expert.float().sum().item() for expert in moe.experts.w1.split(48)}) == 4


@pytest.mark.parametrize("precision", MIXED)
def test_it_trains_on_in_mixed_precision(precision, lm_data, flat_fp16_on_cpu):
    setup = build(lm_data, **{**LM, **MIXED[precision], "moe_spawn_update": 2})
    trainer = setup.trainer()
    trainer.begin_epoch(1)
    losses = [trainer.train_step([batch])["loss"] for batch in setup.batches()[:6] for _ in range(3)]
    assert trainer.get_model().decoder.layers[1].moe.spawned
    assert losses[-1] < losses[0]
    (gate,) = trainer.get_model().decoder.layers[1].moe.router.parameters()
    (initial,) = trainer.get_model().decoder.layers[1].moe.make_router().parameters()
    assert not torch.equal(gate, initial.to(gate.dtype))


@pytest.mark.parametrize("precision", ["fp16", "memory_efficient_fp16"])
def test_an_overflow_on_a_cpu_is_left_out(precision, lm_data, tmp_path):
    """A batch whose gradients have overflown makes no update, and halves the scale of the loss."""
    settings = {
        **LM,
        **MIXED[precision],
        "fp16_init_scale": 2**24,
        "max_update": 8,
        "disable_validation": True,
    }
    result = call("fairseq-train", lm_data, save_dir=tmp_path, no_save=True, **settings)
    assert result.lines("gradient overflow detected") and len(result.log("train_inner")) == 8
    assert 0 < result.log("train_inner")[-1]["loss_scale"] < 2**24
    assert len(result.lines("spawned experts before")) == 1


def test_another_error_than_an_overflow_is_one(lm_data):
    trainer = build(lm_data, **{**LM, **MIXED["fp16"]}).train(1)
    trainer.optimizer.step = mock.Mock(side_effect=RuntimeError("Torch not compiled with CUDA enabled"))
    with pytest.raises(RuntimeError, match="CUDA"):
        trainer.train_step([build(lm_data, **LM).batches()[1]])


def test_fp16_resumes(lm_data, tmp_path):
    """fairseq does not save its float32 copies, so this is close and not equal, as for dense models."""
    settings = {**LM, **MIXED["fp16"], "save_interval_updates": 3}
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    call(
        "fairseq-train",
        lm_data,
        save_dir=tmp_path / "r",
        restore_file=tmp_path / "checkpoint_2_9.pt",
        **settings,
    )
    whole, resumed = (parameters(folder / "checkpoint_last.pt") for folder in (tmp_path, tmp_path / "r"))
    for name, tensor in whole.items():
        assert torch.allclose(tensor.float(), resumed[name].float(), atol=0.02), name


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler")  # without a GPU it leaves losses as they are
def test_amp_keeps_its_scaler(lm_data):
    setup = build(lm_data, **{**LM, "amp": True})
    trainer = setup.train(updates=3)
    scaler = trainer.optimizer.scaler
    growth.spawn(trainer)
    assert trainer.optimizer.scaler is scaler
    losses = [trainer.train_step([batch])["loss"] for batch in setup.batches()[3:6] for _ in range(3)]
    assert losses[-1] < losses[0]


def test_learning_rate_loss_scale_and_counter_carry_over(lm_data):
    setup = build(lm_data, **{**LM, **MIXED["fp16"], "lr_scheduler": "inverse_sqrt", "warmup_updates": 10})
    trainer = setup.train(updates=3)
    trainer.optimizer.scaler.loss_scale = 2.0
    before = trainer.get_lr(), trainer.get_num_updates(), trainer.lr_scheduler
    growth.spawn(trainer)
    assert (trainer.get_lr(), trainer.get_num_updates(), trainer.lr_scheduler) == before
    assert trainer.optimizer.scaler.loss_scale == 2.0
    trainer.train_step([setup.batches()[3]])
    assert trainer.get_lr() == pytest.approx(0.005 * 4 / 10)
    assert trainer.optimizer.get_lr() == trainer.get_lr()


@pytest.mark.parametrize("ema_fp32", [False, True])
def test_ema_grows_with_the_model(ema_fp32, lm_data):
    setup = build(lm_data, **{**LM, "store_ema": True, "ema_decay": 0.5, "ema_fp32": ema_fp32})
    trainer = setup.train(updates=3)
    base = trainer.ema.get_model().decoder.layers[1].moe.experts.w1.detach().clone()
    model = trainer.get_model().decoder.layers[1].moe.experts.w1.detach().clone()
    assert not torch.equal(base, model)
    plan = trainer.get_model().decoder.layers[1].moe.plan_spawn()
    growth.spawn(trainer)
    ema, moe = (m.decoder.layers[1].moe for m in (trainer.ema.get_model(), trainer.get_model()))
    assert torch.equal(ema.experts.w1, plan.weights("w1", base))
    gates = [part.router.state_dict() for part in (ema, moe)]
    assert gates[0]
    assert_equal(*gates)
    assert not any(p.requires_grad for p in ema.parameters())
    trainer.train_step([setup.batches()[3]])
    expected = 0.5 * plan.weights("w1", base) + 0.5 * moe.experts.w1
    assert torch.allclose(ema.experts.w1, expected, atol=1e-6)


@pytest.mark.parametrize("spawn_update", [0, 2])
@pytest.mark.parametrize("ema_fp32", [False, True])
def test_ema_copies_tables_of_integers(ema_fp32, spawn_update, lm_data):
    ema = {"store_ema": True, "ema_decay": 0.9, "ema_fp32": ema_fp32}
    trainer = build(lm_data, **{**LM, **ema, "moe_router": "hash", "moe_spawn_update": spawn_update}).train(4)
    tables = [m.decoder.layers[1].moe.router.table_V for m in (trainer.ema.get_model(), trainer.get_model())]
    assert torch.equal(*tables) and tables[0].dtype == torch.int64 and tables[0].max() == 3
    moe = trainer.get_model().decoder.layers[1].moe
    assert not torch.equal(trainer.ema.get_model().decoder.layers[1].moe.experts.w1, moe.experts.w1)


def test_frozen_experts_stay_frozen(lm_data):
    setup = build(lm_data, **LM)
    experts = setup.model.decoder.layers[1].moe.experts
    experts.w1.requires_grad_(False)
    trainer = setup.train(updates=2)
    growth.spawn(trainer)
    assert not experts.w1.requires_grad and experts.w2.requires_grad
    before = experts.w1.clone()
    trainer.train_step([setup.batches()[3]])
    assert torch.equal(experts.w1, before)
