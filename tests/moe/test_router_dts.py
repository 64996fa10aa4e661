"""The Dense-To-Sparse gate against a slow reference in float64, written from the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from fairseq_evomoe.moe.losses import balance_loss, entropy, z_loss
from fairseq_evomoe.moe.routers import ROUTERS, dts
from fairseq_evomoe.moe.routers.dts import DenseToSparseRouter, gumbel
from support.router_checks import close, dense, softmax


def make(dim, experts, **options):
    router = DenseToSparseRouter(dim, experts, **options)
    router.initialize(torch.Generator().manual_seed(0))
    return router.double()


def reference(x, w, noise, tau, c, stage, gate):
    """Weights (T x E) by the formulas of the paper's code, one token at a time."""
    rows = []
    for x_t, g_t in zip(x.tolist(), noise.tolist()):
        logits = [sum(a * b for a, b in zip(x_t, w_e)) for w_e in w.tolist()]
        y = softmax([(z + g) / tau for z, g in zip(logits, g_t)])
        best = max(range(len(y)), key=y.__getitem__)
        if stage == "hard":
            mask = [e == best for e in range(len(y))]
        else:
            mask = [v > c or e == best for e, v in enumerate(y)]
        value = y if gate == "gumbel" else softmax(logits)
        rows.append([v if m else 0.0 for v, m in zip(value, mask)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("gate", ["softmax", "gumbel"])
@pytest.mark.parametrize("stage", ["soft", "hard"])
@pytest.mark.parametrize("tau", [2.0, 0.5, 0.1])
def test_training_matches_the_formulas(monkeypatch, gate, stage, tau):
    torch.manual_seed(1)
    x = torch.randn(40, 6, dtype=torch.float64)
    noise = gumbel(torch.empty(40, 5, dtype=torch.float64), RoutingContext())
    monkeypatch.setattr(dts, "gumbel", lambda like, context: noise)
    router = make(6, 5, threshold=0.03, gate_weight=gate, gate_noise="always").train()
    routing = router(x, RoutingContext(temperature=tau, hard=stage == "hard"))
    expected = reference(x, router.weight, noise, tau, 0.03, stage, gate)
    weight, mask = dense(routing)
    assert torch.equal(mask, expected > 0)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-10)
    # l_aux = E^2 mean_e( mean_t(gate) mean_t(mask) )
    aux = 5**2 * (expected.mean(0) * (expected > 0).double().mean(0)).mean()
    assert torch.allclose(routing.losses["balance"], aux, rtol=0, atol=1e-10)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [2.0, 0.1])
def test_the_normalized_balance_loss_is_switchs(monkeypatch, hard, tau):
    """``E sum_e f_e P_e``, f the share of the active pairs and P the mean of the whole distribution."""
    torch.manual_seed(1)
    x = torch.randn(40, 6, dtype=torch.float64)
    noise = gumbel(torch.empty(40, 5, dtype=torch.float64), RoutingContext())
    monkeypatch.setattr(dts, "gumbel", lambda like, context: noise)
    router = make(6, 5, threshold=0.03, gate_noise="always", balance_form="normalized").train()
    routing = router(x, RoutingContext(temperature=tau, hard=hard))
    pairs = (
        reference(x, router.weight, noise, tau, 0.03, "hard" if hard else "soft", "softmax") > 0
    ).double()
    probability = torch.tensor([softmax(row) for row in (x @ router.weight.t()).tolist()]).double()
    share = pairs.sum(0) / pairs.sum()
    assert routing.losses["balance"].item() == pytest.approx(5 * float((share * probability.mean(0)).sum()))


@pytest.mark.parametrize("form, dense_loss", [("published", 4.0), ("normalized", 1.0)])
def test_the_balance_loss_of_an_even_routing(form, dense_loss):
    """Normalized it is 1 in all stages, without gradient; as published, E where all experts are active."""
    even = torch.eye(4, dtype=torch.float64).repeat(5, 1)  # token t to expert t modulo 4
    for hard, sharpness, expected in ((False, 0.0, dense_loss), (True, 100.0, 1.0)):
        router = make(4, 4, balance_form=form, gate_noise="soft").train()
        with torch.no_grad():
            router.weight.copy_(sharpness * torch.eye(4))
        loss = router(even, RoutingContext(temperature=2.0, hard=hard)).losses["balance"]
        assert loss.item() == pytest.approx(expected)
    router = make(4, 4, balance_form=form, gate_noise="soft").train()
    with torch.no_grad():
        router.weight.copy_(torch.eye(4))
    router(even, RoutingContext(hard=True)).losses["balance"].backward()
    assert (router.weight.grad.abs().sum() < 1e-12) == (form == "normalized")


