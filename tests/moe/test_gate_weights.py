"""Weights that sum to 1 with a gradient (``straight-through``), and the gate's noise in the hard stage."""

import pytest
import torch

from fairseq_evomoe.moe import RoutingContext
from fairseq_evomoe.moe.routers import dts
from support.router_checks import close, dense, make


def tokens(count=40):
    torch.manual_seed(1)
    return torch.randn(count, 6, dtype=torch.float64)


CASES = {
    "dts": {"threshold": 0.15, "eval_routing": "adaptive"},
    "switch": {},
    "topk": {"top_k": 2},
    "top-p": {"top_p": 0.6},
}


@pytest.mark.parametrize("name", CASES)
def test_straight_through_sums_to_one_and_has_the_gradient_of_undivided_weights(name):
    x = tokens()
    factor_TE = torch.randn(40, 5, dtype=torch.float64)
    gradients, weights = {}, {}
    for how in ("never", "straight-through", "always"):
        router = make(name, 6, 5, renormalize=how, **CASES[name]).eval()
        routing = router(x, RoutingContext(temperature=1.0))
        weights[how], mask = dense(routing)
        total_T = weights["never"].sum(1).detach()
        # the undivided weights' gradient, divided by their sum
        factor_N = factor_TE[routing.token_N, routing.expert_N]
        scale_N = 1 / total_T[routing.token_N] if how == "never" else 1
        (routing.weight_N * factor_N * scale_N).sum().backward()
        gradients[how] = router.weight.grad
    assert close(weights["straight-through"].sum(1), torch.ones(40))
    assert close(weights["straight-through"], weights["always"])
    assert close(gradients["straight-through"], gradients["never"])
    assert gradients["straight-through"].abs().sum() > 1e-3
    if name == "switch":  # a weight of 1 teaches the gate nothing
        assert gradients["always"].abs().sum() < 1e-12


def test_noise_in_the_soft_stage_only(monkeypatch):
    x = tokens()
    noise = 20 * torch.randn(40, 5, dtype=torch.float64)
    monkeypatch.setattr(dts, "gumbel", lambda like, context: noise)
    for kind, hard, expected_noise in (
        ("always", True, noise),
        ("soft", True, 0 * noise),
        ("soft", False, noise),
    ):
        router = make("dts", 6, 5, gate_noise=kind, threshold=0.9).train()
        routing = router(x, RoutingContext(temperature=0.5, hard=hard))
        logits = x @ router.weight.t()
        expected = ((logits + expected_noise) / 0.5).softmax(1)
        _, mask = dense(routing)
        assert torch.equal(mask[range(40), expected.argmax(1)], torch.ones(40).bool())
        assert hard is False or mask.sum() == 40
    router.eval()
    assert torch.equal(
        router(x, RoutingContext(hard=True)).expert_N, make("dts", 6, 5).eval()(x, RoutingContext()).expert_N
    )
