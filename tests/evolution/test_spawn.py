"""Experts out of an expert."""

import pytest
import torch

from fairseq_evomoe.evolution.spawn import Spawn, SpawnMethod
from fairseq_evomoe.moe.plan import Inherit

NAMES = ("w1", "b1", "w2", "b2")


def base():
    torch.manual_seed(0)
    return {
        "w1": 0.3 + 2 * torch.randn(200, 50),
        "b1": torch.randn(200),
        "w2": torch.randn(200, 50),
        "b2": torch.randn(1, 50),
    }


OLD = ("mask", "noise", "reinit", "copy")


def spawned(method, strength=None, **options):
    plan = Spawn(3, method=SpawnMethod(method), strength=strength, **options).plan(base())
    assert plan.widths == [200] * 3
    tensors = {name: plan.weights(name, tensor) for name, tensor in base().items()}
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


def test_reinit_gives_a_narrower_expert_a_random_choice_of_units():
    plan = Spawn(3, method=SpawnMethod.reinit, strength=0.25, widths=[80, 80, 200]).plan(base())
    assert plan.widths == [80, 80, 200]
    tensors = {name: plan.weights(name, tensor) for name, tensor in base().items()}
    choices = []
    for rows in (slice(0, 80), slice(80, 160)):
        place = {tuple(row): u for u, row in enumerate(base()["w1"].tolist())}
        mine = map(tuple, tensors["w1"][rows].tolist())
        old = [(i, place[row]) for i, row in enumerate(mine) if row in place]
        assert len(old) == 60 and [u for _, u in old] == sorted({u for _, u in old})
        for name in ("b1", "w2"):
            mine = tensors[name][rows]
            assert all(torch.equal(mine[i], base()[name][u]) for i, u in old)
        choices.append({u for _, u in old})
    assert choices[0] != choices[1]
    with pytest.raises(ValueError, match="reinit if none is wider"):
        Spawn(2, method=SpawnMethod.reinit, widths=[80, 201]).plan(base())


@pytest.mark.parametrize("method", OLD)
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
    tensors = {name: tensor.bfloat16() for name, tensor in base().items()}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for method in SpawnMethod:
        plan = Spawn(2, method=method).plan(tensors)
        for name, tensor in tensors.items():
            assert plan.weights(name, tensor).dtype == torch.bfloat16
    assert all(torch.equal(tensors[name], before[name]) for name in NAMES)


@pytest.mark.parametrize("inherit", Inherit)
def test_a_rank_has_its_experts_part_of_the_statistics(inherit):
    plan = Spawn(3, method=SpawnMethod.mask, strength=0.4, inherit=inherit).plan(base())
    for name, tensor in base().items():
        whole = plan.statistics(name, tensor, tensor).chunk(3)
        part = plan.only([2, 0]).statistics(name, tensor, tensor)
        assert torch.equal(part, torch.cat([whole[2], whole[0]]))


def test_statistics_are_inherited():
    plan = Spawn(3, method=SpawnMethod.reinit).plan(base())
    for name, tensor in base().items():
        moment = torch.randn(tensor.shape)
        assert torch.equal(plan.statistics(name, moment, moment), torch.cat([moment] * 3))


@pytest.mark.parametrize(
    "method, checksum", [("mask", 415.0), ("noise", 832.4644165), ("reinit", 571.5108032)]
)
def test_the_random_numbers_are_those_of_the_first_version(method, checksum):
    small = {"w1": torch.arange(12.0).view(4, 3), "b1": torch.arange(4.0), "w2": torch.ones(4, 3)}
    plan = Spawn(2, layer=1, method=SpawnMethod(method), strength=0.5, seed=3).plan(small)
    place = torch.arange(1.0, 9).unsqueeze(1)
    found = sum((place * plan.weights(name, x).view(8, -1)).sum().item() for name, x in small.items())
    assert found == pytest.approx(checksum, rel=1e-5)


def test_the_third_matrix_is_treated_as_the_first():
    gated = {**base(), "w3": torch.randn(200, 50)}
    for method in ("mask", "noise", "reinit"):
        plan = Spawn(2, method=SpawnMethod(method)).plan(gated)
        w1, w3 = (plan.weights(name, gated[name]) != gated[name].repeat(2, 1) for name in ("w1", "w3"))
        assert w3.any() and w3.float().mean().item() == pytest.approx(w1.float().mean().item(), abs=0.02)
        if method == "reinit":
            assert torch.equal(w1.all(1), w3.all(1))


@pytest.mark.parametrize("method", ("mask", "noise", "copy"))
def test_other_widths_than_the_base_has_are_refused(method):
    for widths in ([200, 100, 200], [96] * 3):
        with pytest.raises(ValueError, match=f"{method}.*`expert_sizes`"):
            Spawn(3, method=SpawnMethod(method), widths=widths).plan(base())
    assert Spawn(3, method=SpawnMethod(method), widths=[200] * 3).plan(base()).widths == [200] * 3


@pytest.mark.parametrize("widths", [[8, 8], [8, 0, 8]])
def test_widths_that_are_no_widths_are_refused(widths):
    with pytest.raises(ValueError, match="`expert_sizes`"):
        Spawn(3, method=SpawnMethod.slice, widths=widths)
