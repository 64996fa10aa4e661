"""A run that is interrupted and resumed is, bit for bit, the run that is not."""

import torch

from support.cli import Run, assert_equal, call, parameters


def check_resume(data, folder, settings, stops, whole=None):
    """Resuming from each of some updates ends where the uninterrupted run ends.

    The interrupted runs save nothing on their way, which must not matter either.

    Args:
        whole: the uninterrupted run, which is trained if it is not given.

    Returns:
        The uninterrupted run, which has a checkpoint of each third update unless the settings say otherwise.
    """
    if whole is None:
        saving = {"save_interval_updates": 3, **settings, "save_dir": folder / "whole"}
        whole = Run(folder / "whole", call("fairseq-train", data, **saving))
    expected = torch.load(whole.last)
    settings = {**settings, "save_interval_updates": 0}
    for stop in stops:
        restarted = folder / f"from{stop}"
        result = call("fairseq-train", data, save_dir=restarted, restore_file=whole.at(stop), **settings)
        assert result.log("train_inner")[0]["num_updates"] == stop + 1
        assert_equal(parameters(restarted / "checkpoint_last.pt"), parameters(whole.last))
        resumed = torch.load(restarted / "checkpoint_last.pt")
        assert_equal(resumed["last_optimizer_state"], expected["last_optimizer_state"])
        ours, theirs = (each["optimizer_history"][-1] for each in (resumed, expected))
        assert ours["num_updates"] == theirs["num_updates"] == settings["max_update"]
        assert_equal(ours["lr_scheduler_state"], theirs["lr_scheduler_state"])
        for key in ("ema", "ema_fp32_params"):
            assert_equal(resumed["extra_state"].get(key), expected["extra_state"].get(key))
    return whole
