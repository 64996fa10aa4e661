"""This package keeps one object on a Trainer, whatever class of somebody else's the Trainer is of."""

import inspect

import pytest
import torch
from fairseq.trainer import Trainer

from fairseq_evomoe.moe.statistics import Collector
from fairseq_evomoe.training.state import RunState
from fairseq_evomoe.training.statistics import commit_statistics
from support.cli import LM, build


class FromScratch(Trainer):
    """A Trainer whose constructor does not call fairseq's, which ours stands in for."""

    def __init__(self, *args):
        inspect.unwrap(Trainer.__init__)(self, *args)


def test_there_is_nothing_else_of_ours_on_a_trainer(lm_data, monkeypatch):
    settings = {**LM, "moe_spawn_update": 2, "moe_router": "stable", "moe_stable_update": 4}
    setup = build(lm_data, **{**settings, "moe_anneal_updates": None, "moe_hard_update": None})
    trainer = setup.train(updates=3)
    assert [name for name in vars(trainer) if "moe" in name] == ["evomoe"]
    assert isinstance(trainer.evomoe, RunState) and trainer.evomoe is RunState.of(trainer)


def test_statistics_are_taken_in_once(lm_data):
    """A method that spawns by how active units are counts that; see ``moe/statistics.py``."""
    trainer = build(lm_data, **{**LM, "moe_spawn_method": "slice", "moe_expert_sizes": "1,2,4,1"}).train(2)
    layer = trainer.get_model().decoder.layers[1].moe
    (collector,) = [module for module in layer.modules() if isinstance(module, Collector)]
    counted = []
    collector.commit = counted.append
    commit_statistics(trainer, updated=True)  # of an update that has been counted
    assert trainer.evomoe.last_counted == 2 and not counted
    trainer.evomoe.last_counted = 1
    commit_statistics(trainer, updated=False)
    assert not counted and trainer.evomoe.last_counted == 1
    collector.add(torch.ones_like(collector.no_sums()))
    commit_statistics(trainer, updated=True)
    assert len(counted) == 1 and counted[0].eq(1).all() and trainer.evomoe.last_counted == 2


def test_a_trainer_that_does_not_call_our_constructor(lm_data):
    setup = build(lm_data, **{**LM, "moe_spawn_update": 1})
    trainer = FromScratch(setup.cfg, setup.task, setup.model, setup.criterion)
    assert not hasattr(trainer, "evomoe")
    trainer.begin_epoch(1)
    for batch in setup.batches()[:2]:
        trainer.train_step([batch])
    assert all(layer.moe.spawned for layer in list(setup.model.decoder.layers)[1:])
    trainer.consolidate_optimizer()
    assert trainer.state_dict()["model"] and isinstance(trainer.evomoe, RunState)


def test_an_update_that_fails_is_over(lm_data, tmp_path):
    setup = build(lm_data, **LM, save_dir=tmp_path)
    trainer = setup.trainer()
    trainer.begin_epoch(1)
    with pytest.raises(KeyError, match="net_input"):
        trainer.train_step([{"id": []}])
    assert (tmp_path / "crash.pt").exists()
    assert not trainer.evomoe.in_update
