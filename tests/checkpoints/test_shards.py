"""Checkpoints of two ranks, in one file and in several: any number of ranks can load them."""

import os
import shutil
from unittest import mock

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_evomoe.checkpoints.index import DamagedCheckpoint
from fairseq_evomoe.checkpoints.recovery import newest_whole
from fairseq_evomoe.checkpoints.saved_optimizer import LAYOUT
from support.cli import assert_equal, call, evomoe, run
from support.parallel import RANKS, SENTENCES
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks

pytestmark = pytest.mark.ranks

SETTINGS = {**SENTENCES, "moe_balance_weight": 0.1, "save_interval_updates": 5}
EMA = {"store_ema": True, "ema_fp32": True}
TWO = {**SETTINGS, "moe_expert_parallel": 2}
# update, folder, ranks that share the experts then: before the spawn, in the soft stage, top-1
RESUMED = [
    (5, "whole", 2),
    (10, "whole", 1),
    (10, "whole", 2),
    (10, "sharded", 1),
    (10, "sharded", 2),
    (15, "sharded", 2),
]


def at(folder, update):
    """The checkpoint of an update, of which an epoch of two ranks has seven."""
    return folder / f"checkpoint_{(update - 1) // 7 + 1}_{update}.pt"


@pytest.fixture(scope="module")
def saved(lm_data, tmp_path_factory):
    """Folder of ``whole`` and ``sharded``, which two ranks have trained alike, and of what was resumed."""
    folder = tmp_path_factory.mktemp("saved")
    whole, sharded = folder / "whole", folder / "sharded"
    jobs = [
        [[lm_data], {**TWO, **EMA, "save_dir": whole}],
        [[lm_data], {**TWO, **EMA, "save_dir": sharded, "moe_sharded_checkpoint": True}],
    ]
    few = {**TWO, "save_dir": folder / "few", "moe_sharded_checkpoint": True, "keep_interval_updates": 1}
    jobs.append([[lm_data], {**few, "no_last_checkpoints": True}])
    for update, kind, parallel in RESUMED:
        options = {**SETTINGS, **EMA, "moe_expert_parallel": parallel, "save_interval_updates": 0}
        options["restore_file"] = at(folder / kind, update)
        options["save_dir"] = folder / f"{update}-{kind}-{parallel}"
        jobs.append([[lm_data], options])
    for parallel in (1, 2):
        options = {**SETTINGS, "moe_spawn_update": 0, "moe_expert_parallel": parallel, "max_update": 6}
        options["finetune_from_model"] = at(folder / "whole", 5)
        options["save_dir"] = folder / f"upcycled-{parallel}"
        jobs.append([[lm_data], options])
    train_on_ranks(RANKS, jobs, folder / "jobs")  # one after the other
    return folder


@pytest.fixture
def sharded(saved, tmp_path):
    """A copy of the checkpoints in several files."""
    return shutil.copytree(saved / "sharded", tmp_path / "sharded", dirs_exist_ok=False)


