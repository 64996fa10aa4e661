"""Gates that see the embedding of a token: ``--moe-gate-input``."""

import pytest
import torch

from fairseq_evomoe.moe import RoutingContext, Vocabulary, record
from support.cli import LM, MASKED_LM, TRANSLATION, build, call
from support.gate_inputs import LINEAR_ROUTERS, WIDTH, batch, vocabulary
from support.models import layers, make_model, padded_batch
from support.router_checks import close, dense, gradients_are_right, make, softmax
from support.tasks import PLAIN


def reference(router, x, e):
    """The gate's probabilities, one token at a time."""
    rows = []
    for t in range(len(x)):
        mean = sum(e[t].tolist()) / WIDTH
        variance = sum((v - mean) ** 2 for v in e[t].tolist()) / WIDTH
        normal = [(v - mean) / (variance + 1e-5) ** 0.5 for v in e[t].tolist()]
        logits = []
        for expert in range(router.experts):
            logit = sum(u * v for u, v in zip(router.token_weight[expert].tolist(), normal))
            if router.weight is not None:
                logit += sum(u * v for u, v in zip(router.weight[expert].tolist(), x[t].tolist()))
            logits.append(logit)
        rows.append(softmax(logits))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("gate_input", ["token", "both"])
@pytest.mark.parametrize("name", LINEAR_ROUTERS)
def test_probabilities_are_those_of_the_formula(name, gate_input):
    router = make(name, 4, 3, gate_input=gate_input, vocabulary=vocabulary()).eval()
    x, e = batch()
    routing = router(x, RoutingContext(embedding_TC=e))
    expected = reference(router, x, e)
    assert close(routing.probability_TE, expected)
    _, mask = dense(routing)
    assert torch.equal(mask[torch.arange(len(x)), expected.argmax(1)], torch.ones(len(x)).bool())
    if gate_input == "token":
        assert torch.equal(router(x * 0, RoutingContext(embedding_TC=e)).expert_N, routing.expert_N)


def test_no_gradient_goes_back_into_the_embeddings():
    router = make("dts", 4, 3, gate_input="both", vocabulary=vocabulary()).eval()
    x, e = batch(6)
    assert gradients_are_right(router, x, RoutingContext(embedding_TC=e))
    router(x, RoutingContext(embedding_TC=e.requires_grad_())).weight_N.sum().backward()
    assert e.grad is None and router.token_weight.grad.abs().sum() > 0


def test_hidden_is_what_it_always_was():
    x, _ = batch()
    router = make("dts", 4, 3)
    assert list(dict(router.named_parameters())) == ["weight"]
    assert torch.equal(make("dts", 4, 3, gate_input="hidden").weight, router.weight)


def test_a_state_of_a_gate_that_saw_the_input_alone_is_loaded():
    x, e = batch()
    hidden = make("topk", 4, 3, seed=3).eval()
    both = make("topk", 4, 3, gate_input="both", vocabulary=vocabulary()).eval()
    assert not both.load_state_dict(hidden.state_dict()).missing_keys
    ours, theirs = both(x, RoutingContext(embedding_TC=e)), hidden(x, RoutingContext())
    assert torch.equal(ours.expert_N, theirs.expert_N) and close(ours.weight_N, theirs.weight_N)


@pytest.mark.parametrize("name", LINEAR_ROUTERS)
def test_a_table_has_logits_for_each_entry_of_the_vocabulary(name):
    router = make(name, 4, 3, gate_input="table", vocabulary=vocabulary(0)).eval()
    x, _ = batch()
    token_T = torch.arange(len(x)) % 11
    routing = router(x, RoutingContext(token_T=token_T))
    expected = torch.stack([router.token_weight[:, t] for t in token_T]).softmax(1)
    assert close(routing.probability_TE, expected.detach())
    routing.probability_TE[:, 0].sum().backward()  # what is learned is the row of a token that was there
    assert (router.token_weight.grad.abs().sum(0) > 0).all()
    with pytest.raises(ValueError, match="table needs the vocabulary index"):
        router(x, RoutingContext())


def test_a_table_starts_as_a_random_hash():
    many = Vocabulary(20000, torch.zeros(20000))
    first, again, other = (make("dts", 4, 8, seed=s, gate_input="table", vocabulary=many) for s in (1, 1, 2))
    assert torch.equal(first.token_weight, again.token_weight)
    assert first.token_weight.std().item() == pytest.approx(3, abs=0.05)
    share_E = torch.bincount(first.token_weight.argmax(0), minlength=8) / 20000
    assert (share_E - 1 / 8).abs().max() < 0.01
    same = (first.token_weight.argmax(0) == other.token_weight.argmax(0)).float().mean()
    assert same.item() == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("missing", ["vocabulary", "width", "embeddings"])
