"""Many ranks train as one process does on the batches of all of them, however the experts are shared out."""

import pytest
from cli import LM, TRANSLATION
from rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks

RANKS = 2

# eps: where a gradient is 0 but for rounding, as that of a key's bias, Adam would make a step of its sign
EXACT = {
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "adam_eps": 1e-3,
    "batch_size": 5,
    "max_update": 20,
    "clip_norm": 0.5,
}
# sentences of very different lengths; an odd number of batches, so that one rank ends the epoch with a dummy
SENTENCES = {**LM, **EXACT, "sample_break_mode": "eos", "tokens_per_sample": 64, "moe_freq": 1}
PAIRS = {**TRANSLATION, **EXACT, "required_batch_size_multiple": 1}

HMOE = {
    "moe_expert_sizes": "arithmetic",
    "moe_expert_activation": "swiglu",
    "moe_spawn_method": "slice",
    "moe_penalty_weight": 0.1,
}
CASES = {
    "dts, P=1": {"moe_balance_weight": 0.1},
    "dts": {"moe_expert_parallel": 2, "moe_balance_weight": 0.1},
    "dts, adaptive, gumbel weights": {
        "moe_expert_parallel": 2,
        "moe_gate_weight": "gumbel",
        "moe_hard_update": -1,
    },
    "switch": {"moe_expert_parallel": 2, "moe_router": "switch", "moe_z_weight": 0.001},
    "switch, P=1, capacity": {"moe_router": "switch", "moe_capacity_factor": 1.0},
    "topk": {
        "moe_expert_parallel": 2,
        "moe_router": "topk",
        "moe_random_second": True,
        "moe_capacity_factor": 1.0,
    },
    "base": {"moe_expert_parallel": 2, "moe_router": "base"},
    "base, P=1": {"moe_router": "base"},
    "hash": {"moe_expert_parallel": 2, "moe_router": "hash"},
    "hash, a rank without tokens": {
        "moe_expert_parallel": 2,
        "moe_router": "hash",
        "all_to_first_expert": True,
    },
    "stable": {"moe_expert_parallel": 2, "moe_router": "stable", "moe_stable_update": 12},
    "HMoE, top-k": {
        "moe_expert_parallel": 2,
        "moe_router": "topk",
        "moe_balance_weight": 0.0,
        **HMOE,
    },
    "HMoE, top-p": {
        "moe_expert_parallel": 2,
        "moe_router": "top-p",
        "moe_renormalize": "always",
        "moe_entropy_weight": 0.03,
        **HMOE,
    },
}


def test_ranks_equal_one_process(lm_data, tmp_path):
    jobs, names = [], list(CASES)
    for name in names:
        jobs.append([[lm_data], {**SENTENCES, **CASES[name], "save_dir": tmp_path / "ranks" / name}])
    results = train_on_ranks(RANKS, jobs, tmp_path / "jobs")
    rows = {}
    for name, result in zip(names, results):
        one = train_on_all_batches(
            RANKS, lm_data, **{**SENTENCES, **CASES[name], "save_dir": tmp_path / "one" / name}
        )
        losses = [[log["loss"] for log in run.log("train_inner")] for run in (result, one)]
        assert len(losses[0]) == len(losses[1]) == 20
        states = [state_of(tmp_path / kind / name / "checkpoint_last.pt") for kind in ("ranks", "one")]
        rows[name] = largest_difference(*states), max(abs(a - b) for a, b in zip(*losses))
    print(rows)
    assert all(row[0] < 1e-5 for row in rows.values()), rows


def test_checkpoints_fit_any_number_of_ranks(lm_data, tmp_path):
    """From before and after the spawn, in one file and in several, with the optimizer's state."""
    settings = {**SENTENCES, "moe_balance_weight": 0.1, "save_interval_updates": 5, "store_ema": True, "ema_fp32": True}
    settings = {**settings, "no_epoch_checkpoints": True}
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    two = {**settings, "moe_expert_parallel": 2}
    train_on_ranks(
        RANKS,
        [
            [[lm_data], {**two, "save_dir": whole}],
            [[lm_data], {**two, "save_dir": sharded, "moe_sharded_checkpoint": True}],
        ],
        tmp_path / "jobs",
    )
    end = state_of(whole / "checkpoint_last.pt")
    print(sorted(p.name for p in whole.iterdir()), sorted(p.name for p in sharded.iterdir()))
    from fairseq import checkpoint_utils
    assembled = checkpoint_utils.load_checkpoint_to_cpu(str(sharded / "checkpoint_last.pt"))
    import torch
    reference = torch.load(whole / "checkpoint_last.pt")
    from cli import assert_equal
    for key in ("model", "last_optimizer_state"):
        for name in reference[key]:
            if name.endswith("_float_tensor"): continue
            if key == "model":
                assert_equal(reference[key][name], assembled[key][name])
        if key != "model":
            assert_equal(reference[key], assembled[key])
    assert_equal(reference["extra_state"]["ema"], assembled["extra_state"]["ema"])

    jobs, names = [], []
    for update, folder, parallel in ((5, whole, 1), (5, whole, 2), (10, whole, 1), (10, sharded, 1), (10, whole, 2), (10, sharded, 2), (15, sharded, 2)):
        path = next(folder.glob("checkpoint_*_{}.pt".format(update)))
        names.append("{}-{}-{}".format(update, folder.name, parallel))
        jobs.append([[lm_data], {**settings, "moe_expert_parallel": parallel, "restore_file": path, "save_dir": tmp_path / names[-1]}])
    train_on_ranks(RANKS, jobs, tmp_path / "resumed")
    for name, (_, options) in zip(names, jobs):
        print(name, largest_difference(end, state_of(tmp_path / name / "checkpoint_last.pt")))
    for update, folder in ((5, whole), (10, whole), (15, sharded)):
        path = next(folder.glob("checkpoint_*_{}.pt".format(update)))
        name = "one-{}-{}".format(update, folder.name)
        train_on_all_batches(RANKS, lm_data, **{**settings, "restore_file": path, "save_dir": tmp_path / name})
        print(name, largest_difference(end, state_of(tmp_path / name / "checkpoint_last.pt")))
    assert 0
