"""Language models with an adaptive softmax, as those of wikitext-103, with the routers' losses."""

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY

from support.cli import LM, TRANSLATION, build, call
from support.refusals import refused
from support.tasks import PLAIN

# cutoffs, and inputs that share the output's matrices, as in transformer_lm_wiki103
ADAPTIVE = {
    **LM,
    "criterion": "evomoe_adaptive_loss",
    "ddp_backend": "legacy_ddp",
    "adaptive_softmax_cutoff": "10,20",
    "adaptive_input": True,
    "adaptive_input_cutoff": "10,20",
    "tie_adaptive_weights": True,
    "dropout": 0.0,
}
BALANCED = {**ADAPTIVE, **PLAIN, "moe_router": "switch", "moe_jitter": 0.0, "moe_balance_weight": 0.5}


def test_it_is_fairseq_s_loss_and_the_routers(lm_data):
    setup = build(lm_data, **BALANCED)
    fairseq = CRITERION_REGISTRY["adaptive_loss"](setup.task, False)
    batch = setup.batches()[0]
    model = setup.model.train()
    (plain, size, log), (ours, _, log_of_ours) = (each(model, batch) for each in (fairseq, setup.criterion))
    balance = log_of_ours["moe_balance"] / log_of_ours["moe_tokens"]
    assert torch.allclose(ours, plain + 0.5 * size * balance) and balance > 0.5
    assert torch.equal(log_of_ours["loss"], log["loss"])
    ours.backward()
    assert model.decoder.layers[1].moe.router.weight.grad.abs().sum() > 0
    assert torch.allclose(setup.criterion(model.eval(), batch)[0], fairseq(model, batch)[0])


def test_it_trains_through_a_spawn_and_is_evaluated(lm_data, tmp_path):
    settings = {**ADAPTIVE, "moe_router": "switch", "moe_hard_update": None, "moe_anneal_updates": 5000}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    steps = result.log("train_inner")
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["moe_phase"] < steps[-1]["moe_phase"]
    assert steps[-1]["moe_balance"] >= 1 and result.log("valid")[-1]["valid_moe_experts"] == 1
    path = tmp_path / "checkpoint_last.pt"
    found = call(
        "fairseq-eval-lm", lm_data, path=path, user_dir=LM["user_dir"], gen_subset="test", batch_size=4
    )
    assert found.lines("Perplexity")


@pytest.mark.parametrize(
    "settings, changes, parts",
    [
        # fairseq's criterion, which would drop the loss
        (
            BALANCED,
            {"criterion": "adaptive_loss"},
            ["--moe-balance-weight", "--criterion evomoe_adaptive_loss"],
        ),
        # an AssertionError of fairseq's in the first update
        (BALANCED, {"criterion": "evomoe_cross_entropy"}, ["--criterion evomoe_adaptive_loss"]),
        (ADAPTIVE, {"criterion": "cross_entropy"}, ["--criterion evomoe_adaptive_loss"]),
        (
            TRANSLATION,
            {"adaptive_softmax_cutoff": "10,20", "share_all_embeddings": False},
            ["--criterion evomoe_label_smoothed_cross_entropy", "--criterion evomoe_adaptive_loss"],
        ),
        # another one
        (
            LM,
            {"criterion": "evomoe_adaptive_loss", "ddp_backend": "legacy_ddp"},
            ["--adaptive-softmax-cutoff", "--criterion evomoe_cross_entropy"],
        ),
    ],
    ids=["fairseq", "ours", "cross_entropy", "translation", "no_cutoff"],
)
def test_what_does_not_fit_is_refused(settings, changes, parts, lm_data, translation_data):
    data = translation_data if settings is TRANSLATION else lm_data
    setup = build(data, **{**settings, **changes})
    with pytest.raises(ValueError) as error:
        setup.trainer()
    refused(error, *parts)


def test_a_criterion_of_somebody_else_s_gets_the_advice_that_fits(lm_data):
    """Nothing of ours extends it."""
    for settings, name in ((BALANCED, "evomoe_adaptive_loss"), ({**LM, **PLAIN}, "evomoe_cross_entropy")):
        setup = build(lm_data, **{**settings, "moe_balance_weight": 0.5})
        other = type("Other", (CRITERION_REGISTRY["adaptive_loss"],), {})(setup.task, False)
        if name == "evomoe_cross_entropy":
            other = type("Other", (CRITERION_REGISTRY["nat_loss"],), {})(setup.task, 0.0)
        setup.criterion = other
        with pytest.raises(ValueError) as error:
            setup.trainer()
        refused(error, "--moe-balance-weight", f"use --criterion {name}")


def test_the_wrapper_that_does_not_fit_is_named(lm_data):
    with pytest.raises(Exception, match="--ddp-backend=legacy_ddp"):
        build(lm_data, **{**ADAPTIVE, "ddp_backend": "pytorch_ddp"})
