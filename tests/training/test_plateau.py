"""Experts that spawn by themselves, at a plateau of the training loss: --moe-spawn-update auto."""

import math
from unittest import mock

import hypothesis
import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from hypothesis import given
from hypothesis import strategies as st

from fairseq_evomoe.config.resolve import resolve
from fairseq_evomoe.evolution.plateau import Plateau
from fairseq_evomoe.models.feed_forward import moe_layers
from fairseq_evomoe.training.growth import watch_loss
from support.cli import LM, MASKED_LM, TRANSLATION, Run, assert_equal, build, call, call_hydra, parameters
from support.evaluation import perplexity
from support.hydra import write_yaml
from support.parallel import SENTENCES, SHARED
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks
from support.refusals import refused
from support.resume import check_resume

WINDOW, SHARE, UPDATES = 5, 0.3, 52
PLATEAU = {"moe_spawn_update": "auto", "moe_spawn_window": WINDOW, "moe_spawn_plateau": SHARE}
AUTO = {**LM, **PLATEAU, "max_update": UPDATES, "lr": 0.02, "disable_validation": True}


def reference(losses, weights=None, rates=None, window=WINDOW, share=SHARE):
    """The update before which the experts spawn, from all losses at once; ``None``: never."""
    weights, rates = weights or [1] * len(losses), rates or [1.0] * len(losses)
    means = []
    for end in range(window, len(losses) + 1, window):
        part = [(x, w) for x, w in zip(losses[end - window : end], weights[end - window : end]) if w > 0]
        part = [(x, w) for x, w in part if math.isfinite(x)]
        if not part:
            continue
        mean = sum(x * w for x, w in part) / sum(w for _, w in part)
        means.append((mean, rates[end - 1]))
        falls = [a[0] - b[0] for a, b in zip(means, means[1:])]
        if len(falls) < 2 or means[-1][1] > means[-2][1]:
            continue
        greatest = max(falls[:-1])
        if greatest > 0 and falls[-1] < share * greatest:
            return end
    return None


def see_all(plateau, losses, weights=None, rates=None):
    """The update at which the plateau is found."""
    weights, rates = weights or [1] * len(losses), rates or [1.0] * len(losses)
    for update, (loss, weight, lr) in enumerate(zip(losses, weights, rates), 1):
        if plateau.see(update, loss, weight, lr):
            assert plateau.spawn_update == update
            return update
    return None


# whole numbers, so that sums are exact in any order
EACH_UPDATE = st.tuples(
    st.one_of(st.integers(0, 40), st.sampled_from([math.nan, math.inf, -math.inf])),
    st.integers(0, 3),
    st.integers(1, 3),
)


@hypothesis.settings(max_examples=300, deadline=None)
@given(
    st.lists(EACH_UPDATE, max_size=60),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.integers(0, 60),
)
def test_the_rule_is_the_slow_one_and_survives_an_interruption(updates, window, share, stop):
    losses, weights, rates = (list(part) for part in zip(*updates)) if updates else ([], [], [])
    expected = reference(losses, weights, rates, window, share)
    plateau = Plateau(window, share)
    found = None
    for update, (loss, weight, lr) in enumerate(updates, 1):
        if update == stop:
            state, plateau = plateau.state(), Plateau(window, share)
            plateau.load(state)
            assert_equal(plateau.state(), state)
            assert not plateau.resume(update - 1, stage=0)
        if plateau.see(update, loss, weight, lr):
            found = update
            break
    assert found == expected == plateau.spawn_update


NOISE = np.random.default_rng(1).normal(0, 0.02, 1000).tolist()
FALLING = [5 + 4 * 0.98**n for n in range(1000)]
CURVES = {
    "falls and ends": (FALLING, (130, 150)),
    "falls and ends, with noise": ([a + b for a, b in zip(FALLING, NOISE)], (100, 180)),
    "falls like a power": ([3 + 5 * (n + 1) ** -0.3 for n in range(1000)], (20, 300)),
    "falls evenly": ([20 - 0.01 * n for n in range(1000)], None),
    "is flat": ([3.0] * 1000, None),
    "rises": ([0.01 * n for n in range(1000)], None),
    "is NaN": ([math.nan] * 1000, None),
    "falls, then is NaN": (FALLING[:60] + [math.nan] * 940, None),
    "falls, with NaN between": ([math.inf if n % 3 == 1 else x for n, x in enumerate(FALLING)], (130, 150)),
}


@pytest.mark.parametrize("curve", CURVES)
def test_curves(curve):
    losses, where = CURVES[curve]
    found = see_all(Plateau(10, 0.1), losses)
    assert found == reference(losses, window=10, share=0.1)
    assert found is None if where is None else where[0] <= found <= where[1]
    # the unit does not matter, nor what the loss falls to
    assert see_all(Plateau(10, 0.1), [8 * x + 64 for x in losses]) == found


