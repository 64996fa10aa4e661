"""m2mKD: a meta model, modules in it, and the student, as phases of one run."""

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from support.cli import LM, MASKED_LM, TRANSLATION, Run, build, call, parameters, run
from support.parallel import EXACT, RANKS, TOLERANCE
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks
from support.refusals import refused
from support.resume import check_resume
from support.tasks import PLAIN, dense

QUIET = {"disable_validation": True}
M2MKD = {
    **{name: value for name, value in LM.items() if name not in PLAIN},
    "moe_preset": "m2mkd",
    "moe_meta_updates": 3,
    "moe_module_updates": 6,
    "moe_freq": 1,
    "max_update": 12,
    "required_batch_size_multiple": 1,  # or else fairseq validates with whole batches only
}


@pytest.fixture(scope="module")
def teacher(lm_data, tmp_path_factory):
    """A dense model of four layers."""
    folder = tmp_path_factory.mktemp("teacher")
    settings = {**dense(LM), **QUIET, "decoder_layers": 4, "max_update": 8}
    return Run(folder, call("fairseq-train", lm_data, save_dir=folder, **settings)).last


@pytest.fixture(scope="module")
def whole(teacher, lm_data, tmp_path_factory):
    """A run through all phases, by the console script, with a checkpoint in each."""
    folder = tmp_path_factory.mktemp("m2mkd")
    settings = {**M2MKD, "moe_teacher": teacher, "save_interval_updates": 1}
    return Run(folder, run("fairseq-train", lm_data, save_dir=folder, **settings))


def test_each_phase_trains_its_own_part(whole):
    found = [parameters(whole.at(update)) for update in (1, 3, 4, 9, 10)]
    start, meta, first, modules, student = found

    def changed(before, after):
        both = set(before) & set(after)
        return {name for name in both if not torch.equal(before[name], after[name])} - {"distillation.phase"}

    assert all(name.startswith("distillation.meta.") for name in changed(start, meta))
    assert len(changed(start, meta)) > 20
    assert all(name.startswith("decoder.layers.") for name in changed(first, modules))
    assert {name.split(".")[2] for name in changed(first, modules)} == {"0", "1"}
    assert not any(name.startswith("distillation.") for name in student)
    assert {"decoder.embed_tokens.weight", "decoder.layers.0.moe.router.weight"} <= changed(modules, student)


def test_the_student_begins_in_what_is_around_the_meta_model_s_layers(whole):
    meta, first = parameters(whole.at(3)), parameters(whole.at(4))
    for name in ("embed_tokens.weight", "layer_norm.weight", "output_projection.weight"):
        assert torch.equal(first["decoder." + name], meta["distillation.meta.decoder." + name])


def test_what_the_log_says(whole):
    steps = whole.log("train_inner")
    learning = [step.get("moe_divergence") is not None for step in steps]
    assert learning == [False] * 3 + [True] * 6 + [False] * 3
    assert steps[2]["loss"] < steps[0]["loss"] and steps[-1]["loss"] < steps[0]["loss"]
    assert [step["moe_experts"] for step in steps] == [0] * 3 + [2] * 9
    for text in ("a meta model of 2 layers", "from update 3 modules learn", "from update 9 the student"):
        assert len(whole.result.lines(text)) == 1
    costs = [step["moe_active_params"] for step in steps]
    assert costs[0] < costs[-1] < costs[4]


@pytest.mark.parametrize("stop", [2, 3, 6, 9, 10])
def test_a_run_resumed_in_any_phase_is_the_same(stop, whole, teacher, lm_data, tmp_path):
    settings = {**M2MKD, "moe_teacher": teacher}
    check_resume(lm_data, tmp_path, settings, [stop], whole)


def evaluated(data, path):
    """What `fairseq-eval-lm` says, where there is no teacher."""
    flags = {"path": path, "user_dir": LM["user_dir"], "gen_subset": "valid", "tokens_per_sample": 16}
    return call("fairseq-eval-lm", data, batch_size=8, num_workers=0, **flags).lines("Perplexity")


def test_a_checkpoint_of_any_phase_is_evaluated_without_its_teacher(whole, lm_data):
    assert all(evaluated(lm_data, whole.at(update)) for update in (2, 6))
    (line,) = evaluated(lm_data, whole.last)
    last = whole.log("valid")[-1]["valid_ppl"]
    assert float(line.split("Perplexity: ")[1]) == pytest.approx(last, abs=0.011)


def test_a_narrower_student_needs_stitches(teacher, lm_data, tmp_path):
    narrow = {"decoder_embed_dim": 16, "decoder_input_dim": 16, "decoder_output_dim": 16, **QUIET}
    settings = {**M2MKD, **narrow, "moe_teacher": teacher}
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path / "without", **settings)
    refused(error, "--moe-teacher", "32", "16", "--moe-stitch")
    settings.update(moe_stitch=True, save_interval_updates=5)
    whole = Run(tmp_path, call("fairseq-train", lm_data, save_dir=tmp_path, **settings))
    (line,) = whole.result.lines("modules learn; embeddings")
    assert " 0 of " in line
    assert any(".stitches." in name for name in parameters(whole.at(5)))
    assert not any(".stitches." in name for name in parameters(whole.last))
    check_resume(lm_data, tmp_path, settings, [5], whole)


