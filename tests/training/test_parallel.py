"""Many ranks train as one process does on the batches of all of them, however the experts are shared out.

The processes of all tests here are started once: they work off one list of jobs, ``support/rank_jobs.py``.
"""

import pytest
import torch

from fairseq_evomoe.checkpoints import trace_file
from fairseq_evomoe.models.feed_forward import moe_layers
from fairseq_evomoe.moe import ROUTERS, record
from fairseq_evomoe.training.ranks import set_dummy_batch
from support.cli import LM, MASKED_LM, TRANSLATION, build, call
from support.optimizers import MIXED
from support.parallel import (
    EXACT,
    EXACT_JOBS,
    PUBLISHED,
    RANKS,
    SENTENCES,
    SHARED,
    TOLERANCE,
)
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks

DYNMOE = {"moe_router": "dynmoe", "moe_dynmoe_window": 3, "moe_max_experts": 6, "moe_spawn_update": 0}
# What equals the same ranks with all experts each.
P1_JOBS = {
    "dynmoe": {**SENTENCES, **DYNMOE, "store_ema": True, "ema_fp32": True},
    "layer drop": {
        **SENTENCES,
        "decoder_layers": 4,
        "decoder_layerdrop": 0.4,
        "ddp_backend": "legacy_ddp",  # the other one refuses parameters that are not used
    },
    "update-freq": {**SENTENCES, "update_freq": 2, "moe_router": "switch"},
    "dropout": {**SENTENCES, "dropout": 0.1},
    "memory-efficient fp16": {**SENTENCES, **MIXED["memory_efficient_fp16"], "moe_router": "topk"},
    "fp16": {**SENTENCES, **MIXED["fp16"], "moe_router": "topk"},
    "flat fp16": {**SENTENCES, **MIXED["flat_fp16"], "moe_router": "topk", "flat_fp16_on_cpu": True},
    "bf16": {**SENTENCES, **MIXED["bf16"], "moe_router": "topk"},
    "masked LM": {**MASKED_LM, **EXACT, "moe_freq": 1},
    "soft": {**MASKED_LM, **EXACT, "moe_router": "soft", "moe_slots": 2},
    "recurrent": {**SENTENCES, "moe_router": "recurrent"},
    "laplace": {**SENTENCES, "moe_router": "laplace"},
    "no biases": {**SENTENCES, "moe_router": "topk", "moe_expert_bias": "none"},
    "dynmoe, one expert is left": {**SENTENCES, **DYNMOE, "keep_one_expert": True},
}
# What must only work.
OTHER_JOBS = {
    "bf16 on the way": {**SENTENCES, **SHARED, "moe_a2a_dtype": "bf16"},
    "lsh": {
        **SENTENCES,
        **SHARED,
        **PUBLISHED,  # with a table, tokens of an expert are less alike, and so coarse a hash loses more
        "moe_a2a_compress": "lsh",
        "moe_lsh_hashes": 1,
        "moe_lsh_dim": 2,
    },
}


@pytest.fixture(scope="module")
def trained(lm_data, translation_data, tmp_path_factory):
    """Folder in which each job has one of its name, and what the jobs printed."""
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {**EXACT_JOBS, **OTHER_JOBS}
    for name, options in P1_JOBS.items():
        jobs[name + ", P=1"], jobs[name] = options, {**options, **SHARED}
    data = lambda options: translation_data if options["task"] == "translation" else lm_data  # noqa: E731
    listed = [[[data(options)], {**options, "save_dir": folder / name}] for name, options in jobs.items()]
    return folder, dict(zip(jobs, train_on_ranks(RANKS, listed, folder)))


def last(folder, name):
    return state_of(folder / name / "checkpoint_last.pt")


def losses(result):
    return [log["loss"] for log in result.log("train_inner")]


@pytest.mark.ranks
@pytest.mark.parametrize("name", EXACT_JOBS)
def test_ranks_equal_one_process(name, trained, tmp_path, request):
    folder, results = trained
    options = {**EXACT_JOBS[name], "save_dir": tmp_path}
    data = request.getfixturevalue("translation_data" if options["task"] == "translation" else "lm_data")
    one = train_on_all_batches(RANKS, data, **options)
    assert losses(results[name]) == pytest.approx(losses(one), abs=2e-3)  # as they are printed
    assert len(losses(one)) == 20
    expected = state_of(tmp_path / "checkpoint_last.pt")
    assert largest_difference(last(folder, name), expected) < TOLERANCE
    if "moe_trace" in options:
        check_traces(trace_file.read(folder / name), trace_file.read(tmp_path))


def check_traces(found, expected):
    """Loads are those of all ranks together, and the probe is routed by experts of both."""
    assert [(x["kind"], x.get("update")) for x in found] == [(x["kind"], x.get("update")) for x in expected]
    for record_, other in zip(found, expected):
        if record_["kind"] == "update":
            for layer, one in zip(record_["layers"].values(), other["layers"].values()):
                assert (layer["tokens"], layer["widths"]) == (one["tokens"], one["widths"])
                assert layer["load"] == pytest.approx(one["load"], abs=2)  # a tie that rounding decides
                assert layer["gate_entropy"] == pytest.approx(one["gate_entropy"], abs=1e-3)
    probe = found[-1]["layers"]["decoder.layers.1"]["probe"]
    assert len(set(probe["expert"])) > 1 and max(probe["expert"]) > 1


