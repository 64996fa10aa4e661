"""Several narrow experts of a token for the cost of a wide one."""

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.moe import RoutingContext, Vocabulary
from fairseq_evomoe.moe.routers.hash import HashRouter
from support.cli import LM, build
from support.experts import make_layer
from support.router_checks import close, dense, make
from support.tasks import PLAIN


def tokens(count=40):
    torch.manual_seed(1)
    return torch.randn(count, 6, dtype=torch.float64)


def best(values, k):
    """The k indices of the highest values."""
    return sorted(range(len(values)), key=lambda e: -values[e])[:k]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("phase", ["hard", "evaluation"])
def test_the_hard_stage_has_the_k_best_experts(phase, k):
    x = tokens()
    router = make("dts", 6, 5, hard_experts=k, gate_noise="soft").train(phase == "hard")
    routing = router(x, RoutingContext(temperature=0.7, hard=True))
    weight, mask = dense(routing)
    probability = (x @ router.weight.t()).softmax(1)
    for t in range(len(x)):
        chosen = best(probability[t].tolist(), k)
        assert sorted(mask[t].nonzero().flatten().tolist()) == sorted(chosen)
        assert close(weight[t, chosen], probability[t, chosen].detach())
    assert routing.token_N.tolist() == [t for t in range(len(x)) for _ in range(k)]


@pytest.mark.parametrize("threshold", [0.1, 0.99])
def test_the_soft_stage_has_at_least_the_k_best(threshold):
    x = tokens()
    router = make("dts", 6, 5, hard_experts=2, threshold=threshold, eval_routing="adaptive").eval()
    _, mask = dense(router(x, RoutingContext(temperature=1.0)))
    probability = (x @ router.weight.t()).softmax(1)
    for t in range(len(x)):
        expected = {e for e in range(5) if probability[t, e] > threshold} | set(
            best(probability[t].tolist(), 2)
        )
        assert set(mask[t].nonzero().flatten().tolist()) == expected


def test_straight_through_weights_of_two_experts_sum_to_one():
    weight, mask = dense(
        make("dts", 6, 5, hard_experts=2, renormalize="straight-through").eval()(tokens(), RoutingContext())
    )
    assert mask.sum(1).tolist() == [2] * 40 and close(weight.sum(1), torch.ones(40))


@pytest.mark.parametrize("hashes", [1, 2, 3])
def test_each_hash_has_its_own_part_of_the_experts(hashes):
    size, experts = 3000, 6
    router = HashRouter(4, experts, Vocabulary(size, torch.zeros(size)), hashes=hashes)
    router.initialize(torch.Generator().manual_seed(1))
    token_T = torch.arange(size)
    weight, mask = dense(router(torch.zeros(size, 4, dtype=torch.float64), RoutingContext(token_T=token_T)))
    part = experts // hashes
    for i in range(hashes):
        mine = mask[:, i * part : (i + 1) * part]
        assert (mine.sum(1) == 1).all()
        assert (mine.double().mean(0) - 1 / part).abs().max() < 0.05
    assert torch.equal(weight, mask.double())
    pairs = torch.unique(mask.long(), dim=0)
    assert len(pairs) == part**hashes  # the hashes know nothing of each other


def test_a_hash_layer_with_one_hash_has_the_table_that_it_always_had():
    router = HashRouter(4, 6, Vocabulary(50, torch.zeros(50)))
    router.initialize(torch.Generator().manual_seed(1))
    assert torch.equal(router.table_V, torch.randint(6, (50,), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("router", ["topk", "soft"])
def test_the_factor_is_that_of_the_routed_experts_alone(router):
    options = {"router": router, "widths": (8, 8, 8, 8), "shared_expert": True}
    layers = [make_layer(**options, scaling_factor=factor) for factor in (1.0, 3.0)]
    x = torch.randn(9, 6, dtype=torch.float64)
    sequences = torch.zeros(9, dtype=torch.long)
    one, three = (layer(x, RoutingContext(), sequences=sequences) for layer in layers)
    shared = layers[0].shared(x, [9])
    assert close(three - shared, 3 * (one - shared)) and (one - shared).abs().max() > 1e-3


def test_options_reach_the_layer(lm_data):
    options = {
        "moe_gate_input": "table",
        "moe_table_std": 0.5,
        "moe_hard_experts": 2,
        "moe_scaling_factor": 2.0,
    }
    moe = build(lm_data, **{**LM, **PLAIN, **options}).model.decoder.layers[1].moe
    assert moe.router.options.hard_experts == 2 and moe.scaling_factor == 2
    assert moe.router.token_weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert build(lm_data, **{**LM, **PLAIN}).model.decoder.layers[1].moe.scaling_factor == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hard_experts": 5}, "--moe-hard-experts must be from 1 to the 4 experts, but is 5"),
        ({"hard_experts": 0}, "--moe-hard-experts must be at least 1, but is 0"),
        ({"router": "topk", "hard_experts": 2}, "--moe-hard-experts 2 has no effect with"),
        ({"router": "hash", "hashes": 3}, "--moe-hashes must be a divisor of the 4 experts, but is 3"),
        ({"router": "hash", "hashes": 2, "hash": "balanced"}, "--moe-hashes must be 1 with --moe-hash bala"),
        ({"scaling_factor": 0.0}, "--moe-scaling-factor must be greater than 0"),
        ({"gate_input": "table", "table_std": -1.0}, "--moe-table-std must be at least 0, but is -1"),
    ],
    ids=str,
)
def test_refused(options, message):
    with pytest.raises(ConfigError) as refused:
        resolve({"experts": 4, **options})
    assert message in str(refused.value)