def test_a_spawn_after_the_modules_have_learnt(teacher, lm_data, tmp_path):
    """One expert is learnt from the teacher, and spawns in the student."""
    settings = {**M2MKD, **QUIET, "moe_teacher": teacher, "moe_spawn_update": 9, "moe_spawn_method": "copy"}
    result = call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    assert [step["moe_experts"] for step in result.log("train_inner")] == [0] * 3 + [1] * 6 + [2] * 3
    assert result.lines("spawned experts before update 9: 1 -> 4")


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [1, 2])
def test_two_ranks_are_one_process(parallel, teacher, lm_data, tmp_path):
    settings = {**M2MKD, **EXACT, "moe_teacher": teacher, "max_update": 8, "moe_meta_updates": 3}
    settings["moe_module_updates"] = 3
    two = {**settings, "moe_expert_parallel": parallel, "save_dir": tmp_path / "two"}
    train_on_ranks(RANKS, [[[lm_data], two]], tmp_path / "jobs")
    train_on_all_batches(RANKS, lm_data, save_dir=tmp_path / "one", **settings)
    one, two = (state_of(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert largest_difference(one, two) < TOLERANCE


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"moe_meta_updates": 0}, ["--moe-teacher", "--moe-meta-updates"]),
        ({"moe_meta_updates": 8}, ["--moe-meta-updates", "--moe-module-updates", "14", "12"]),
        ({"moe_spawn_update": 4}, ["--moe-spawn-update 4", "--moe-teacher", "9"]),
        ({"moe_router": "dts", "moe_spawn_update": 0}, ["--moe-spawn-update", "--moe-router dts", "9"]),
        ({"moe_router": "dynmoe"}, ["--moe-router dynmoe", "--moe-teacher"]),
        ({"moe_module_alpha": 1.5}, ["--moe-module-alpha", "at most 1"]),
    ],
    ids=str,
)
def test_refused(options, parts, teacher, lm_data):
    with pytest.raises(ConfigError) as error:
        build(lm_data, **{**M2MKD, "moe_teacher": teacher, **options})
    refused(error, *parts)


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"moe_teacher": "nothing.pt"}, ["--moe-teacher nothing.pt", "no file"]),
        ({"moe_teacher": None}, ["--moe-teacher", "--moe-meta-updates"]),
        ({"moe_stitch": True}, ["--moe-stitch", "nothing to do"]),
        ({"decoder_layers": 5}, ["--moe-teacher", "4 layers", "5 modules"]),
        ({"finetune_from_model": "teacher"}, ["--moe-teacher", "--finetune-from-model"]),
        ({"store_ema": True}, ["--moe-teacher", "--store-ema"]),
        (
            {"criterion": "cross_entropy", "moe_balance_weight": 0.0},
            ["--moe-teacher", "evomoe_cross_entropy"],
        ),
        ({"tokens_per_sample": 32}, ["--moe-teacher", "16", "32"]),
    ],
    ids=str,
)
def test_refused_before_training(options, parts, teacher, lm_data, tmp_path):
    settings = {**M2MKD, "moe_teacher": teacher, **options}
    if options.get("finetune_from_model"):
        settings["finetune_from_model"] = teacher
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    refused(error, *parts)
    assert not list(tmp_path.glob("*.pt"))


def test_teachers_that_do_not_fit(whole, lm_data, translation_data, tmp_path):
    def said(data, **settings):
        with pytest.raises(ConfigError) as error:
            call("fairseq-train", data, save_dir=tmp_path / "run", **settings)
        return error

    with_experts = {**M2MKD, "moe_teacher": whole.last}
    refused(said(lm_data, **with_experts), "--moe-teacher", "evomoe_lm_tiny", "transformer_lm")
    masked = {name: value for name, value in MASKED_LM.items() if name not in PLAIN}
    phases = {
        "moe_preset": "m2mkd",
        "moe_meta_updates": 1,
        "moe_module_updates": 1,
        "moe_teacher": whole.last,
    }
    refused(said(lm_data, **masked, **phases), "--moe-teacher", "roberta")
    pairs = {name: value for name, value in TRANSLATION.items() if name not in PLAIN}
    refused(said(translation_data, **pairs, **phases), "--moe-teacher", "one stack", "evomoe_roberta")


def test_a_checkpoint_without_a_meta_model_is_not_of_an_early_phase(whole, teacher, lm_data, tmp_path):
    settings = {**M2MKD, "moe_teacher": teacher, "restore_file": whole.last, "reset_optimizer": True}
    with pytest.raises(ConfigError) as error:
        call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    refused(error, "--moe-teacher", "9", "--restore-file")


def test_options_without_a_teacher_are_told(lm_data, tmp_path):
    settings = {**LM, **QUIET, "moe_module_alpha": 0.1, "max_update": 7}
    (line,) = call("fairseq-train", lm_data, save_dir=tmp_path, **settings).lines("no effect without")
    assert "--moe-teacher" in line and line.endswith("--moe-module-alpha")
