"""Experts out of clusters of tokens: --moe-spawn-method cluster."""

import numpy as np
import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.evolution.cluster_aware import find_clusters
from fairseq_evomoe.evolution.spawn import Spawn, SpawnMethod
from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from fairseq_evomoe.moe.plan import make_spawner
from fairseq_evomoe.moe.statistics import Sample
from support.cli import LM, build
from support.rank_threads import on_ranks
from support.router_checks import end_update
from support.stages import check_that_it_goes_on, layer_of

DIM, KINDS = 10, 3


def tokens(number, seed=0):
    """Tokens of three kinds, each near a plane of its own, around a mean; and the kind of each."""
    generator = torch.Generator().manual_seed(seed)
    planes = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)))[0]
    kind_N = torch.arange(number) % KINDS
    part = torch.randn(number, 2, generator=generator) + torch.tensor([4.0, 0.0])
    bases = torch.stack([planes[2 * kind : 2 * kind + 2] for kind in range(KINDS)])[kind_N]
    x_ND = torch.einsum("nk,nkd->nd", part, bases) + 0.01 * torch.randn(number, DIM, generator=generator)
    return x_ND + 0.5, kind_N


def test_clusters_are_the_kinds_and_keep_their_directions():
    x_ND, kind_N = tokens(91)
    found = find_clusters(x_ND, KINDS, torch.Generator().manual_seed(1))
    x_ND, kind_N = x_ND[1:], kind_N[1:]  # clusters are of equal sizes
    best_N = (x_ND @ found.gate_ED.t()).argmax(1)
    of_kind = [best_N[kind_N == kind].unique().tolist() for kind in range(KINDS)]
    assert sorted(of_kind) == [[0], [1], [2]]
    assert (found.gate_ED.double() @ x_ND.double().mean(0)).abs().max() < 1e-5
    logits = (x_ND @ found.gate_ED.t()).numpy()
    assert np.sqrt((logits.std(axis=1) ** 2).mean()) == pytest.approx(1, abs=1e-4)
    for kind in range(KINDS):
        (expert,) = of_kind[kind]
        part = x_ND[kind_N == kind].double().numpy()
        _, values, vectors = np.linalg.svd(part, full_matrices=False)
        energy = np.cumsum(values**2) / (values**2).sum()
        directions = vectors[: int(np.argmax(energy >= 0.9)) + 1]
        rows = torch.randn(4, DIM, dtype=torch.float64)
        inside = rows.numpy() @ directions.T @ directions
        expected = inside + 0.7 * (rows.numpy() - inside)
        assert np.allclose(found.narrowed(expert, rows, 0.3).numpy(), expected, atol=1e-10)


def test_experts_are_the_base_within_their_cluster():
    torch.manual_seed(1)
    base = {
        "w1": torch.randn(8, DIM),
        "b1": torch.randn(8),
        "w2": torch.randn(8, DIM),
        "b2": torch.randn(1, DIM),
    }
    x_ND, _ = tokens(90)
    spawn = Spawn(KINDS, method=SpawnMethod.cluster, strength=1.0)
    plan = spawn.plan(base, x_ND)
    assert plan.gate_ED.shape == (KINDS, DIM) and plan.widths == [8] * KINDS
    best_N = (x_ND @ plan.gate_ED.t()).argmax(1)
    w1 = plan.weights("w1", base["w1"]).split(8)
    for expert in range(KINDS):
        own, others = x_ND[best_N == expert], x_ND[best_N != expert]
        change = lambda x: ((x @ (w1[expert] - base["w1"]).t()).norm() / (x @ base["w1"].t()).norm()).item()  # noqa: E731,B023
        assert change(own) < 0.35 < 0.6 < change(others)
    for name in ("b1", "w2", "b2"):
        assert torch.equal(plan.weights(name, base[name]), torch.cat([base[name]] * KINDS))
    again = spawn.plan(base, x_ND)
    assert torch.equal(again.gate_ED, plan.gate_ED) and torch.equal(
        torch.cat(w1), again.weights("w1", base["w1"])
    )
    few = spawn.plan(base, x_ND[:2])
    assert few.gate_ED is None and torch.equal(few.weights("w1", base["w1"]), torch.cat([base["w1"]] * KINDS))


