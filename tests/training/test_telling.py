"""What the log says of a run's experts: each line once."""

import pytest

from fairseq_evomoe.models.feed_forward import moe_layers
from fairseq_evomoe.models.layers import count_parameters
from fairseq_evomoe.training.telling import parameters_in_the_end
from support.cli import LM, build, call


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_preset": "evomoe_table"},
        {"moe_router": "switch", "moe_shared_expert": True, "moe_spawn_update": 6},
        {"moe_router": "recurrent", "moe_spawn_update": 6},
        {"moe_expert_sizes": "arithmetic", "moe_total_ffn_dim": 192, "moe_freq": 1},
        {"moe_gate_warmup": 4},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "none",
)
def test_parameters_in_the_end_are_those_of_the_spawned_model(options, lm_data):
    model = build(lm_data, **{**LM, **options}).model
    foretold = parameters_in_the_end(model)
    for _, layer in moe_layers(model):
        layer.moe.spawn()
    assert foretold == count_parameters(model)
    assert parameters_in_the_end(model) is None


def test_each_line_is_there_once(lm_data, tmp_path):
    result = call("fairseq-train", lm_data, **LM, save_dir=tmp_path)
    (start,) = result.lines("router dts")
    (spawn,) = result.lines("spawned experts")
    (hard,) = result.lines("from update")
    (end,) = result.lines("the run ends")
    before, after = spawn.split(" experts, ")[1].split(" parameters")[0].split(" -> ")
    assert "1 of 2 layers with 4 experts of 48 hidden units" in start
    assert f"{before} parameters, {after} with all experts; one expert until update 6" in start
    assert hard.endswith("top-1 routing from update 10 on")
    assert end.endswith(f"at update 14: top-1 routing of 4, {after} parameters")


def test_a_resumed_run_says_where_it_is(lm_data, tmp_path):
    call("fairseq-train", lm_data, **{**LM, "max_update": 8}, save_dir=tmp_path)
    result = call("fairseq-train", lm_data, **{**LM, "max_update": 12}, save_dir=tmp_path)
    (start,) = result.lines("router dts")
    assert start.endswith("parameters; dense gate") and "with all experts" not in start
    assert len(result.lines("top-1 routing from update 10 on")) == 1


def test_a_run_that_ends_with_its_epochs_says_so(lm_data, tmp_path):
    options = {**LM, "max_update": None, "max_epoch": 1, "moe_spawn_update": 2, "moe_hard_update": 1}
    result = call("fairseq-train", lm_data, **options, save_dir=tmp_path)
    (end,) = result.lines("the run ends")
    assert f"at update {len(result.log('train_inner'))}:" in end
