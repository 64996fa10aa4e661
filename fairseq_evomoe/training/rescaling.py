"""``--moe-spawn-rescale``: how much more each layer's experts are to give, measured on the run's own text."""

import logging
from typing import Any, Dict, List

import torch
from fairseq import utils
from fairseq.trainer import Trainer

from ..models.feed_forward import MoEFeedForward, moe_layers
from ..moe.plan import Plan
from ..moe.rescaling import weights_now_and_then
from .probe import evaluated
from .state import RunState

logger = logging.getLogger(__name__)


@torch.no_grad()
def output_scales(trainer: Trainer, plans: Dict[str, Plan]) -> Dict[str, float]:
    """What the output of each layer's experts is to be multiplied by when they spawn, by the layer's name.

    The tokens are those whose drift is logged: the beginning of the first batch, the same on all ranks.  The
    model sees them once, as in evaluation, before anything has changed.  Where the gate is soft after the
    spawn, the weights of a token's experts sum to 1 as before, and nothing is scaled.

    Args:
        trainer: fairseq's, before the spawn; all ranks must call this.
        plans: what becomes of the experts of each layer.
    """
    model, probe = trainer.get_model(), RunState.of(trainer).drift.probe
    if probe is None:
        logger.warning("--moe-spawn-rescale scales nothing: the first batch has no tokens to measure with")
        return dict.fromkeys(plans, 1.0)
    layers, sums, handles = dict(moe_layers(model)), {}, []

    def measure(name: str) -> Any:
        def before_forward(moe: Any, inputs: Any) -> None:
            sums[name] = weights_now_and_then(moe, plans[name], *inputs)

        return before_forward

    names = [name for name in plans if not _soft_after(layers[name], trainer.get_num_updates())]
    try:
        for name in names:
            handles.append(layers[name].moe.register_forward_pre_hook(measure(name)))
        with evaluated(model):
            model(**(utils.move_to_cuda(probe) if trainer.cuda else probe), features_only=True)
    finally:
        for handle in handles:
            handle.remove()
    return {**dict.fromkeys(plans, 1.0), **_quotients(layers, names, sums)}


def _quotients(
    layers: Dict[str, MoEFeedForward], names: List[str], sums: Dict[str, torch.Tensor]
) -> Dict[str, float]:
    """The same on all ranks, whatever their processors make of the last bits."""
    if not names:
        return {}
    moe = layers[names[0]].moe
    here = torch.stack([sums[name] for name in names]).to(moe.experts.w1.device)
    (total,) = moe.ranks.total(here)
    found = {name: float(now / then) for name, (now, then) in zip(names, total.tolist())}
    logger.info("the experts' output is scaled by " + ", ".join(f"{scale:.3g}" for scale in found.values()))
    return found


def _soft_after(layer: MoEFeedForward, update: int) -> bool:
    """Whether a token has several experts after the spawn, because the gate is on its way to a sparse one."""
    phase = layer.schedule.phase(update, layer.moe.stage + 1)
    return layer.moe.router_class.anneals and phase != phase.HARD