def test_the_z_loss():
    x = torch.randn(40, 6, dtype=torch.float64)
    router = make(6, 5).train()
    assert "z" not in router(x, RoutingContext(losses={"balance"})).losses
    found = router(x, RoutingContext()).losses["z"]
    assert found.item() == pytest.approx(z_loss(x @ router.weight.t()).item())


@pytest.mark.parametrize("name", ["dts", "switch", "topk", "top-p"])
def test_the_entropy_loss_is_that_of_the_gate(name):
    x = torch.randn(40, 6, dtype=torch.float64)
    router = ROUTERS[name](6, 5, **({"jitter": 0.0} if name == "switch" else {})).double().train()
    router.initialize(torch.Generator().manual_seed(0))
    for hard in (False, True):
        assert "entropy" not in router(x, RoutingContext(losses={"balance"}, hard=hard)).losses
        found = router(x, RoutingContext(hard=hard)).losses["entropy"]
        rows = [softmax(row) for row in (x @ router.weight.t()).tolist()]
        assert found.item() == pytest.approx(-sum(p * math.log(p) for row in rows for p in row) / len(rows))
    found.backward()
    with torch.no_grad():
        router.weight -= 0.1 * router.weight.grad
    assert router(x, RoutingContext()).losses["entropy"] < found  # the gate is more confident


@pytest.mark.parametrize("stage", [False, True])
def test_evaluation_has_no_noise_and_is_top1_of_the_plain_softmax(stage):
    x = torch.randn(30, 6, dtype=torch.float64)
    for gate in ("softmax", "gumbel"):
        router = make(6, 5, gate_weight=gate).eval()
        weight, mask = dense(router(x, RoutingContext(temperature=0.3, hard=stage)))
        zero = torch.zeros(30, 5, dtype=torch.float64)
        expected = reference(x, router.weight, zero, 1.0, 0.0, "hard", "softmax")
        assert torch.allclose(weight, expected, rtol=0, atol=1e-10)
        assert mask.sum() == 30


@pytest.mark.parametrize("gate", ["softmax", "gumbel"])
def test_adaptive_evaluation_keeps_what_is_over_the_threshold(gate):
    x = torch.randn(30, 6, dtype=torch.float64)
    router = make(6, 5, threshold=0.1, gate_weight=gate, eval_routing="adaptive").eval()
    weight, _ = dense(router(x, RoutingContext(temperature=0.4, hard=True)))
    zero = torch.zeros(30, 5, dtype=torch.float64)
    expected = reference(x, router.weight, zero, 0.4, 0.1, "soft", gate)
    assert torch.allclose(weight, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "experts, tau, expected",
    [
        (16, 2.0, 16.0), (16, 1.0, 15.7), (16, 0.5, 10.2), (16, 0.3, 5.2), (16, 0.1, 1.9),
        (8, 2.0, 8.0), (8, 1.0, 7.9), (8, 0.5, 6.4), (8, 0.3, 4.1), (8, 0.1, 1.75),
        (4, 2.0, 4.0), (4, 1.0, 4.0), (4, 0.5, 3.6), (4, 0.3, 2.9), (4, 0.1, 1.6),
    ],
)  # fmt: skip
def test_mean_number_of_active_experts(experts, tau, expected):
    """Logits of 0 and c = 0.001: the table of expected active experts."""
    torch.manual_seed(2)
    router = DenseToSparseRouter(4, experts).train()
    torch.nn.init.zeros_(router.weight)
    routing = router(torch.randn(20000, 4), RoutingContext(temperature=tau))
    assert routing.token_N.shape[0] / 20000 == pytest.approx(expected, abs=0.2)


def test_a_token_under_the_threshold_goes_to_its_best_expert():
    router = make(4, 3, threshold=0.9).train()
    routing = router(torch.randn(50, 4, dtype=torch.float64), RoutingContext(temperature=5.0))
    assert torch.equal(routing.token_N.unique(), torch.arange(50))
    assert routing.token_N.shape[0] == 50


def test_gate_is_computed_in_float32():
    torch.manual_seed(3)
    x, weight = torch.randn(64, 32), torch.randn(8, 32)
    router = DenseToSparseRouter(32, 8, eval_routing="adaptive").to(torch.bfloat16).eval()
    router.weight.data.copy_(weight)
    routing = router(x.to(torch.bfloat16), RoutingContext())
    logits = x.to(torch.bfloat16).double() @ router.weight.double().t()
    expected = logits.softmax(-1)[routing.token_N, routing.expert_N]
    assert routing.weight_N.dtype == torch.float32
    assert torch.allclose(routing.weight_N.double(), expected, atol=1e-6)


