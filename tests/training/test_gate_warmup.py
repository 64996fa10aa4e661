"""--moe-gate-warmup: the gate learns before the spawn, and nothing else knows of it."""

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.config.resolve import resolve
from support.cli import LM, assert_equal, build
from support.parallel import SENTENCES, SHARED
from support.rank_jobs import largest_difference, state_of, train_on_all_batches, train_on_ranks
from support.stages import check_that_it_goes_on, layer_of

WARM = {**LM, "moe_gate_warmup": 3, "moe_gate_input": "both", "moe_spawn_update": 4}


def test_the_gate_alone_learns_and_a_resumed_run_goes_on(lm_data, tmp_path):
    setup = build(lm_data, **WARM, store_ema=True, ema_decay=0.5)
    trainer = setup.train(updates=3)
    plain = build(lm_data, **{**WARM, "moe_gate_warmup": 0}).train(updates=3)
    moe, state = layer_of(trainer), trainer.get_model().state_dict()
    assert moe.warmup.updates == 2  # before the second and the third
    others = {key: x for key, x in state.items() if ".warmup." not in key}
    assert_equal(others, dict(plain.get_model().state_dict()))
    check_that_it_goes_on(setup, trainer, tmp_path, setup.batches()[3:4])
    assert moe.warmup.updates == 3
    learned = moe.warmup.gate_K.clone()
    drawn = torch.nn.utils.parameters_to_vector(moe.make_router({}).parameters())
    assert not torch.equal(learned, drawn)
    check_that_it_goes_on(setup, trainer, tmp_path, setup.batches()[4:6])
    after = torch.nn.utils.parameters_to_vector(moe.router.parameters())
    assert moe.warmup is None and 0 < (after - learned).abs().max() <= 2.1 * LM["lr"]  # two steps of Adam


@pytest.mark.ranks
def test_two_ranks_are_one_process(lm_data, tmp_path):
    options = {**SENTENCES, "moe_gate_warmup": 4, "moe_spawn_update": 6, "max_update": 8}
    train_on_ranks(
        2, [[[lm_data], {**options, **SHARED, "save_dir": tmp_path / "two", "ranks": 2}]], tmp_path
    )
    train_on_all_batches(2, lm_data, **options, save_dir=tmp_path / "one")
    two, one = (state_of(tmp_path / name / "checkpoint_last.pt") for name in ("two", "one"))
    assert largest_difference(two, one) < 1e-5


@pytest.mark.parametrize(
    "options, text",
    [
        ({"router": "hash", "spawn_update": 50}, "--moe-router hash has not: leave it out"),
        ({"spawn_update": "auto"}, "counts back from the spawn, which nobody knows before"),
        ({"spawn_method": "split"}, "--moe-spawn-method split would make anew: leave one of them out"),
    ],
)
def test_what_it_does_not_go_with(options, text):
    with pytest.raises(ConfigError) as error:
        resolve({"gate_warmup": "5%", **options}, max_update=1000, ffn_dims=[64])
    assert error.value.option == "gate_warmup" and text in str(error.value)
