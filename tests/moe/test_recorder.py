"""Who wants to know how a batch was routed opens a record; a layer keeps nothing."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_evomoe.moe import ROUTERS, MoELayer, RoutingContext, Vocabulary, record


def make(router="switch", spawned=True, **options):
    torch.manual_seed(0)
    vocabulary = Vocabulary(11, torch.ones(11), 5)
    return MoELayer(6, 8, 4, router, spawned=spawned, vocabulary=vocabulary, **options)


def test_records_are_nested_and_closed():
    layer, x = make(), torch.randn(5, 6)
    with record() as outer:
        layer(x)
        with record() as inner:
            layer(x[:3])
        assert inner[layer].tokens == outer[layer].tokens == 3
        layer(x[:2])
    layer(x)
    assert inner[layer].tokens == 3 and outer[layer].tokens == 2


def test_an_error_closes_a_record():
    layer = make()
    with pytest.raises(RuntimeError), record() as routings:
        layer(torch.randn(5, 7))
    layer(torch.randn(5, 6))
    assert not routings


def test_a_layer_keeps_nothing_of_a_pass():
    layer, x = make(), torch.randn(5, 6, requires_grad=True)
    before = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    layer(x).sum().backward()
    after = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    assert before.keys() == after.keys() and all(after[name] is before[name] for name in before)
    copy.deepcopy(layer)


def test_losses_by_their_weights_with_gradient():
    weights = {"balance": 0.5, "z": 0.25, "entropy": 0.0, "penalty": 2.0}
    layers = [make("topk", loss_weights=weights), make("topk", loss_weights={"balance": 0.1})]
    x = torch.randn(9, 6)
    with record() as routings:
        for layer in layers:
            x = layer(x)
    one, two = (routings[layer].losses for layer in layers)
    expected = 0.5 * one["balance"] + 0.25 * one["z"] + 2 * one["penalty"] + 0.1 * two["balance"]
    assert torch.allclose(routings.auxiliary_loss(), expected)
    routings.auxiliary_loss().backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in layers)


def test_without_losses_the_sum_is_zero():
    layer = make(spawned=False)
    with record() as routings:
        layer(torch.randn(3, 6))
    assert routings.auxiliary_loss() == 0


def test_what_is_computed_again_for_gradients_is_not_recorded():
    layer, x = make("topk"), torch.randn(9, 6, requires_grad=True)
    with record() as routings:
        y = checkpoint(layer, x, use_reentrant=False)
    recorded = routings[layer]
    (y.sum() + routings.auxiliary_loss()).backward()
    assert routings[layer] is recorded and x.grad.abs().sum() > 0


@pytest.mark.parametrize("context, phase", [(None, 1), (RoutingContext(0.5, hard=True), 2)])
def test_the_report(context, phase):
    layer = make("dts")
    x = torch.randn(9, 6)
    with record() as routings:
        layer(x, context)
    routing = routings[layer]
    report = routing.report()
    assert report.tokens == 9 and report.assignments == len(routing.token_N) == report.load_E.sum()
    assert report.phase == phase and report.temperature == (0.5 if context else 1.0)
    assert report.balance == routing.losses["balance"] and not report.balance.requires_grad
    assert report.gate_entropy == routing.gate_entropy > 0
    single = make("dts", spawned=False)
    with record() as routings:
        single(x)
    report = routings[single].report()
    assert report.phase == 0 and report.load_E.tolist() == [9.0] and report.balance == 1


@pytest.mark.parametrize("router", ROUTERS)
def test_threads_get_what_one_gets(router):
    layer = make(router).eval()
    inputs = [torch.randn(1 + i % 5, 7, 6) for i in range(60)]
    shape = lambda x: torch.ones(x.shape[:2], dtype=torch.long)  # noqa: E731

    def run(x):
        tokens = (x[..., 0] * 100).long() % 11
        with record() as routings, torch.no_grad():
            y = layer(x, None, None, tokens, shape(x).cumsum(0) - 1, x[..., :5])
        return y.tolist(), routings[layer].expert_N.tolist()

    alone = [run(x) for x in inputs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(run, inputs))
    finally:
        sys.setswitchinterval(interval)
    assert together == alone
