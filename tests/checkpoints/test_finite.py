"""NaN that gradients never show is not saved over the last good checkpoint."""

import copy

import pytest
import torch

from fairseq_evomoe.checkpoints.finite import not_finite
from fairseq_evomoe.checkpoints.saved_optimizer import LAYOUT
from fairseq_evomoe.checkpoints.saving import CannotSave
from support.cli import LM, build, call
from support.optimizers import OPTIMIZERS

KEY = "decoder.layers.1.moe.experts.w1"
SMALL = {**LM, "moe_spawn_update": 0, "max_update": 2}


@pytest.fixture(scope="module")
def state(lm_data):
    """A checkpoint's state after two updates, with everything that one can have."""
    return saved(build(lm_data, **SMALL, store_ema=True, ema_fp32=True, cpu=True))


def saved(setup):
    """What fairseq would save after two updates."""
    trainer = setup.train(2)
    trainer.consolidate_optimizer()
    return trainer.state_dict()


def number_of(state, key):
    return state[LAYOUT]["keys"].index(key)


def statistic(state, name):
    return state["last_optimizer_state"]["state"][number_of(state, KEY)][name]


PLACES = {
    KEY: lambda state: state["model"][KEY],
    f"{KEY} of the EMA": lambda state: state["extra_state"]["ema_fp32_params"][KEY],
    f"exp_avg of {KEY}": lambda state: state["last_optimizer_state"]["state"][number_of(state, KEY)][
        "exp_avg"
    ],
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", PLACES)
def test_what_has_it_is_named(name, value, state):
    state = copy.deepcopy(state)
    assert not_finite(state) is None
    PLACES[name](state).view(-1)[7] = value
    assert not_finite(state) == name


def test_large_numbers_and_buffers_are_no_reason(state):
    state = copy.deepcopy(state)
    state["model"][KEY].fill_(3e38)  # whose sum is Inf
    state["model"]["decoder.embed_positions._float_tensor"] = torch.full((1,), float("nan"))
    assert not_finite(state) is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_has_any_by_design(optimizer, lm_data):
    settings = {**SMALL, **OPTIMIZERS[optimizer], "optimizer": optimizer}
    assert not_finite(saved(build(lm_data, **settings, cpu=True))) is None


def test_the_last_good_checkpoint_stays(lm_data, tmp_path):
    settings = {**SMALL, "save_dir": tmp_path, "save_interval_updates": 1}
    call("fairseq-train", lm_data, **settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    last = torch.load(tmp_path / "checkpoint_last.pt")
    statistic(last, "exp_avg_sq").view(-1)[3] = float("inf")  # its weight makes no step, which shows nowhere
    torch.save(last, tmp_path / "broken.pt")
    broken = {**settings, "max_update": 3, "restore_file": tmp_path / "broken.pt"}
    with pytest.raises(CannotSave) as error:
        call("fairseq-train", lm_data, **broken)
    assert f"exp_avg_sq of {KEY} has NaN or Inf" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "broken.pt").unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