def make(**options):
    torch.manual_seed(0)
    spawner = make_spawner(experts=KINDS, method="cluster")
    return MoELayer(DIM, 8, KINDS, "switch", spawner=spawner, **options)


def test_a_layer_keeps_every_sixteenth_token_and_spawns_from_them():
    layer, parts = make(), []
    for update in range(3):
        x, _ = tokens(16 * 30, update)
        layer(x[:100]), layer(x[100:], RoutingContext(first_row=100))
        parts += [x[:100:16], x[112::16]]
        end_update(layer)
    assert torch.equal(layer.activity.measured, torch.cat(parts))
    other = make()
    other.load_state_dict(layer.state_dict())
    spawned = make(spawned=True)
    spawned.load_state_dict(layer.state_dict())
    for each in (layer, other):
        each.spawn()
    assert layer.activity is None and torch.equal(layer.router.weight, other.router.weight)
    assert torch.equal(layer.router.weight, spawned.router.weight)
    x, kind_N = tokens(60, 9)
    with record() as routings:
        layer.eval()(x)
    kinds = [routings[layer].expert_N[kind_N == kind].unique().tolist() for kind in range(KINDS)]
    assert sorted(kinds) == [[0], [1], [2]]


def test_ranks_keep_the_same_tokens():
    x, _ = tokens(100)
    alone, layers = make(), [make(), make()]
    alone(x)
    end_update(alone)

    def run(ranks, part):
        layers[ranks.rank].ranks = ranks
        layers[ranks.rank](part)

    on_ranks(run, [x[:37], x[37:]])
    end_update(*layers)
    for layer in layers:
        assert torch.equal(layer.activity.measured, alone.activity.measured)


def test_the_oldest_tokens_are_replaced():
    sample = Sample(2, size=4)
    for update in range(3):
        sample.watch(None, torch.full((2, 2), float(update)), 0)
        sample.watch(None, torch.full((200, 2), float(update)), 70)  # beyond what is kept of an update
        sample.watch(None, torch.full((2, 2), float(update)), 0)  # as activation checkpointing does
        sample.commit(sample.drain())
    assert sample.measured.tolist() == [[2.0, 2.0]] * 2 + [[1.0, 1.0]] * 2


def test_a_run_resumes_and_spawns(lm_data, tmp_path):
    settings = {**LM, "moe_spawn_method": "cluster", "moe_gate_input": "both", "moe_spawn_update": 3}
    setup = build(lm_data, **settings, store_ema=True, ema_decay=0.9)
    trainer = setup.train(updates=2)
    assert layer_of(trainer).activity.seen > 4
    check_that_it_goes_on(setup, trainer, tmp_path, setup.batches()[2:5])
    assert layer_of(trainer).spawned


@pytest.mark.parametrize(
    "options, option, text",
    [
        (
            {"spawn_update": "50:2,100:4"},
            "spawn_method",
            "cluster makes experts and a gate of the base",
        ),
        ({"gate_warmup": 5}, "gate_warmup", "--moe-spawn-method cluster would make anew"),
        ({"spawn_strength": 1.5}, "spawn_strength", "is a share between 0 and 1"),
        ({"expert_sizes": "hybrid"}, "spawn_method", "cluster makes experts of 64 hidden units"),
    ],
)
def test_what_it_does_not_go_with(options, option, text):
    given = {"experts": 4, "spawn_update": 50, "spawn_method": "cluster", **options}
    with pytest.raises(ConfigError) as error:
        resolve(given, max_update=1000, ffn_dims=[64])
    assert error.value.option == option and text in str(error.value)