def load(path, ema=True):
    """A checkpoint without what is different in each run."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    tensors = {"model": state["model"]}
    if ema:
        tensors.update({name: state["extra_state"][name] for name in ("ema", "ema_fp32_params")})
    for name, of_model in tensors.items():
        tensors[name] = {k: x for k, x in of_model.items() if not k.endswith("_float_tensor")}
    return {**tensors, "optimizer": state["last_optimizer_state"], "layout": state[LAYOUT]}


def test_several_files_hold_what_one_does(saved):
    assert_equal(load(saved / "sharded" / "checkpoint_last.pt"), load(saved / "whole" / "checkpoint_last.pt"))
    names = {path.name for path in (saved / "sharded").iterdir()}
    assert {"checkpoint_last.pt", "checkpoint_last-experts1.pt"} < names
    assert "checkpoint_1_5-experts1.pt" not in names  # one expert
    parts = [torch.load(saved / "sharded" / name) for name in sorted(names) if "last" in name]
    sizes = [sum(x.numel() for x in part["moe_experts"]["model"].values()) for part in parts]
    assert sizes[0] == sizes[1] > 0


def test_old_checkpoints_are_removed_with_all_their_files(saved):
    names = {path.name for path in (saved / "few").iterdir()}
    assert names == {"checkpoint_3_20.pt", "checkpoint_3_20-experts1.pt"}
    assert load(saved / "few" / "checkpoint_3_20.pt", ema=False)


@pytest.mark.parametrize("update, kind, parallel", RESUMED)
def test_two_ranks_go_on_as_before(update, kind, parallel, saved):
    resumed = load(saved / f"{update}-{kind}-{parallel}" / "checkpoint_last.pt")
    expected = load(saved / "whole" / "checkpoint_last.pt")
    assert largest_difference(resumed["model"], expected["model"]) < 1e-5
    assert largest_difference(resumed["ema"], expected["ema"]) < 1e-5
    for number, statistics in expected["optimizer"]["state"].items():
        assert (
            largest_difference(
                *(
                    {k: torch.as_tensor(x) for k, x in s.items()}
                    for s in (statistics, resumed["optimizer"]["state"][number])
                )
            )
            < 1e-5
        )


def test_one_expert_is_spawned_on_loading(saved):
    every, own = (state_of(saved / f"upcycled-{p}" / "checkpoint_last.pt") for p in (1, 2))
    assert largest_difference(every, own) < 1e-5
    assert every["decoder.layers.1.moe.experts.b2"].shape[0] == 4


@pytest.mark.parametrize("update, kind", [(5, "whole"), (10, "whole"), (15, "sharded")])
def test_one_process_goes_on_as_before(update, kind, saved, lm_data, tmp_path):
    options = {**SETTINGS, **EMA, "restore_file": at(saved / kind, update), "save_dir": tmp_path}
    train_on_all_batches(RANKS, lm_data, **options)
    expected = state_of(saved / "whole" / "checkpoint_last.pt")
    assert largest_difference(state_of(tmp_path / "checkpoint_last.pt"), expected) < 1e-5


def test_one_process_evaluates_them_without_options(saved, lm_data):
    perplexities = []
    for kind in ("whole", "sharded"):
        path = saved / kind / "checkpoint_last.pt"
        result = call("fairseq-eval-lm", lm_data, path=path, cpu=True, tokens_per_sample=64, batch_size=8)
        assert int(result.lines("Evaluated")[0].split("Evaluated")[1].split()[0]) > 100
        perplexities.append(result.lines("Perplexity")[0].split("Loss")[1])
    assert perplexities[0] == perplexities[1]


def test_consolidate_and_reshard(saved, tmp_path, capsys):
    whole, parts, again = (str(tmp_path / name) for name in ("whole.pt", "three.pt", "again.pt"))
    first = str(saved / "sharded" / "checkpoint_last.pt")
    evomoe("consolidate", first, "--out", whole)
    expected = load(saved / "whole" / "checkpoint_last.pt")
    assert_equal(load(whole), expected)
    assert "moe_shards" not in torch.load(whole)
    evomoe("reshard", whole, "--parts", 3, "--out", parts)
    assert capsys.readouterr().out.splitlines()[-3:] == [
        str(tmp_path / name) for name in ("three.pt", "three-experts1.pt", "three-experts2.pt")
    ]
    assert_equal(load(parts), expected)
    evomoe("reshard", parts, "--parts", 2, "--out", again)  # from several files to several others
    assert_equal(load(again), expected)
    assert not any(x.numel() for k, x in torch.load(again)["model"].items() if ".experts.w1" in k)


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("consolidate", ["{whole}", "--out", "{out}"], "has all experts already"),
        ("consolidate", ["{folder}/none.pt", "--out", "{out}"], "There is no checkpoint"),
        ("consolidate", ["{folder}/checkpoint_last-experts1.pt", "--out", "{out}"], "give its first file"),
        ("reshard", ["{whole}", "--parts", "5", "--out", "{out}"], "--parts must be from 2 to the 4 experts"),
        ("reshard", ["{whole}", "--parts", "2", "--out", "{whole}"], "which would be lost"),
        ("reshard", ["{whole}", "--parts", "2", "--out", "{out}x"], "must end in .pt"),
        ("reshard", ["{single}", "--parts", "2", "--out", "{out}"], "one expert"),
    ],
)
def test_mistakes_are_named(command, arguments, message, saved, tmp_path, capsys):
    names = {
        "whole": saved / "whole" / "checkpoint_last.pt",
        "single": at(saved / "whole", 5),
        "folder": saved / "sharded",
        "out": tmp_path / "out.pt",
    }
    with pytest.raises(SystemExit) as exit:
        evomoe(command, *[argument.format(**names) for argument in arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.startswith("evomoe " + command)
    assert not list(tmp_path.iterdir())


def test_the_commands_are_there(saved, tmp_path):
    first, out = saved / "sharded" / "checkpoint_last.pt", tmp_path / "whole.pt"
    result = run("evomoe", "consolidate", first, out=out)
    assert out.exists() and "parameters" in result.output


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "missing": (lambda folder: (folder / "checkpoint_last-experts1.pt").unlink(), "experts1.pt is missing"),
    "truncated": (
        lambda folder: truncate(folder / "checkpoint_last-experts1.pt"),
        "experts1.pt cannot be read",
    ),
    "truncated first file": (
        lambda folder: truncate(folder / "checkpoint_last.pt"),
        "last.pt cannot be read",
    ),
    "mixed up": (
        lambda folder: shutil.copy(
            str(at(folder, 15)).replace(".pt", "-experts1.pt"), folder / "checkpoint_last-experts1.pt"
        ),
        "experts1.pt belongs to another checkpoint (update 15)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(damage, sharded, lm_data):
    harm, message = DAMAGE[damage]
    harm(sharded)
    path = sharded / "checkpoint_last.pt"
    with pytest.raises(DamagedCheckpoint) as error:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert message in str(error.value)
    # in training, a way out is named too
    before = set(sharded.iterdir())
    options = {**SETTINGS, "max_update": 21, "cpu": True, "save_dir": sharded}
    with pytest.raises(DamagedCheckpoint) as error:
        call("fairseq-train", lm_data, **options, restore_file=path)
    assert message in str(error.value)
    assert f"give --restore-file {newest_whole(str(path))}" in str(error.value)
    assert newest_whole(str(path)) in (str(at(sharded, 20)), str(sharded / "checkpoint_best.pt"))
    assert set(sharded.iterdir()) == before


@pytest.mark.parametrize("damage, restarts", [("truncated", "0"), ("truncated first file", "1")])
def test_a_run_that_is_started_again_takes_the_newest_whole_one(damage, restarts, sharded, lm_data):
    """By a user, SLURM or a loop, or by torchrun."""
    DAMAGE[damage][0](sharded)
    with mock.patch.dict(os.environ, TORCHELASTIC_RESTART_COUNT=restarts):
        result = call(
            "fairseq-train", lm_data, **{**SETTINGS, **EMA, "max_update": 21}, cpu=True, save_dir=sharded
        )
    (line,) = result.lines("checkpoint_last.pt is not whole: the run goes on from")
    assert "cannot be read: it is truncated" in line
    assert result.log("train_inner")[0]["num_updates"] == 21


def test_data_go_on_where_they_were(saved, lm_data, tmp_path):
    """fairseq's own position counts the batches of each rank."""
    state = torch.load(at(saved / "whole", 10))
    position = state["extra_state"]["train_iterator"]
    assert position["num_shards"] == 2 and position["iterations_in_epoch"] == 3
    options = {**SETTINGS, **EMA, "max_update": 11, "save_interval_updates": 1}
    call(
        "fairseq-train", lm_data, **options, cpu=True, restore_file=at(saved / "whole", 10), save_dir=tmp_path
    )
    position = torch.load(tmp_path / "checkpoint_last.pt")["extra_state"]["train_iterator"]
    assert position["num_shards"] == 1 and position["iterations_in_epoch"] == 7
