"""In a decoder nothing depends on later tokens, whatever the router, its limits and the stage of training."""

import pytest
import torch

from fairseq_evomoe.config.errors import ConfigError
from fairseq_evomoe.models.feed_forward import moe_layers
from fairseq_evomoe.moe import ROUTERS, record
from support.cli import LM, MASKED_LM, TRANSLATION, build
from support.models import make_model
from support.refusals import refused

# In training BASE assigns all tokens of a batch together, as published; in evaluation it does not.
NOT_IN_TRAINING = {"base"}
LIMIT = {"moe_capacity_factor": 1.0}
CASES = [
    pytest.param(router, options, id=" ".join([router, *options]))
    for router, cls in ROUTERS.items()
    if not cls.needs_whole_sequence
    for options in ({}, LIMIT)
    if not options or "capacity_factor" in cls.Options.declared()
]
STAGES = [0, 1000]
"""Updates in the first and in the last stage after the spawn."""


def outputs(model, tokens, update):
    """What the model says of each token, and how many pairs were dropped."""
    model.set_num_updates(update)
    for _, layer in moe_layers(model):
        layer.begin_update()  # and has the same noise again
    with torch.no_grad(), record() as routings:
        return model(tokens)[0].flatten(0, 1), sum(int(routing.dropped) for routing in routings.values())


def changes_before_the_last(model, update):
    """Whether what is said before the last token depends on what that is; and whether pairs were dropped."""
    torch.manual_seed(0)
    tokens = torch.randint(4, 20, (4, 16))
    whole, dropped = outputs(model, tokens, update)
    changed = False
    for token in range(4, 20, 2):
        tokens[-1, -1] = token
        found, _ = outputs(model, tokens, update)
        changed |= not torch.equal(found[:-1], whole[:-1])
    assert not torch.equal(found[-1], whole[-1])
    return changed, dropped


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("router, options", CASES)
def test_a_later_token_changes_nothing(request, router, options, training):
    if router == "stable":
        options = {**options, "moe_stable_update": 1}
    setup = make_model(request, LM, moe_router=router, **options)
    for update in STAGES:
        changed, dropped = changes_before_the_last(setup.model.train(training), update)
        assert changed == (training and router in NOT_IN_TRAINING)
        assert (dropped > 0) == (training and "moe_capacity_factor" in options)


@pytest.mark.parametrize("router", [name for name, cls in ROUTERS.items() if cls.needs_whole_sequence])
@pytest.mark.parametrize("settings", [LM, TRANSLATION], ids=["lm", "translation"])
def test_what_mixes_a_whole_sequence_is_refused_in_a_decoder(request, router, settings):
    with pytest.raises(ConfigError, match="a decoder must not see"):
        make_model(request, settings, moe_router=router)


@pytest.mark.parametrize("router", ["switch", "topk", "stable"])
@pytest.mark.parametrize("settings", [LM, TRANSLATION], ids=["lm", "translation"])
def test_a_limit_in_evaluation_is_refused_in_a_decoder(request, router, settings):
    options = {"moe_stable_update": 1} if router == "stable" else {}
    with pytest.raises(ConfigError) as error:
        make_model(request, settings, moe_router=router, moe_eval_capacity_factor=1.0, **options)
    refused(error, "--moe-eval-capacity-factor", "decoder")


@pytest.mark.parametrize("factor, drops", [(0, False), (0.5, True)])
def test_an_encoder_drops_in_evaluation_what_it_is_told_to(lm_data, factor, drops):
    options = {"moe_spawn_update": 0, "moe_anneal_updates": 5000, "moe_hard_update": None, "moe_freq": 1}
    options.update(moe_router="switch", moe_capacity_factor=0.5, moe_eval_capacity_factor=factor)
    model = build(lm_data, **{**MASKED_LM, **options}).model.eval()
    with torch.no_grad(), record() as routings:
        model(torch.randint(4, 20, (4, 10)))
    assert any(int(routing.dropped) > 0 for routing in routings.values()) == drops
