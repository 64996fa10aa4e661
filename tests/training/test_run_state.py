"""This package keeps one object on a Trainer, whatever class of somebody else's the Trainer is of."""

import pytest
from fairseq.trainer import Trainer

from fairseq_evomoe.training.state import RunState
from support.cli import LM, build


class FromScratch(Trainer):
    """A Trainer that fairseq's constructor, and so ours, is not asked for."""

    def __init__(self, other):
        vars(self).update({name: value for name, value in vars(other).items() if name != "evomoe"})


def test_there_is_nothing_else_of_ours_on_a_trainer(lm_data, monkeypatch):
    settings = {**LM, "moe_spawn_update": 2, "moe_router": "stable", "moe_stable_update": 4}
    setup = build(lm_data, **{**settings, "moe_anneal_updates": None, "moe_hard_update": None})
    trainer = setup.train(updates=3)
    assert [name for name in vars(trainer) if "moe" in name] == ["evomoe"]
    assert isinstance(trainer.evomoe, RunState) and trainer.evomoe is RunState.of(trainer)


def test_statistics_are_taken_in_once(lm_data):
    settings = {**LM, "moe_spawn_method": "split", "moe_spawn_strength": None}
    trainer = build(lm_data, **settings).train(updates=2)
    assert trainer.evomoe.last_counted == 2 and not trainer.evomoe.in_update


def test_a_trainer_that_does_not_call_our_constructor(lm_data):
    setup = build(lm_data, **{**LM, "moe_spawn_update": 1})
    trainer = FromScratch(setup.trainer())
    trainer.begin_epoch(1)
    for batch in setup.batches()[:2]:
        trainer.train_step([batch])
    assert all(layer.moe.spawned for layer in list(setup.model.decoder.layers)[1:])
    assert trainer.state_dict()["model"] and isinstance(trainer.evomoe, RunState)


def test_an_update_that_fails_is_over(lm_data):
    setup = build(lm_data, **LM)
    trainer = setup.trainer()
    trainer.begin_epoch(1)
    with pytest.raises(KeyError, match="net_input"):
        trainer.train_step([{}, {"id": []}][1:])
    assert not trainer.evomoe.in_update
