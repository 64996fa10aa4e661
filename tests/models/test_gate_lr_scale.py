"""A learning rate of the gate's own: ``--moe-gate-lr-scale``."""

import pytest
import torch

from fairseq_evomoe.moe import RoutingContext
from support.cli import LM, build
from support.gate_inputs import LINEAR_ROUTERS, batch, vocabulary
from support.router_checks import close, make

INPUTS = ["hidden", "token", "both", "table"]


def context(gate_input):
    _, e = batch()
    return RoutingContext(embedding_TC=e, token_T=torch.arange(30) % 11)


def logits_after(updates, name, gate_input, scale, lr):
    """The gate's logits, once Adam has moved it with gradients that another gate would have, too."""
    router = make(name, 4, 3, gate_input=gate_input, vocabulary=vocabulary(), gate_lr_scale=scale)
    router.initialize(torch.Generator().manual_seed(1))
    router.double()
    x, _ = batch()
    optimizer = torch.optim.Adam(router.parameters(), lr=lr, eps=0)
    for step in range(updates):
        target = torch.randn(30, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        (router.logits(x, context(gate_input)) * target).sum().backward()
        optimizer.step()
    return router.logits(x, context(gate_input)).detach()


@pytest.mark.parametrize("gate_input", INPUTS)
@pytest.mark.parametrize("name", LINEAR_ROUTERS)
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_adam_moves_the_gate_as_with_another_rate(name, gate_input, scale):
    start = logits_after(0, name, gate_input, 1.0, 0.01)
    assert torch.allclose(logits_after(0, name, gate_input, scale, 0.01), start, atol=1e-6)
    found = logits_after(5, name, gate_input, scale, 0.01)
    assert torch.allclose(found, logits_after(5, name, gate_input, 1.0, 0.01 * scale), atol=1e-6)
    assert not torch.allclose(found, logits_after(5, name, gate_input, 1.0, 0.01), atol=1e-3)


@pytest.mark.parametrize("gate_input", ["hidden", "both"])
def test_a_gate_that_is_given_is_not_scaled(gate_input):
    router = make("topk", 4, 3, gate_input=gate_input, vocabulary=vocabulary(), gate_lr_scale=0.5)
    rows, (x, _) = torch.randn(3, 4, dtype=torch.float64), batch()
    router.double().set_gate(rows)
    assert close(router.logits(x, context(gate_input)), x @ rows.t())


def test_a_run_spawns_with_it(lm_data):
    """With 4 gates and a vocabulary of some dozens, the spread of the table is known to some percent."""
    options = {"moe_gate_input": "table", "moe_gate_lr_scale": 0.25, "moe_spawn_update": 2}
    trainer = build(lm_data, **{**LM, **options}).train(updates=4)
    router = trainer.get_model().decoder.layers[1].moe.router
    assert router.token_weight.std().item() == pytest.approx(3 / 0.25, rel=0.2)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"moe_gate_lr_scale": 0.0}, "--moe-gate-lr-scale must be greater than 0, but is 0"),
        ({"moe_gate_lr_scale": 0.5, "moe_router": "hash"}, "--moe-gate-lr-scale 0.5 has no effect with"),
        ({"moe_gate_lr_scale": 0.5, "moe_router": "laplace"}, "--moe-gate-lr-scale 0.5 has no effect with"),
    ],
)
def test_where_it_is_refused(options, words, lm_data):
    with pytest.raises(ValueError, match=words):
        build(lm_data, **{**LM, **options})
