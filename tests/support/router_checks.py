"""What the tests of several routers need."""

import math

import torch

from fairseq_evomoe.moe import ROUTERS, RoutingContext
from fairseq_evomoe.moe.statistics import Collector


def make(name, dim, experts, seed=0, **options):
    """A router in float64, initialised."""
    router = ROUTERS[name](dim, experts, **options)
    router.initialize(torch.Generator().manual_seed(seed))
    return router.double()


def dense(routing):
    """The routing as T x E weights and mask."""
    weight = torch.zeros(routing.tokens, routing.experts, dtype=torch.float64)
    mask = torch.zeros(routing.tokens, routing.experts, dtype=torch.bool)
    for t, e, w in zip(routing.token_N, routing.expert_N, routing.weight_N):
        assert not mask[t, e], "a pair twice"
        weight[t, e], mask[t, e] = w, True
    return weight, mask


def softmax(row):
    """Of a list of numbers."""
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [v / sum(exps) for v in exps]


def dot(a, b):
    """Of two lists of numbers."""
    return sum(u * v for u, v in zip(a, b))


def entropy(row):
    """Of a list of probabilities, in nats."""
    return -sum(p * math.log(p) for p in row if p > 0)


def close(a, b):
    """Whether tensors are equal within 1e-10."""
    return torch.allclose(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=1e-10)


def gradients_are_right(router, x, context=None):
    """``gradcheck`` of weights, probabilities and losses with respect to x and every parameter."""

    def run(*_):  # gradcheck changes its inputs, the parameters among them, in place
        routing = router(x, context or RoutingContext())
        outputs = (routing.weight_N, routing.probability_TE, *routing.losses.values())
        return tuple(output for output in outputs if output is not None and output.requires_grad)

    return torch.autograd.gradcheck(run, (x.requires_grad_(), *router.parameters()))


def is_deterministic(name, dim, experts, **options):
    """Whether all parameters and buffers come from the generator."""
    torch.manual_seed(1)
    one = make(name, dim, experts, **options)
    state = torch.get_rng_state()
    two = make(name, dim, experts, **options)
    used_other_numbers = not torch.equal(state, torch.get_rng_state())
    other = make(name, dim, experts, seed=1, **options)
    pairs = [(v, two.state_dict()[k], other.state_dict()[k]) for k, v in one.state_dict().items()]
    assert any(not torch.equal(a, c) for a, _, c in pairs), "no parameter depends on the generator"
    return not used_other_numbers and all(torch.equal(a, b) for a, b, _ in pairs)


def check_precision(name, dtype, **options):
    """A router in ``dtype`` computes as float64 does on the same rounded numbers, in float32."""
    torch.manual_seed(2)
    router = make(name, 32, 8, **options).to(dtype)
    x = torch.randn(64, 32).to(dtype)
    routing = router(x, RoutingContext())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(x, RoutingContext())
    exact = make(name, 32, 8, **options)
    exact.load_state_dict(router.state_dict())
    expected = exact(x.double(), RoutingContext())
    for got in (routing, under_autocast):
        assert got.weight_N.dtype == got.probability_TE.dtype == torch.float32
        assert torch.allclose(got.probability_TE.double(), expected.probability_TE, atol=1e-5)
        assert torch.allclose(dense(got)[0], dense(expected)[0], atol=1e-5)
        assert got.gate_entropy.dtype == torch.float32 and not got.gate_entropy.requires_grad
    total = routing.weight_N.square().sum() + sum(routing.losses.values())
    total.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in router.parameters())


def end_update(*ranks):
    """What ends an update: the routers of some ranks add up what they have collected, and keep it."""
    of_ranks = [[each for each in router.modules() if isinstance(each, Collector)] for router in ranks]
    for collectors in zip(*of_ranks):
        total_K = sum(each.drain() for each in collectors)
        for collector in collectors:
            collector.commit(total_K)


def is_causal(router, x, **context):
    """Whether the pairs of each token but the last stay, and their weights, when the last one changes."""

    def pairs(x):
        routing = router(x, RoutingContext(noise_key=("gate", 1), **context))
        weight, mask = dense(routing)
        return weight[:-1], mask[:-1]

    changed = x.clone()
    changed[-1] = -3 * changed[-1] + 1
    (weight, mask), (other_weight, other_mask) = pairs(x), pairs(changed)
    return torch.equal(mask, other_mask) and torch.equal(weight, other_weight)
