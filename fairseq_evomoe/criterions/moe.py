"""What every criterion of this plugin adds to fairseq's own: auxiliary losses and statistics."""

import math
from typing import Any, Dict, List

import torch
from fairseq import metrics
from torch import Tensor, nn

from ..models.feed_forward import MoEFeedForward, moe_layers
from ..moe.losses import entropy


class MoECriterion:
    """Mixin for a fairseq criterion.

    The loss that is minimised becomes ``loss + sample_size * sum over layers of weight * auxiliary
    loss``.  What is reported as ``loss``, ``nll_loss`` and ``ppl`` stays what fairseq reports, and the
    ``moe_*`` statistics are reported beside it.
    """

    def forward(self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True):
        """See fairseq's ``FairseqCriterion.forward``."""
        layers = [layer for _, layer in moe_layers(model)]
        for layer in layers:  # a layer that LayerDrop skips has nothing to report
            layer.moe.clear_routing()
        loss, sample_size, logging_output = super().forward(model, sample, reduce)
        if layers:
            logging_output.update(statistics(model, layers, loss))
            if reduce and model.training:
                loss = add_auxiliary_losses(loss, sample_size, layers)
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """See fairseq's ``FairseqCriterion.reduce_metrics``."""
        super().reduce_metrics(logging_outputs)
        log_statistics(logging_outputs)


def add_auxiliary_losses(loss: Tensor, sample_size: Any, layers: List[MoEFeedForward]) -> Tensor:
    """``loss + sample_size * sum over layers and losses of weight * auxiliary loss``."""
    for layer in layers:
        if layer.moe.routing is None:
            continue
        for name, value in layer.moe.routing.losses.items():
            weight = layer.loss_weights.get(name, 0.0)
            if weight > 0:
                loss = loss + weight * sample_size * value
    return loss


@torch.no_grad()
def statistics(model: nn.Module, layers: List[MoEFeedForward], like: Tensor) -> Dict[str, Any]:
    """What one batch tells of its routing, as sums that can be added up over batches and workers.

    Every key is there for every batch, so that the workers' sums match.
    """
    like = like.detach().float()
    experts = max(layer.moe.num_experts if layer.moe.spawned else 1 for layer in layers)
    load_LE = like.new_zeros(len(layers), experts)
    balance = like.new_zeros(())
    gate_entropy = like.new_zeros(())
    dropped = like.new_zeros(())
    active_L = like.new_zeros(len(layers))
    tokens_L = [0] * len(layers)
    tokens = assignments = sent_bytes = 0
    for i, layer in enumerate(layers):
        routing = layer.moe.routing
        if routing is None:
            continue
        load_LE[i, : routing.experts] = load_E = routing.load_E()
        active_L[i] = load_E @ load_E.new_tensor(layer.moe.experts.parameters_of_each())
        # each token of MH-MoE is several that are routed, all of which use an expert
        tokens_L[i] = routing.tokens // (layer.moe.heads.heads if layer.moe.heads is not None else 1)
        tokens += routing.tokens
        dropped += routing.dropped
        sent_bytes += routing.sent_bytes / layer.moe.ranks.size
        assignments += routing.token_N.shape[0]
        balance += routing.tokens * routing.losses.get("balance", 1.0)
        if routing.gate_entropy is not None:
            gate_entropy += routing.gate_entropy
    first = layers[0]
    return {
        "moe_batches": 1.0,
        "moe_tokens": float(tokens),
        "moe_assignments": float(assignments),
        "moe_load": load_LE,
        "moe_balance": balance,
        "moe_gate_entropy": gate_entropy,
        "moe_dropped": dropped,
        # per layer, since the layers of encoder and decoder see different numbers of tokens
        "moe_active": active_L,
        "moe_layer_tokens": like.new_tensor(tokens_L),
        "moe_other_params": float(_other_parameters(model, layers)),
        # the mean over ranks and layers; ranks are summed up later
        "moe_sent_bytes": sent_bytes / len(layers),
        "moe_phase": float(first.schedule.phase(first.num_updates, first.moe.spawned)),
        "moe_temperature": float(first.context.temperature),
    }


def _other_parameters(model: nn.Module, layers: List[MoEFeedForward]) -> int:
    """Number of parameters that every token uses: all but those of experts that are routed to."""
    sizes = [layer.moe.experts.parameters_of_each() for layer in layers]
    routed = sum(size[e] for size, layer in zip(sizes, layers) for e in layer.moe.experts.local)
    return sum(p.numel() for p in model.parameters()) - routed


def log_statistics(logging_outputs: List[Dict[str, Any]]) -> None:
    """Report the statistics through fairseq's metrics: see the table in README.md."""
    logs = [log for log in logging_outputs if "moe_load" in log]
    if not logs:
        return

    def total(key: str) -> Tensor:
        return torch.as_tensor(sum(log[key] for log in logs))

    tokens = total("moe_tokens").clamp(min=1)
    batches = total("moe_batches").clamp(min=1)
    load_LE = total("moe_load")
    experts = load_LE.shape[1]
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)
    evenness_L = entropy(share_LE) / math.log(experts) if experts > 1 else share_LE[:, 0]
    # LayerDrop may have skipped a layer throughout: its share is 0 and it does not count
    layers = share_LE.sum().clamp(min=1)
    values = {
        "moe_experts": total("moe_assignments") / tokens,
        "moe_temperature": total("moe_temperature") / batches,
        "moe_phase": total("moe_phase") / batches,
        "moe_balance": total("moe_balance") / tokens,
        "moe_load_entropy": evenness_L.sum() / layers,
        "moe_load_max": share_LE.max(1).values.sum() / layers,
        "moe_gate_entropy": total("moe_gate_entropy") / tokens,
        "moe_dropped": total("moe_dropped"),
        "moe_active_params": total("moe_other_params") / batches
        + (total("moe_active") / total("moe_layer_tokens").clamp(min=1)).sum(),
    }
    if total("moe_sent_bytes") > 0:
        values["moe_a2a_mb"] = total("moe_sent_bytes") / 1e6
    for priority, (name, value) in enumerate(values.items()):
        metrics.log_scalar(name, value, weight=1, priority=600 + priority, round=3)
