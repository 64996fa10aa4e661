"""What this package keeps on a running fairseq ``Trainer``: one object."""

from dataclasses import dataclass, field
from typing import List, Optional

from fairseq.trainer import Trainer

from ..checkpoints.whole import WholeExperts
from ..evolution.schedule import Phase
from ..moe.recorder import Record
from .drift import Drift
from .listener import Listener
from .trace import Trace
from .waiting import Pulse


@dataclass
class RunState:
    """What is known of a run between calls of the Trainer's methods.

    Attributes:
        in_update: whether ``train_step`` is under way, so that whatever is saved is a crash.
        broken: what of the MoE layers had NaN or Inf in the last update; see ``ranks.broken_parts``.
        routings: how the layers have routed in the update that is under way.
        last_counted: the update whose statistics were taken in last.
        gathered: all experts, for the checkpoint that is being saved in one file.
        shards: name of the set of files that is being saved, if the checkpoint is one.
        listener: knows whether a signal has asked the run to end.
        pulse: sign of life of this rank among others; ``None``: it is alone.
        spawned_before: how many times the experts have spawned before update 0, in the run whose checkpoint
            this one began with.
        phase: of the update before; see ``telling.py``.
        drift: how the routing of some tokens has changed.
        trace: writes down what the experts do.
    """

    in_update: bool = False
    broken: List[str] = field(default_factory=list)
    routings: Record = field(default_factory=Record)
    last_counted: Optional[int] = None
    gathered: Optional[WholeExperts] = None
    shards: Optional[str] = None
    spawned_before: int = 0
    listener: Listener = field(default_factory=Listener)
    pulse: Optional[Pulse] = None
    phase: Optional[Phase] = None
    drift: Drift = field(default_factory=Drift)
    trace: Trace = field(default_factory=Trace)

    @classmethod
    def of(cls, trainer: Trainer) -> "RunState":
        """The state of a run, which begins when it is first asked for.

        So a Trainer of somebody else's needs no constructor of fairseq's to have one.
        """
        state = vars(trainer).get("evomoe")
        if not isinstance(state, cls):
            state = trainer.evomoe = cls()
        return state

    def forget_checkpoint(self) -> None:
        """Nothing is being saved, or no more."""
        self.gathered = self.shards = None