@pytest.mark.parametrize("gate", ["softmax", "gumbel"])
def test_gradients(monkeypatch, gate):
    torch.manual_seed(4)
    noise = gumbel(torch.empty(7, 3, dtype=torch.float64), RoutingContext())
    monkeypatch.setattr(dts, "gumbel", lambda like, context: noise)
    router = make(4, 3, gate_weight=gate).train()

    def run(x, w):
        router.weight = torch.nn.Parameter(torch.empty(0))
        del router.weight
        router.weight = w
        routing = router(x, RoutingContext(temperature=0.7))
        return routing.weight_N, routing.losses["balance"]

    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, w))


def test_balance_loss_by_hand():
    """Three tokens, two experts: tokens 0 and 1 to expert 0 (weights .8, .6), token 2 to both."""
    from fairseq_evomoe.moe import Routing

    routing = Routing(
        token_N=torch.tensor([0, 1, 2, 2]),
        expert_N=torch.tensor([0, 0, 0, 1]),
        weight_N=torch.tensor([0.8, 0.6, 0.4, 0.6]),
        tokens=3,
        experts=2,
    )
    # mean gate (1.8/3, .6/3), mean mask (3/3, 1/3); 2^2 * (0.6 * 1 + 0.2 / 3) / 2
    assert balance_loss(routing).item() == pytest.approx(4 * (0.6 + 0.2 / 3) / 2)


def test_balance_loss_at_its_two_ends():
    from fairseq_evomoe.moe import Routing

    tokens, experts = 8, 4
    top1 = Routing(torch.arange(tokens), torch.arange(tokens) % experts, torch.ones(tokens), tokens, experts)
    assert balance_loss(top1).item() == pytest.approx(1.0)
    every = torch.ones(tokens, experts).nonzero(as_tuple=True)
    uniform = Routing(*every, torch.full((tokens * experts,), 1 / experts), tokens, experts)
    assert balance_loss(uniform).item() == pytest.approx(experts)


def test_entropy():
    rows = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert torch.allclose(entropy(rows), torch.tensor([0.0, math.log(2)]))


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 9),
    threshold=st.sampled_from([0.0, 0.001, 0.5, 0.99]),
    temperature=st.sampled_from([0.05, 1.0, 10.0]),
    training=st.booleans(),
    hard=st.booleans(),
    adaptive=st.booleans(),
    same=st.booleans(),
)
def test_every_token_is_routed(tokens, experts, threshold, temperature, training, hard, adaptive, same):
    router = DenseToSparseRouter(
        3, experts, threshold=threshold, eval_routing="adaptive" if adaptive else "top1"
    )
    router.initialize(torch.Generator().manual_seed(0))
    x = torch.zeros(tokens, 3) if same else torch.randn(tokens, 3)
    routing = router.train(training)(x, RoutingContext(temperature=temperature, hard=hard))
    assert torch.equal(routing.token_N.unique(), torch.arange(tokens))
    assert routing.load_E().sum() == routing.token_N.shape[0]
    assert (routing.weight_N >= 0).all() and (routing.weight_N <= 1).all()
    assert torch.isfinite(routing.losses["balance"])


def test_the_balance_loss_in_evaluation_is_that_of_switch():
    """As in the authors' code: of the best experts and the probabilities of all."""
    torch.manual_seed(3)
    router = make(6, 4).eval()
    x = torch.randn(50, 6, dtype=torch.float64)
    probability = (x @ router.weight.t()).softmax(-1)
    share = [(probability.argmax(-1) == e).double().mean() for e in range(4)]
    expected = 4 * sum(share[e] * probability[:, e].mean() for e in range(4))
    assert close(router(x, RoutingContext(hard=True)).losses["balance"], expected)
    published = router.train()(x, RoutingContext(hard=True)).losses["balance"]
    assert not close(published, expected)


@pytest.mark.parametrize("balance", ["bias", "quantile"])
def test_a_bias_does_not_change_the_weights_of_evaluation(balance):
    """Whatever weighs while training, evaluation weighs by the plain probability, at any temperature."""
    torch.manual_seed(0)
    layers = [
        MoELayer(8, 16, 4, "dts", spawned=True, gate_weight="gumbel", balance=each, balance_weight=0.0).eval()
        for each in ("loss", balance)
    ]
    layers[1].load_state_dict({**layers[1].state_dict(), **layers[0].state_dict()})
    x = torch.randn(9, 8)
    with record() as routings:
        outputs = [layer(x, RoutingContext(temperature=0.5, hard=True)) for layer in layers]
    assert torch.equal(*(routings[layer].weight_N for layer in layers)) and torch.equal(*outputs)
