"""A trainer that grows, and one that goes on from its checkpoint."""

from fairseq.trainer import Trainer

from fairseq_evomoe.moe import MoELayer
from support.cli import assert_equal


def layer_of(trainer):
    """The only MoE layer of a trainer's model."""
    (moe,) = (module for module in trainer.get_model().modules() if isinstance(module, MoELayer))
    return moe


def check_that_it_goes_on(setup, trainer, folder, batches):
    """A trainer that goes on, and one that goes on from its checkpoint, make the same of some batches."""
    path = str(folder / "checkpoint.pt")
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(path, {"train_iterator": {"epoch": 1}})
    other = Trainer(setup.cfg, setup.task, setup.task.build_model(setup.cfg.model), setup.criterion)
    other.load_checkpoint(path)
    for each in (trainer, other):
        for batch in batches:
            assert each.train_step([batch]) is not None
    assert_equal(trainer.get_model().state_dict(), other.get_model().state_dict())
    assert_equal(*(each.optimizer.optimizer.state_dict() for each in (trainer, other)))
