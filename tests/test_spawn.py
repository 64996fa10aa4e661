"""Experts out of an expert."""

import pytest
import torch

from fairseq_evomoe.evolution.spawn import Spawn, SpawnMethod

NAMES = ("w1", "b1", "w2", "b2")


def base():
    torch.manual_seed(0)
    return {
        "w1": 0.3 + 2 * torch.randn(200, 50),
        "b1": torch.randn(200),
        "w2": torch.randn(200, 50),
        "b2": torch.randn(1, 50),
    }


def spawned(method, strength=None, **options):
    spawn = Spawn(3, method=SpawnMethod(method), strength=strength, **options)
    tensors = {name: spawn(name, tensor) for name, tensor in base().items()}
    rows = {name: tensor.shape[0] for name, tensor in base().items()}
    return [
        {name: tensor[e * rows[name] : (e + 1) * rows[name]] for name, tensor in tensors.items()}
        for e in range(3)
    ]


def test_copy():
    for expert in spawned("copy"):
        assert all(torch.equal(expert[name], tensor) for name, tensor in base().items())


def test_mask_sets_a_share_of_the_weights_to_zero_and_leaves_the_others():
    experts = spawned("mask", 0.3)
    for expert in experts:
        for name in ("w1", "w2"):
            kept = expert[name] != 0
            assert kept.float().mean().item() == pytest.approx(0.7, abs=0.02)
            assert torch.equal(expert[name][kept], base()[name][kept])
        assert torch.equal(expert["b1"], base()["b1"]) and torch.equal(expert["b2"], base()["b2"])
    assert not torch.equal(experts[0]["w1"], experts[1]["w1"])


def test_noise_has_the_strength_of_the_weights_own_deviation():
    experts = spawned("noise", 0.2)
    for expert in experts:
        difference = expert["w1"] - base()["w1"]
        assert difference.std().item() == pytest.approx(0.2 * base()["w1"].std().item(), rel=0.05)
        assert torch.equal(expert["b1"], base()["b1"])
    assert not torch.equal(experts[0]["w1"], experts[1]["w1"])


def test_reinit_draws_whole_hidden_units_from_the_statistics_of_the_base():
    experts = spawned("reinit", 0.5)
    original = base()
    for expert in experts:
        changed = {
            "w1": (expert["w1"] != original["w1"]).all(1),
            "b1": expert["b1"] != original["b1"],
            "w2": (expert["w2"] != original["w2"]).all(1),
        }
        assert changed["w1"].sum() == 100
        assert torch.equal(changed["w1"], changed["b1"]) and torch.equal(changed["w1"], changed["w2"])
        untouched = ~changed["w1"]
        assert torch.equal(expert["w1"][untouched], original["w1"][untouched])
        fresh = expert["w1"][changed["w1"]]
        assert fresh.mean().item() == pytest.approx(original["w1"].mean().item(), abs=0.1)
        assert fresh.std().item() == pytest.approx(original["w1"].std().item(), rel=0.1)
        assert torch.equal(expert["b2"], original["b2"])
    assert not torch.equal(experts[0]["w1"], experts[1]["w1"])


@pytest.mark.parametrize("method", [m.value for m in SpawnMethod])
def test_the_result_depends_on_nothing_but_the_arguments(method):
    first = spawned(method)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = spawned(method)
    for a, b in zip(first, second):
        assert all(torch.equal(a[name], b[name]) for name in NAMES)
    torch.manual_seed(99)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("change", [{"layer": 1}, {"seed": 2}])
def test_layers_and_seeds_differ(change):
    assert not torch.equal(spawned("mask")[0]["w1"], spawned("mask", **change)[0]["w1"])


def test_the_base_is_not_changed_and_dtype_is_kept():
    weights = torch.randn(10, 4, dtype=torch.bfloat16)
    before = weights.clone()
    for method in SpawnMethod:
        assert Spawn(2, method=method)("w1", weights).dtype == torch.bfloat16
    assert torch.equal(weights, before)


def test_statistics_are_inherited():
    moment = torch.randn(10, 4)
    inherited = Spawn(3, method=SpawnMethod.reinit).inherit("w1", moment)
    assert torch.equal(inherited, moment.repeat(3, 1))
