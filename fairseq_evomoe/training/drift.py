"""How many tokens the routers send elsewhere than they once did: it tells a learned gate from a hash."""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, cast

import torch
from fairseq import metrics, utils
from fairseq.trainer import Trainer
from torch import Tensor, nn

from ..models.feed_forward import MoEModel, moe_layers
from ..moe import record
from .probe import beginning, evaluated, first_choices

TOKENS = 256
"""How many tokens of the first batch are probed, if its first sequence is no longer than that."""


@dataclass
class Drift:
    """What became of the first tokens of the training data, each time that they were routed.

    The probe is the beginning of the first batch of the training data, whole sequences of up to 256 tokens,
    or one.  The model routes it as in evaluation, without dropout, noise or gradient, first when the experts
    are there and then after 1, 2, ..., 20, 22, 24, ..., 30, 33, ... more updates, at intervals of a tenth of
    the updates so far, at least one.  A token's expert in a layer is that with the greatest weight; none is
    one, too.  Two numbers are means over the tokens of the probe in all layers:

    - ``moe_drift``: the share whose expert is another than at the start;
    - ``moe_drift_recent``: the share whose expert is another than one probe before, which is what the last
      tenth of the updates has changed.

    They are logged with each update, and are those of the last probe.  A gate that assigns tokens for good,
    such as a hash, has 0 and 0; one that learns and settles has the first alone.  Probes become rarer as the
    run goes on: 2000 updates have 71.  Layers whose experts work on mixtures of tokens (Soft MoE) do not
    count.  If the number of a layer's experts changes, the start is then.

    All of it is part of a checkpoint, so that a resumed run goes on as it would have.

    Attributes:
        probe: what the model is given; ``None``: no batch has been seen.
        experts: number of experts of each layer.
        start_LT: int64, on the CPU: the expert of each token at the start; ``None``: there are none yet.
        before_LT: the same one probe before.
        begun: the update of the start.
        probed: after how many more updates the last probe was.
        total: ``moe_drift``.
        recent: ``moe_drift_recent``.
    """

    probe: Optional[Dict[str, Any]] = None
    experts: List[int] = field(default_factory=list)
    start_LT: Optional[Tensor] = None
    before_LT: Optional[Tensor] = None
    begun: int = 0
    probed: int = 0
    total: float = 0.0
    recent: float = 0.0

    KEY = "moe_drift"
    """Of the state in what a checkpoint has beside model and optimizer."""

    def see_batch(self, batch: Any) -> None:
        """Take the probe from the first batch of the data, unless there is one."""
        inputs = batch.get("net_input") if isinstance(batch, dict) else None
        if self.probe is None and inputs and torch.is_tensor(inputs.get("src_tokens")):
            self.probe = beginning(inputs, TOKENS)

    def probe_if_due(self, trainer: Trainer) -> None:
        """Between two updates: route the probe, if experts are there and it is time."""
        model, update = trainer.get_model(), trainer.get_num_updates()
        layers = [layer for _, layer in moe_layers(model)]
        if self.probe is None or not isinstance(model, MoEModel) or any(not x.moe.spawned for x in layers):
            return
        if not layers or model.distillation is not None:  # nothing is routed, or not by the model itself yet
            return
        experts = [layer.moe.num_experts for layer in layers]
        first = self.start_LT is None or self.experts != experts
        if not first and update - self.begun < self.probed + max(self.probed // 10, 1):
            return
        for layer in layers:
            layer.set_num_updates(update)  # which a run that goes on is told later than one that resumes
        now_LT = route(cast(nn.Module, model), utils.move_to_cuda(self.probe) if trainer.cuda else self.probe)
        if first or self.start_LT is None or self.before_LT is None:
            self.experts, self.begun, self.probed = experts, update, 0
            self.start_LT = self.before_LT = now_LT
            self.total = self.recent = 0.0
            return
        self.total, self.recent = _changed(self.start_LT, now_LT), _changed(self.before_LT, now_LT)
        self.before_LT, self.probed = now_LT, update - self.begun

    def log(self) -> None:
        """Report what the last probe has found through fairseq's metrics, once there have been two."""
        if self.probed > 0:
            for priority, (name, value) in enumerate((("", self.total), ("_recent", self.recent))):
                # without weight a meter shows the last value, and no mean
                metrics.log_scalar("moe_drift" + name, value, weight=0, priority=650 + priority, round=4)

    def state(self) -> Dict[str, Any]:
        """What a checkpoint keeps; empty if there was no probe yet."""
        return dict(vars(self)) if self.start_LT is not None else {}

    def load(self, state: Dict[str, Any]) -> None:
        """Go on from what ``state`` has returned."""
        vars(self).update(state)


def route(model: nn.Module, inputs: Dict[str, Any]) -> Tensor:
    """The expert of each token in each layer: int64, on the CPU, shape (L, T)."""
    with evaluated(model), torch.no_grad(), record() as routings:
        model(**inputs, features_only=True)
    found = [first_choices(routing)[1] for routing in routings.values() if routing.slots is None]
    sizes = {len(expert_T) for expert_T in found}  # an encoder's tokens are others than a decoder's
    rows = [
        nn.functional.pad(expert_T, (0, max(sizes) - len(expert_T)), value=_NO_TOKEN) for expert_T in found
    ]
    return torch.stack(rows).cpu() if rows else torch.empty(0, 0, dtype=torch.long)


_NO_TOKEN = -2


def _changed(one_LT: Tensor, other_LT: Tensor) -> float:
    """The share of the tokens whose experts differ."""
    count = int((other_LT != _NO_TOKEN).sum())
    return int((one_LT != other_LT).sum()) / max(count, 1)
