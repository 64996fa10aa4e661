"""What every criterion of this plugin adds to fairseq's own: auxiliary losses and statistics."""

import math
from typing import Any, Dict, List, Tuple

import torch
from fairseq import metrics
from torch import Tensor, nn

from ..moe import MoELayer, record
from ..moe.losses import entropy
from ..moe.recorder import Record
from .module_distillation import loss_of_modules

_Mixin: Any = object  # for mypy: what a mixin is mixed into has the rest


class MoECriterion(_Mixin):
    """Mixin for a fairseq criterion.

    The loss that is minimised becomes ``loss + sample_size * sum over layers of weight * auxiliary
    loss``.  What is reported as ``loss``, ``nll_loss`` and ``ppl`` stays what fairseq reports, and the
    ``moe_*`` statistics are reported beside it.
    """

    def forward(
        self, model: nn.Module, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """See fairseq's ``FairseqCriterion.forward``."""
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        distillation = getattr(model, "distillation", None)
        with record() as routings:
            if distillation is None or not distillation.learning:
                loss, sample_size, logging_output = super().forward(model, sample, reduce)
            else:
                loss, sample_size, logging_output = loss_of_modules(
                    super().forward, model, sample, reduce, self.padding_idx
                )
        if layers:
            logging_output.update(statistics(model, layers, routings, loss))
            if distillation is not None:  # not all of the parameters are used, and some more than once
                logging_output["moe_other_params"] = distillation.cost()
            if reduce and model.training:
                for weight, value in routings.weighted_losses():
                    loss = loss + weight * sample_size * value
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """See fairseq's ``FairseqCriterion.reduce_metrics``."""
        super().reduce_metrics(logging_outputs)
        log_statistics(logging_outputs)


@torch.no_grad()
def statistics(model: nn.Module, layers: List[MoELayer], routings: Record, like: Tensor) -> Dict[str, Any]:
    """What one batch tells of its routing, as sums that can be added up over batches and workers.

    Every key is there for every batch, so that the workers' sums match.

    Args:
        model: what the criterion has called.
        layers: its MoE layers.
        routings: how those have routed the batch that LayerDrop has not skipped.
        like: a tensor on the device of the sums.
    """
    like = like.detach().float()
    reports = {i: routings[layer].report() for i, layer in enumerate(layers) if layer in routings}
    experts = max(layer.num_experts if layer.spawned else 1 for layer in layers)
    load_LE = like.new_zeros(len(layers), experts)
    balance, gate_entropy, dropped = (like.new_zeros(()) for _ in range(3))
    tokens_L = [0] * len(layers)
    sent_bytes = 0.0
    for i, report in reports.items():
        layer = layers[i]
        load_LE[i, : len(report.load_E)] = report.load_E
        # each token of MH-MoE is several that are routed, all of which use an expert
        tokens_L[i] = report.tokens // (1 if layer.heads is None else layer.heads.heads)
        balance += report.tokens * report.balance
        gate_entropy += report.gate_entropy
        dropped += report.dropped
        sent_bytes += report.sent_bytes / layer.ranks.size
    sizes_L = [layer.experts.parameters_of_each() for layer in layers]
    size_LE = _copied([size + [0] * (experts - len(size)) for size in sizes_L], like)
    stage = next(iter(reports.values()), None)  # the same in all layers
    return {
        "moe_batches": 1.0,
        "moe_passes": 0.0 if stage is None else 1.0,
        "moe_tokens": float(sum(report.tokens for report in reports.values())),
        "moe_assignments": float(sum(report.assignments for report in reports.values())),
        "moe_load": load_LE,
        "moe_balance": balance,
        "moe_gate_entropy": gate_entropy,
        "moe_dropped": dropped,
        # per layer, since the layers of encoder and decoder see different numbers of tokens
        "moe_active": (load_LE * size_LE).sum(1),
        "moe_layer_tokens": _copied(tokens_L, like),
        "moe_other_params": float(_other_parameters(model, layers)),
        "moe_table_params": float(_table_parameters(layers)),
        # the mean over ranks and layers; ranks are summed up later
        "moe_sent_bytes": sent_bytes / len(layers),
        "moe_phase": 0.0 if stage is None else float(stage.phase),
        "moe_temperature": 0.0 if stage is None else float(stage.temperature),
    }


def _copied(numbers: List[Any], like: Tensor) -> Tensor:
    """Numbers as a tensor like another one; a GPU gets them when it has time, and nobody waits for that."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)


def _other_parameters(model: nn.Module, layers: List[MoELayer]) -> int:
    """Number of parameters that every token uses: all but experts that are routed to, and routers' tables."""
    sizes = [layer.experts.parameters_of_each() for layer in layers]
    routed = sum(size[e] for size, layer in zip(sizes, layers) for e in layer.experts.local)
    return sum(p.numel() for p in model.parameters()) - routed - _table_parameters(layers)


def _table_parameters(layers: List[MoELayer]) -> int:
    """Number of parameters that routers look up, a row for each entry of the vocabulary."""
    routers = [layer.router for layer in layers if layer.router is not None]
    return sum(table.numel() for router in routers for table in router.tables)


def log_statistics(logging_outputs: List[Dict[str, Any]]) -> None:
    """Report the statistics through fairseq's metrics: see the table in ``config/README.md``."""
    logs = [log for log in logging_outputs if "moe_load" in log]
    if not logs:
        return

    def total(key: str) -> Tensor:
        return torch.as_tensor(sum(log[key] for log in logs))

    tokens = total("moe_tokens").clamp(min=1)
    batches, passes = total("moe_batches").clamp(min=1), total("moe_passes").clamp(min=1)
    load_LE = total("moe_load")
    experts = load_LE.shape[1]
    share_LE = load_LE / load_LE.sum(1, keepdim=True).clamp(min=1)
    evenness_L = entropy(share_LE) / math.log(experts) if experts > 1 else share_LE[:, 0]
    # LayerDrop may have skipped a layer throughout: its share is 0 and it does not count
    layers = share_LE.sum().clamp(min=1)
    values = {
        "moe_experts": total("moe_assignments") / tokens,
        "moe_temperature": total("moe_temperature") / passes,
        "moe_phase": total("moe_phase") / passes,
        "moe_balance": total("moe_balance") / tokens,
        "moe_load_entropy": evenness_L.sum() / layers,
        "moe_load_max": share_LE.max(1).values.sum() / layers,
        "moe_gate_entropy": total("moe_gate_entropy") / tokens,
        "moe_dropped": total("moe_dropped"),
        "moe_active_params": total("moe_other_params") / batches
        + (total("moe_active") / total("moe_layer_tokens").clamp(min=1)).sum(),
    }
    if total("moe_table_params") > 0:
        values["moe_table_params"] = total("moe_table_params") / batches
    if "moe_divergence" in logs[0]:
        values["moe_divergence"] = total("moe_divergence") / total("sample_size").clamp(min=1)
    if total("moe_sent_bytes") > 0:
        values["moe_a2a_mb"] = total("moe_sent_bytes") / 1e6
    for priority, (name, value) in enumerate(values.items()):
        metrics.log_scalar(name, value, weight=1, priority=600 + priority, round=3)