def test_a_warm_up_is_no_plateau():
    """As long as the learning rate rises; and not in the first window of the full one, either."""
    rates = [min(n / 200, 1.0) for n in range(1000)]
    losses = [9 + 0.001 * (-1) ** (n // 10) for n in range(200)] + FALLING[:800]
    assert see_all(Plateau(10, 0.1), losses) == 30  # noise is taken for a fall and a plateau
    found = see_all(Plateau(10, 0.1), losses, rates=rates)
    assert 330 <= found <= 350 and found == reference(losses, rates=rates, window=10, share=0.1)


def test_each_update_weighs_its_sample_size():
    plateau = Plateau(2, 0.1)
    see_all(plateau, [1.0, 4.0], [100, 200])
    assert plateau.mean == 3.0


def test_an_update_counts_once(lm_data):
    """With --amp, train_step calls itself; without a loss, as on a TPU, an update has no weight."""
    setup = build(lm_data, **AUTO)
    trainer = setup.train(2)
    plateau = setup.model.plateau
    before = plateau.state()
    watch_loss(trainer, {"sample_size": 128})
    assert_equal(plateau.state(), before)
    assert (plateau.update, plateau.count) == (2, 2) and plateau.weight_sum > 200
    trainer._num_updates = 3
    watch_loss(trainer, {})
    assert (plateau.update, plateau.count) == (3, 3) and plateau.weight_sum == before["plateau.losses"][1]


def test_an_overflow_does_not_count(lm_data):
    setup = build(lm_data, **{**AUTO, "memory_efficient_fp16": True, "fp16_init_scale": 2**30})
    trainer = setup.trainer()
    trainer.begin_epoch(1)
    with mock.patch.object(torch.Tensor, "cuda", lambda self: self):  # trainer.py makes a norm of 0 there
        for batch in setup.batches() * 3:
            trainer.train_step([batch])
    updates, plateau = trainer.get_num_updates(), setup.model.plateau
    assert 0 < updates < 24 and plateau.update == updates
    assert plateau.count + WINDOW * plateau.windows == updates
    assert plateau.state()["plateau.losses"].dtype == torch.float64


def spawn_of(result):
    """The update of the spawn in a log."""
    (line,) = result.lines("spawned experts before update")
    (reason,) = result.lines("spawning before update")
    update = int(line.split("before update ")[1].split(":")[0])
    assert "| INFO |" in reason and f"before update {update}:" in reason
    return update


def reference_of_log(result, **rule):
    log = result.log("train_inner")
    return reference(*([step[key] for step in log] for key in ("loss", "wpb", "lr")), **rule)


RUNS = {
    "slice": {
        "moe_spawn_method": "slice",
        "moe_expert_sizes": "1,2,4,1",
        "store_ema": True,
        "ema_fp32": True,
    },
    "update-freq, stable": {
        "update_freq": 3,
        "batch_size": 3,
        "moe_router": "stable",
        "moe_anneal_updates": None,
        "moe_hard_update": None,
        "lr_scheduler": "inverse_sqrt",
        "warmup_updates": 6,
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_spawns_where_its_losses_say_and_resumes(name, lm_data, tmp_path):
    options = {**AUTO, **RUNS[name]}
    saving = {**options, "save_dir": tmp_path / "whole", "save_interval_updates": 1}
    result = call("fairseq-train", lm_data, **saving)
    update = spawn_of(result)
    assert update == reference_of_log(result) and 3 * WINDOW <= update < UPDATES // 2
    last = 4 if name == "slice" else (UPDATES - update) // 10
    phases = [int(step["moe_phase"]) for step in result.log("train_inner")]
    assert phases == [0] * update + [1] * last + [2] * (UPDATES - update - last)

    # none of them is the end of an epoch, where nothing is saved
    whole = Run(tmp_path / "whole", result)
    check_resume(lm_data, tmp_path, options, (3, update - 1, update, update + 2), whole)
    assert parameters(whole.at(update - 1))["plateau.updates"].tolist()[:2] == [-1, update - 1]
    for path in (whole.at(update), whole.last):
        assert parameters(path)["plateau.updates"].tolist()[:2] == [update, update]
    if name == "slice":
        ema = torch.load(path)["extra_state"]["ema"]
        assert_equal(ema["plateau.updates"], parameters(path)["plateau.updates"])


def test_without_a_plateau_they_spawn_half_way(lm_data, tmp_path):
    settings = {**AUTO, "moe_spawn_window": None, "max_update": 18}
    assert build(lm_data, **settings).model.plateau.window == 10
    saving = {**settings, "save_dir": tmp_path / "whole", "save_interval_updates": 1}
    result = call("fairseq-train", lm_data, **saving)
    assert spawn_of(result) == 9
    assert result.lines("spawning before update 9: the training loss has reached no plateau")
    check_resume(lm_data, tmp_path, settings, (8, 9, 10), Run(tmp_path / "whole", result))


@pytest.mark.parametrize("updates, window", [(0, 500), (100, 10), (800, 20), (839, 20), (100000, 2500)])
def test_the_usual_window(updates, window, lm_data):
    setup = build(lm_data, **{**AUTO, "moe_spawn_window": None, "max_update": updates})
    assert setup.model.plateau.window == window
    (layer,) = (layer for _, layer in moe_layers(setup.model))
    assert layer.schedule.spawn_update == (updates // 2 or math.inf) and not layer.moe.spawned


def test_without_max_update_there_is_a_warning(lm_data, caplog):
    build(lm_data, **{**AUTO, "max_update": 0, "max_epoch": 2}).trainer()
    assert "nothing limits how long --moe-spawn-update auto waits" in caplog.text


@pytest.fixture(scope="module")
def run(lm_data, tmp_path_factory):
    """Settings, folder and update of the spawn of a run whose anneal does not end."""
    folder = tmp_path_factory.mktemp("auto")
    settings = {**AUTO, "moe_anneal_updates": 60, "moe_hard_update": -1, "save_interval_updates": 5}
    result = call("fairseq-train", lm_data, **settings, save_dir=folder)
    return settings, folder, spawn_of(result)


def test_evaluation_knows_when_they_spawned(run, lm_data):
    settings, folder, update = run
    overrides = {"moe_eval_routing": "adaptive"}
    path = folder / "checkpoint_last.pt"
    (model,), _ = checkpoint_utils.load_model_ensemble([str(path)], arg_overrides=overrides)
    (layer,) = (layer for _, layer in moe_layers(model))
    assert layer.context.temperature == pytest.approx(2.0 - 1.5 * (UPDATES - update) / 60)
    found, same = (
        perplexity(lm_data, path, model_overrides=repr({**overrides, **each}))
        for each in ({}, {"moe_spawn_update": update})
    )
    assert found == same


def loaded(data, settings, path, **reset):
    trainer = build(data, **settings).trainer()
    trainer.load_checkpoint(str(path), **reset)
    (layer,) = (layer for _, layer in moe_layers(trainer.get_model()))
    return trainer, trainer.get_model().plateau, layer


RESET = {"reset_optimizer": True, "reset_lr_scheduler": True, "reset_meters": True}


def test_loading_with_the_counter_reset(run, lm_data, caplog):
    settings, folder, update = run
    _, plateau, layer = loaded(lm_data, settings, folder / "checkpoint_last.pt")
    assert plateau.spawn_update == layer.schedule.spawn_update == update and layer.moe.spawned
    assert not caplog.records or "already" not in caplog.text
    # what has spawned goes on as if it had at the start
    trainer, plateau, layer = loaded(lm_data, settings, folder / "checkpoint_last.pt", **RESET)
    assert plateau.spawn_update == layer.schedule.spawn_update == 0 and trainer.get_num_updates() == 0
    assert "the checkpoint's experts have spawned already" in caplog.text
    # what has not, even if it was to in a moment, waits for a plateau of its own
    for stop in (update - 5, update):
        (path,) = folder.glob(f"checkpoint_?_{stop}.pt")
        _, plateau, layer = loaded(lm_data, settings, path, **RESET)
        assert plateau == Plateau(WINDOW, SHARE) and not layer.moe.spawned
        assert layer.schedule.spawn_update == UPDATES // 2
        _, plateau, _ = loaded(lm_data, settings, path)
        assert (plateau.update, plateau.spawn_update) == (stop, update if stop == update else None)


def test_loading_into_a_model_that_spawns_otherwise(run, lm_data, caplog):
    settings, folder, update = run
    fixed = {**settings, "moe_spawn_update": update}
    auto, plain = (build(lm_data, **each).model for each in (settings, fixed))
    plain.load_state_dict(parameters(folder / "checkpoint_last.pt"))  # strictly
    assert not set(Plateau.KEYS) & plain.state_dict().keys()
    auto.load_state_dict(plain.state_dict())
    assert auto.plateau.resume(7, stage=1) and auto.plateau.spawn_update == 0


@pytest.mark.parametrize("task", [LM, TRANSLATION, MASKED_LM], ids=lambda each: each["task"])
def test_keys_of_the_state(task, request):
    data = request.getfixturevalue("translation_data" if task is TRANSLATION else "lm_data")
    fixed, auto = (build(data, **{**task, **options}).model for options in ({}, PLATEAU))
    assert fixed.plateau is None
    assert list(auto.state_dict()) == [*Plateau.KEYS, *fixed.state_dict()]
    copy = build(data, **{**task, **PLATEAU}).model
    see_all(auto.plateau, [3.0, 2.0, 1.0])
    copy.load_state_dict(auto.state_dict())
    assert copy.plateau == auto.plateau != build(data, **{**task, **PLATEAU}).model.plateau


def test_one_expert_never_spawns(lm_data):
    model = build(lm_data, **{**LM, **PLATEAU, "moe_experts": 1}).model
    assert model.plateau is None and list(model.state_dict()) == list(
        build(lm_data, **{**LM, "moe_experts": 1}).model.state_dict()
    )


@pytest.mark.parametrize("given, expected", [("100", 100), (100, 100), (0, 0), ("auto", "auto")])
def test_a_number_in_a_word_is_a_number(given, expected):
    found = resolve({"spawn_update": given}).schedule.spawn_update
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "changes, parts",
    [
        *(
            (
                {"moe_spawn_update": value},
                ["--moe-spawn-update must be ", "at least 0", "auto", "is " + value],
            )
            for value in ("soon", "-3", "1.5", "AUTO")
        ),
        ({"moe_spawn_window": 0}, ["--moe-spawn-window must be at least 1, but is 0"]),
        ({"moe_spawn_plateau": 1.0}, ["--moe-spawn-plateau must be at least 0 and less than 1, but is 1.0"]),
        ({"moe_spawn_plateau": -0.1}, ["--moe-spawn-plateau", "-0.1"]),
        (
            {"moe_router": "stable", "moe_stable_update": 25},
            ["--moe-stable-update (25) may be before the spawn", "half of --max-update (52;"],
        ),
        (
            {"moe_router": "stable", "moe_stable_update": 999, "max_update": 0},
            ["--moe-stable-update (999)", "give --max-update"],
        ),
    ],
)
def test_bad_values_are_refused(changes, parts, lm_data):
    with pytest.raises(ValueError) as error:
        build(lm_data, **{**AUTO, **changes})
    refused(error, *parts)


def test_a_later_stable_update_is_taken(lm_data):
    model = build(lm_data, **{**AUTO, "moe_router": "stable", "moe_stable_update": 30}).model
    model.plateau.spawned = [20]
    model.count_from_spawn()
    (layer,) = (layer for _, layer in moe_layers(model))
    assert [layer.schedule.phase(n, 1).name for n in (20, 29, 30)] == ["SOFT", "SOFT", "HARD"]


def test_idle_options_are_named(lm_data, caplog):
    build(lm_data, **{**LM, "moe_spawn_window": 5}).trainer()
    assert "no effect without --moe-spawn-update auto: --moe-spawn-window" in caplog.text


def test_yaml(lm_data, tmp_path):
    options = {**AUTO, "max_update": 25}
    call("fairseq-train", lm_data, save_dir=tmp_path / "flags", **options)
    write_yaml(tmp_path / "train.yaml", lm_data, {**options, "save_dir": str(tmp_path / "yaml")})
    result = call_hydra(tmp_path / "train.yaml")
    assert spawn_of(result) == 12
    flags, yaml = (parameters(tmp_path / name / "checkpoint_last.pt") for name in ("flags", "yaml"))
    assert_equal(flags, yaml)


@pytest.mark.ranks
def test_ranks_decide_as_one_process_does(lm_data, tmp_path):
    """Sentences of very different lengths, and at the end of an epoch one rank without any."""
    options = {**SENTENCES, **PLATEAU, "moe_spawn_plateau": 0.8, "max_update": 40}
    shared = {**options, **SHARED, "moe_sharded_checkpoint": True, "moe_spawn_method": "slice"}
    jobs = {
        "each": options,
        "shared": {**shared, "save_interval_updates": 13},
        "resumed": {**shared, "restore_file": tmp_path / "shared/checkpoint_2_13.pt"},
    }
    listed = [[[lm_data], {**job, "save_dir": tmp_path / name}] for name, job in jobs.items()]
    results = train_on_ranks(2, listed, tmp_path)
    one = train_on_all_batches(2, lm_data, **options, save_dir=tmp_path / "one")
    update = spawn_of(one)
    assert 13 < update == reference_of_log(one, share=0.8) < 20
    assert [spawn_of(result) for result in results] == [update] * 3
    assert len(results[2].log("train_inner")) == 40 - 13
    states = {name: state_of(tmp_path / name / "checkpoint_last.pt") for name in ["one", "each"]}
    assert largest_difference(states["one"], states["each"]) < 1e-5
    whole, resumed = (
        checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / name / "checkpoint_last.pt"))["model"]
        for name in ("shared", "resumed")
    )
    whole, resumed = ({k: x for k, x in each.items() if "_float_" not in k} for each in (whole, resumed))
    assert_equal(whole, resumed)
