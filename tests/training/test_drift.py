"""How many tokens are sent elsewhere than they once were: against models that are loaded and asked."""

import pytest
import torch

from fairseq_evomoe.moe import record
from fairseq_evomoe.moe.routing import Routing
from fairseq_evomoe.training.drift import TOKENS, Drift
from fairseq_evomoe.training.probe import first_choices
from support.cli import LM, MASKED_LM, TRANSLATION, Run, assert_equal, build, call, parameters
from support.rank_jobs import patched
from support.resume import check_resume
from support.tasks import DATA

SPAWN, LAST = 3, 12
LEARNED = {"moe_router": "topk", "moe_freq": 1, "moe_spawn_update": SPAWN, "max_update": LAST, "lr": 0.05}
SETTINGS = {**LM, **LEARNED, "moe_anneal_updates": None, "moe_hard_update": None, "disable_validation": True}


def drifts(run):
    """Update and both numbers of each line of the log that has them."""
    lines = [line for line in run.log("train_inner") if "moe_drift" in line]
    return {int(line["num_updates"]): (line["moe_drift"], line["moe_drift_recent"]) for line in lines}


@pytest.fixture(scope="module")
def trained(lm_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drift")
    settings = {**SETTINGS, "save_interval_updates": 1}
    return Run(folder, call("fairseq-train", lm_data, save_dir=folder, **settings))


def asked(setup, tokens, state):
    """The expert with the greatest weight of each token, layer by layer, found one token at a time."""
    setup.model.load_state_dict(state)
    with torch.no_grad(), record() as routings:
        setup.model.eval()(tokens, src_lengths=None)
    found = []
    for routing in routings.values():
        pairs = list(zip(*(x.tolist() for x in (routing.token_N, routing.expert_N, routing.weight_N))))
        for t in range(routing.tokens):
            found.append(max((weight, -expert) for token, expert, weight in pairs if token == t)[1])
    return found


def test_it_is_what_models_of_the_checkpoints_do(trained, lm_data):
    """The start is after the spawn and before the update that follows, of which there is no checkpoint."""
    setup = build(lm_data, **SETTINGS)
    probe = torch.load(trained.at(LAST))["extra_state"][Drift.KEY]["probe"]
    assert torch.equal(probe["src_tokens"], setup.batches()[0]["net_input"]["src_tokens"])
    assert probe["src_tokens"].numel() <= TOKENS
    logged = drifts(trained)
    assert sorted(logged) == list(range(SPAWN + 2, LAST + 1))  # before the update of each line
    saved = {int(path.stem.split("_")[-1]): path for path in trained.folder.glob("checkpoint_*_*.pt")}
    experts = {
        n: asked(setup, probe["src_tokens"], parameters(path)) for n, path in saved.items() if n > SPAWN
    }
    kept = torch.load(trained.at(LAST))["extra_state"][Drift.KEY]
    start = [-e for e in kept["start_LT"].flatten().tolist()]
    experts[SPAWN] = start
    checked = [n for n in logged if {n - 1, n - 2} <= experts.keys()]  # at an epoch's end there is none
    for update, (total, recent) in [(n, logged[n]) for n in checked]:
        now, before = experts[update - 1], experts[update - 2]
        count = len(now)
        assert total == pytest.approx(sum(a != b for a, b in zip(start, now)) / count, abs=1e-4)
        assert recent == pytest.approx(sum(a != b for a, b in zip(before, now)) / count, abs=1e-4)
    assert len(checked) > 3 and max(total for total, _ in logged.values()) > 0.05


@pytest.mark.parametrize("options", [{}, {"moe_hashes": 2}], ids=str)
def test_a_hash_does_not_drift(options, lm_data, tmp_path):
    settings = {**SETTINGS, "moe_router": "hash", **options, "max_update": 8}
    run = Run(tmp_path, call("fairseq-train", lm_data, save_dir=tmp_path, **settings))
    assert set(drifts(run).values()) == {(0.0, 0.0)}


def test_a_resumed_run_logs_what_the_run_would_have(trained, lm_data, tmp_path):
    """From a moment right before a probe, and from one between two."""
    check_resume(lm_data, tmp_path, SETTINGS, (SPAWN, SPAWN + 1, 9), trained)
    expected = torch.load(trained.last)["extra_state"][Drift.KEY]
    for stop in (SPAWN, SPAWN + 1, 9):
        state = torch.load(tmp_path / f"from{stop}" / "checkpoint_last.pt")["extra_state"][Drift.KEY]
        assert_equal(state, expected)


@pytest.mark.parametrize("option", ["finetune_from_model", "restore_file"])
def test_another_run_begins_anew(option, trained, lm_data, tmp_path):
    reset = {"reset_optimizer": True, "reset_dataloader": True, "reset_meters": True}
    settings = {**SETTINGS, option: trained.last, "moe_spawn_update": 0, "max_update": 2}
    settings.update(reset if option == "restore_file" else {})
    call("fairseq-train", lm_data, save_dir=tmp_path, **settings)
    state = torch.load(tmp_path / "checkpoint_last.pt")["extra_state"][Drift.KEY]
    assert (state["begun"], state["probed"]) == (0, 1)


@pytest.mark.parametrize("settings", [MASKED_LM, TRANSLATION], ids=lambda settings: settings["task"])
def test_other_tasks(settings, tmp_path, request):
    data = request.getfixturevalue(DATA[settings["task"]])
    options = {name: value for name, value in SETTINGS.items() if SETTINGS[name] != LM.get(name)}
    run = Run(tmp_path, call("fairseq-train", data, save_dir=tmp_path, **{**settings, **options}))
    logged = drifts(run)
    assert len(logged) == LAST - SPAWN - 1 and max(logged.values()) > (0, 0)
    kept = torch.load(run.last)["extra_state"][Drift.KEY]
    rows, length = kept["probe"]["src_tokens"].shape
    assert rows * length <= TOKENS
    layers = 4 if settings is TRANSLATION else 2
    assert len(kept["start_LT"]) == layers


def test_mixtures_of_tokens_have_no_experts(lm_data, tmp_path):
    settings = {**MASKED_LM, "moe_router": "soft", "moe_spawn_update": 0, "max_update": 3}
    settings.update(moe_anneal_updates=None, moe_hard_update=None, disable_validation=True)
    run = Run(tmp_path, call("fairseq-train", lm_data, save_dir=tmp_path, **settings))
    assert set(drifts(run).values()) == {(0.0, 0.0)}


def test_experts_that_come_or_go_begin_anew(lm_data, tmp_path):
    """DynMoE's expert numbers mean something else afterwards."""
    settings = {**SETTINGS, "moe_router": "dynmoe", "moe_spawn_update": 0, "moe_dynmoe_window": 4}
    with patched({"keep_one_expert": True}):
        result = call("fairseq-train", lm_data, save_dir=tmp_path, **{**settings, "max_update": 6})
    assert result.lines("changed experts before update 4")
    kept = torch.load(tmp_path / "checkpoint_last.pt")["extra_state"][Drift.KEY]
    assert (kept["begun"], kept["probed"], kept["experts"]) == (4, 1, [1, 1])


def test_the_expert_with_the_greatest_weight_and_the_first_of_several():
    routing = Routing(
        token_N=torch.tensor([0, 0, 1, 1, 3]),
        expert_N=torch.tensor([2, 1, 2, 0, 1]),
        weight_N=torch.tensor([0.2, 0.8, 0.5, 0.5, 0.0]),
        tokens=4,
        experts=3,
    )
    weight_T, expert_T = first_choices(routing)
    assert expert_T.tolist() == [1, 0, -1, 1] and weight_T[2] == -1
    nothing = torch.zeros(0, dtype=torch.long)
    assert first_choices(Routing(nothing, nothing, torch.zeros(0), 0, 3))[1].tolist() == []


def test_what_has_no_tokens_is_no_probe():
    for batch in ("DUMMY", None, {}, {"net_input": {"source": torch.zeros(2, 3)}}):
        drift = Drift()
        drift.see_batch(batch)
        assert drift.probe is None and drift.state() == {}
    tokens = torch.zeros(3, 2 * TOKENS, dtype=torch.long)
    drift.see_batch({"net_input": {"src_tokens": tokens, "src_lengths": tokens[:, 0], "more": None}})
    assert drift.probe["src_tokens"].shape == (1, 2 * TOKENS) and drift.probe["src_lengths"].shape == (1,)
