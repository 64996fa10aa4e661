"""Expert output masking: outputs of random pairs are left out in training; evaluation scales all."""

import pytest
import torch

from fairseq_evomoe.moe import MoELayer, RoutingContext, record
from support.rank_threads import on_ranks
from support.router_checks import close

KEY = ("gate", 1)


def make_layer(router="topk", share=0.3, experts=4, **options):
    torch.manual_seed(0)
    return MoELayer(6, 5, experts, router, spawned=True, output_masking=share, **options).double()


def outputs(layer, x, **context):
    with record() as routings:
        y = layer(x, RoutingContext(noise_key=KEY, **context))
    return y, routings[layer]


def without(layer):
    """The layer without masking."""
    layer.output_masking = 0.0
    return layer


@pytest.mark.parametrize("router", ["topk", "dts", "hash"])
def test_training_leaves_out_and_evaluation_scales(router):
    options = {"vocabulary": None} if router != "hash" else {"hashes": 2}
    if router == "hash":
        from fairseq_evomoe.moe import Vocabulary

        options["vocabulary"] = Vocabulary(20, torch.ones(20))
    x, token_T = torch.randn(400, 6, dtype=torch.float64), torch.arange(400) % 20
    layer = make_layer(router, **options)
    _, trained = outputs(layer.train(), x, token_T=token_T)
    y, evaluated = outputs(layer.eval(), x, token_T=token_T)
    whole, _ = outputs(without(layer), x, token_T=token_T)
    assert close(y, 0.7 * whole)
    gone = (trained.weight_N == 0).double().mean().item()
    assert gone == pytest.approx(0.3, abs=0.05)
    assert int(trained.dropped) == int(evaluated.dropped) == 0  # they cost what they cost


def test_a_token_s_experts_are_left_out_by_themselves():
    layer, x = make_layer().train(), torch.randn(600, 6, dtype=torch.float64)
    y, masked = outputs(layer, x)
    whole, routing = outputs(without(layer), x)
    assert torch.equal(masked.token_N, routing.token_N) and torch.equal(masked.load_E(), routing.load_E())
    kept = (masked.weight_N != 0).view(2, -1)
    share = [(kept.sum(0) == count).double().mean().item() for count in range(3)]
    assert share == pytest.approx([0.09, 0.42, 0.49], abs=0.06)
    assert close(y[kept.all(0)], whole[kept.all(0)])
    assert y[~kept.any(0)].abs().max() == 0
    assert torch.equal(masked.weight_N[kept.flatten()], routing.weight_N[kept.flatten()])
    assert torch.equal(masked.losses["balance"], routing.losses["balance"])


def test_it_depends_on_the_place_of_a_token_alone():
    """Not on how many ranks there are; and other than the gate's noise, on a key of its own."""
    layer, x = make_layer().train(), torch.randn(30, 6, dtype=torch.float64)
    y, _ = outputs(layer, x)
    import copy

    def run(ranks, part):
        own = copy.copy(layer)
        own.ranks = ranks
        return outputs(own, part)[0]

    assert close(torch.cat(on_ranks(run, x.split([11, 19]))), y)


def test_gradients():
    layer, x = make_layer(experts=3).train(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: outputs(layer, x)[0], (x, *layer.parameters()))


def test_one_expert_is_not_masked():
    """Before the spawn the layer is the dense one."""
    layer = MoELayer(6, 5, 4, "topk", output_masking=0.5).double().train()
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.equal(layer(x), layer(x)) and torch.equal(layer(x), layer.eval()(x))
