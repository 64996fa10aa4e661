"""What a report reads of logs."""

import json

import numpy as np
import pytest

from fairseq_evomoe.checkpoints.files import CommandError
from fairseq_evomoe.report import curves

START = "2026-01-01 00:00:00 | INFO | "
JSON = START + 'train_inner | {{"epoch": 1, "loss": "{loss}", "moe_phase": "1", "num_updates": "{at}"}}'
SIMPLE = START + (
    "train_inner | epoch 001:     10 / 90 loss={loss}, moe_phase=1, ppl=9.1, num_updates={at}, gnorm=1.5e-2"
)
VALID = {
    JSON: 'valid | {"valid_loss": "5.5", "valid_nll_loss": "5.25", "valid_num_updates": "20"}',
    SIMPLE: "valid | epoch 001 | valid on 'valid' subset | loss 5.5 | nll_loss 5.25 | num_updates 20",
}


@pytest.mark.parametrize("line", [JSON, SIMPLE], ids=["json", "simple"])
def test_both_formats_say_the_same(line, tmp_path):
    log = tmp_path / "log"
    lines = [line.format(loss=7 - at / 10, at=at) for at in (10, 20)]
    spawn = START + "fairseq_evomoe | spawned experts before update 9: 1 -> 4"
    log.write_text("\n".join(["noise", *lines, spawn, START + VALID[line]]))
    found = curves.read([str(log)])
    assert found["update"] == [10, 20] and found["loss"] == [6, 5] and found["moe_phase"] == [1, 1]
    assert found["valid"] == {"update": [20], "loss": [5.25]} and found["spikes"] == []
    assert found["spawns"] == ["spawned experts before update 9: 1 -> 4"]
    if line is SIMPLE:
        assert found["gnorm"] == [0.015, 0.015]


def test_a_run_that_went_on_has_one_curve(tmp_path):
    for name, updates, loss in (("a", (1, 2, 3), 9), ("b", (3, 4), 4)):
        (tmp_path / name).write_text("\n".join(JSON.format(loss=loss, at=at) for at in updates))
    found = curves.read([str(tmp_path / "a"), str(tmp_path / "b")])
    assert found["update"] == [1, 2, 3, 4] and found["loss"] == [9, 9, 4, 4]


def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "log").write_text(json.dumps({"loss": 1}))
    with pytest.raises(CommandError, match="has no lines `train_inner`.*--log-format"):
        curves.read([str(tmp_path / "log")])


def test_jumps_of_the_loss():
    draw = np.random.default_rng(0)
    loss = np.linspace(8, 5, 60) + 0.02 * draw.standard_normal(60)
    assert curves.spikes(loss) == []
    loss[40] += 1
    assert curves.spikes(loss) == [40]
    assert curves.spikes(np.full(30, 2.0)) == [] and curves.spikes(loss[:3]) == []
