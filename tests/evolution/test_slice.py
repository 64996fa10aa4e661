"""Experts of different widths out of one: what they keep, and what they compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairseq_evomoe.evolution.spawn import Spawn, SpawnMethod, usefulness
from fairseq_evomoe.moe import Hidden, MoELayer, RoutingContext
from fairseq_evomoe.moe.statistics import Activity
from support.cli import LM, call, parameters
from support.resume import check_resume

ROWS = ("w1", "b1", "w2", "w3")


def base(units=20, dim=6, gated=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1": (units, dim), "b1": (units,), "w2": (units, dim), "b2": (1, dim)}
    if gated:
        shapes["w3"] = (units, dim)
    return {name: torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}


def slice_of(widths, strength=0.0, **options):
    return Spawn(len(widths), method=SpawnMethod.slice, strength=strength, widths=widths, **options)


def experts_of(plan, tensors):
    """The new experts one by one."""
    whole = {name: plan.weights(name, tensor) for name, tensor in tensors.items()}
    parts = {name: x.split(plan.widths if name != "b2" else 1) for name, x in whole.items()}
    return [{name: part[e] for name, part in parts.items()} for e in range(len(plan.widths))]


def apply(expert, x):
    """An expert by its formula."""
    hidden = F.silu(x @ expert["w1"].t() + expert["b1"])
    if "w3" in expert:
        hidden = hidden * (x @ expert["w3"].t())
    return hidden @ expert["w2"] + expert["b2"]


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_narrow_expert_keeps_the_most_useful_units(measured, gated):
    tensors = base(gated=gated)
    activity = torch.rand(20) if measured else None
    score = []
    for unit in range(20):  # one unit at a time
        lengths = {n: sum(v**2 for v in x[unit].tolist()) ** 0.5 for n, x in tensors.items() if n[0] == "w"}
        if measured:
            score.append(activity[unit].item() * lengths["w2"])
        else:
            score.append(lengths["w1"] * lengths["w2"] * lengths.get("w3", 1))
    expected = sorted(sorted(range(20), key=lambda unit: -score[unit])[:7])
    plan = slice_of([7, 20]).plan(tensors, activity)
    narrow, same = experts_of(plan, tensors)
    for name in set(ROWS) & set(tensors):
        assert torch.equal(narrow[name], tensors[name][expected])
    assert torch.equal(narrow["b2"], tensors["b2"])
    assert all(torch.equal(same[name], tensors[name]) for name in tensors)
    assert torch.allclose(usefulness(tensors, activity).double(), torch.tensor(score).double(), rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_a_wide_expert_computes_what_the_base_computes_and_its_new_units_learn(gated):
    tensors = base(gated=gated)
    _, wide = experts_of(slice_of([4, 50]).plan(tensors), tensors)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.allclose(apply(wide, x), apply(tensors, x), rtol=0, atol=1e-12)
    for name in set(ROWS) & set(tensors) - {"w2"}:
        assert torch.equal(wide[name][:20], tensors[name])
        fresh = wide[name][20:]
        assert fresh.std().item() == pytest.approx(tensors[name].std().item(), rel=0.35)
        assert len(set(fresh.flatten().tolist())) == fresh.numel()
    w2 = wide["w2"].requires_grad_()
    apply(wide, x).square().sum().backward()
    assert (w2.grad[20:].abs().sum(1) > 0).all()


def test_a_share_of_the_units_is_chosen_by_chance_so_that_experts_of_equal_widths_differ():
    tensors = base(units=200)
    order = usefulness(tensors).sort(descending=True).indices.tolist()
    kept = [set(origin.unit_K.tolist()) for origin in slice_of([100] * 3, 0.2).plan(tensors).origins]
    for units in kept:
        assert len(units) == 100 and set(order[:80]) <= units
        assert not units <= set(order[:100])
    assert kept[0] != kept[1] != kept[2] != kept[0]
    default = Spawn(3, method=SpawnMethod.slice, widths=[100] * 3).plan(tensors).origins[0].unit_K.tolist()
    assert set(order[:90]) <= set(default) != set(order[:100])


def test_statistics_follow_the_units_and_are_zero_for_new_ones():
    tensors = base()
    plan = slice_of([5, 30, 20], 0.4).plan(tensors)
    for name, tensor in tensors.items():
        moment = torch.randn_like(tensor)
        for origin, part in zip(
            plan.origins, plan.statistics(name, moment, moment).split(plan.widths if name != "b2" else 1)
        ):
            kept = len(origin.unit_K)
            assert torch.equal(part[:kept], moment[origin.unit_K] if name != "b2" else moment)
            assert not part[kept:].any()


def test_every_copy_of_the_tensors_keeps_the_same_units():
    tensors = base()
    plan = slice_of([8, 8]).plan(tensors)
    average = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    rows = torch.cat([origin.unit_K for origin in plan.origins])
    assert torch.equal(plan.weights("w1", average["w1"]), average["w1"][rows])
    assert slice_of([8, 8]).plan(average).origins[0].unit_K.tolist() != plan.origins[0].unit_K.tolist()


@given(
    units=st.integers(1, 30),
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
    strength=st.floats(0, 1),
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_widths(units, widths, strength, ties):
    tensors = base(units)
    if ties:
        tensors = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    plan = slice_of(widths, strength).plan(tensors)
    again = slice_of(widths, strength).plan(tensors)
    assert plan.widths == widths
    for origin, other, width in zip(plan.origins, again.origins, widths):
        assert len(set(origin.unit_K.tolist())) == len(origin.unit_K) == min(width, units)
        assert torch.equal(origin.unit_K, other.unit_K)
    for name, tensor in tensors.items():
        rows = len(widths) if name == "b2" else sum(widths)
        assert plan.weights(name, tensor).shape == (rows,) + tensor.shape[1:]


def make_layer(widths, gated=False, units=20, method="slice", norm=None):
    layer = MoELayer(
        6,
        units,
        len(widths),
        "topk",
        top_k=min(2, len(widths)),
        between=Hidden(F.silu, norm=norm),
        gated=gated,
        spawner=Spawn(len(widths), method=SpawnMethod(method), widths=widths),
    )
    layer.experts.fill(base(units, gated=gated))
    return layer.train()


@pytest.mark.parametrize("gated", [False, True])
def test_the_layer_measures_activations_of_real_tokens_while_training(gated):
    layer = make_layer([4, 8], gated)
    x = torch.randn(2, 40, 6)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    padding[1, 20:] = True
    state = torch.get_rng_state()
    layer(x, RoutingContext(), padding)
    layer.eval()
    layer(10 * x, RoutingContext())
    assert torch.equal(state, torch.get_rng_state())
    tokens = torch.cat([x[0], x[1, :20]])[:: Activity.STRIDE]
    hidden = F.silu(tokens @ layer.experts.w1.t() + layer.experts.b1)
    hidden = hidden * (tokens @ layer.experts.w3.t()) if gated else hidden
    sums = layer.activity.drain()
    assert sums[-1] == len(tokens) == 4
    assert torch.allclose(sums[:-1], hidden.abs().sum(0), atol=1e-5)
    assert not layer.activity.drain().any()

    # two updates and one without tokens
    layer.activity.commit(sums)
    layer.activity.commit(torch.zeros_like(sums))
    layer.activity.commit(2 * sums)
    mean = hidden.abs().mean(0)
    assert torch.allclose(layer.activity.magnitude_H, (0.01 + 0.99 * 0.01) * mean, rtol=1e-4)


def test_the_measurement_decides_what_is_kept_and_is_gone_afterwards():
    layer = make_layer([4, 8])
    activity = torch.zeros(20)
    activity[11] = 1e6
    layer.activity.magnitude_H.copy_(activity)
    w1 = layer.experts.w1.detach().clone()
    assert "activity.magnitude_H" in layer.state_dict()
    layer.spawn()
    assert (layer.experts.w1[:4] == w1[11]).all(1).any()
    assert layer.experts.widths == [4, 8] and not any("activity" in key for key in layer.state_dict())


def test_the_measurement_stays_in_float32():
    layer = make_layer([4, 8]).half()
    assert layer.experts.w1.dtype == torch.float16
    layer.activity.magnitude_H.fill_(1e5)
    layer.bfloat16()
    assert layer.activity.magnitude_H.dtype == torch.float32 and layer.activity.magnitude_H[0] == 1e5


def test_states_with_and_without_a_measurement_load():
    source = make_layer([4, 8])
    source.activity.magnitude_H.uniform_()
    state = source.state_dict()
    dense = {key: value for key, value in state.items() if "activity" not in key}

    same = make_layer([4, 8])
    same.load_state_dict(state)
    assert torch.equal(same.activity.magnitude_H, source.activity.magnitude_H)
    same.load_state_dict(dense)
    other = make_layer([20, 20], method="copy")
    other.load_state_dict(state)
    assert other.activity is None and torch.equal(other.experts.w1, source.experts.w1)

    spawned = make_layer([4, 8])
    spawned.spawn()
    for given_state, activity in ((state, source.activity.magnitude_H), (dense, None)):
        spawned.load_state_dict(given_state)
        plan = source.spawner.plan(source.expert_tensors(), activity)
        assert torch.equal(spawned.experts.w1, plan.weights("w1", source.experts.w1))
    single = make_layer([4, 8])
    single.load_state_dict(spawned.state_dict())
    assert single.spawned and all(
        torch.equal(a, b) for a, b in zip(single.state_dict().values(), spawned.state_dict().values())
    )


def test_a_normalisation_of_hidden_units_needs_equal_widths():
    with pytest.raises(ValueError, match="normalisation of hidden units.*`widths`"):
        make_layer([4, 8], norm=torch.nn.LayerNorm(20)).spawn()
    layer = make_layer([20, 20], norm=torch.nn.LayerNorm(20))
    layer.spawn()
    assert layer.spawned


SLICE = {**LM, "moe_spawn_method": "slice", "moe_expert_sizes": "1,2,4,1"}


def test_a_run_resumes_bit_equal(lm_data, tmp_path):
    ema = {"store_ema": True, "ema_decay": 0.9, "ema_fp32": True}
    check_resume(lm_data, tmp_path, {**SLICE, **ema}, (3, 6))
    before, after = (parameters(next((tmp_path / "whole").glob(f"checkpoint_?_{n}.pt"))) for n in (3, 9))
    prefix = "decoder.layers.1.moe."
    assert (before[prefix + "activity.magnitude_H"] > 0).float().mean() > 0.8  # some units sleep
    assert not any("activity" in key for key in after)
    assert after[prefix + "experts.w1"].shape == (24 + 48 + 96 + 24, 32)
    saved = torch.load(tmp_path / "whole/checkpoint_last.pt")["extra_state"]["ema_fp32_params"]
    assert not any("activity" in key for key in saved)


def test_measuring_changes_nothing_before_the_spawn(lm_data, tmp_path):
    for method in ("slice", "copy"):
        settings = {**LM, "moe_spawn_method": method, "dropout": 0.2, "max_update": 6, "moe_spawn_update": 5}
        call("fairseq-train", lm_data, save_dir=tmp_path / method, save_interval_updates=5, **settings)
    states = [parameters(tmp_path / method / "checkpoint_1_5.pt") for method in ("slice", "copy")]
    assert set(states[0]) - set(states[1]) == {"decoder.layers.1.moe.activity.magnitude_H"}
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())
