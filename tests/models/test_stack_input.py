"""What routers learn from outside their layer: the tokens, the sequence they belong to, earlier layers."""

import copy

import pytest
import torch

from fairseq_evomoe.moe import record
from support.cli import LM, MASKED_LM, TRANSLATION
from support.models import layers, make_model, padded_batch

TASKS = [LM, MASKED_LM, TRANSLATION]


@pytest.mark.parametrize("activations", [False, True], ids=["", "checkpoint_activations"])
@pytest.mark.parametrize("settings", TASKS, ids=lambda settings: settings["task"])
def test_every_token_goes_where_the_table_says(settings, activations, request):
    """With padding on the left, and with embeddings that encoder and decoder share."""
    setup = make_model(request, settings, moe_router="hash", checkpoint_activations=activations)
    batch = padded_batch(setup)
    with record() as routings:
        loss = setup.criterion(setup.model.train(), batch)[0]
    inputs = {"encoder": batch["net_input"]["src_tokens"], "decoder": batch["net_input"]["src_tokens"]}
    if settings is TRANSLATION:
        inputs["decoder"] = batch["net_input"]["prev_output_tokens"]
        assert not torch.equal(inputs["encoder"], inputs["decoder"])
    expected = {}
    for name, moe in layers(setup.model).items():
        tokens = inputs[name.split(".")[0]]
        expected[name] = moe.router.table_V[tokens[tokens.ne(1)]]
        assert torch.equal(routings[moe].expert_N, expected[name]), name
    with record() as routings:
        loss.backward()  # with checkpoint_activations, layers run once more, when other tokens came last
    assert bool(routings) == activations
    for moe, routing in routings.items():
        name = next(name for name, other in layers(setup.model).items() if other is moe)
        assert torch.equal(routing.expert_N, expected[name]), name


def test_a_router_of_tokens_needs_tokens(lm_data, request):
    setup = make_model(request, LM, moe_router="hash")
    moe = setup.model.decoder.layers[0].moe
    with pytest.raises(ValueError, match="hash"):
        moe(torch.zeros(3, 1, 32), setup.model.decoder.layers[0].context)


@pytest.mark.parametrize("layerdrop", [0.0, 0.4])
@pytest.mark.parametrize("settings", TASKS, ids=lambda settings: settings["task"])
def test_the_recurrent_state_never_leaks_between_batches(settings, layerdrop, request):
    side = "decoder" if settings is LM else "encoder"
    options = {side + "_layers": 4, side + "_layerdrop": layerdrop}
    setup = make_model(request, settings, moe_router="recurrent", **options)
    model, (one, two) = setup.model.train(), setup.batches()[:2]
    assert not torch.equal(one["net_input"]["src_tokens"], two["net_input"]["src_tokens"])

    def output(batch):
        torch.manual_seed(3)
        return model(**batch["net_input"])[0]

    alone = output(two)
    output(one)
    assert torch.equal(output(two), alone)
    shared = {id(moe.router.gru) for name, moe in layers(model).items() if name.startswith(side)}
    assert len(shared) == 1


def test_the_recurrent_state_comes_from_the_layer_before(request):
    model = make_model(request, LM, moe_router="recurrent", decoder_layers=2).model.eval()
    routers = [moe.router for moe in layers(model).values()]
    seen = []
    for router in routers:
        router.register_forward_pre_hook(lambda _, inputs: seen.append(dict(inputs[1].memory)))
    tokens = torch.tensor([[5, 6, 7]])
    model(tokens)
    assert seen[0] == {} and seen[1]["recurrent"].shape == (3, 128)
    state = seen[1]["recurrent"]
    model(tokens.flip(1))
    assert seen[2] == {} and not torch.equal(seen[3]["recurrent"], state)


def test_activation_checkpointing_gives_the_same_gradients(request):
    gradients = []
    for activations in (False, True):
        options = {"moe_router": "recurrent", "decoder_layers": 3, "moe_balance_weight": 0.5}
        setup = make_model(request, LM, checkpoint_activations=activations, **options)
        setup.criterion(setup.model.train(), setup.batches()[0])[0].backward()
        gradients.append({name: p.grad for name, p in setup.model.named_parameters()})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-6), name
    assert plain["decoder.layers.0.moe.router.gru.weight_hh"].abs().sum() > 0


def test_a_copy_of_the_model_has_inputs_of_its_own(request):
    """As fairseq's EMA makes one."""
    model = make_model(request, LM, moe_router="hash").model.eval()
    other = copy.deepcopy(model)
    with record() as routings:
        model(torch.tensor([[5, 6, 7]]))
        expected = other(torch.tensor([[8, 9, 10, 11]]))[0]
    for ours, theirs in zip(model.decoder.layers, other.decoder.layers):
        assert ours.stack is not theirs.stack
        assert routings[theirs.moe].tokens == 4 and routings[ours.moe].tokens == 3
    assert torch.equal(model(torch.tensor([[8, 9, 10, 11]]))[0], expected)
