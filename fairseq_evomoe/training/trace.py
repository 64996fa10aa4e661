"""What the experts of a run do, told while it trains: ``--moe-trace N``, TensorBoard and Weights & Biases.

The file, and what is in it: ``checkpoints/trace_file.py``.  Between two records nothing is computed; a record
costs one sum over the ranks and one pass of a batch of 128 tokens.
"""

import logging
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional

import torch
import torch.distributed as dist
from fairseq.trainer import Trainer

from ..checkpoints.trace_file import FORMAT, Record, TraceFile
from ..models.feed_forward import moe_layers
from ..moe.plan import Plan
from ..moe.recorder import Record as Routings
from .boards import Board, boards_of
from .probe import Probe, drift, is_batch

logger = logging.getLogger(__name__)


@dataclass
class Trace:
    """Follows a run, and writes down what its experts do.

    Attributes:
        changes: of experts, that are not written down yet: records.
        started: whether the run has made an update.
        every: updates between two records; 0: none.
        file: ``None`` on other ranks than the first, and without ``--moe-trace``.
        boards: what else the first rank tells.
        probe: ``None`` if there is none.
        last: the last first choices of the probe's tokens, by layer.
        generations: of each expert, by layer; see ``checkpoints/trace_file.py``.
    """

    changes: List[Record] = field(default_factory=list)
    started: bool = False
    every: int = 0
    file: Optional[TraceFile] = None
    boards: List[Board] = field(default_factory=list)
    probe: Optional[Probe] = None
    last: Dict[str, List[int]] = field(default_factory=dict)
    generations: Dict[str, List[int]] = field(default_factory=dict)

    def note_change(self, update: int, plans: Dict[str, Plan]) -> None:
        """Experts become others, before the next update.

        Args:
            update: number of updates that have been made.
            plans: what becomes of them, by layer.
        """
        parents = {name: [origin.source for origin in plan.origins] for name, plan in plans.items()}
        layers = {name: {"parents": parents[name], "widths": plan.widths} for name, plan in plans.items()}
        self.changes.append({"kind": "experts", "update": update, "layers": layers})

    def note_update(self, trainer: Trainer, samples: List[Any], routings: Routings, before: int) -> None:
        """An update was made; all ranks must call this.

        Args:
            trainer: fairseq's.
            samples: the batches of the update.
            routings: how the layers have routed the last of them.
            before: number of updates before it.
        """
        if not self.started:
            self._start(trainer, samples, before)
        for change in self.changes:
            for name, layer in change["layers"].items():
                layer["generations"] = self._next_generation(name, layer["parents"])
                self.last.pop(name, None)
            self._tell(change)
        self.changes = []
        update = trainer.get_num_updates()
        if self.every > 0 and update % self.every == 0:
            self._tell(self._record(trainer, routings, update))

    def _start(self, trainer: Trainer, samples: List[Any], update: int) -> None:
        self.started = True
        model, cfg = trainer.get_model(), trainer.cfg
        every, is_first = getattr(cfg.model, "moe_trace", None) or 0, trainer.data_parallel_rank == 0
        boards = boards_of(cfg.common)
        self.every = every or (cfg.common.log_interval if boards else 0)
        self.boards = [begin() for begin in boards] if is_first else []
        if not every:
            return
        pad = trainer.task.source_dictionary.pad() if trainer.task.source_dictionary is not None else -1
        batch = next((sample for sample in [*samples, trainer._dummy_batch] if is_batch(sample)), None)
        self.probe = None if batch is None else Probe(batch["net_input"], pad)
        if is_first:
            file = TraceFile(cfg.checkpoint.save_dir)
            try:
                kept = file.go_on(update)
            except (OSError, ValueError) as error:
                logger.warning(f"--moe-trace writes nothing: {error}")
                return
            self.file = file
            if kept:
                self._go_on(kept, pad)
            else:
                probe = None if self.probe is None else self.probe.as_record(model)
                layers = [name for name, _ in moe_layers(model)]
                self._tell({"kind": "run", "format": FORMAT, "layers": layers, "probe": probe})

    def _go_on(self, records: List[Record], pad: int) -> None:
        """Let what is compared with what came before be as in the run that wrote the records."""
        probe = records[0]["probe"]
        if probe is not None and self.probe is not None:  # on other ranks there is one, too
            self.probe = Probe.of_record(probe, pad)
        for record in records[1:]:
            for name, layer in record["layers"].items():
                if record["kind"] == "experts":
                    self.generations[name] = layer["generations"]
                    self.last.pop(name, None)
                elif layer["probe"] is not None:
                    self.last[name] = layer["probe"]["expert"]

    def _next_generation(self, name: str, parents: List[int]) -> List[int]:
        before = self.generations.get(name) or [0] * (max(parents) + 1)
        self.generations[name] = [before[parent] + (parents.count(parent) > 1) for parent in parents]
        return self.generations[name]

    def _record(self, trainer: Trainer, routings: Routings, update: int) -> Record:
        layers = dict(moe_layers(trainer.get_model()))
        # the probe before the sums, so that it is no different from rank to rank what comes next
        spawned = any(layer.moe.spawned for layer in layers.values())
        choices = self.probe.choices(trainer.get_model()) if self.probe is not None and spawned else {}
        found = _summed(trainer, routings)
        first = next(iter(routings.values()), None)
        for name, figures in found.items():
            figures["widths"] = list(layers[name].moe.experts.widths)
            figures["probe"] = seen = choices.get(name)
            if seen is not None:
                seen["drift"] = drift(self.last.get(name), seen["expert"])
                self.last[name] = seen["expert"]
        return {
            "kind": "update",
            "update": update,
            "phase": 0 if first is None else first.phase,
            "temperature": 1.0 if first is None else round(first.temperature, 6),
            "layers": found,
        }

    def _tell(self, record: Record) -> None:
        if self.file is not None:
            try:
                self.file.append(record)
            except OSError as error:
                logger.warning(f"--moe-trace writes no more: {error}")
                self.file = None
        for board in self.boards:
            board.tell(record)


def _summed(trainer: Trainer, routings: Routings) -> Dict[str, Dict[str, Any]]:
    """How the layers have routed a batch, over all ranks, in one exchange."""
    layers = [(name, layer.moe) for name, layer in moe_layers(trainer.get_model())]
    parts = []
    for _, moe in layers:
        experts = moe.num_experts if moe.router is not None else 1  # those that compute nothing left out
        part = torch.zeros(3 + experts, dtype=torch.float64, device=trainer.device)
        if moe in routings:  # LayerDrop may have left it out
            report = routings[moe].report()
            part[0], part[1] = report.tokens, report.dropped
            part[2] = report.gate_entropy
            part[3:] = report.load_E
        parts.append(part)
    total_K = torch.cat(parts)
    if trainer.data_parallel_world_size > 1:
        dist.all_reduce(total_K, group=trainer.data_parallel_process_group)
    found = {}
    for (name, _), part in zip(layers, total_K.cpu().split([len(part) for part in parts])):
        tokens, load = int(part[0]), [int(number) for number in part[3:].tolist()]
        found[name] = {
            "load": load,
            "tokens": tokens,
            "assignments": sum(load),
            "dropped": int(part[1]),
            "gate_entropy": round(float(part[2]) / max(tokens, 1), 4),
        }
    return found
