"""Losses, capacities and noise of several ranks are those of one process with all their tokens."""

import copy
from dataclasses import replace

import pytest
import torch

from fairseq_evomoe.moe import RoutingContext, Vocabulary
from support.rank_threads import on_ranks
from support.router_checks import close, end_update, make

DIM, EXPERTS, V = 6, 5, 17
SIZES = [(7, 13), (1, 0, 9, 4)]
CASES = [
    ("switch", {"jitter": 0.2}),
    ("switch", {"capacity_factor": 0.8}),
    ("topk", {}),
    ("topk", {"balance_choices": "first", "random_second": True}),
    ("topk", {"top_k": 3, "capacity_factor": 0.7}),
    ("laplace", {}),
    ("recurrent", {"recurrent_dim": 4}),
    ("top-p", {}),
    ("dts", {"threshold": 0.1}),
    ("dts", {"threshold": 0.1, "balance_form": "normalized", "gate_weight": "gumbel"}),
    ("stable", {}),
    ("stable", {"capacity_factor": 0.8}),
    ("base", {}),
    ("comet", {}),
    ("dynmoe", {"balance_weight": 0.01, "activity_weight": 0.01}),
    ("remoe", {"l1_start": 1.0}),
    ("remoe", {"l1_start": 1.0, "l1_form": "plain"}),
    ("switch", {"balance": "bias", "capacity_factor": 0.8}),
    ("xmoe", {"routing_dim": 3}),
    *((name, {"zero_experts": 1, "constant_experts": 2}) for name in ("switch", "topk", "top-p")),
    ("dts", {"copy_experts": 1, "threshold": 0.1}),
    ("dtop-p", {}),
    ("expert-threshold", {}),
]
# routers that learn something of the tokens of all ranks after each update
ADAPTIVE = [
    ("dynmoe", {"dynmoe_window": 9}),
    ("remoe", {}),
    ("dtop-p", {"mean_experts": 4.0}),
    ("expert-threshold", {"mean_experts": 2.0}),
    *(
        (name, {"balance": how})
        for name in ("switch", "topk", "dts", "top-p")
        for how in ("bias", "quantile")
    ),
]


def routed(router, x_TD, token_T, **context):
    context = RoutingContext(token_T=token_T, noise_key=("gate", 1), temperature=0.7, **context)
    return router(x_TD, context)


def pairs(routing, first=0):
    """Weights by token and expert."""
    token_N, expert_N = (routing.token_N + first).tolist(), routing.expert_N.tolist()
    return dict(zip(zip(token_N, expert_N), routing.weight_N.tolist()))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal, hard", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_they_equal_one_process(name, options, causal, hard, sizes):
    torch.manual_seed(1)
    stage = {"hard": hard, "causal": causal}
    router = make(name, DIM, EXPERTS, vocabulary=Vocabulary(V, torch.ones(V)), **options).train()
    x_TD = torch.randn(sum(sizes), DIM, dtype=torch.float64, requires_grad=True)
    token_T = torch.randint(V, (sum(sizes),))
    if hard:  # freezes what there is to be frozen
        routed(router, x_TD, token_T, hard=True)
    one = routed(router, x_TD, token_T, **stage)
    parts = list(zip(x_TD.split(sizes), token_T.split(sizes)))
    many = on_ranks(lambda ranks, part: routed(router, *part, **stage, ranks=ranks), parts)

    together = {}
    for first, routing in zip(torch.tensor((0, *sizes)).cumsum(0).tolist(), many):
        together.update(pairs(routing, first))
    assert together.keys() == pairs(one).keys()
    assert together == pytest.approx(pairs(one), abs=1e-12)
    assert sum(int(routing.dropped) for routing in many) == int(one.dropped)
    assert (int(one.dropped) > 0) == ("capacity_factor" in options)

    assert one.losses.keys() == router.loss_weights.keys()
    inputs = [x_TD, *router.parameters()]
    for loss, value in one.losses.items():
        expected = gradients(value, inputs)
        for routing in many:
            assert close(routing.losses[loss], value), loss
            found = gradients(routing.losses[loss], inputs)
            assert all(close(a, b) for a, b in zip(found, expected)), loss


def gradients(loss, inputs):
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name, options", ADAPTIVE, ids=str)
def test_what_they_keep_of_an_update_is_what_one_process_keeps(name, options, sizes):
    torch.manual_seed(3)
    one = make(name, DIM, EXPERTS, **options).train()
    ranks = [copy.deepcopy(one) for _ in sizes]
    before = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    for _ in range(3):
        x_TD = torch.randn(sum(sizes), DIM, dtype=torch.float64)
        routed(one, x_TD, None)
        on_ranks(lambda rank, part: routed(*part, None, ranks=rank), list(zip(ranks, x_TD.split(sizes))))
        end_update(one)
        end_update(*ranks)
    expected = one.state_dict()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in expected.items())
    for router in ranks:
        for key, tensor in router.state_dict().items():
            assert torch.equal(tensor, ranks[0].state_dict()[key]), key
            assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-6), key


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_recurrent_router_pools_the_layers_of_all_ranks(sizes):
    torch.manual_seed(2)
    shared = {}
    layers = [make("recurrent", DIM, EXPERTS, seed=i, shared=shared, recurrent_dim=4) for i in range(3)]
    xs = torch.randn(3, sum(sizes), DIM, dtype=torch.float64, requires_grad=True)

    def total(ranks, xs):
        context = RoutingContext() if ranks is None else RoutingContext(ranks=ranks)
        return sum(
            layer(x, replace(context, memory=context.memory)).losses["balance"]
            for layer, x in zip(layers, xs)
        )

    one = total(None, xs)
    inputs = [xs, *torch.nn.ModuleList(layers).parameters()]
    for many in on_ranks(total, xs.split(sizes, dim=1)):
        assert close(many, one)
        assert all(close(a, b) for a, b in zip(gradients(many, inputs), gradients(one, inputs)))
