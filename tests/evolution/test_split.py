"""EMoE: the hidden units of one expert, divided among many by balanced k-means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairseq_evomoe.evolution.clustering import balanced_kmeans
from fairseq_evomoe.evolution.spawn import Spawn, SpawnMethod
from fairseq_evomoe.moe import Hidden, MoELayer, Routing, RoutingContext
from fairseq_evomoe.moe.routers.router import Router
from fairseq_evomoe.moe.routers.topk import TopKRouter
from support.cli import LM, build, call, parameters
from support.resume import check_resume
from support.tasks import dense


class Everything(TopKRouter):
    """Every token to every expert, with weight 1."""

    def forward(self, x_TD, context):
        """See ``Router``."""
        token_N, expert_N = torch.ones(x_TD.shape[0], self.experts).nonzero(as_tuple=True)
        return Routing(token_N, expert_N, torch.ones(len(token_N)).to(x_TD), x_TD.shape[0], self.experts)


class Gateless(Router):
    """No gate."""

    def initialize(self, generator):
        """There is nothing to fill."""


def split_layer(experts=4, units=24, dim=6, gated=False, router=Everything, dtype=torch.float64):
    torch.manual_seed(0)
    spawner = Spawn(experts, method=SpawnMethod.split)
    layer = MoELayer(dim, units, experts, router, between=Hidden(F.gelu), gated=gated, spawner=spawner).to(
        dtype
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_experts_together_are_the_base(gated, dtype, tolerance):
    layer = split_layer(gated=gated, dtype=dtype)
    x = torch.randn(5, 7, 6, dtype=dtype)
    before = layer(x, RoutingContext())
    w1 = layer.experts.w1.detach().clone()
    layer.spawn()
    assert layer.experts.widths == [6] * 4
    after = layer(x, RoutingContext())
    assert (after - before).abs().max() < tolerance * before.abs().max().clamp(min=1)
    # every unit once
    assert sorted(map(tuple, layer.experts.w1.tolist())) == sorted(map(tuple, w1.tolist()))


def test_the_gate_rows_are_the_mean_keys():
    layer = split_layer()
    layer.spawn()
    for expert, row in enumerate(layer.router.weight):
        keys = layer.experts.w1[6 * expert : 6 * expert + 6]
        assert torch.allclose(row, sum(keys) / 6, rtol=0, atol=1e-6)


def test_biases_and_statistics():
    spawn = Spawn(4, method=SpawnMethod.split)
    tensors = {
        "w1": torch.randn(24, 6),
        "b1": torch.randn(24),
        "w2": torch.randn(24, 6),
        "b2": torch.randn(1, 6),
    }
    plan = spawn.plan(tensors)
    assert torch.equal(plan.weights("b2", tensors["b2"]), (tensors["b2"] / 4).repeat(4, 1))
    rows = torch.cat([origin.unit_K for origin in plan.origins])
    assert rows.sort().values.tolist() == list(range(24))
    moment = torch.randn(24, 6)
    assert torch.equal(plan.statistics("w2", moment, tensors["w2"]), moment[rows])
    assert torch.equal(plan.statistics("b2", tensors["b2"], tensors["b2"]), tensors["b2"].repeat(4, 1))


def test_the_experts_are_the_groups_of_similar_units():
    torch.manual_seed(0)
    centres = torch.eye(5)[:3]
    group = torch.randperm(30) % 3
    w1 = (centres[group] + 0.05 * torch.randn(30, 5)) * torch.rand(30, 1).add(0.1)  # lengths do not matter
    plan = Spawn(3, method=SpawnMethod.split).plan({"w1": w1})
    assert sorted(group[origin.unit_K].tolist() for origin in plan.origins) == [[g] * 10 for g in range(3)]


def objective(x, cluster, clusters):
    return sum((x[cluster == k] - x[cluster == k].mean(0)).square().sum().item() for k in range(clusters))


@given(
    clusters=st.integers(1, 5),
    size=st.integers(1, 8),
    dim=st.integers(1, 4),
    same=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_kmeans_is_balanced_repeatable_and_no_single_swap_or_random_assignment_is_better(
    clusters, size, dim, same, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(clusters * size, dim, generator=generator, dtype=torch.float64)
    x = torch.ones_like(x) if same else x
    cluster = balanced_kmeans(x, clusters, torch.Generator().manual_seed(1))
    assert torch.bincount(cluster, minlength=clusters).tolist() == [size] * clusters
    assert torch.equal(cluster, balanced_kmeans(x, clusters, torch.Generator().manual_seed(1)))
    # with the means as they are, no other assignment is better (up to what breaks ties)
    means = torch.stack([x[cluster == k].mean(0) for k in range(clusters)])
    cost = torch.cdist(x, means).square()
    found = cost.gather(1, cluster.unsqueeze(1)).sum().item()
    for _ in range(20):
        other = cluster[torch.randperm(len(cluster), generator=generator)]
        assert found <= cost.gather(1, other.unsqueeze(1)).sum().item() + 1e-3 * len(x)


def test_kmeans_improves_on_chance():
    torch.manual_seed(0)
    x = F.normalize(torch.randn(240, 8), dim=1).double()
    cluster = balanced_kmeans(x, 6, torch.Generator().manual_seed(0))
    chance = torch.arange(240) % 6
    assert objective(x, cluster, 6) < 0.8 * objective(x, chance, 6)


def test_a_dense_state_is_split_when_it_is_loaded():
    dense = split_layer()
    state = dense.state_dict()
    layer = split_layer()
    layer.spawn()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(7)
    layer.load_state_dict(state)
    assert layer.spawned_on_load
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.allclose(layer(x, RoutingContext()), dense(x, RoutingContext()), rtol=0, atol=1e-12)
    plan = dense.plan_spawn()
    assert torch.equal(layer.router.weight, plan.gate_ED.to(layer.router.weight))


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="24.*units.*`experts` is 5"):
        split_layer(experts=5).spawn()
    with pytest.raises(ValueError, match="`spawn_method` split.*`router` Gateless"):
        split_layer(router=Gateless).spawn()
    with pytest.raises(ValueError, match="`spawn_method` split makes experts of 12"):
        Spawn(2, method=SpawnMethod.split, widths=[4, 20]).plan({"w1": torch.randn(24, 6)})
    with pytest.raises(ValueError, match="normalisation of hidden units.*as wide as the base, 24"):
        layer = split_layer()
        layer.experts.hidden.norm = torch.nn.LayerNorm(24)
        layer.spawn()


@pytest.mark.parametrize("name", ["switch", "topk", "dts", "dynmoe"])
def test_routers_with_a_linear_gate_take_it(name):
    layer = split_layer(router=name)
    layer.spawn()
    assert torch.allclose(layer.router.weight[2], layer.experts.w1[12:18].mean(0), atol=1e-6)
    assert layer(torch.randn(3, 6, dtype=torch.float64), RoutingContext()).shape == (3, 6)


SPLIT = {**LM, "moe_spawn_method": "split", "moe_router": "topk"}


def test_a_run_resumes_bit_equal(lm_data, tmp_path):
    check_resume(lm_data, tmp_path, SPLIT, (6,))
    state = parameters(tmp_path / "whole/checkpoint_last.pt")
    assert state["decoder.layers.1.moe.experts.w1"].shape == (48, 32)
    assert state["decoder.layers.1.moe.experts.b2"].shape == (4, 32)


def test_a_dense_model_is_split_from_the_start(lm_data, tmp_path, monkeypatch):
    call("fairseq-train", lm_data, save_dir=tmp_path / "dense", **dense(LM))
    path = tmp_path / "dense/checkpoint_last.pt"
    settings = {**SPLIT, "moe_spawn_update": 0, "max_update": 8}
    call("fairseq-train", lm_data, save_dir=tmp_path, finetune_from_model=path, **settings)

    plain = build(lm_data, **dense(LM)).model.eval()
    model = build(lm_data, **settings).model.eval()
    for each in (plain, model):
        each.load_state_dict(parameters(path))
    assert model.decoder.layers[1].moe.experts.widths == [12] * 4
    monkeypatch.setattr(TopKRouter, "forward", Everything.forward)
    setup = build(lm_data, **settings)
    batch = setup.batches("valid")[0]
    with torch.no_grad():
        expected, found = (each(**batch["net_input"])[0] for each in (plain, model))
    words = batch["net_input"]["src_tokens"] != setup.task.dictionary.pad()  # padding gets nothing
    assert words.sum() > 50 and (found - expected)[words].abs().max() < 1e-5
