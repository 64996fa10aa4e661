"""Systems of 2024 and later, as their presets are: two processes against one, and fairseq's other commands.

The two processes are started once, and work off a list of all systems.
"""

import re

import pytest
import torch

from support.cli import MASKED_LM, TRANSLATION, call
from support.evaluation import EVALUATION, hypotheses, perplexity
from support.parallel import EXACT, RANKS, SENTENCES, SHARED, TOLERANCE
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks
from support.tasks import dense

UPDATES = 8
SIZES = {"moe_freq": 1, "max_update": UPDATES, "moe_spawn_update": 1}
"""Experts spawn before the second update, as many as the preset says, or four."""
NARROW = {"decoder_ffn_embed_dim": 64}  # which is divided among 32 experts
# by preset: what it is given more, and a buffer of a router that must not be as at first
SYSTEMS = {
    "comet": ({"moe_leaf_search": 4, "ddp_backend": "legacy_ddp"}, "order.made"),
    "default_moe": ({}, "defaults.output_ED"),
    "ds_moe": ({**SHARED, "moe_experts": 4}, None),
    "dtop_p": ({**SHARED, "moe_mean_experts": 3.0}, "controller.p"),
    "evomoe_activation": ({**SHARED, "moe_anneal_updates": 3, "moe_hard_update": 4}, None),
    "expert_choice": ({}, None),
    "expert_threshold": (SHARED, "cutoffs.cutoff_E"),
    "loss_free": ({**SHARED, **NARROW}, "balancing.bias_E"),
    "modified_softmax": ({}, None),
    "moe_plus_plus": ({}, None),
    "quantile_balancing": (NARROW, "balancing.bias_E"),
    "remoe": ({**SHARED, "moe_l1_start": 0.01}, "penalty.coefficient"),
    "xmoe": ({**SHARED, "moe_routing_dim": 3}, None),
}
FREE = {"moe_anneal_updates": None, "moe_hard_update": None}
LEARNING = "distillation"  # no preset, but what makes a dense model of a system


def settings_of(name, teacher=None):
    if name == LEARNING:
        more = {"criterion": "evomoe_distillation", "user_dir": SENTENCES["user_dir"]}
        options = {**dense(SENTENCES), **more, "distillation_teacher": teacher, "max_update": UPDATES}
        return {**options, "ddp_backend": "legacy_ddp"}
    task = {**MASKED_LM, **EXACT} if name == "expert_choice" else SENTENCES
    experts = {"moe_experts": None if "decoder_ffn_embed_dim" in SYSTEMS[name][0] else 4}
    return {**task, **FREE, **SIZES, **experts, "moe_preset": name, **SYSTEMS[name][0]}


@pytest.fixture(scope="module")
def runs(lm_data, tmp_path_factory, trained):
    """Folder with one of each system's name, trained by two processes; and what each printed."""
    folder = tmp_path_factory.mktemp("systems")
    teacher = trained(TEACHER).last
    names = [*SYSTEMS, LEARNING]
    jobs = [[[lm_data], {**settings_of(name, teacher), "save_dir": folder / name}] for name in names]
    return folder, dict(zip(names, train_on_ranks(RANKS, jobs, folder))), teacher


TEACHER = {**SENTENCES, "moe_router": "switch", **FREE, **SIZES, "max_update": 3}


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*SYSTEMS, LEARNING])
def test_two_processes_train_what_one_does(name, runs, lm_data, tmp_path):
    folder, results, teacher = runs
    one = train_on_all_batches(RANKS, lm_data, **settings_of(name, teacher), save_dir=tmp_path)
    both, alone = (state_of(path / "checkpoint_last.pt") for path in (folder / name, tmp_path))
    assert largest_difference(both, alone) < TOLERANCE
    logs = [result.log("train_inner") for result in (results[name], one)]
    for key in ["loss"] if name == LEARNING else ["loss", "moe_experts", "moe_balance", "moe_drift"]:
        values = [[line[key] for line in log if key in line] for log in logs]
        assert values[0] == pytest.approx(values[1], abs=5e-3) and values[0]
    buffer = SYSTEMS[name][1] if name != LEARNING else None
    if buffer:
        assert alone[f"decoder.layers.1.moe.router.{buffer}"].abs().sum() > 0


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*SYSTEMS, LEARNING])
def test_what_they_have_trained_is_evaluated(name, runs, lm_data):
    folder, _, _ = runs
    path = folder / name / "checkpoint_last.pt"
    if name != "expert_choice":
        assert 1 < perplexity(lm_data, path, sample_break_mode="eos", tokens_per_sample=64) < 1000
        return
    options = {"task": "masked_lm", "criterion": "evomoe_masked_lm", "valid_subset": "valid", "batch_size": 8}
    printed = call("fairseq-validate", lm_data, path=path, **options, **EVALUATION).output
    assert 1 < float(re.search(r"\| loss ([\d.]+)", printed)[1]) < 10


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "expert_choice"])
def test_it_translates(name, translation_data, tmp_path):
    options = {key: value for key, value in SYSTEMS[name][0].items() if key not in SHARED}
    options.pop("moe_leaf_search", None)
    settings = {**TRANSLATION, **FREE, **SIZES, "moe_preset": name, **options, "max_update": 3}
    settings.update({"decoder_ffn_embed_dim": 64, "encoder_ffn_embed_dim": 64, "disable_validation": True})
    settings["moe_experts"] = None if name in ("loss_free", "quantile_balancing") else 4
    call("fairseq-train", translation_data, save_dir=tmp_path, **settings)
    path = tmp_path / "checkpoint_last.pt"
    one, many = (
        call(
            "fairseq-generate",
            translation_data,
            path=path,
            beam=2,
            max_len_b=8,
            batch_size=size,
            **EVALUATION,
        )
        for size in (8, 40)
    )
    found = hypotheses(many.output)
    assert len(found) == 40
    assert sum(found[i] != text for i, text in hypotheses(one.output).items()) <= 2


@pytest.mark.ranks
def test_each_update_counts_once(runs):
    """Whatever number of processes there are; the first has no experts yet."""
    folder, _, _ = runs
    state = state_of(folder / "expert_threshold" / "checkpoint_last.pt")
    assert torch.equal(state["decoder.layers.1.moe.router.cutoffs.updates"], torch.tensor(UPDATES - 1.0))
