"""Stratified MoE in fairseq's layers: what passes start from, and the LayerNorm on what goes on."""

import pytest
import torch

from fairseq_evomoe.models.feed_forward import moe_layers
from fairseq_evomoe.moe import record
from support.cli import LM, MASKED_LM, TRANSLATION, build, call, parameters
from support.models import make_model, padded_batch
from support.resume import check_resume
from support.tasks import PLAIN, dense

STRATA = {"moe_router": "stratified", "moe_strata": "1,1,2"}


@pytest.fixture(params=[True, False], ids=["norm before", "norm after"])
def translator(request):
    """A model in evaluation whose LayerNorms are not those that they start as, and a batch with padding."""
    before = {f"{side}_normalize_before": request.param for side in ("encoder", "decoder")}
    setup = make_model(request, TRANSLATION, **STRATA, **before)
    for name, parameter in setup.model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return setup.model.eval(), padded_batch(setup)["net_input"]


def test_a_layer_goes_on_with_the_norm_of_its_sum(translator):
    """With r what the MoE layer's output y is added to: LN_S(r + y), and passes start from r."""
    model, batch = translator
    seen, wrapped = {}, []
    for name, layer in moe_layers(model):
        seen[name] = []
        moe = layer.moe
        kept = lambda _, args, y, name=name: seen[name].append((args, y))  # noqa: E731
        wrapped += [moe.register_forward_hook(kept), layer.register_forward_hook(kept)]
    with torch.no_grad(), record() as routings:
        model(**batch)
    for name, layer in moe_layers(model):
        (args, y), (_, whole) = seen[name]
        x, padding, residual = args[0], args[2], args[6]
        whole = (whole if torch.is_tensor(whole) else whole[0]).transpose(0, 1)
        assert (residual is not None) == layer.normalize_before
        if layer.normalize_before:
            assert torch.allclose(layer.final_layer_norm(residual), x, atol=1e-6)
        expected = layer.moe.router.norms[-1]((x if residual is None else residual) + y)
        if not layer.normalize_before:
            expected = layer.final_layer_norm(expected)
        real = slice(None) if padding is None else ~padding
        assert torch.allclose(whole[real], expected[real], atol=1e-6), name
        routing = routings[layer.moe]
        assert routing.tokens < len(routing.token_N) <= 2 * 3 * routing.tokens
    for handle in wrapped:
        handle.remove()


def test_incremental_decoding_is_full_decoding(translator):
    model, batch = translator
    tokens = batch["prev_output_tokens"]
    with torch.no_grad():
        encoded = model.encoder(batch["src_tokens"], src_lengths=batch["src_lengths"])
        full, state = model.decoder(tokens, encoder_out=encoded)[0], {}
        for i in range(tokens.shape[1]):
            step = model.decoder(tokens[:, : i + 1], encoder_out=encoded, incremental_state=state)[0]
            real = tokens[:, i].ne(1)
            assert torch.allclose(step[real, 0], full[real, i], atol=1e-5), i


def test_before_the_spawn_it_is_the_dense_model(lm_data, tmp_path):
    """And loads a dense checkpoint; with the experts there, as copies, the LayerNorms are what is new."""
    call("fairseq-train", lm_data, save_dir=tmp_path, **{**dense(LM), "max_update": 2})
    state = parameters(tmp_path / "checkpoint_last.pt")
    tokens, outputs = torch.randint(4, 20, (3, 9)), {}
    for name, options in {
        "dense": {"moe_spawn_update": 6},
        "spawned": {"moe_spawn_update": 0, "moe_spawn_method": "copy"},
        "one stratum, inner": {
            "moe_spawn_update": 0,
            "moe_spawn_method": "copy",
            "moe_strata": "4",
            "moe_strata_norm": "inner",
        },
    }.items():
        settings = {**LM, "moe_anneal_updates": None, "moe_hard_update": None, **STRATA, **options}
        model = build(lm_data, **settings).model.eval()
        model.load_state_dict(dict(state))
        with torch.no_grad():
            outputs[name] = model(tokens)[0]
    assert torch.allclose(outputs["dense"], outputs["one stratum, inner"], atol=1e-5)
    assert not torch.allclose(outputs["dense"], outputs["spawned"], atol=1e-2)


def test_a_run_with_a_spawn_and_all_that_is_random_resumes_bit_equal(lm_data, tmp_path):
    options = {"moe_random_second": True, "moe_capacity_factor": 1.0, "moe_output_masking": 0.1}
    settings = {**LM, **PLAIN, **STRATA, **options, "moe_freq": 1, "max_update": 6, "moe_spawn_update": 1}
    whole = check_resume(lm_data, tmp_path, settings, (3,))
    start, *later = (step["moe_experts"] for step in whole.log("train_inner"))
    assert start == 1 and all(1 < experts < 6 for experts in later)
    assert whole.log("train_inner")[-1]["moe_dropped"] > 0
    valid = whole.log("valid")[-1]
    assert valid["valid_moe_dropped"] == 0 and 2 <= valid["valid_moe_experts"] < 6


def test_the_cost_is_what_is_passed(lm_data):
    setup = build(lm_data, **{**MASKED_LM, **PLAIN, **STRATA, "moe_freq": 1})
    with record() as routings:
        _, _, log = setup.criterion(setup.model.train(), setup.batches()[0])
    setup.criterion.reduce_metrics([log])
    layers = [layer.moe for _, layer in moe_layers(setup.model)]
    size = layers[0].experts.parameters_of_each()[0]
    pairs = [len(routings[moe].token_N) for moe in layers]
    assert log["moe_active"].tolist() == [count * size for count in pairs]
    assert log["moe_assignments"] == sum(pairs) > log["moe_tokens"]


def test_what_is_frozen_stays(lm_data):
    """The gates and LayerNorms are the router."""
    settings = {**LM, **STRATA, "moe_anneal_updates": None, "moe_hard_update": None, "moe_freq": 1}
    setup = build(lm_data, **{**settings, "moe_freeze": "router", "moe_spawn_update": 0})
    before = {name: p.detach().clone() for name, p in setup.model.named_parameters()}
    setup.train(2)
    still = {name for name, p in setup.model.named_parameters() if torch.equal(p.detach(), before[name])}
    assert still == {name for name in before if ".router." in name}
    assert any(".router.norms." in name for name in still)


@pytest.mark.parametrize("before", [True, False], ids=["norm before", "norm after"])
def test_passes_start_from_a_residual_that_is_scaled(before, lm_data):
    setup = build(lm_data, **{**LM, **STRATA, "moe_spawn_update": 0})
    ((_, layer),) = moe_layers(setup.model)
    layer.normalize_before = before
    # what --scale-resids makes; fairseq 0.12.3 does not hand it on to its layers
    layer.w_resid = torch.nn.Parameter(torch.randn(32))
    seen = []
    layer.moe.register_forward_hook(lambda moe, args, y: seen.append((args, y)))
    layer.register_forward_hook(lambda layer, args, y: seen.append(y[0].transpose(0, 1)))
    with torch.no_grad():
        setup.model.eval()(**setup.batches()[0]["net_input"])
    (args, y), whole = seen
    expected = layer.moe.router.norms[-1](args[6] + y)
    expected = expected if before else layer.final_layer_norm(expected)
    assert torch.allclose(whole, expected, atol=1e-6)
