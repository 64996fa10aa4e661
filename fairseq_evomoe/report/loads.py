"""How even the loads are, how sure the gate is, and what a layer costs."""

from typing import Any, Dict

import numpy as np

from .sample import Array, LayerSample


def entropy(count_B: Array) -> float:
    """Entropy in nats of the shares of some counts; 0 if there is nothing."""
    count_B = np.asarray(count_B, dtype=np.float64)
    share_B = count_B[count_B > 0] / max(count_B.sum(), 1e-300)
    return float(-(share_B * np.log(share_B)).sum())


def evenness(count_B: Array) -> float:
    """Entropy of the shares in units of that of equal ones: 1 for equal shares, 0 for a single one."""
    return entropy(count_B) / np.log(len(count_B)) if len(count_B) > 1 else 1.0


def information(count_BE: Array) -> float:
    """How much of the choice of an expert is known to who knows the bin: from 0 to 1.

    Mutual information of bin and expert, less its bias of ``(B - 1)(E - 1) / 2 n`` (Miller, Madow), in units
    of the entropy of the experts.

    Args:
        count_BE: how often each expert was chosen in each bin.
    """
    count_BE = np.asarray(count_BE, dtype=np.float64)
    count_BE = count_BE[count_BE.sum(1) > 0][:, count_BE.sum(0) > 0]
    total = count_BE.sum()
    if total == 0 or min(count_BE.shape) < 2:
        return 0.0
    of_experts = entropy(count_BE.sum(0))
    mutual = of_experts + entropy(count_BE.sum(1)) - entropy(count_BE.ravel())
    bias = (count_BE.shape[0] - 1) * (count_BE.shape[1] - 1) / (2 * total)
    return float(np.clip((mutual - bias) / of_experts, 0, 1))


def load_of(layer: LayerSample) -> Dict[str, Any]:
    """Load, gate and cost of a layer that has a router.

    ``load`` is the share of the rows that each expert gets; with several experts a row they sum to more than
    1.  ``evenness`` is that of the experts' parts of all pairs.  ``active_parameters`` and ``flops`` are
    those of a token in this layer without attention: 2 FLOPs forward for each parameter that is used.
    """
    choices = layer.choices
    assert choices is not None
    load_E, rows = choices.load_E, max(choices.rows, 1)
    tokens = rows / layer.heads
    # every expert is computed where each token has all of them, whatever its share is
    used_E = np.bincount(choices.expert_N, minlength=choices.experts)
    active = layer.parameters_of_all + float(used_E @ np.asarray(layer.parameters)) / tokens
    if layer.soft:
        active = 0.0  # it depends on slots, not on tokens
    sure = layer.confidence_T
    return {
        "rows": choices.rows,
        "load": (load_E / rows).tolist(),
        "evenness": evenness(load_E),
        "busiest": float(load_E.max() / max(load_E.sum(), 1e-30)) * choices.experts,
        "idle": int((load_E == 0).sum()),
        "experts_per_token": len(choices.row_N) / rows,
        "without_expert": 1 - len(np.unique(choices.row_N)) / rows,
        "dropped": layer.dropped,
        "confidence": None if sure is None else float(sure.mean(dtype=np.float64)),
        "confidence_histogram": None
        if sure is None
        else np.histogram(sure, bins=10, range=(0, 1))[0].tolist(),
        "gate_entropy": None
        if layer.gate_entropy is None
        else layer.gate_entropy / np.log(max(choices.experts, 2)),
        "active_parameters": None if layer.soft else active,
        "flops": None if layer.soft else 2 * active,
    }
