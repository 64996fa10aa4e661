"""Routers that learn something of the tokens of each update: a resumed run knows it, too, bit for bit."""

import pytest
import torch

from support.cli import LM, MASKED_LM, parameters
from support.evaluation import perplexity
from support.resume import check_resume
from support.tasks import PLAIN

ROUTERS = {
    "remoe": ({"moe_router": "remoe", "moe_l1_start": 0.01}, "penalty.coefficient"),
    "bias": ({"moe_router": "switch", "moe_balance": "bias"}, "balancing.bias_E"),
    "quantile": ({"moe_router": "topk", "moe_balance": "quantile"}, "balancing.bias_E"),
    "xmoe": ({"moe_router": "xmoe", "moe_balance": "bias", "moe_routing_dim": 3}, "balancing.bias_E"),
    "dtop-p": ({"moe_router": "dtop-p", "moe_mean_experts": 3.0}, "controller.p"),
    "expert-threshold": ({"moe_router": "expert-threshold"}, "cutoffs.cutoff_E"),
    "default-moe": ({"moe_router": "default-moe"}, "defaults.output_ED"),
    "comet": ({"moe_router": "comet", "moe_leaf_search": 4}, "order.made"),
    "moe++": ({"moe_preset": "moe_plus_plus"}, "free.constant_CD"),
    "moe++ bias": ({"moe_preset": "moe_plus_plus", "moe_balance": "bias"}, "balancing.bias_E"),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_run_resumes_bit_equal(name, lm_data, tmp_path):
    options, buffer = ROUTERS[name]
    settings = {**LM, **PLAIN, **options, "moe_freq": 1, "max_update": 6, "disable_validation": True}
    whole = check_resume(lm_data, tmp_path, {**settings, "moe_spawn_update": 1}, (3,))
    key = f"decoder.layers.1.moe.router.{buffer}"
    middle, end = parameters(whole.at(3))[key], parameters(whole.last)[key]
    assert middle.dtype == torch.float32 and not torch.equal(middle, end)


@pytest.mark.parametrize("preset", ["evomoe_activation", "modified_softmax", "ds_moe"])
def test_a_gate_s_preset_resumes_bit_equal(preset, lm_data, tmp_path):
    """With experts that spawn.  DS-MoE trains at the cost of all, and is used at that of two."""
    settings = {**LM, **PLAIN, "moe_preset": preset, "moe_freq": 1, "max_update": 6, "moe_spawn_update": 1}
    whole = check_resume(lm_data, tmp_path, settings, (3,))
    training = whole.log("train_inner")[-1]["moe_experts"]
    validation = whole.log("valid")[-1]["valid_moe_experts"]
    if preset == "ds_moe":
        assert (training, validation) == (4, 2)
        all_experts = {"moe_hard_experts": 4}, {"moe_eval_routing": "adaptive", "moe_threshold": 0.0}
        two, four, over_0 = (
            perplexity(lm_data, whole.last, model_overrides=repr(each)) for each in ({}, *all_experts)
        )
        assert four == over_0 != two


def test_expert_choice_resumes_bit_equal(lm_data, tmp_path):
    """It learns nothing of an update, but is no router of a decoder."""
    options = {"moe_router": "expert-choice", "moe_freq": 1, "max_update": 6, "disable_validation": True}
    check_resume(lm_data, tmp_path, {**MASKED_LM, **PLAIN, **options, "moe_spawn_update": 1}, (3,))