@pytest.mark.ranks
@pytest.mark.parametrize("name", P1_JOBS)
def test_shared_experts_equal_experts_on_every_rank(name, trained):
    folder, results = trained
    whole, shared = last(folder, name + ", P=1"), last(folder, name)
    # from 2 on, a step of fp16 is 0.002, of bf16 0.016
    tolerance = 0.05 if "bf16" in name else 5e-3 if "fp16" in name else TOLERANCE
    assert largest_difference(whole, shared) < tolerance
    if name == "dynmoe":
        assert len(results[name].lines("changed experts before update 3")) == 1
        ema = [
            torch.load(folder / job / "checkpoint_last.pt")["extra_state"]["ema"]
            for job in (name, name + ", P=1")
        ]
        assert largest_difference(*({k: x for k, x in e.items() if "_float_" not in k} for e in ema)) < 1e-5


@pytest.mark.ranks
def test_the_bytes_on_the_way_are_reported(trained):
    results = trained[1]
    sent = {name: [log["moe_a2a_mb"] for log in results[name].log("train_inner")[6:]] for name in ("dts",)}
    assert "moe_a2a_mb" not in results["dts"].log("train_inner")[5]  # one expert
    assert "moe_a2a_mb" not in results["dts, P=1"].log("train_inner")[-1]
    assert min(sent["dts"]) > 0
    half = [log["moe_a2a_mb"] for log in results["bf16 on the way"].log("train_inner")[6:]]
    # the weights and counts stay as they are
    assert 0.5 < sum(half) / sum(sent["dts"]) < 0.6


@pytest.mark.ranks
@pytest.mark.parametrize("name", OTHER_JOBS)
def test_less_on_the_way_trains_nearly_the_same(name, trained):
    results = trained[1]
    whole = results["dts as published" if name == "lsh" else "dts"]
    assert losses(results[name])[-1] == pytest.approx(losses(whole)[-1], abs=0.1)
    assert losses(results[name])[8:] != losses(whole)[8:]


KINDS = [
    *({"moe_router": name} for name, cls in ROUTERS.items() if not cls.needs_whole_sequence),
    {"moe_router": "soft", "task": "masked_lm"},
    {"moe_router": "expert-choice", "task": "masked_lm"},
    {"moe_hyper_adapter": True, "moe_shared_expert": True},
    {"moe_heads": 4},
    {"moe_router": "hash", "moe_hashes": 2},
    {"moe_expert_activation": "swiglu", "activation_dropout": 0.1, "moe_expert_sizes": "arithmetic"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_dummy_batch_reaches_every_parameter(options, lm_data):
    """pytorch_ddp waits for all of them."""
    settings = {**(MASKED_LM if "task" in options else LM), **options, "moe_spawn_update": 0}
    setup = build(lm_data, **settings)
    set_dummy_batch([layer for _, layer in moe_layers(setup.model)], True)
    with record() as routings:
        loss, _, _ = setup.criterion(setup.model.train(), setup.batches()[0])
    loss.backward()
    assert not [name for name, p in setup.model.named_parameters() if p.grad is None]
    assert all(routings[layer.moe].tokens == 0 for _, layer in moe_layers(setup.model))


REFUSED = [
    ({"moe_expert_parallel": 2}, "--moe-expert-parallel 2 does not divide the number of ranks, 1"),
    ({"moe_expert_parallel": 5}, "--moe-expert-parallel must be from 1 to the --moe-experts (4)"),
    ({"moe_expert_parallel": 0}, "--moe-expert-parallel must be at least 1"),
    ({"moe_sharded_checkpoint": True}, "--moe-sharded-checkpoint"),
    ({"moe_a2a_dtype": "bf16"}, "--moe-a2a-dtype"),
    ({"moe_a2a_compress": "lsh"}, "--moe-a2a-compress"),
    ({**SHARED, "moe_lsh_hashes": 3}, "--moe-lsh-hashes"),
    ({**SHARED, "moe_router": "topk", "moe_mutual_distillation_weight": 0.1}, "--moe-mutual-distillation"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_contradictions_are_refused(options, message, lm_data, tmp_path):
    with pytest.raises(ValueError) as error:
        call("fairseq-train", lm_data, **{**LM, **options, "save_dir": tmp_path})
    assert message in str(error.value)


def test_a_model_is_used_without_regard_to_the_ranks_that_trained_it(lm_data):
    """As one with fewer experts than ranks, out of ``evomoe merge``."""
    setup = build(lm_data, **{**LM, "moe_experts": 2, "moe_expert_parallel": 4, "moe_spawn_update": 0})
    assert setup.model.decoder.layers[1].moe.experts.local == [0, 1]
    with pytest.raises(ValueError, match="--moe-expert-parallel must be from 1 to the --moe-experts"):
        setup.trainer()


@pytest.mark.parametrize(
    "data, settings, options, message",
    [
        ("lm_data", LM, {"amp": True}, "--amp"),
        ("lm_data", LM, {"zero_sharding": "os"}, "--zero-sharding"),
        ("translation_data", TRANSLATION, {"eval_bleu": True}, "--eval-bleu"),
    ],
)
def test_what_does_not_work_on_ranks_is_refused(data, settings, options, message, request):
    from fairseq_evomoe.training.checks import check_before_trainer

    setup = build(request.getfixturevalue(data), **{**settings, **SHARED, **options})
    setup.cfg.distributed_training.distributed_world_size = 2
    with pytest.raises(ValueError, match=message):
        check_before_trainer(setup.cfg)


@pytest.mark.parametrize("optimizer, refused", [("adafactor", True), ("adam", False)])
def test_optimizers_that_mix_experts_are_refused(optimizer, refused, lm_data):
    from fairseq_evomoe.training.checks import check_optimizer

    trainer = build(lm_data, **{**LM, "optimizer": optimizer, "lr": None}).trainer()
    trainer.cfg.model.moe_expert_parallel = 2
    if refused:
        with pytest.raises(ValueError, match="--optimizer adafactor"):
            check_optimizer(trainer.cfg, trainer.optimizer)
    else:
        assert check_optimizer(trainer.cfg, trainer.optimizer) is None
