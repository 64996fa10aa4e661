"""A run that is interrupted and resumed is, bit for bit, the run that is not."""

import torch

from support.cli import assert_equal, call, parameters


def check_resume(data, folder, settings, stops):
    """Resuming from each of some updates ends where the uninterrupted run ends."""
    settings = {"save_interval_updates": 3, **settings}
    call("fairseq-train", data, save_dir=folder / "whole", **settings)
    saved = {int(path.stem.split("_")[2]): path for path in (folder / "whole").glob("checkpoint_?_*.pt")}
    whole = torch.load(folder / "whole/checkpoint_last.pt")
    for stop in stops:
        restarted = folder / f"from{stop}"
        result = call("fairseq-train", data, save_dir=restarted, restore_file=saved[stop], **settings)
        assert [step["num_updates"] for step in result.log("train_inner")][0] == stop + 1
        assert_equal(*(parameters(path / "checkpoint_last.pt") for path in (restarted, folder / "whole")))
        resumed = torch.load(restarted / "checkpoint_last.pt")
        assert_equal(resumed["last_optimizer_state"], whole["last_optimizer_state"])
        ours, theirs = (each["optimizer_history"][-1] for each in (resumed, whole))
        assert ours["num_updates"] == theirs["num_updates"] == settings["max_update"]
        assert_equal(ours["lr_scheduler_state"], theirs["lr_scheduler_state"])
        for key in ("ema", "ema_fp32_params"):
            assert_equal(resumed["extra_state"].get(key), whole["extra_state"].get(key))
    return saved
