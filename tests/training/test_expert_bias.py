"""`--moe-expert-bias none`: trained through a spawn, resumed, made dense, and what is refused."""

import pytest
import torch

from fairseq_evomoe.training.freezing import in_words
from support.cli import LM, build, call, evomoe, parameters
from support.resume import check_resume

NONE = {**LM, "moe_expert_bias": "none"}


def biases(state):
    return {key: x for key, x in state.items() if key.endswith((".experts.b1", ".experts.b2"))}


@pytest.fixture(scope="module")
def whole(lm_data, tmp_path_factory):
    return check_resume(lm_data, tmp_path_factory.mktemp("none"), NONE, stops=[6, 9])


def test_a_run_has_none_before_and_after_the_spawn(whole):
    for update in (3, 9):
        found = biases(parameters(whole.at(update)))
        assert found and not any(x.any() for x in found.values())
    losses = [line["loss"] for line in whole.log("train_inner")]
    assert losses[-1] < losses[0] - 1


def test_nothing_is_said_to_be_frozen(lm_data):
    assert in_words(build(lm_data, **NONE).model) == ""


def test_a_dense_model_of_it_has_biases_of_zero(whole, tmp_path):
    evomoe("densify", whole.last, "--method", "average", "--out", tmp_path / "dense.pt")
    model = torch.load(tmp_path / "dense.pt")["model"]
    moe = [key for key in biases(parameters(whole.last)) if key.endswith("b2")]
    for key in moe:
        layer = key[: -len(".moe.experts.b2")]
        assert not model[f"{layer}.fc1.bias"].any() and not model[f"{layer}.fc2.bias"].any()
        assert model[f"{layer}.fc1.weight"].any()


def test_a_checkpoint_with_biases_is_refused(lm_data, tmp_path):
    call("fairseq-train", lm_data, **{**LM, "max_update": 2, "moe_spawn_update": 1, "save_dir": tmp_path})
    with pytest.raises(Exception, match="--moe-expert-bias none there are none"):
        call("fairseq-train", lm_data, **{**NONE, "finetune_from_model": tmp_path / "checkpoint_last.pt"})
