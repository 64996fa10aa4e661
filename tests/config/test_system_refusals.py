"""What the systems of 2024 and later do not go with: one sentence before anything is built or trained."""

import pytest

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from support.cli import LM, TRANSLATION, build
from support.refusals import refused
from support.tasks import PLAIN

NO_EFFECT = "has no effect with --moe-router"
REFUSED = [
    (
        {"router": "switch", "balance": "bias", "balance_weight": 0.1},
        "balance_weight",
        "leave one of them out",
    ),
    ({"router": "topk", "balance": "quantile", "balance_weight": 0.1}, "balance_weight", "quantile"),
    ({"preset": "loss_free", "balance_weight": 0.1}, "balance_weight", "instead of a loss"),
    (
        {"router": "topk", "balance": "quantile", "balance_rate": 0.1},
        "balance_rate",
        "give --moe-balance bias",
    ),
    ({"router": "topk", "balance_rate": 0.1}, "balance_rate", "give --moe-balance bias"),
    ({"router": "laplace", "balance": "bias"}, "balance", NO_EFFECT),
    ({"preset": "remoe", "mean_experts": 17.0}, "mean_experts", "to the 16 experts, but is 17.0"),
    ({"preset": "remoe", "mean_experts": 0.0}, "mean_experts", "greater than 0"),
    ({"preset": "remoe", "l1_factor": 1.0}, "l1_factor", "greater than 1"),
    ({"preset": "remoe", "gate_activation": "tanh"}, "gate_activation", NO_EFFECT),
    ({"preset": "remoe", "mutual_information_weight": 0.1}, "mutual_information_weight", NO_EFFECT),
    ({"preset": "dtop_p", "mean_experts": 17.0}, "mean_experts", "to the 16 experts"),
    ({"preset": "dtop_p", "top_p": 0.0}, "top_p", "greater than 0 and at most 1"),
    ({"preset": "expert_choice", "mean_experts": 17.0}, "mean_experts", "to the 16 experts"),
    ({"preset": "expert_threshold", "cutoff_decay": 1.0}, "cutoff_decay", "less than 1"),
    ({"router": "switch", "zero_experts": 1, "experts": 1}, "experts", "leave them out or give more"),
    ({"router": "hash", "zero_experts": 1}, "zero_experts", NO_EFFECT),
    ({"preset": "xmoe", "copy_experts": 1}, "copy_experts", NO_EFFECT),
    ({"router": "switch", "free_balance": 0.5}, "free_balance", "no effect without --moe-zero-experts"),
    ({"preset": "xmoe", "routing_dim": 0}, "routing_dim", "at least 1"),
    ({"preset": "xmoe", "gate_input": "token"}, "gate_input", NO_EFFECT),
    (
        {"gate_input": "table", "gate_input_activation": "tanh"},
        "gate_input_activation",
        "leave one of them out",
    ),
    ({"gate_activation": "swish"}, "gate_activation", "must be one of identity, sigmoid"),
    ({"router": "hash", "mutual_information_weight": 0.1}, "mutual_information_weight", NO_EFFECT),
    ({"preset": "ds_moe", "hard_experts": 17}, "hard_experts", "from 1 to the 16 experts"),
    ({"preset": "default_moe", "renormalize": "always"}, "renormalize", NO_EFFECT),
    ({"router": "topk", "default_decay": 0.5}, "default_decay", NO_EFFECT),
    (
        {"spawn_update": "5:2,9:4", "spawn_select": "gradient", "freeze": "experts"},
        "spawn_select",
        "give --moe-spawn-select load",
    ),
    (
        {"spawn_update": 9, "gate_warmup": 5, "freeze": "router"},
        "gate_warmup",
        "leaves it as it is drawn",
    ),
    ({"preset": "comet", "leaf_search": -1}, "leaf_search", "at least 0"),
    ({"router": "topk", "leaf_search": 10}, "leaf_search", NO_EFFECT),
]


@pytest.mark.parametrize("given, option, words", REFUSED, ids=str)
def test_options(given, option, words):
    with pytest.raises(ConfigError) as raised:
        resolve(given, max_update=100, ffn_dims=[64])
    assert raised.value.option == option
    refused(raised, f"--moe-{option.replace('_', '-')}", words)


@pytest.mark.parametrize(
    "given, parts",
    [
        ({"moe_router": "remoe", "moe_penalty_weight": 0.1}, ["--moe-penalty-weight", "remoe has none"]),
        ({"moe_preset": "expert_threshold", "moe_penalty_weight": 0.1}, ["expert-threshold has none"]),
        ({"moe_preset": "xmoe", "moe_spawn_method": "split"}, ["--moe-spawn-method split", "linear gate"]),
        ({"moe_preset": "modified_softmax", "moe_spawn_method": "split"}, ["--moe-gate-input-activation"]),
        ({"moe_preset": "default_moe", "moe_eval_capacity_factor": 1.0}, ["what a decoder drops"]),
        ({"moe_preset": "expert_choice"}, ["--moe-router expert-choice", "later ones", "evomoe_roberta"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_models(given, parts, settings, lm_data, translation_data):
    data = lm_data if settings is LM else translation_data
    plain = {**PLAIN, "moe_anneal_updates": None}
    with pytest.raises(ConfigError) as raised:
        build(data, **{**settings, **plain, "moe_spawn_update": None, **given})
    refused(raised, *parts)