def test_what_is_missing_is_named(missing):
    with pytest.raises(ValueError, match="`gate_input` both .* hidden"):
        given = {"vocabulary": None, "width": vocabulary(0)}.get(missing, vocabulary())
        router = make("switch", 4, 3, gate_input="both", vocabulary=given)
        router(batch()[0], RoutingContext())


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("activations", [False, True], ids=["", "checkpoint_activations"])
@pytest.mark.parametrize("settings", [LM, MASKED_LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_every_token_goes_where_its_embedding_says(settings, activations, heads, request):
    """With padding, encoders and decoders; once more when a layer is computed again."""
    options = {"moe_router": "topk", "moe_top_k": 1, "moe_gate_input": "token", "moe_heads": heads}
    setup = make_model(request, settings, checkpoint_activations=activations, **options)
    sample = padded_batch(setup)
    inputs = {"encoder": sample["net_input"]["src_tokens"], "decoder": sample["net_input"]["src_tokens"]}
    if settings is TRANSLATION:
        inputs["decoder"] = sample["net_input"]["prev_output_tokens"]
    expected = {}
    for name, moe in layers(setup.model).items():
        side = name.split(".")[0]
        stack = setup.model.encoder if side == "encoder" else setup.model.decoder
        stack = getattr(stack, "sentence_encoder", stack)
        tokens = inputs[side][inputs[side].ne(1)]
        e = stack.embed_tokens.weight[tokens].detach()
        e = (e - e.mean(1, keepdim=True)) / e.var(1, unbiased=False, keepdim=True).add(1e-5).sqrt()
        expected[name] = (e @ moe.router.token_weight.t()).argmax(1).repeat_interleave(heads)
    with record() as routings:
        loss = setup.criterion(setup.model.train(), sample)[0]
    for name, moe in layers(setup.model).items():
        assert torch.equal(routings[moe].expert_N, expected[name]), name
    loss.backward()
    for name, moe in layers(setup.model).items():
        assert torch.equal(routings[moe].expert_N, expected[name]), name
        assert moe.router.token_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("gate_input", ["both", "table"])
def test_generating_step_by_step_routes_like_the_whole(gate_input, request):
    model = make_model(request, LM, moe_router="topk", moe_gate_input=gate_input).model.eval()
    tokens = torch.tensor([[5, 6, 7, 8, 9]])
    whole = model(tokens)[0]
    state = {}
    steps = [model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in range(5)]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_other_routers_refuse_it(lm_data):
    with pytest.raises(ValueError, match="--moe-gate-input both has no effect with --moe-router hash"):
        build(lm_data, **{**LM, **PLAIN, "moe_router": "hash", "moe_gate_input": "both"})


@pytest.mark.parametrize("gate_input", ["both", "table"])
def test_a_run_grows_and_resumes_with_it(gate_input, lm_data, tmp_path):
    options = {**LM, "moe_gate_input": gate_input, "save_interval_updates": 9}
    call("fairseq-train", lm_data, **options, save_dir=tmp_path / "whole")
    call("fairseq-train", lm_data, **{**options, "max_update": 9}, save_dir=tmp_path / "parts")
    call("fairseq-train", lm_data, **options, save_dir=tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / run / "checkpoint_last.pt", weights_only=False)["model"]
        for run in ("whole", "parts")
    )
    assert any(key.endswith("router.token_weight") for key in whole)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("gate_input", ["token", "table"])
def test_a_split_needs_a_gate_that_sees_the_input(gate_input, lm_data):
    options = {**LM, "moe_router": "topk", "moe_spawn_method": "split", "moe_gate_input": gate_input}
    with pytest.raises(ValueError, match=f"--moe-gate-input {gate_input} does not: use hidden or both"):
        build(lm_data, **options)


@pytest.mark.parametrize("gate_input", ["hidden", "token", "both", "table"])
def test_all_gate_inputs_take_a_penalty(lm_data, gate_input):
    """What tries the router out before training has embeddings, too."""
    settings = {**MASKED_LM, "moe_gate_input": gate_input, "moe_penalty_weight": 0.1}
    found = [layer.loss_weights["penalty"] for layer in layers(build(lm_data, **settings).model).values()]
    assert len(found) == 1 and found[0] > 0
